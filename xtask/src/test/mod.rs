//! The test rings, part by part, and their sum.

mod changed;
mod machines;
mod parts;
mod tally;
mod unit;

use std::{path::Path, process::ExitCode, time::Instant};

use anyhow::{Context as _, Result};
use clap::{Args, ValueEnum};

use self::parts::{NATIVE, PARTS, Part, Work};
pub use self::tally::{Tally, counts};
use crate::{build, fuzz, images, matrix, native::Containerd, setup, vm};

#[derive(Args)]
pub struct Options {
    /// Only these rings
    #[arg(long)]
    ring: Vec<Ring>,
    /// Only parts whose name holds this; `--list` shows them
    #[arg(long, value_name = "NAME")]
    part: Vec<String>,
    /// Everything there is, on every kernel, in its longest form: hours
    #[arg(long)]
    full: bool,
    /// Only what the changes since a commit may break: the last one on the main branch, unless another is named
    #[arg(long, value_name = "COMMIT", num_args = 0..=1, default_missing_value = "origin/main")]
    changed: Option<String>,
    /// Print what there is, what it protects and what it may take, and run nothing
    #[arg(long)]
    list: bool,
    /// With --list: one object a line
    #[arg(long, requires = "list")]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Ring {
    /// Formatting, lints, unit, property and golden tests
    Unit,
    /// Coverage-guided fuzzing of every parser of hostile bytes
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

/// How long each fuzz target runs as a part of the tests, and with `--full`, in seconds.
const FUZZ_SECONDS: (u64, u64) = (6, 60);

pub fn run(options: &Options) -> Result<ExitCode> {
    if options.list {
        print!("{}", if options.json { parts::json_lines() } else { parts::table() });
        return Ok(ExitCode::SUCCESS);
    }
    let changed = options.changed.as_deref().map(changed::files).transpose()?;
    let wanted: Vec<&Part> = PARTS
        .iter()
        .filter(|part| part.budget(options.full).is_some())
        .filter(|part| options.ring.is_empty() || options.ring.contains(&part.ring))
        .filter(|part| options.part.is_empty() || options.part.iter().any(|name| part.name.contains(name)))
        .filter(|part| changed.as_ref().is_none_or(|files| part.is_touched_by(files)))
        .collect();
    anyhow::ensure!(!wanted.is_empty(), "there is nothing to run: see `cargo xtask test --list`");
    if changed.is_some() {
        println!("what the changes may break: {}", names(&wanted));
    }
    let tally = Tally::default();
    let needs_guests = wanted.iter().any(|part| matches!(part.work, Work::Boot(_)));
    tally.timed("set-up", None, setup::run)?;
    // What is fetched comes while the processors build.
    let (binaries, guests) = std::thread::scope(|scope| {
        let guests = needs_guests.then(|| scope.spawn(|| machines::fetch(&wanted)));
        let binaries = tally.timed("build", None, || build::run(&build::Options { release: true }));
        let guests = guests.map(|guests| guests.join());
        (binaries, guests)
    });
    let binaries = binaries?;
    if let Some(guests) = guests {
        guests.unwrap_or_else(|panic| std::panic::resume_unwind(panic)).context("the guests' parts")?;
    }
    let boots: Vec<&Part> =
        wanted.iter().copied().filter(|part| matches!(part.work, Work::Boot(_))).collect();
    let natively: Vec<&Part> =
        wanted.iter().copied().filter(|part| matches!(part.work, Work::Native)).collect();
    // What the machines need is made beside it: both have steps that keep one processor busy only.
    let machines = std::thread::scope(|scope| {
        let machines = (!boots.is_empty()).then(|| {
            scope.spawn(|| {
                tally.timed("the guests' disk and what only they have", None, || {
                    tally.case("what the guests need is there", || {
                        machines::Machines::prepare(&binaries, &boots, options.full)
                    })
                })
            })
        });
        for part in wanted.iter().copied().filter(|part| matches!(part.work, Work::Cargo)) {
            cargo(part, options.full, &tally);
        }
        machines.and_then(|machines| machines.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    });
    // Two machines and what runs natively, which waits more than it works.
    std::thread::scope(|scope| {
        scope.spawn(|| natively.iter().for_each(|part| native(part, &binaries, options.full, &tally)));
        if let Some(machines) = &machines {
            let rows = vm::two_at_once(&boots, |part| machines.run(part, &tally));
            let rows: Vec<matrix::Row> = rows.into_iter().flatten().collect();
            if !rows.is_empty() {
                println!("\n{}", matrix::table(&rows));
            }
        }
    });
    Ok(tally.close())
}

fn names(parts: &[&Part]) -> String {
    parts.iter().map(|part| part.name).collect::<Vec<_>>().join("; ")
}

fn cargo(part: &Part, full: bool, tally: &Tally) {
    println!("\n== {}", part.name);
    tally.timed(part.name, part.budget(full), || match (part.ring, part.name) {
        (Ring::Fuzz, _) => fuzz::ring(tally, if full { FUZZ_SECONDS.1 } else { FUZZ_SECONDS.0 }),
        (_, "unit tests") => unit::tests(tally),
        _ => unit::house(tally),
    });
}

fn native(part: &Part, binaries: &Path, full: bool, tally: &Tally) {
    tally.timed(part.name, part.budget(full), || {
        if part.ring == Ring::Matrix {
            if let Some(row) = matrix::native(binaries, tally) {
                println!("\n{}", matrix::table(&[row]));
            }
            return;
        }
        let result = images::make(binaries).and_then(|images| {
            let containerd = Containerd::start(&images)?;
            let (mut output, mut worst) = (String::new(), 0);
            for words in NATIVE.iter().filter_map(|scenario| scenario.words(full)) {
                let begun = Instant::now();
                println!("natively | -- {words}");
                let words: Vec<&str> =
                    std::iter::once("palisade-scenarios").chain(words.split(' ')).collect();
                let (code, more) = containerd.run(binaries, &words, vm::Stream::Named("natively"))?;
                println!("natively | {} took {} s", words[1], begun.elapsed().as_secs());
                output.push_str(&more);
                worst = worst.max(code);
            }
            Ok((output, worst))
        });
        tally.add(part.name, result);
    });
}
