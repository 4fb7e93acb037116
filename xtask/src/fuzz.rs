//! The fuzz targets: every parser of hostile bytes, for a while each.

use std::process::Command;

use anyhow::{Result, bail};
use clap::Args;

use crate::{build::TARGET, dependencies, paths, shell, test::Tally, vm};

#[derive(Args)]
pub struct Options {
    /// Only these targets
    #[arg(long)]
    target: Vec<String>,
    /// Seconds for each target
    #[arg(long, default_value_t = 60)]
    seconds: u64,
}

/// What `cargo fuzz` passes, without the sanitizer: the parsers have no unsafe code of their own. The compiler of the workspace
/// takes these flags with `RUSTC_BOOTSTRAP`.
const FLAGS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
                     -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
                     -Cllvm-args=-sanitizer-coverage-trace-compares -Cdebug-assertions";

const TARGETS: &[&str] = &["ring_record", "profile", "log_segment", "nri_frames", "batch", "spool_row"];

pub fn run(options: &Options) -> Result<std::process::ExitCode> {
    let tally = Tally::default();
    fuzz(&tally, &options.target, options.seconds);
    Ok(tally.close())
}

/// Each target for so many seconds.
pub fn ring(tally: &Tally, seconds: u64) {
    fuzz(tally, &[], seconds);
}

fn fuzz(tally: &Tally, only: &[String], seconds: u64) {
    let folder = paths::target().join("fuzz");
    let built = tally.case("the fuzz targets build", || {
        shell::counted_step("build the fuzz targets", |progress| {
            dependencies::cached(&folder, &["release", &format!("{TARGET}/release")], FLAGS, || {
                shell::cargo(
                    Command::new("cargo")
                        .args(["build", "--release", "--package", "palisade-fuzz", "--target", TARGET])
                        .current_dir(paths::repository())
                        .env("CARGO_TARGET_DIR", &folder)
                        .env("RUSTC_BOOTSTRAP", "1")
                        .env("RUSTFLAGS", FLAGS)
                        .env_remove("CARGO_ENCODED_RUSTFLAGS"),
                    "fuzz-build",
                    progress,
                )
            })
        })
    });
    if built.is_none() {
        return;
    }
    let wanted: Vec<&&str> =
        TARGETS.iter().filter(|target| only.is_empty() || only.iter().any(|name| name == *target)).collect();
    vm::two_at_once(&wanted, |target| {
        tally.case(&format!("fuzz {target} for {seconds} s"), || {
            // New inputs go to a folder outside the tree; what is worth keeping is copied to fuzz/corpus by hand.
            let found = folder.join("found").join(target);
            std::fs::create_dir_all(&found)?;
            let output = Command::new(folder.join(TARGET).join("release").join(**target))
                .arg(&found)
                .arg(paths::repository().join("fuzz/corpus").join(target))
                .args([
                    format!("-max_total_time={seconds}"),
                    "-max_len=8192".to_owned(),
                    "-timeout=10".to_owned(),
                ])
                .arg(format!("-artifact_prefix={}/", folder.display()))
                .output()?;
            let said = String::from_utf8_lossy(&output.stderr);
            let last = said.lines().rev().find(|line| line.starts_with("Done")).unwrap_or_default();
            if !output.status.success() || last.is_empty() {
                let lines: Vec<&str> = said.lines().collect();
                bail!("{}", lines[lines.len().saturating_sub(25)..].join("\n"));
            }
            println!("     {last}");
            Ok(())
        });
    });
}
