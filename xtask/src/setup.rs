//! Installing what is missing, once, and saying so.

use std::{path::Path, process::Command};

use anyhow::{Context as _, Result, bail};

use crate::{paths, shell};

/// Packages, and a path of each that shows it is there.
const PACKAGES: &[(&str, &str)] = &[
    ("gcc", "/usr/bin/gcc"),
    ("g++", "/usr/bin/g++"),
    ("libc6-dev", "/usr/include/stdlib.h"),
    ("protobuf-compiler", "/usr/bin/protoc"),
    ("libprotobuf-dev", "/usr/include/google/protobuf/descriptor.proto"),
    ("qemu-system-x86", "/usr/bin/qemu-system-x86_64"),
    ("mmdebstrap", "/usr/bin/mmdebstrap"),
    ("containerd", "/usr/bin/containerd"),
    ("runc", "/usr/sbin/runc"),
    ("busybox-static", "/bin/busybox"),
    ("e2fsprogs", "/sbin/mkfs.ext4"),
    ("kmod", "/sbin/modprobe"),
    ("cpio", "/usr/bin/cpio"),
    ("xz-utils", "/usr/bin/xz"),
    ("llvm-22", OBJCOPY),
];

/// What the eBPF compiler takes from Debian when rustup has no nightly with `rust-src`.
const EBPF_PACKAGES: &[(&str, &str)] = &[
    ("rustc-web", "/usr/bin/rustc"),
    ("cargo-web", "/usr/bin/cargo"),
    ("libstd-rust-web-dev-bpf", "/usr/lib/rustlib/bpfel-unknown-none/lib"),
];

/// What bpf-linker is built against.
const LLVM_PACKAGES: &[(&str, &str)] = &[
    ("llvm-22-dev", "/usr/lib/llvm-22/bin/llvm-config"),
    ("clang-22", "/usr/bin/clang-22"),
    ("libpolly-22-dev", "/usr/lib/llvm-22/lib/libPolly.a"),
    ("zlib1g-dev", "/usr/include/zlib.h"),
    ("libzstd-dev", "/usr/include/zstd.h"),
];

const LINKER_VERSION: &str = "0.13.0";

/// How the eBPF programs are compiled here.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum EbpfToolchain {
    /// Debian's compiler, which ships a `core` for BPF.
    Debian,
    /// A rustup nightly that builds `core` from `rust-src`.
    Nightly,
}

/// A nightly with `rust-src` wins, since whoever has one chose it.
pub fn ebpf_toolchain() -> EbpfToolchain {
    let sysroot = shell::read(Command::new("rustup").args(["run", "nightly", "rustc", "--print", "sysroot"]));
    let has_source = sysroot.is_ok_and(|root| {
        Path::new(root.trim()).join("lib/rustlib/src/rust/library/core/Cargo.toml").exists()
    });
    if has_source { EbpfToolchain::Nightly } else { EbpfToolchain::Debian }
}

/// Takes sections out of objects.
pub const OBJCOPY: &str = "/usr/lib/llvm-22/bin/llvm-objcopy";

/// The linker that `cargo install` puts beside cargo.
pub fn bpf_linker() -> Result<std::path::PathBuf> {
    Ok(paths::cache("tools")?.join("bin/bpf-linker"))
}

fn missing<'a>(packages: &[(&'a str, &'a str)]) -> Vec<&'a str> {
    packages.iter().filter(|(_, path)| !Path::new(path).exists()).map(|(name, _)| *name).collect()
}

/// Installs everything. Does nothing, and takes no time, when all is there.
pub fn run() -> Result<()> {
    let mut wanted = missing(PACKAGES);
    if ebpf_toolchain() == EbpfToolchain::Debian {
        wanted.extend(missing(EBPF_PACKAGES));
    }
    let linker = bpf_linker()?;
    if !linker.exists() {
        wanted.extend(missing(LLVM_PACKAGES));
    }
    install(&wanted)?;
    if !linker.exists() {
        let root = paths::cache("tools")?;
        shell::step("build bpf-linker", || {
            shell::quiet(
                Command::new("cargo")
                    .args(["install", "bpf-linker", "--version", LINKER_VERSION, "--locked"])
                    .args(["--no-default-features", "--features", "llvm-22", "--root"])
                    .arg(&root)
                    .env("LLVM_PREFIX", "/usr/lib/llvm-22")
                    .env_remove("CARGO_TARGET_DIR"),
                "bpf-linker",
            )
        })?;
    }
    Ok(())
}

fn install(wanted: &[&str]) -> Result<()> {
    if wanted.is_empty() {
        return Ok(());
    }
    let words = wanted.join(" ");
    if !rustix::process::geteuid().is_root() || !Path::new("/usr/bin/apt-get").exists() {
        bail!(
            "these Debian packages are needed and cannot be installed from here: {words}\n\
               as root: apt-get install --no-install-recommends {words}"
        );
    }
    shell::step(&format!("install {words}"), || {
        let apt = |arguments: &[&str], log| {
            shell::quiet(
                Command::new("apt-get").args(arguments).env("DEBIAN_FRONTEND", "noninteractive"),
                log,
            )
        };
        apt(&["update"], "apt-update")?;
        let mut arguments = vec!["install", "--yes", "--no-install-recommends"];
        arguments.extend(wanted);
        if apt(&arguments, "apt-install").is_err() {
            // An interrupted installation is the usual cause; finish it and try once more.
            apt(&["--fix-broken", "--yes", "install"], "apt-fix")?;
            apt(&arguments, "apt-install")?;
        }
        Ok(())
    })
    .context("the remedy is to install them by hand and run this again")
}
