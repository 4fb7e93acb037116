//! Acts that need another root directory or mount namespace, each on a thread of its own that ends with it.

use std::{
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd},
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, bail};
use aya::programs::{RawTracePoint, RawTracePointRunOptions, TestRun as _};
use palisade_abi::codes::origin;
use rustix::{
    mount::{MountFlags, MountPropagationFlags, mount, mount_change},
    thread::{UnshareFlags, unshare_unsafe},
};

/// Runs `work` on a thread that shares neither root and working directory nor, with `mounts`, the mount table
/// with the rest of the agent.
fn apart<T: Send>(mounts: bool, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                let mut flags = UnshareFlags::FS;
                if mounts {
                    flags |= UnshareFlags::NEWNS;
                }
                // SAFETY: the new thread holds no descriptor or lock that depends on what is unshared.
                unsafe { unshare_unsafe(flags) }.context("cannot leave the shared file system state")?;
                work()
            })
            .join()
            .map_err(|_| anyhow::anyhow!("the helper thread panicked"))?
    })
}

/// Lets the program `learn_root` store the superblock of `root` under `slot`, and what layers it has.
pub(super) fn learn(program: &RawTracePoint, slot: u64, root: &Path) -> Result<()> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    apart(false, || {
        rustix::process::chroot(root).with_context(|| format!("cannot enter {}", root.display()))?;
        std::env::set_current_dir("/").ok();
        let mut options = RawTracePointRunOptions::default();
        options.args[0] = slot;
        options.args[1] = now;
        let result = program.test_run(options)?;
        if result.return_value != 0 {
            bail!("the kernel could not store the root {}", root.display());
        }
        Ok(())
    })
}

/// What the program `probe_origin` says of a file that is open: a code of [`origin`].
pub(super) fn origin_of(program: &RawTracePoint, file: BorrowedFd) -> Result<u8> {
    let mut options = RawTracePointRunOptions::default();
    options.args[0] = u64::try_from(file.as_raw_fd())?;
    Ok(u8::try_from(program.test_run(options)?.return_value).unwrap_or(origin::UNKNOWN))
}

/// Proves that the program `probe_origin` tells a file of a lower layer from one of the upper layer, on an
/// overlay made for it that nobody else sees.
pub(super) fn prove_overlay(program: &RawTracePoint) -> Result<()> {
    let scratch = tempfile::tempdir().context("cannot make a scratch folder")?;
    let base: PathBuf = scratch.path().to_owned();
    apart(true, || {
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
            .context("cannot make mounts private")?;
        mount("tmpfs", &base, "tmpfs", MountFlags::empty(), None).context("cannot mount a scratch tmpfs")?;
        for folder in ["lower/of-image", "upper/of-container", "work", "merged"] {
            std::fs::create_dir_all(base.join(folder))?;
        }
        let options = format!("lowerdir={0}/lower,upperdir={0}/upper,workdir={0}/work", base.display());
        let merged = base.join("merged");
        let options = std::ffi::CString::new(options)?;
        mount("overlay", &merged, "overlay", MountFlags::empty(), options.as_c_str())
            .context("cannot mount a scratch overlay")?;
        for (folder, expected) in [("of-image", origin::IMAGE), ("of-container", origin::DRIFT)] {
            let opened = std::fs::File::open(merged.join(folder))?;
            let found = origin_of(program, opened.as_fd())?;
            if found != expected {
                bail!(
                    "a folder that is {} was taken for {}",
                    origin::name(expected).unwrap_or("?"),
                    origin::name(found).unwrap_or("nothing known")
                );
            }
        }
        Ok(())
    })
}
