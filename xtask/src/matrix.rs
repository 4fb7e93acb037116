//! The load matrix: every program on every supported kernel, with what each costs the verifier.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    path::Path,
    process::{Command, ExitCode},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use serde_json::Value;

use crate::{
    build, images,
    kernels::Kernel,
    native::Containerd,
    paths,
    test::Tally,
    vm::{self, Machine, Processors, Stream},
};

#[derive(Args)]
pub struct Options {
    /// Only these kernels
    #[arg(long)]
    kernel: Vec<Kernel>,
    /// Write docs/kernels.md
    #[arg(long)]
    write: bool,
}

/// What one kernel gave.
struct Row {
    release: String,
    tier: String,
    programs: BTreeMap<String, Option<u64>>,
    absent: Vec<String>,
}

pub fn run(options: &Options) -> Result<ExitCode> {
    let binaries = build::run(&build::Options { release: true })?;
    let kernels = if options.kernel.is_empty() { Kernel::ALL.to_vec() } else { options.kernel.clone() };
    let mut tally = Tally::default();
    let rows = measure(&binaries, &kernels, &mut tally)?;
    let text = table(&rows);
    println!("\n{text}");
    if options.write {
        std::fs::write(paths::repository().join("docs/kernels.md"), document(&text))?;
    }
    Ok(tally.close())
}

/// Boots every kernel, asks the agent's doctor, and runs the smoke scenario. Then the same natively.
pub fn ring(binaries: &Path, tally: &mut Tally) -> Result<()> {
    let rows = measure(binaries, &Kernel::ALL, tally)?;
    println!("\n{}", table(&rows));
    Ok(())
}

const MARK: &str = "=== doctor";

fn measure(binaries: &Path, kernels: &[Kernel], tally: &mut Tally) -> Result<Vec<Row>> {
    let boot = |kernel: Kernel| {
        let script = format!(
            "palisade-scenarios smoke; code=$?; echo '{MARK}'; PALISADE_LOG=off palisade-agent doctor --json; \
             echo; echo '{MARK}'; exit $code"
        );
        let machine = Machine {
            kernel,
            processors: Processors::Turns(2),
            append: "",
            deadline: Duration::from_secs(900),
            containerd: true,
            binaries,
            host: None,
            apps: false,
            extra: &[],
        };
        machine.run(&["sh".to_owned(), "-c".to_owned(), script], Stream::None)
    };
    vm::prepare(binaries, kernels.iter().copied(), false)?;
    let mut rows = Vec::new();
    for (kernel, outcome) in vm::two_at_once(kernels, |kernel| {
        let begun = Instant::now();
        let outcome = boot(*kernel);
        println!("{kernel} ran for {} s", begun.elapsed().as_secs());
        (*kernel, outcome)
    }) {
        let row = tally.case(&format!("matrix {kernel}: every program loads"), || {
            let outcome = outcome?;
            print!("{}", outcome.output.split(MARK).next().unwrap_or_default());
            tally_smoke(&outcome.output, outcome.code)?;
            let row = row(&outcome.output)?;
            if row.tier != "full" {
                bail!("the tier is {}, not full", row.tier);
            }
            Ok(row)
        });
        rows.extend(row);
    }
    rows.extend(tally.case("matrix native: every program of the fallback tier loads", || {
        let containerd = Containerd::start(&images::make(binaries)?)?;
        let (code, output) = containerd.run(binaries, &["palisade-scenarios", "smoke"])?;
        tally_smoke(&output, code)?;
        let doctor = Command::new(binaries.join("palisade-agent"))
            .args(["doctor", "--json"])
            .env("PALISADE_LOG", "off")
            .output()?;
        row(&format!("{MARK}\n{}\n{MARK}", String::from_utf8_lossy(&doctor.stdout)))
    }));
    Ok(rows)
}

/// The smoke scenario must have run and passed.
fn tally_smoke(output: &str, code: impl Into<i32>) -> Result<()> {
    let code: i32 = code.into();
    let (passed, failed) = crate::test::counts(output).context("the smoke scenario printed no result")?;
    if failed > 0 || passed == 0 || code != 0 {
        bail!("smoke: {passed} passed, {failed} failed, exit code {code}\n{output}");
    }
    Ok(())
}

fn row(output: &str) -> Result<Row> {
    let json = output.split(MARK).nth(1).context("the doctor said nothing")?;
    let value: Value =
        serde_json::from_str(json.trim()).with_context(|| format!("the doctor's report: {json}"))?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let programs = value["programs"]
        .as_array()
        .context("the doctor lists no programs")?
        .iter()
        .map(|program| (text(&program["name"]), program["verified_instructions"].as_u64()))
        .collect();
    let absent = value["absent_kernel_fields"].as_array().into_iter().flatten().map(text).collect();
    Ok(Row { release: text(&value["kernel"]), tier: text(&value["tier"]), programs, absent })
}

fn table(rows: &[Row]) -> String {
    let mut names: Vec<&String> = rows.iter().flat_map(|row| row.programs.keys()).collect();
    names.sort();
    names.dedup();
    let mut text = String::from("| program |");
    // Writing to a String cannot fail.
    for row in rows {
        let _ = write!(text, " {} |", row.release);
    }
    let _ = write!(text, "\n|---|{}\n", "---:|".repeat(rows.len()));
    for name in names {
        let _ = write!(text, "| `{name}` |");
        for row in rows {
            let cell = match row.programs.get(name) {
                None => "–".to_owned(),
                Some(None) => "loads".to_owned(),
                Some(Some(count)) => count.to_string(),
            };
            let _ = write!(text, " {cell} |");
        }
        text.push('\n');
    }
    let _ = write!(text, "| tier |");
    for row in rows {
        let _ = write!(text, " {} |", row.tier);
    }
    let _ = write!(text, "\n| fields not there |");
    for row in rows {
        let absent = if row.absent.is_empty() { "–".to_owned() } else { row.absent.join(", ") };
        let _ = write!(text, " {absent} |");
    }
    text.push('\n');
    text
}

fn document(table: &str) -> String {
    format!(
        "# Kernels\n\n\
         Written by `cargo xtask matrix --write`. Every program is loaded on every kernel below, and on each one a\n\
         container is started under an enforced profile: an allowed program runs, two denied ones do not, and the\n\
         origins are right.\n\n\
         A number is how many instructions the verifier looked at, of one million that it allows; \"loads\" stands\n\
         where the kernel does not tell (before 5.16), and a dash where the program is not part of the tier.\n\n\
         {table}\n\
         On 5.10 `bpf` must be added to the kernel's `lsm=` parameter; later Debian kernels have it. The last column\n\
         is the machine that the matrix was written on, where LSM programs are refused.\n"
    )
}
