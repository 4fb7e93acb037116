//! Benchmarks: A and B in one run, in alternation, with the spread.

use std::{process::ExitCode, time::Duration};

use anyhow::{Context as _, Result};
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use crate::{
    build::{self, Another},
    images,
    kernels::Kernel,
    native::Containerd,
    vm::{Machine, Processors, Stream},
};

#[derive(Subcommand)]
pub enum Bench {
    /// What the agent costs per exec, in a virtual machine with one processor under the instruction clock
    Exec(Exec),
    /// What the agent adds to the start of a dynamically linked program and of a Java virtual machine, in the same machine
    Mmap(Mmap),
    /// How many records a second come from the kernel's ring onto a collector's disk without a gap, on this machine
    Delivery(Delivery),
    /// What the agent adds to the start of a container, in the same machine
    ContainerStart(ContainerStart),
}

#[derive(Args)]
pub struct Delivery {
    /// Records a second; given again: one after the other
    #[arg(long, default_values_t = [100_000])]
    rate: Vec<u64>,
    /// Of each rate
    #[arg(long, default_value_t = 300)]
    seconds: u64,
    /// Without a collector, which comes back at the end
    #[arg(long)]
    down: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
pub struct ContainerStart {
    #[arg(long, default_value = "6.12")]
    kernel: Kernel,
    /// Starts without and with the agent, each
    #[arg(long, default_value_t = 10)]
    count: u32,
    #[arg(long, default_value_t = 3)]
    repeats: u32,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
pub struct Mmap {
    #[arg(long, default_value = "6.12")]
    kernel: Kernel,
    /// Starts of the program per loop; of the virtual machine a fiftieth
    #[arg(long, default_value_t = 200)]
    count: u64,
    #[arg(long, default_value_t = 3)]
    repeats: u32,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
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
    /// Further rules of the container's profile
    #[arg(long, default_value_t = 0)]
    rules: usize,
    /// Further profiles, which name no container
    #[arg(long, default_value_t = 0)]
    profiles: usize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(bench: &Bench) -> Result<ExitCode> {
    match bench {
        Bench::Exec(options) => exec(options),
        Bench::Mmap(options) => mmap(options),
        Bench::ContainerStart(options) => container_start(options),
        Bench::Delivery(options) => delivery(options),
    }
}

/// Runs a bench of palisade-scenarios under the instruction clock. Returns its repeats, the kernel and its exit code.
fn measure(kernel: Kernel, apps: bool, words: &[&str]) -> Result<(Vec<Value>, String, u8)> {
    let binaries = build::run(&build::Options { release: true })?;
    let machine = Machine {
        kernel,
        processors: Processors::Counted,
        append: "",
        deadline: Duration::from_secs(3600),
        containerd: true,
        binaries: &binaries,
        host: None,
        apps,
        extra: Vec::new(),
    };
    let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
    let outcome = machine.run(&words, Stream::None)?;
    // The kernel's own lines begin with a bracket, too.
    let repeats = outcome
        .output
        .lines()
        .find_map(|line| serde_json::from_str(line).ok())
        .with_context(|| format!("the bench printed no result:\n{}", outcome.output))?;
    Ok((repeats, outcome.release, outcome.code))
}

/// What a container's start takes without the agent and with it. The pairs are in alternation, so a median of each is
/// over the same stretch of the machine's life.
fn container_start(options: &ContainerStart) -> Result<ExitCode> {
    let (count, repeats) = (options.count.to_string(), options.repeats.to_string());
    let words = ["palisade-scenarios", "bench-start", "--count", &count, "--repeats", &repeats];
    let (repeats, release, code) = measure(options.kernel, false, &words)?;
    let all = |field: &str| -> Vec<f64> {
        let mut values: Vec<f64> = repeats
            .iter()
            .flat_map(|repeat| repeat[field].as_array().into_iter().flatten().filter_map(Value::as_f64))
            .map(|nanoseconds| nanoseconds / 1e6)
            .collect();
        values.sort_by(f64::total_cmp);
        values
    };
    let (without, with) = (all("without"), all("with"));
    let share: Vec<f64> = {
        let mut shares: Vec<f64> = repeats
            .iter()
            .map(|repeat| {
                let of = |field: &str| {
                    let mut values: Vec<f64> =
                        repeat[field].as_array().into_iter().flatten().filter_map(Value::as_f64).collect();
                    values.sort_by(f64::total_cmp);
                    median(&values) / 1e6
                };
                of("with") - of("without")
            })
            .collect();
        shares.sort_by(f64::total_cmp);
        shares
    };
    let rows = [
        ("start without the agent, ms", without),
        ("start with it, ms", with),
        ("difference of the medians of a repeat, ms", share),
        ("the runtime waits for the agent, ms", all("answered")),
    ];
    print_rows("container-start", &release, &rows, &repeats, options.json);
    Ok(ExitCode::from(code))
}

/// A table for people, or one JSON object.
fn print_rows(bench: &str, release: &str, rows: &[(&str, Vec<f64>)], repeats: &[Value], as_json: bool) {
    let least = |values: &[f64]| values.first().copied().unwrap_or(f64::NAN);
    let most = |values: &[f64]| values.last().copied().unwrap_or(f64::NAN);
    if as_json {
        let rows: Vec<Value> = rows
            .iter()
            .map(|(name, values)| {
                json!({"name": name, "median": median(values), "least": least(values), "most": most(values)})
            })
            .collect();
        println!("{}", json!({"bench": bench, "kernel": release, "rows": rows, "repeats": repeats}));
        return;
    }
    println!("kernel {release}, {} repeats", repeats.len());
    println!("{:<42} {:>10} {:>10} {:>10}", "", "median", "least", "most");
    for (name, values) in rows {
        println!("{name:<42} {:>10.3} {:>10.3} {:>10.3}", median(values), least(values), most(values));
    }
}

/// What each program in the kernel took in the last repeat, in a loop of its own. In JSON it is among the repeats.
fn print_programs(repeats: &[Value], as_json: bool) {
    let programs = repeats.last().and_then(|repeat| repeat["programs"].as_array());
    if as_json {
        return;
    }
    println!("{:<42} {:>10} {:>10}", "programs in the kernel, per turn", "runs", "µs");
    for program in programs.into_iter().flatten() {
        let number = |field: &str| program[field].as_f64().unwrap_or(f64::NAN);
        println!(
            "{:<42} {:>10.2} {:>10.3}",
            program["name"].as_str().unwrap_or_default(),
            number("runs"),
            number("nanoseconds") / 1e3
        );
    }
}

fn exec(options: &Exec) -> Result<ExitCode> {
    let (count, repeats) = (options.count.to_string(), options.repeats.to_string());
    let (rules, profiles) = (options.rules.to_string(), options.profiles.to_string());
    let words = [
        "palisade-scenarios",
        "bench-exec",
        "--count",
        &count,
        "--repeats",
        &repeats,
        "--rules",
        &rules,
        "--profiles",
        &profiles,
    ];
    let (repeats, release, code) = measure(options.kernel, false, &words)?;
    let values = |field: &str| sorted(&repeats, field);
    let ratio = |place: &str| ratios(&repeats, place);
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
    let rows =
        rows.map(|(name, values, unit)| (name, values.into_iter().map(|value| value / unit).collect()));
    print_rows("exec", &release, &rows, &repeats, options.json);
    print_programs(&repeats, options.json);
    Ok(ExitCode::from(code))
}

fn mmap(options: &Mmap) -> Result<ExitCode> {
    let (count, repeats) = (options.count.to_string(), options.repeats.to_string());
    let words = ["palisade-scenarios", "bench-mmap", "--count", &count, "--repeats", &repeats];
    let (repeats, release, code) = measure(options.kernel, true, &words)?;
    let milliseconds = |field: &str| -> Vec<f64> {
        sorted(&repeats, field).into_iter().map(|nanoseconds| nanoseconds / 1e6).collect()
    };
    let rows = [
        ("linked program, ratio", ratios(&repeats, "linked")),
        ("linked program without the agent, ms", milliseconds("linked_before")),
        ("linked program with it, ms", milliseconds("linked_agent")),
        ("Java virtual machine, ratio", ratios(&repeats, "java")),
        ("Java virtual machine without the agent, ms", milliseconds("java_before")),
        ("Java virtual machine with it, ms", milliseconds("java_agent")),
    ];
    print_rows("mmap", &release, &rows, &repeats, options.json);
    print_programs(&repeats, options.json);
    Ok(ExitCode::from(code))
}

/// On this machine itself: its disk and its network count.
fn delivery(options: &Delivery) -> Result<ExitCode> {
    let binaries = build::run(&build::Options { release: true })?;
    let (agent, objects) = (build::test_agent(Another::State, true)?, build::generator()?);
    let containerd = Containerd::start(&images::make(&binaries)?)?;
    let mut measured = Vec::new();
    let mut failed = 0;
    for rate in &options.rate {
        let (agent, objects) = (agent.display().to_string(), objects.display().to_string());
        let (rate, seconds) = (rate.to_string(), options.seconds.to_string());
        let mut words =
            vec!["palisade-scenarios", "bench-delivery", "--agent", &agent, "--objects", &objects];
        words.extend(["--rate", &rate, "--seconds", &seconds]);
        words.extend(options.down.then_some("--down"));
        let (code, output) = containerd.run(&binaries, &words, Stream::Plain)?;
        failed |= code;
        measured.extend(output.lines().rev().find_map(|line| serde_json::from_str::<Value>(line).ok()));
    }
    if options.json {
        println!("{}", json!({"bench": "delivery", "repeats": measured}));
    } else {
        for one in measured.iter().filter_map(Value::as_object) {
            println!();
            for (name, value) in one {
                println!("{name:<24} {value}");
            }
        }
    }
    Ok(ExitCode::from(u8::from(failed != 0)))
}

/// A field of every repeat, the least first.
fn sorted(repeats: &[Value], field: &str) -> Vec<f64> {
    let mut values: Vec<f64> = repeats.iter().filter_map(|repeat| repeat[field].as_f64()).collect();
    values.sort_by(f64::total_cmp);
    values
}

/// What was measured with the agent over the mean of before and after, of every repeat, the least first.
fn ratios(repeats: &[Value], place: &str) -> Vec<f64> {
    let mut ratios: Vec<f64> = repeats
        .iter()
        .filter_map(|repeat| {
            let of = |when: &str| repeat[format!("{place}_{when}")].as_f64();
            Some(of("agent")? / ((of("before")? + of("after")?) / 2.0))
        })
        .collect();
    ratios.sort_by(f64::total_cmp);
    ratios
}

fn median(sorted: &[f64]) -> f64 {
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}
