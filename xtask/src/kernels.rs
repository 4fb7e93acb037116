//! The kernels that Palisade is tested on, and the small initial file system that boots them.

use std::{
    fmt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;

use crate::{
    debian::{Index, Package},
    paths, shell,
};

/// A supported kernel line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Kernel {
    #[value(name = "5.10")]
    V5_10,
    #[value(name = "6.1")]
    V6_1,
    #[value(name = "6.12")]
    V6_12,
    /// The newest that Debian has, at least 7.2
    #[value(name = "newest")]
    Newest,
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V5_10 => "5.10",
            Self::V6_1 => "6.1",
            Self::V6_12 => "6.12",
            Self::Newest => "newest",
        })
    }
}

impl Kernel {
    pub const ALL: [Self; 4] = [Self::V5_10, Self::V6_1, Self::V6_12, Self::Newest];

    /// Names of its image packages. Only the flavour for clouds: small, and what nodes run.
    fn pattern(self) -> &'static str {
        match self {
            Self::V5_10 => r"^linux-image-5\.10\.0-[0-9]+-cloud-amd64$",
            Self::V6_1 => r"^linux-image-6\.1\.0-[0-9]+-cloud-amd64$",
            Self::V6_12 => r"^linux-image-6\.12\.[0-9]+\+deb12-cloud-amd64$",
            Self::Newest => r"^linux-image-[7-9][0-9.]*\+deb[0-9]+-cloud-amd64$",
        }
    }

    /// What the command line must say beside the common part.
    fn parameters(self) -> &'static str {
        match self {
            // BPF LSM is compiled into 5.10 but is not in its default list.
            Self::V5_10 => "lsm=lockdown,yama,apparmor,bpf",
            Self::V6_1 | Self::V6_12 | Self::Newest => "",
        }
    }
}

/// Modules that the guest needs, loaded before its root is mounted.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_blk",
    "ext4",
    "overlay",
    "virtio_console",
    "veth",
    "bridge",
    "tun",
    "binfmt_misc",
    // A disk whose power is cut.
    "loop",
    "dm-log-writes",
];

/// A kernel that is ready to boot.
pub struct Bootable {
    /// The exact version, as `uname -r` prints it.
    pub release: String,
    pub image: PathBuf,
    pub initramfs: PathBuf,
    pub parameters: &'static str,
}

/// Finds or fetches `kernel`.
pub fn prepare(kernel: Kernel) -> Result<Bootable> {
    let package = resolve(kernel)?;
    let folder = paths::cache("kernels")?.join(format!("{}_{}", package.name, package.version));
    let unpacked = folder.join("unpacked");
    if !folder.join("complete").exists() {
        shell::step(&format!("fetch kernel {kernel}: {} {}", package.name, package.version), || {
            let index = Index::open()?;
            let mut packages = vec![package.clone()];
            for part in ["linux-binary-", "linux-modules-", "linux-base-"] {
                packages.extend(index.dependencies(&package, part)?);
            }
            packages.retain(|package| package.name != "linux-base");
            index.unpack(&packages, &unpacked)?;
            std::fs::write(folder.join("complete"), "")?;
            Ok(())
        })?;
    }
    let (release, modules) = modules_folder(&unpacked)?;
    let image = [unpacked.join(format!("boot/vmlinuz-{release}")), modules.join("vmlinuz")]
        .into_iter()
        .find(|path| path.exists())
        .with_context(|| format!("no kernel image in {}", unpacked.display()))?;
    let recipe = paths::fingerprint(&[include_bytes!("kernels.rs"), INIT.as_bytes()]);
    let initramfs = folder.join(format!("initramfs-{recipe}.cpio"));
    if !initramfs.exists() {
        shell::step(&format!("make the initial file system of {release}"), || {
            make_initramfs(&unpacked, &release, &initramfs)
        })?;
    }
    Ok(Bootable { release, image, initramfs, parameters: kernel.parameters() })
}

/// The package of `kernel`: what was chosen last, for a week, then what is newest.
fn resolve(kernel: Kernel) -> Result<Package> {
    let note = paths::cache("kernels")?.join(format!("{kernel}.package"));
    let recent = note
        .metadata()
        .and_then(|metadata| metadata.modified())
        .is_ok_and(|time| time.elapsed().is_ok_and(|age| age.as_secs() < 7 * 24 * 3600));
    if recent && let Some((name, version)) = std::fs::read_to_string(&note)?.trim().split_once(' ') {
        return Ok(Package { name: name.to_owned(), version: version.to_owned() });
    }
    let package = Index::open()?
        .newest(kernel.pattern())?
        .with_context(|| format!("Debian's archives have no kernel {kernel}"))?;
    std::fs::write(&note, format!("{} {}", package.name, package.version))?;
    Ok(package)
}

fn modules_folder(unpacked: &Path) -> Result<(String, PathBuf)> {
    for base in ["usr/lib/modules", "lib/modules"] {
        let Ok(entries) = std::fs::read_dir(unpacked.join(base)) else { continue };
        for entry in entries {
            let entry = entry?;
            if entry.path().join("kernel").exists() {
                return Ok((entry.file_name().to_string_lossy().into_owned(), entry.path()));
            }
        }
    }
    bail!("no modules in {}", unpacked.display())
}

const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
for module in $(/bin/busybox cat /modules); do /bin/busybox insmod $module || echo "cannot load $module"; done
deadline=100
while [ ! -b /dev/vda ] && [ $deadline -gt 0 ]; do deadline=$((deadline - 1)); /bin/busybox usleep 50000; done
/bin/busybox mount -t ext4 /dev/vda /root || { echo "cannot mount the root file system"; /bin/busybox poweroff -f; }
/bin/busybox umount /proc
/bin/busybox mount --move /dev /root/dev
exec /bin/busybox switch_root /root /sbin/palisade-guest
"#;

fn make_initramfs(unpacked: &Path, release: &str, output: &Path) -> Result<()> {
    // kmod wants `lib/modules`; newer packages have `usr/lib/modules`.
    if !unpacked.join("lib").exists() {
        std::os::unix::fs::symlink("usr/lib", unpacked.join("lib"))?;
    }
    shell::quiet(Command::new("depmod").arg("-b").arg(unpacked).arg(release), "depmod")?;
    let root = tempfile::tempdir()?;
    for folder in ["bin", "dev", "proc", "root", "modules.d"] {
        std::fs::create_dir(root.path().join(folder))?;
    }
    std::fs::copy("/bin/busybox", root.path().join("bin/busybox"))
        .context("busybox-static is not installed")?;
    let init = root.path().join("init");
    std::fs::write(&init, INIT)?;
    shell::read(Command::new("chmod").arg("755").arg(&init))?;
    let mut order = Vec::new();
    for module in MODULES {
        // A module that is built in, or that this kernel does not have, prints no file.
        let shown = shell::read(Command::new("modprobe").arg("-d").arg(unpacked).args([
            "-S",
            release,
            "--show-depends",
            module,
        ]))
        .unwrap_or_default();
        for file in shown.lines().filter_map(|line| line.strip_prefix("insmod ")) {
            let path = PathBuf::from(file.trim());
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            let plain = name.trim_end_matches(".xz").trim_end_matches(".zst").to_owned();
            if order.contains(&plain) {
                continue;
            }
            let target = root.path().join("modules.d").join(&plain);
            if name == plain {
                std::fs::copy(&path, &target)?;
            } else {
                let tool = if name.ends_with(".xz") { "xz" } else { "zstd" };
                let output = Command::new(tool).args(["-d", "-c"]).arg(&path).output()?;
                std::fs::write(&target, output.stdout)?;
            }
            order.push(plain);
        }
    }
    let list: String = order.iter().map(|name| format!("/modules.d/{name}\n")).collect();
    std::fs::write(root.path().join("modules"), list)?;
    let partial = output.with_extension("partial");
    shell::quiet(
        Command::new("sh")
            .arg("-c")
            .arg("find . | cpio --quiet -o -H newc > \"$0\"")
            .arg(&partial)
            .current_dir(root.path()),
        "initramfs",
    )?;
    std::fs::rename(&partial, output)?;
    Ok(())
}
