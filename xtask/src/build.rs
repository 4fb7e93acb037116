//! Compiling: the eBPF objects first, then the binaries that carry them.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};
use clap::Args;

use crate::{
    paths,
    setup::{self, EbpfToolchain},
    shell,
};

#[derive(Args, Clone, Default)]
pub struct Options {
    /// Optimise; leaves the programs' debug messages out
    #[arg(long)]
    pub release: bool,
}

/// The target of all binaries: statically linked, so that they run in any guest and image.
pub const TARGET: &str = "x86_64-unknown-linux-gnu";

const PACKAGES: &[&str] = &["palisade-agent", "palisade-collector", "palisade", "palisade-scenarios"];

/// The binaries that a build leaves, by name.
pub const BINARIES: &[&str] =
    &["palisade-agent", "palisade-collector", "palisade", "palisade-scenarios", "palisade-fixture"];

/// Name, target processor and features of an object.
type Variant = (&'static str, &'static str, &'static [&'static str]);

/// The two forms of the object: kernels before 5.12 have no atomic fetch-add.
const VARIANTS: &[Variant] = &[("fetch-add", "v3", &["fetch-add"]), ("lanes", "v2", &[])];

/// Builds everything and returns the folder of the binaries.
pub fn run(options: &Options) -> Result<PathBuf> {
    setup::run()?;
    let objects = shell::step("build the eBPF programs", || {
        if options.release { ebpf(&[], "plain") } else { ebpf(&["log"], "debug") }
    })?;
    shell::step("build the binaries", || binaries(options, &objects, PACKAGES, &[]))
}

/// Bugs that can be planted in the verdict, as features of the eBPF crate. For testing the tests.
const BUGS: &[&str] = &[
    "plant-origin-ignored",
    "plant-failed-walk-allowed",
    "plant-enforce-is-audit",
    "plant-drift-is-image",
    "plant-latch-stays",
    "plant-sessions-ignored",
    "plant-conditions-parents-ignored",
    "plant-conditions-arguments-ignored",
    "plant-scripts-unjudged",
    "plant-code-mapped-unjudged",
    "plant-code-protect-unjudged",
    "plant-code-jit-allowed",
    "plant-code-memory-allowed",
    "plant-code-trace-allowed",
    "plant-code-executables-unprotected",
    "plant-ring-unshared",
];

/// Builds an agent that loads its objects from a folder, and objects with one bug each. Returns both.
pub fn planted() -> Result<(PathBuf, PathBuf)> {
    let all = paths::target().join("ebpf/planted");
    shell::step("build programs with planted bugs", || {
        ebpf_variants(&VARIANTS[..1], &[], "planted/control")?;
        for bug in BUGS {
            // Only what the kernel that they run on takes. One has no bug, and must pass.
            ebpf_variants(&VARIANTS[..1], &[bug], &format!("planted/{bug}"))?;
        }
        Ok(())
    })?;
    let plain = paths::target().join("ebpf/plain");
    let options = Options { release: true };
    let folder = shell::step("build the agent for planted bugs", || {
        binaries(&options, &plain, &["palisade-agent"], &["palisade-agent/test-objects"])
    })?;
    Ok((folder.join("palisade-agent"), all))
}

/// Builds programs that make records by themselves, and an agent that loads them. Returns both, the agent first.
pub fn generator() -> Result<(PathBuf, PathBuf)> {
    let objects = shell::step("build the generator of records", || ebpf(&["generator"], "generator"))?;
    let plain = paths::target().join("ebpf/plain");
    let options = Options { release: true };
    let folder = shell::step("build the agent for it", || {
        binaries(&options, &plain, &["palisade-agent"], &["palisade-agent/test-objects"])
    })?;
    Ok((folder.join("palisade-agent"), objects))
}

/// Builds an agent whose layouts are those of another version: for testing upgrades.
pub fn another_abi() -> Result<PathBuf> {
    shell::step("build an agent of another ABI", || {
        let objects = ebpf(&["another-abi"], "another-abi")?;
        let options = Options { release: true };
        let folder = binaries(&options, &objects, &["palisade-agent"], &["palisade-agent/another-abi"])?;
        // Another build with features takes its place.
        let kept = folder.join(ANOTHER_ABI);
        std::fs::copy(folder.join("palisade-agent"), &kept)?;
        Ok(kept)
    })
}

/// The name of the agent that [`another_abi`] builds.
pub const ANOTHER_ABI: &str = "palisade-agent-of-another-abi";

fn ebpf(extra: &[&str], name: &str) -> Result<PathBuf> {
    ebpf_variants(VARIANTS, extra, name)
}

fn ebpf_variants(variants: &[Variant], extra: &[&str], name: &str) -> Result<PathBuf> {
    let build = paths::target().join("ebpf-build");
    std::fs::create_dir_all(&build).with_context(|| format!("cannot create {}", build.display()))?;
    // Every variant is built to the same place: without this, one process could take what another has just built.
    let lock = std::fs::File::create(build.join("palisade.lock"))?;
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive)?;
    let output = paths::target().join("ebpf").join(name);
    std::fs::create_dir_all(&output).with_context(|| format!("cannot create {}", output.display()))?;
    for (variant, cpu, features) in variants {
        let mut features: Vec<String> = features.iter().map(|&feature| feature.to_owned()).collect();
        features.extend(extra.iter().map(|&feature| feature.to_owned()));
        let flags = format!(
            "-C linker={} -C link-arg=--btf -C debuginfo=2 -C target-cpu={cpu}",
            setup::bpf_linker()?.display()
        );
        let mut command = match setup::ebpf_toolchain() {
            EbpfToolchain::Debian => {
                let mut command = Command::new("/usr/bin/cargo");
                command.args(["build"]).env("RUSTC", "/usr/bin/rustc").env("RUSTC_BOOTSTRAP", "1");
                command
            }
            EbpfToolchain::Nightly => {
                let mut command = Command::new("rustup");
                command.args(["run", "nightly", "cargo", "build", "-Zbuild-std=core"]);
                command.env_remove("RUSTC");
                command
            }
        };
        command
            .args(["--release", "--target", "bpfel-unknown-none", "--package", "palisade-ebpf"])
            .args(["--features", &features.join(",")])
            .current_dir(paths::repository())
            .env("CARGO_TARGET_DIR", &build)
            .env("RUSTFLAGS", flags)
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .env_remove("RUSTUP_TOOLCHAIN")
            .env_remove("RUSTC_WRAPPER");
        shell::quiet(&mut command, &format!("ebpf-{}-{variant}", name.replace('/', "-")))?;
        let built = build.join("bpfel-unknown-none/release/palisade-ebpf");
        let object = output.join(format!("{variant}.o"));
        copy_if_changed(&built, &object)?;
    }
    Ok(output)
}

/// Keeps the time stamp of an equal file, so that cargo does not rebuild the agent for nothing.
fn copy_if_changed(from: &Path, to: &Path) -> Result<()> {
    let new = std::fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
    if std::fs::read(to).is_ok_and(|old| old == new) {
        return Ok(());
    }
    std::fs::write(to, new).with_context(|| format!("cannot write {}", to.display()))
}

fn binaries(options: &Options, objects: &Path, packages: &[&str], features: &[&str]) -> Result<PathBuf> {
    let mut command = Command::new("cargo");
    command.arg("build").args(["--target", TARGET]);
    for package in packages {
        command.args(["--package", package]);
    }
    // A build with features has a folder of its own, so that it never stands in for the plain one.
    let mut target = paths::target();
    if !features.is_empty() {
        command.args(["--features", &features.join(",")]);
        target = target.join("test-build");
    }
    if options.release {
        command.arg("--release");
    }
    command
        .current_dir(paths::repository())
        .env("CARGO_TARGET_DIR", &target)
        .env("PALISADE_EBPF_OBJECTS", objects)
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env_remove("CARGO_ENCODED_RUSTFLAGS");
    shell::quiet(&mut command, "binaries")?;
    let profile = if options.release { "release" } else { "debug" };
    Ok(target.join(TARGET).join(profile))
}
