//! Compiling: the eBPF objects first, then the binaries that carry them.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};
use clap::Args;

use crate::{
    dependencies, paths,
    setup::{self, EbpfToolchain},
    shell::{self, Progress},
};

#[derive(Args, Clone, Default)]
pub struct Options {
    /// Optimise; leaves the programs' debug messages out
    #[arg(long)]
    pub release: bool,
}

/// The target of all binaries: statically linked, so that they run in any guest and image.
pub const TARGET: &str = "x86_64-unknown-linux-gnu";

/// For binaries that need no library of the guest's or the image's.
const FLAGS: &str = "-C target-feature=+crt-static";

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
    shell::counted_step("build the binaries", |progress| binaries(options, &objects, &[], &[], progress))
}

/// A kind of layout that an agent of the tests has of another version, for testing upgrades.
#[derive(Clone, Copy)]
pub enum Another {
    State,
    Policy,
    Records,
}

impl Another {
    pub const ALL: &[Self] = &[Self::State, Self::Policy, Self::Records];

    /// The feature of `palisade-abi`.
    fn feature(self) -> &'static str {
        match self {
            Self::State => "another-state",
            Self::Policy => "another-policy",
            Self::Records => "another-records",
        }
    }

    /// Where the agent stands in a machine.
    pub fn place(self) -> &'static str {
        match self {
            Self::State => "bin/palisade-agent-of-another-state",
            Self::Policy => "bin/palisade-agent-of-another-policy",
            Self::Records => "bin/palisade-agent-of-another-records",
        }
    }
}

/// Builds an agent of the tests: a layout of it is of another version, and it loads other objects from the folder that
/// `PALISADE_TEST_OBJECTS` names. One build serves both, since each takes a minute; less where nothing is `measured` with it.
pub fn test_agent(another: Another, measured: bool) -> Result<PathBuf> {
    let what = format!("build the agent of the tests ({})", another.feature());
    shell::counted_step(&what, |progress| {
        let objects = ebpf(&[another.feature()], another.feature())?;
        let options = Options { release: true };
        let mut settings = Vec::new();
        if !measured {
            settings.extend(["--config", "profile.release.package.palisade-agent.opt-level=1"]);
        }
        let feature = format!("palisade-agent/{}", another.feature());
        let features = [feature.as_str(), "palisade-agent/test-objects"];
        let folder = binaries(&options, &objects, &features, &settings, progress)?;
        let kept = folder.join(another.place().trim_start_matches("bin/"));
        std::fs::copy(folder.join("palisade-agent"), &kept)?;
        Ok(kept)
    })
}

/// Builds programs with bugs that a map switches on, for [`test_agent`].
pub fn planted() -> Result<PathBuf> {
    // Only what the kernel that they run on takes.
    shell::step("build programs with planted bugs", || {
        ebpf_variants(&VARIANTS[..1], &["planted", "another-state"], "planted")
    })
}

/// Builds programs that make records by themselves, for [`test_agent`].
pub fn generator() -> Result<PathBuf> {
    shell::step("build the generator of records", || ebpf(&["generator", "another-state"], "generator"))
}

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
        // What debuggers read is most of the object, and the agent carries and parses it. What the kernel is told comes from `.BTF`.
        let stripped = built.with_extension("stripped");
        let mut strip = Command::new(setup::OBJCOPY);
        strip.arg("--strip-debug").args([&built, &stripped]);
        shell::quiet(&mut strip, &format!("strip-{}-{variant}", name.replace('/', "-")))?;
        copy_if_changed(&stripped, &output.join(format!("{variant}.o")))?;
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

/// Builds all binaries, or with features the agent alone, and returns their folder.
fn binaries(
    options: &Options,
    objects: &Path,
    features: &[&str],
    settings: &[&str],
    progress: &Progress,
) -> Result<PathBuf> {
    let profile = if options.release { "release" } else { "debug" };
    let mut target = paths::target();
    let mut command = Command::new("cargo");
    command.arg("build").args(["--target", TARGET]);
    // Always the same packages, so that what they depend on has the same features and is compiled once.
    for package in PACKAGES {
        command.args(["--package", package]);
    }
    if options.release {
        command.arg("--release");
    }
    if !features.is_empty() {
        command.args(["--features", &features.join(","), "--bin", "palisade-agent"]);
        command.args(settings);
        // A build with features has a folder of its own, so that it never stands in for the plain one.
        target = target.join("test-build");
        dependencies::copy(&paths::target(), &target, &[profile, &format!("{TARGET}/{profile}")])?;
    }
    command
        .current_dir(paths::repository())
        .env("CARGO_TARGET_DIR", &target)
        .env("PALISADE_EBPF_OBJECTS", objects)
        .env("RUSTFLAGS", FLAGS)
        .env_remove("CARGO_ENCODED_RUSTFLAGS");
    let mut build = || shell::cargo(&mut command, "binaries", progress);
    if features.is_empty() {
        dependencies::cached(&target, &[profile, &format!("{TARGET}/{profile}")], FLAGS, build)?;
    } else {
        build()?;
    }
    Ok(target.join(TARGET).join(profile))
}
