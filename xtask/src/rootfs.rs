//! The guest's root file system: Debian with two generations of containerd and of runc, crun, Podman and Docker; the
//! images are already imported into both containerds.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    debian::Index,
    images::{APPS, Image},
    paths, shell,
};

const SUITE: &str = "trixie";
const PACKAGES: &str =
    "containerd,runc,crun,podman,docker.io,docker-cli,iproute2,procps,libseccomp2,e2fsprogs,dmsetup";
/// Newer versions, unpacked beside Debian's own under /opt.
const NEXT: &[(&str, &str)] = &[("runc", "opt/runc-next"), ("containerd", "opt/containerd-next")];
const INIT: &str = include_str!("../guest/init.sh");
const CONTAINERD: &str = include_str!("../guest/containerd.toml");

/// The disk image with `images` imported, made when there is none yet.
pub fn prepare(images: &[Image]) -> Result<PathBuf> {
    let base = base()?;
    let names: Vec<String> = images.iter().map(|image| image.archive.display().to_string()).collect();
    let recipe = paths::fingerprint(&[
        base.display().to_string().as_bytes(),
        names.join("\n").as_bytes(),
        INIT.as_bytes(),
        CONTAINERD.as_bytes(),
    ]);
    let disks = paths::cache("disks")?;
    let disk = disks.join(format!("{recipe}.ext4"));
    if disk.exists() {
        return Ok(disk);
    }
    shell::step("make the guest's disk", || {
        remove_oldest(&disks, 3)?;
        let work = tempfile::tempdir_in(&disks)?;
        let root = work.path().join("root");
        shell::quiet(Command::new("cp").arg("-a").arg(&base).arg(&root), "copy-rootfs")?;
        std::fs::write(root.join("sbin/palisade-guest"), INIT)?;
        shell::read(Command::new("chmod").arg("755").arg(root.join("sbin/palisade-guest")))?;
        std::fs::create_dir_all(root.join("etc/containerd"))?;
        std::fs::write(root.join("etc/containerd/config.toml"), CONTAINERD)?;
        import(&root, "containerd", "/var/lib/containerd", images)?;
        // Only the first has the services, for their size.
        let small: Vec<&Image> = images.iter().filter(|image| image.name != APPS).collect();
        import(&root, "/opt/containerd-next/usr/bin/containerd", "/var/lib/containerd-next", small)?;
        // Of this process alone: another one may be making the same disk.
        let partial = work.path().join("disk.ext4");
        shell::quiet(
            Command::new("mkfs.ext4")
                .args(["-q", "-F", "-O", "^has_journal", "-E", "lazy_itable_init=1", "-d"])
                .arg(&root)
                .arg(&partial)
                .arg("4G"),
            "mkfs",
        )?;
        std::fs::rename(&partial, &disk)?;
        Ok(())
    })?;
    Ok(disk)
}

/// Fetches what of the disk does not depend on the images.
pub fn fetch() -> Result<()> {
    base().map(drop)
}

/// Debian itself, without images.
fn base() -> Result<PathBuf> {
    let recipe = paths::fingerprint(&[SUITE.as_bytes(), PACKAGES.as_bytes(), format!("{NEXT:?}").as_bytes()]);
    let folder = paths::cache("rootfs")?.join(format!("{SUITE}-{recipe}"));
    let root = folder.join("root");
    if folder.join("complete").exists() {
        return Ok(root);
    }
    shell::step("make the guest's Debian", || {
        let _may_be_absent = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder)?;
        let sources = folder.join("sources.list");
        let index = Index::open()?;
        std::fs::write(&sources, Index::sources_of(SUITE)?)?;
        shell::quiet(
            Command::new("mmdebstrap")
                .args(["--variant=minbase", &format!("--include={PACKAGES}")])
                .args(["--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/man/*"])
                .args(["--dpkgopt=path-exclude=/usr/share/locale/*"])
                .arg(SUITE)
                .arg(&root)
                .arg(&sources),
            "mmdebstrap",
        )?;
        for (package, folder) in NEXT {
            index.unpack(&[index.newest_in(package, "sid")?], &root.join(folder))?;
        }
        std::fs::write(folder.join("complete"), "")?;
        Ok(())
    })?;
    Ok(root)
}

/// Imports with the guest's own containerd at `program` into its folder `store`, in its root, at native speed.
fn import<'a>(
    root: &Path,
    program: &str,
    store: &str,
    images: impl IntoIterator<Item = &'a Image>,
) -> Result<()> {
    let mount = |arguments: &[&str], target: &str| {
        shell::read(Command::new("mount").args(arguments).arg(root.join(target)))
    };
    let _mounted = Unmount(root.to_owned());
    mount(&["-t", "proc", "proc"], "proc")?;
    mount(&["--rbind", "--make-rslave", "/dev"], "dev")?;
    mount(&["-t", "tmpfs", "tmpfs"], "run")?;
    std::fs::create_dir_all(root.join("import"))?;
    let chroot = |words: &[&str]| {
        let mut command = Command::new("chroot");
        command.arg(root).args(words).stdin(Stdio::null());
        command
    };
    let log = std::fs::File::create(root.join("import/log"))?;
    let config = root.join("import/config.toml");
    // The btrfs snapshotter asks for the mount of its folder, which a chroot hides, and takes all else down with it.
    let text = format!(
        "version = 2\nroot = {store:?}\ndisabled_plugins = [\"io.containerd.snapshotter.v1.btrfs\"]\n"
    );
    std::fs::write(&config, text)?;
    let daemon = chroot(&[program, "--config", "/import/config.toml"])
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("cannot start the guest's containerd")?;
    let mut daemon = KillOnDrop(daemon);
    let begun = Instant::now();
    while shell::read(&mut chroot(&["ctr", "--connect-timeout", "1s", "version"])).is_err() {
        if begun.elapsed() > Duration::from_secs(60) || daemon.0.try_wait()?.is_some() {
            bail!(
                "the guest's containerd does not answer:\n{}",
                std::fs::read_to_string(root.join("import/log")).unwrap_or_default()
            );
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    for image in images {
        let copy = root.join("import/image.tar");
        std::fs::copy(&image.archive, &copy)?;
        shell::read(&mut chroot(&["ctr", "-n", "k8s.io", "images", "import", "/import/image.tar"]))
            .with_context(|| format!("importing {}", image.name))?;
    }
    drop(daemon);
    std::fs::remove_dir_all(root.join("import"))?;
    Ok(())
}

struct KillOnDrop(Child);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        // SIGTERM, so that the database is closed.
        let _gone_already = rustix::process::kill_process(
            rustix::process::Pid::from_child(&self.0),
            rustix::process::Signal::TERM,
        );
        let _reaped = self.0.wait();
    }
}

struct Unmount(PathBuf);

impl Drop for Unmount {
    fn drop(&mut self) {
        for part in ["proc", "dev", "run"] {
            let _not_mounted = Command::new("umount")
                .args(["--recursive", "--lazy"])
                .arg(self.0.join(part))
                .stderr(Stdio::null())
                .status();
        }
    }
}

/// Keeps the cache from growing with every change of an image.
fn remove_oldest(folder: &Path, keep: usize) -> Result<()> {
    let mut disks: Vec<(std::time::SystemTime, PathBuf)> = std::fs::read_dir(folder)?
        .filter_map(Result::ok)
        .filter(|entry| entry.path().extension().is_some_and(|extension| extension == "ext4"))
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    disks.sort();
    let surplus = disks.len().saturating_sub(keep);
    for (_, path) in disks.into_iter().take(surplus) {
        std::fs::remove_file(path)?;
    }
    Ok(())
}
