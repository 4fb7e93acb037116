//! What cargo checks: format, lints, licences, and the tests of the crates.

use std::process::Command;

use anyhow::Context as _;

use super::Tally;
use crate::{dependencies, licences, paths, shell};

/// Packages that need a target or flags of their own.
const APART: [&str; 4] = ["--exclude", "palisade-ebpf", "--exclude", "palisade-fuzz"];

/// What `cargo test` and `cargo clippy` compile into, below the target folder.
const FOLDERS: &[&str] = &["debug"];

fn cargo(words: &[&str]) -> Command {
    let mut command = Command::new("cargo");
    command
        .args(words)
        .current_dir(paths::repository())
        .env("PALISADE_EBPF_OBJECTS", paths::target().join("ebpf/plain"));
    command
}

/// Format, licences and lints.
pub fn house(tally: &Tally) {
    tally.case("cargo fmt", || shell::loud(&mut cargo(&["fmt", "--all", "--check"])));
    tally.case("licences and sources of dependencies", licences::check);
    tally.case("cargo clippy", || {
        let words = ["clippy", "--quiet", "--workspace", "--all-targets", "--features", "palisade-abi/user"];
        dependencies::cached(&paths::target(), FOLDERS, "clippy", || {
            shell::loud(cargo(&words).args(APART).args(["--", "-D", "warnings"]))
        })
    });
}

/// Unit, property and golden tests.
pub fn tests(tally: &Tally) {
    let words = ["test", "--workspace", "--features", "palisade-abi/user", "--no-fail-fast"];
    let mut printed = None;
    let ran = dependencies::cached(&paths::target(), FOLDERS, "test", || {
        let output = cargo(&words).args(APART).output().context("cannot start cargo")?;
        let succeeded = output.status.success();
        printed = Some(output);
        // What is compiled only in part is not kept.
        anyhow::ensure!(succeeded, "cargo test failed");
        Ok(())
    });
    let output = match printed {
        Some(output) => Ok(output),
        None => Err(ran.err().unwrap_or_else(|| anyhow::anyhow!("cargo printed nothing"))),
    };
    let result = output.map(|output| {
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
    tally.add("unit tests", result);
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
