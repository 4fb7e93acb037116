//! The test rings, one after the other, and their sum.

use std::{
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use clap::{Args, ValueEnum};

use crate::{
    build, fuzz, images,
    kernels::Kernel,
    licences, matrix,
    native::Containerd,
    paths, shell,
    vm::{self, Machine, Processors, Stream},
};

#[derive(Args)]
pub struct Options {
    /// Only these rings
    #[arg(long)]
    ring: Vec<Ring>,
    /// More of what takes long: 200 containers in each cell of the starts instead of 12, the attacks on every kernel, and half an
    /// hour of faults instead of 8 minutes
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
    fn add(&mut self, name: &str, took: Duration, result: Result<(String, i32)>) {
        self.times.push((name.to_owned(), took));
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
    let wanted: Vec<Ring> =
        RINGS.iter().copied().filter(|ring| options.ring.is_empty() || options.ring.contains(ring)).collect();
    for ring in &wanted {
        println!("\n== ring: {ring:?}");
        match ring {
            Ring::Unit => unit(&mut tally),
            Ring::Fuzz => fuzz::ring(&mut tally),
            Ring::Matrix => matrix::ring(&binaries, &mut tally)?,
            // With the scenarios, if those are wanted too.
            Ring::Planted if wanted.contains(&Ring::Scenarios) => {}
            Ring::Scenarios | Ring::Planted => machines(&binaries, &wanted, options.full, &mut tally),
            Ring::Native => native(&binaries, options.full, &mut tally),
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
    tally.add("unit tests", begun.elapsed(), result);
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

/// A boot of its own: what runs in it, what it has besides, and how long it may take.
struct Boot {
    name: &'static str,
    kernel: Kernel,
    append: &'static str,
    apps: bool,
    extra: Vec<(String, PathBuf)>,
    words: Vec<String>,
    minutes: u64,
}

impl Boot {
    fn run(&self, binaries: &Path) -> Result<(String, i32)> {
        let extra: Vec<(&str, &Path)> =
            self.extra.iter().map(|(place, path)| (place.as_str(), path.as_path())).collect();
        let machine = Machine {
            kernel: self.kernel,
            processors: Processors::Turns(2),
            append: self.append,
            deadline: Duration::from_secs(self.minutes * 60),
            containerd: true,
            binaries,
            host: None,
            apps: self.apps,
            extra: &extra,
        };
        let outcome = machine.run(&self.words, Stream::Named(self.name))?;
        Ok((outcome.output, i32::from(outcome.code)))
    }
}

/// Runs the boots, two at a time; the longest should come first.
fn boot(binaries: &Path, boots: &[Boot], tally: &mut Tally) {
    let ready =
        vm::prepare(binaries, boots.iter().map(|boot| boot.kernel), boots.iter().any(|boot| boot.apps));
    if let Err(error) = ready {
        tally.add("the guests' kernels and disk", Duration::ZERO, Err(error));
        return;
    }
    let ended = vm::two_at_once(boots, |boot| {
        let begun = Instant::now();
        let result = boot.run(binaries);
        println!("{} | ended after {} s", boot.name, begun.elapsed().as_secs());
        (boot.name, begun.elapsed(), result)
    });
    for (name, took, result) in ended {
        tally.add(name, took, result);
    }
}

/// Scenarios that share a boot. Those that end and begin agents all the time have one of their own: they are the most likely
/// to meet the emulator's fault that costs everything since the boot ([`Machine::run`]).
const KILLS: &[&str] = &["faults", "outlives --other {other}"];
const VERDICTS: &[&str] =
    &["exec", "code", "differential", "conditions", "elevation", "overlay", "who", "generator", "claims"];
/// The last two stop the containerd that the others use.
const NODE: &[&str] = &[
    "tampering",
    "noisy",
    "limits --containers 500 --profiles 100 --executions 100 --memory 64",
    "members",
    "engines",
    "daemonset",
    "disturbed",
    "volumes",
];
const STARTS: &[&str] = &["starts --count {count}"];
/// What of the verdicts depends on the kernel most, for the others.
const ATTACKS: &[&str] = &["exec", "code", "conditions"];
/// On a disk of their own, for the size of their image; and the shortest boot otherwise.
const SERVICES: &[&str] = &["apps", "powercut"];

fn scenarios(full: bool) -> Result<Vec<Boot>> {
    let other = build::another_abi()?;
    let count = if full { "200" } else { "12" };
    let boot = |name, list: &[&str]| {
        // Each prints its counts, and the machine ends with a failure if one failed.
        let mut script = "code=0".to_owned();
        for scenario in list {
            let scenario = scenario.replace("{count}", count).replace("{other}", build::ANOTHER_ABI);
            script += &format!("; echo '-- {scenario}'; palisade-scenarios {scenario} || code=1");
        }
        script += "; exit $code";
        Boot {
            name,
            kernel: Kernel::V6_12,
            append: "",
            apps: false,
            extra: vec![(format!("bin/{}", build::ANOTHER_ABI), other.clone())],
            words: ["sh", "-c", &script].map(str::to_owned).to_vec(),
            minutes: if full { 240 } else { 60 },
        }
    };
    let elsewhere = |name, kernel, append| Boot { kernel, append, ..boot(name, ATTACKS) };
    let mut boots = vec![
        boot("node", NODE),
        boot("verdicts", VERDICTS),
        boot("kills", KILLS),
        boot("starts", STARTS),
        elsewhere("attacks, newest", Kernel::Newest, ""),
        Boot { apps: true, ..boot("services", SERVICES) },
    ];
    if full {
        boots.extend([
            elsewhere("attacks, 5.10", Kernel::V5_10, ""),
            elsewhere("attacks, 6.1", Kernel::V6_1, ""),
            elsewhere("attacks, 6.12 preempt=full", Kernel::V6_12, "preempt=full"),
        ]);
    }
    Ok(boots)
}

fn planted() -> Result<Boot> {
    let (agent, objects) = build::planted()?;
    let words = ["palisade-scenarios", "planted", "--objects", "/palisade/objects"];
    Ok(Boot {
        name: "planted bugs",
        kernel: Kernel::V6_12,
        append: "",
        apps: false,
        extra: vec![("bin/palisade-agent-test".to_owned(), agent), ("objects".to_owned(), objects)],
        words: words.map(str::to_owned).to_vec(),
        minutes: 40,
    })
}

/// The rings that need a virtual machine for long, as far as they are wanted.
fn machines(binaries: &Path, with: &[Ring], full: bool, tally: &mut Tally) {
    let mut boots = Vec::new();
    let mut take = |name: &str, made: Result<Vec<Boot>>| match made {
        Ok(made) => boots.extend(made),
        Err(error) => tally.add(name, Duration::ZERO, Err(error)),
    };
    if with.contains(&Ring::Scenarios) {
        take("scenarios", scenarios(full));
    }
    if with.contains(&Ring::Planted) {
        take("planted bugs", planted().map(|boot| vec![boot]));
    }
    boot(binaries, &boots, tally);
}

fn native(binaries: &Path, full: bool, tally: &mut Tally) {
    let minutes = if full { "30" } else { "8" };
    let begun = Instant::now();
    let result = images::make(binaries).and_then(|images| {
        let containerd = Containerd::start(&images)?;
        let (exec, mut output) = containerd.run(binaries, &["palisade-scenarios", "exec"])?;
        let mut worst = exec;
        for words in [
            &["palisade-scenarios", "who"][..],
            &["palisade-scenarios", "pinned"],
            &["palisade-scenarios", "conditions"],
            &["palisade-scenarios", "noisy"],
            &["palisade-scenarios", "peers"],
            &["palisade-scenarios", "tls"],
            &["palisade-scenarios", "switches"],
            &["palisade-scenarios", "races", "--count", "10000"],
            &["palisade-scenarios", "faults"],
            &["palisade-scenarios", "starts", "--here"],
            &["palisade-scenarios", "soak", "--minutes", minutes],
        ] {
            let (code, more) = containerd.run(binaries, words)?;
            output.push_str(&more);
            worst = worst.max(code);
        }
        Ok((output, worst))
    });
    tally.add("scenarios natively", begun.elapsed(), result);
}
