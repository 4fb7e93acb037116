//! Benchmarks: A and B in one run, in alternation, with the spread.

use std::{process::ExitCode, time::Duration};

use anyhow::{Context as _, Result};
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use crate::{build, kernels::Kernel, vm::Machine};

#[derive(Subcommand)]
pub enum Bench {
    /// What the agent costs per exec, in a virtual machine with one processor under the instruction clock
    Exec(Exec),
}

#[derive(Args)]
pub struct Exec {
    #[arg(long, default_value = "6.12")]
    kernel: Kernel,
    /// Execs per loop
    #[arg(long, default_value_t = 2000)]
    count: u64,
    #[arg(long, default_value_t = 3)]
    repeats: u32,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(bench: &Bench) -> Result<ExitCode> {
    match bench {
        Bench::Exec(options) => exec(options),
    }
}

fn exec(options: &Exec) -> Result<ExitCode> {
    let binaries = build::run(&build::Options { release: true })?;
    let machine = Machine {
        kernel: options.kernel,
        smp: 1,
        icount: true,
        append: "",
        deadline: Duration::from_secs(3600),
        containerd: true,
        binaries: &binaries,
        host: None,
        extra: &[],
    };
    let words: Vec<String> = [
        "palisade-scenarios",
        "bench-exec",
        "--count",
        &options.count.to_string(),
        "--repeats",
        &options.repeats.to_string(),
    ]
    .map(str::to_owned)
    .to_vec();
    let outcome = machine.run(&words, false)?;
    let line = outcome
        .output
        .lines()
        .find(|line| line.starts_with('['))
        .with_context(|| format!("the bench printed no result:\n{}", outcome.output))?;
    let repeats: Vec<Value> = serde_json::from_str(line)?;
    let values = |field: &str| -> Vec<f64> {
        let mut values: Vec<f64> = repeats.iter().filter_map(|repeat| repeat[field].as_f64()).collect();
        values.sort_by(f64::total_cmp);
        values
    };
    let ratio = |place: &str| -> Vec<f64> {
        let mut ratios: Vec<f64> = repeats
            .iter()
            .filter_map(|repeat| {
                let of = |when: &str| repeat[format!("{place}_{when}")].as_f64();
                Some(of("agent")? / ((of("before")? + of("after")?) / 2.0))
            })
            .collect();
        ratios.sort_by(f64::total_cmp);
        ratios
    };
    let rows = [
        ("loop outside, ratio", ratio("outside"), 1.0),
        ("loop inside, ratio", ratio("inside"), 1.0),
        ("loop inside without, µs per exec", values("inside_before"), 1000.0),
        ("loop inside with, µs per exec", values("inside_agent"), 1000.0),
        ("agent, µs per exec", values("agent_per_exec"), 1000.0),
        ("collector, µs per exec", values("collector_per_exec"), 1000.0),
        ("agent's RSS, MiB", values("rss_kib"), 1024.0),
        ("maps, MiB", values("maps_kib"), 1024.0),
        ("records captured", values("records"), 1.0),
    ];
    if options.json {
        let rows: Vec<Value> = rows
            .iter()
            .map(|(name, values, unit)| {
                json!({"name": name, "median": median(values) / unit, "least": values.first().map(|v| v / unit),
                       "most": values.last().map(|v| v / unit)})
            })
            .collect();
        println!(
            "{}",
            json!({"bench": "exec", "kernel": outcome.release, "count": options.count, "rows": rows,
                              "repeats": repeats})
        );
    } else {
        println!("kernel {}, {} execs a loop, {} repeats", outcome.release, options.count, repeats.len());
        println!("{:<34} {:>10} {:>10} {:>10}", "", "median", "least", "most");
        for (name, values, unit) in rows {
            let of = |value: Option<&f64>| value.copied().unwrap_or(f64::NAN) / unit;
            println!(
                "{name:<34} {:>10.3} {:>10.3} {:>10.3}",
                median(&values) / unit,
                of(values.first()),
                of(values.last())
            );
        }
    }
    Ok(ExitCode::from(outcome.code))
}

fn median(sorted: &[f64]) -> f64 {
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}
