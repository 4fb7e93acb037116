//! The test rings, one after the other, and their sum.

use std::{
    path::Path,
    process::{Command, ExitCode},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use clap::{Args, ValueEnum};

use crate::{
    build, fuzz, images, kernels::Kernel, licences, matrix, native::Containerd, paths, shell, vm::Machine,
};

#[derive(Args)]
pub struct Options {
    /// Only these rings
    #[arg(long)]
    ring: Vec<Ring>,
    /// More of what takes long: 200 containers in each cell of the starts instead of 20
    #[arg(long)]
    full: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Ring {
    /// Formatting, lints, unit, property and golden tests
    Unit,
    /// Coverage-guided fuzzing of every parser of hostile bytes, briefly
    Fuzz,
    /// Every program on every kernel, with one allow, one denial and the right origin
    Matrix,
    /// End-to-end behaviour in a virtual machine
    Scenarios,
    /// The suite against planted bugs
    Planted,
    /// End-to-end behaviour on this machine's kernel
    Native,
}

const RINGS: &[Ring] = &[Ring::Unit, Ring::Fuzz, Ring::Matrix, Ring::Scenarios, Ring::Planted, Ring::Native];

/// Sums up cases of all rings.
#[derive(Default)]
pub struct Tally {
    passed: u32,
    failed: u32,
    times: Vec<(String, Duration)>,
}

impl Tally {
    /// Runs one case and counts it.
    pub fn case<T>(&mut self, name: &str, work: impl FnOnce() -> Result<T>) -> Option<T> {
        let begun = Instant::now();
        let result = work();
        self.times.push((name.to_owned(), begun.elapsed()));
        match result {
            Ok(value) => {
                self.passed += 1;
                println!("ok   {name} ({} s)", begun.elapsed().as_secs());
                Some(value)
            }
            Err(error) => {
                self.failed += 1;
                println!("FAIL {name}: {error:#}");
                None
            }
        }
    }

    /// Adds the counts of a program that reports its own cases.
    fn add(&mut self, name: &str, begun: Instant, result: Result<(String, i32)>) {
        self.times.push((name.to_owned(), begun.elapsed()));
        let counted = result.and_then(|(output, code)| {
            let (passed, failed) = counts(&output).with_context(|| format!("{name} printed no result"))?;
            if passed + failed == 0 || (failed == 0) != (code == 0) {
                bail!("{name}: {passed} passed, {failed} failed, exit code {code}");
            }
            Ok((passed, failed))
        });
        match counted {
            Ok((passed, failed)) => {
                self.passed += passed;
                self.failed += failed;
            }
            Err(error) => {
                self.failed += 1;
                println!("FAIL {error:#}");
            }
        }
    }

    /// Prints what took how long, and the closing line.
    pub fn close(self) -> ExitCode {
        println!();
        for (name, time) in &self.times {
            println!("{:>6} s  {name}", time.as_secs());
        }
        println!("{} passed, {} failed", self.passed, self.failed);
        if self.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

/// The sum of all lines of the form "N passed, N failed"; `None` when there is none.
pub fn counts(output: &str) -> Option<(u32, u32)> {
    let numbers = |line: &str| -> Option<(u32, u32)> {
        let (passed, rest) = line.trim().split_once(" passed, ")?;
        let failed = rest.strip_suffix(" failed")?;
        Some((passed.parse().ok()?, failed.parse().ok()?))
    };
    output.lines().filter_map(numbers).reduce(|sum, more| (sum.0 + more.0, sum.1 + more.1))
}

pub fn run(options: &Options) -> Result<ExitCode> {
    let binaries = build::run(&build::Options { release: true })?;
    let mut tally = Tally::default();
    for ring in RINGS {
        if !options.ring.is_empty() && !options.ring.contains(ring) {
            continue;
        }
        println!("\n== ring: {ring:?}");
        match ring {
            Ring::Unit => unit(&mut tally),
            Ring::Fuzz => fuzz::ring(&mut tally),
            Ring::Matrix => matrix::ring(&binaries, &mut tally)?,
            Ring::Scenarios => scenarios(&binaries, options.full, &mut tally),
            Ring::Planted => planted(&binaries, &mut tally),
            Ring::Native => native(&binaries, &mut tally),
        }
    }
    Ok(tally.close())
}

fn unit(tally: &mut Tally) {
    let objects = paths::target().join("ebpf/plain");
    let cargo = |words: &[&str]| {
        let mut command = Command::new("cargo");
        command.args(words).current_dir(paths::repository()).env("PALISADE_EBPF_OBJECTS", &objects);
        command
    };
    tally.case("cargo fmt", || shell::loud(&mut cargo(&["fmt", "--all", "--check"])));
    tally.case("licences and sources of dependencies", licences::check);
    tally.case("cargo clippy", || {
        shell::loud(&mut cargo(&[
            "clippy",
            "--quiet",
            "--workspace",
            "--exclude",
            "palisade-ebpf",
            "--exclude",
            "palisade-fuzz",
            "--all-targets",
            "--features",
            "palisade-abi/user",
            "--",
            "-D",
            "warnings",
        ]))
    });
    let begun = Instant::now();
    let output = cargo(&[
        "test",
        "--workspace",
        "--exclude",
        "palisade-ebpf",
        "--exclude",
        "palisade-fuzz",
        "--features",
        "palisade-abi/user",
        "--no-fail-fast",
    ])
    .output();
    let result = output.context("cannot start cargo").map(|output| {
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let (passed, failed) = sum_of_cargo_test(&text);
        if !output.status.success() {
            println!("{text}\n{}", String::from_utf8_lossy(&output.stderr));
        }
        // A crate that does not compile runs no test and still fails.
        let failed = if output.status.success() { failed } else { failed.max(1) };
        (format!("{passed} passed, {failed} failed"), i32::from(failed > 0))
    });
    if let Ok((line, _)) = &result {
        println!("unit tests: {line}");
    }
    tally.add("unit tests", begun, result);
}

/// Adds up the lines "test result: ok. 7 passed; 0 failed; …".
fn sum_of_cargo_test(output: &str) -> (u32, u32) {
    output.lines().filter(|line| line.starts_with("test result:")).fold((0, 0), |(passed, failed), line| {
        let number = |word: &str| -> u32 {
            let mut words = line.split([' ', ';', '.']).filter(|part| !part.is_empty()).peekable();
            while let Some(part) = words.next() {
                if words.peek() == Some(&word) {
                    return part.parse().unwrap_or(0);
                }
            }
            0
        };
        (passed + number("passed"), failed + number("failed"))
    })
}

fn in_machine(
    binaries: &Path,
    extra: &[(&str, &Path)],
    words: &[&str],
    minutes: u64,
) -> Result<(String, i32)> {
    let machine = Machine {
        kernel: Kernel::V6_12,
        smp: 2,
        icount: false,
        append: "",
        deadline: Duration::from_secs(minutes * 60),
        containerd: true,
        binaries,
        host: None,
        extra,
    };
    let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
    let outcome = machine.run(&words, true)?;
    Ok((outcome.output, i32::from(outcome.code)))
}

/// Scenarios that share a boot. Those that end and begin agents all the time have one of their own: they are the most likely
/// to meet the emulator's fault that costs everything since the boot ([`Machine::run`]).
const KILLS: &[&str] = &["faults", "outlives --other {other}"];
/// The last three stop the containerd that the others use.
const REST: &[&str] = &[
    "exec",
    "who",
    "generator",
    "claims",
    "tampering",
    "limits --containers 500 --profiles 100 --executions 100 --memory 64",
    "members",
    "engines",
    "daemonset",
    "disturbed",
    "volumes",
    "starts --count {count}",
];

fn scenarios(binaries: &Path, full: bool, tally: &mut Tally) {
    let count = if full { "200" } else { "20" };
    let minutes = if full { 240 } else { 60 };
    for (name, list) in [("scenarios on 6.12 that kill the agent", KILLS), ("scenarios on 6.12", REST)] {
        // Each prints its counts, and the machine ends with a failure if one failed.
        let mut script = "code=0".to_owned();
        for scenario in list {
            let scenario = scenario.replace("{count}", count).replace("{other}", build::ANOTHER_ABI);
            script += &format!("; echo '-- {scenario}'; palisade-scenarios {scenario} || code=1");
        }
        script += "; exit $code";
        let begun = Instant::now();
        let place = format!("bin/{}", build::ANOTHER_ABI);
        let result = build::another_abi().and_then(|agent| {
            in_machine(binaries, &[(place.as_str(), &agent)], &["sh", "-c", &script], minutes)
        });
        tally.add(name, begun, result);
    }
}

fn planted(binaries: &Path, tally: &mut Tally) {
    let begun = Instant::now();
    let result = build::planted().and_then(|(agent, objects)| {
        let extra: &[(&str, &Path)] = &[("bin/palisade-agent-test", &agent), ("objects", &objects)];
        in_machine(binaries, extra, &["palisade-scenarios", "planted", "--objects", "/palisade/objects"], 25)
    });
    tally.add("planted bugs on 6.12", begun, result);
}

fn native(binaries: &Path, tally: &mut Tally) {
    let begun = Instant::now();
    let result = images::make(binaries).and_then(|images| {
        let containerd = Containerd::start(&images)?;
        let (exec, mut output) = containerd.run(binaries, &["palisade-scenarios", "exec"])?;
        let mut worst = exec;
        for words in [
            &["palisade-scenarios", "who"][..],
            &["palisade-scenarios", "faults"],
            &["palisade-scenarios", "starts", "--here"],
        ] {
            let (code, more) = containerd.run(binaries, words)?;
            output.push_str(&more);
            worst = worst.max(code);
        }
        Ok((output, worst))
    });
    tally.add("scenarios natively", begun, result);
}
