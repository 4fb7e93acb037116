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
    vm::{self, Machine, Outcome, Processors, Stream},
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
pub struct Row {
    release: String,
    tier: String,
    programs: BTreeMap<String, Option<u64>>,
    absent: Vec<String>,
}

pub fn run(options: &Options) -> Result<ExitCode> {
    let binaries = build::run(&build::Options { release: true })?;
    let kernels = if options.kernel.is_empty() { Kernel::ALL.to_vec() } else { options.kernel.clone() };
    let tally = Tally::default();
    let rows = measure(&binaries, &kernels, &tally)?;
    let text = table(&rows);
    println!("\n{text}");
    if options.write {
        std::fs::write(paths::repository().join("docs/kernels.md"), document(&text))?;
    }
    Ok(tally.close())
}

const MARK: &str = "=== doctor";

/// What a machine of the matrix runs: the smoke scenario, and what the agent's doctor says.
pub const SCRIPT: &str = "palisade-scenarios smoke; code=$?; echo '=== doctor'; PALISADE_LOG=off palisade-agent doctor --json; \
     echo; echo '=== doctor'; exit $code";

fn measure(binaries: &Path, kernels: &[Kernel], tally: &Tally) -> Result<Vec<Row>> {
    let boot = |kernel: Kernel| {
        let machine = Machine {
            kernel,
            processors: Processors::Turns(2),
            append: "",
            deadline: Duration::from_secs(900),
            containerd: true,
            binaries,
            host: None,
            apps: false,
            extra: Vec::new(),
        };
        machine.run(&["sh", "-c", SCRIPT].map(str::to_owned), Stream::None)
    };
    vm::prepare(binaries, kernels.iter().copied(), false)?;
    let mut rows = Vec::new();
    for (kernel, outcome) in vm::two_at_once(kernels, |kernel| {
        let begun = Instant::now();
        let outcome = boot(*kernel);
        println!("{kernel} ran for {} s", begun.elapsed().as_secs());
        (*kernel, outcome)
    }) {
        rows.extend(tally.case(&format!("matrix {kernel}: every program loads"), || judge(&outcome?)));
    }
    rows.extend(native(binaries, tally));
    Ok(rows)
}

/// What a machine that ran [`SCRIPT`] found.
///
/// # Errors
///
/// When the smoke scenario failed, or the kernel does not have the full tier.
pub fn judge(outcome: &Outcome) -> Result<Row> {
    print!("{}", outcome.output.split(MARK).next().unwrap_or_default());
    tally_smoke(&outcome.output, outcome.code)?;
    let row = row(&outcome.output)?;
    if row.tier != "full" {
        bail!("the tier is {}, not full", row.tier);
    }
    Ok(row)
}

/// The same on this machine's kernel, in whatever tier it has.
pub fn native(binaries: &Path, tally: &Tally) -> Option<Row> {
    tally.case("matrix native: every program of the fallback tier loads", || {
        let containerd = Containerd::start(&images::make(binaries)?)?;
        let (code, output) = containerd.run(binaries, &["palisade-scenarios", "smoke"], Stream::Plain)?;
        tally_smoke(&output, code)?;
        let doctor = Command::new(binaries.join("palisade-agent"))
            .args(["doctor", "--json"])
            .env("PALISADE_LOG", "off")
            .output()?;
        row(&format!("{MARK}\n{}\n{MARK}", String::from_utf8_lossy(&doctor.stdout)))
    })
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

pub fn table(rows: &[Row]) -> String {
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
