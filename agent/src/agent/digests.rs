//! Rules that ask for a file's bytes: the image's file is read in the container's root, before its policy is in force.
//!
//! What the kernel takes for the image's cannot change afterwards: once it is written to, it is drift, which such a rule does not
//! allow. Nothing is kept from one container to another: a container that is started again has what it wrote before.

use std::{
    collections::BTreeMap,
    fs::File,
    io::Read as _,
    os::fd::{AsRawFd as _, OwnedFd},
    sync::mpsc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use palisade_profile::{digest::Digest, policy::Policy};
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, StatxFlags, fstat, openat, openat2, statx,
};
use sha2::{Digest as _, Sha256};

use super::Agent;

/// A larger file is not read, and its rule allows nothing.
const MOST_BYTES: u64 = 128 << 20;
/// How long the agent, and with NRI the container's start, waits for the files of a container.
const PATIENCE: Duration = Duration::from_millis(1000);
/// Attempts at a container's files, one each second.
const MOST_ATTEMPTS: u32 = 5;
/// `STATX_ATTR_MOUNT_ROOT` of include/uapi/linux/stat.h.
const MOUNT_ROOT: u64 = 0x2000;

/// What has been read of a container's files.
#[derive(Clone, Debug, Default)]
pub struct Digests {
    /// `None` for a file that cannot be read.
    known: BTreeMap<String, Option<Digest>>,
    attempts: u32,
}

impl Agent {
    /// The policy of a container with its pinned rules decided by what has been read.
    pub(super) fn verified(&self, slot: u64, policy: Policy) -> Policy {
        let known = self.containers.get(&slot).map(|container| &container.digests.known);
        policy.verified(|path| known?.get(path).copied().flatten())
    }

    /// Reads the files that `policy` asks about, as far as they have not been. Returns whether all are known: else it is to be
    /// tried again.
    pub(super) fn read_digests(&mut self, slot: u64, policy: &Policy) -> bool {
        let Some(container) = self.containers.get(&slot) else { return true };
        let known = &container.digests.known;
        let pinned = policy.exec.iter().flat_map(|exec| exec.pinned.keys());
        let open: Vec<String> = pinned
            .filter_map(|(path, _)| Some(path.exact()?.to_owned()))
            .filter(|path| !known.contains_key(path))
            .collect();
        if open.is_empty() {
            return true;
        }
        let (id, attempts) = (container.id.clone(), container.digests.attempts);
        let found = self.process_in_its_root(slot).map(|pid| {
            // By the first exec the kernel knows the root; before it, nobody but the runtime has chosen one.
            let device = if self.is_untouched(slot, pid) {
                None
            } else {
                Some(self.kernel.maps.state.root_device(slot))
            };
            read_all(pid, device, open.clone())
        });
        let mut found = found.unwrap_or_default();
        if attempts + 1 >= MOST_ATTEMPTS {
            for path in &open {
                found
                    .entry(path.clone())
                    .or_insert_with(|| Err(anyhow::anyhow!("it takes too long to read it")));
            }
        }
        let Some(container) = self.containers.get_mut(&slot) else { return true };
        container.digests.attempts += 1;
        for (path, digest) in found {
            if let Err(error) = &digest {
                let error = format!("{error:#}");
                tracing::error!(
                    container = id,
                    path,
                    error,
                    "a rule with sha256 allows nothing: its file cannot be read"
                );
            }
            container.digests.known.insert(path, digest.ok());
        }
        let known = &container.digests.known;
        for (path, wanted) in policy.exec.iter().flat_map(|exec| exec.pinned.keys()) {
            if let Some(path) = path.exact()
                && open.iter().any(|read| read == path)
                && let Some(Some(found)) = known.get(path)
                && found != wanted
            {
                tracing::warn!(container = id, path, %found, %wanted, "a rule with sha256 allows nothing: the image has other bytes there");
            }
        }
        open.iter().all(|path| known.contains_key(path))
    }
}

/// Digests of files of the process `pid`, as many as can be read in time. A thread that a file keeps waiting (a container may
/// have it watched) is left behind.
fn read_all(pid: u32, device: Option<Option<u64>>, paths: Vec<String>) -> BTreeMap<String, Result<Digest>> {
    let (results, arrived) = mpsc::channel();
    std::thread::spawn(move || {
        for path in paths {
            let digest = root_of(pid, device).and_then(|root| read(&root, &path));
            if results.send((path, digest)).is_err() {
                return;
            }
        }
    });
    let begun = Instant::now();
    let mut found = BTreeMap::new();
    while let Ok((path, digest)) = arrived.recv_timeout(PATIENCE.saturating_sub(begun.elapsed())) {
        found.insert(path, digest);
    }
    found
}

/// The root directory of the process `pid`, if it is the root of the container's root filesystem: what a process has chosen for
/// itself (`chroot`, a mount of its own) is not. `device` is what the kernel programs know the filesystem by; the outer `None`
/// when nobody but the runtime can have chosen.
pub(super) fn root_of(pid: u32, device: Option<Option<u64>>) -> Result<OwnedFd> {
    let path = format!("/proc/{pid}/root");
    let root = openat(CWD, &path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .with_context(|| format!("cannot open {path}"))?;
    let Some(device) = device else { return Ok(root) };
    let device = device.context("the container's root filesystem is not known yet")?;
    let found = statx(&root, c"", AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC, StatxFlags::INO)?;
    let own = u64::from(found.stx_dev_major) << 20 | u64::from(found.stx_dev_minor);
    ensure!(own == device, "the process has another filesystem for its root");
    ensure!(found.stx_attributes.bits() & MOUNT_ROOT != 0, "the process has a folder for its root");
    // A bind mount of a folder is a mount's root, too; the table says of which folder.
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", root.as_raw_fd()))?;
    let mount =
        info.lines().find_map(|line| line.strip_prefix("mnt_id:")).map(str::trim).context("no mnt_id")?;
    let table = std::fs::read_to_string(format!("/proc/{pid}/mountinfo"))?;
    let folder = table.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(' ').collect();
        (fields.first() == Some(&mount)).then(|| fields.get(3).copied().unwrap_or_default().to_owned())
    });
    ensure!(folder.as_deref() == Some("/"), "the process has a folder for its root: {folder:?}");
    Ok(root)
}

/// The digest of a file below `root`: neither links nor mounts are followed.
fn read(root: &OwnedFd, path: &str) -> Result<Digest> {
    let resolve = ResolveFlags::IN_ROOT
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_MAGICLINKS
        | ResolveFlags::NO_XDEV;
    // Not to wait for who writes to a pipe.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file: OwnedFd = openat2(root, path, flags, Mode::empty(), resolve)?;
    let stat = fstat(&file)?;
    ensure!(FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile, "it is no regular file");
    let size = u64::try_from(stat.st_size).unwrap_or(u64::MAX);
    ensure!(size <= MOST_BYTES, "it has {size} bytes, more than {MOST_BYTES}");
    let mut file = File::from(file).take(MOST_BYTES + 1);
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            count => hash.update(&buffer[..count]),
        }
    }
    ensure!(file.limit() > 0, "it grows while it is read");
    Ok(Digest(hash.finalize().into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_regular_file_on_the_root_filesystem_is_read() {
        let root = root_of(std::process::id(), None).unwrap();
        let folder = tempfile::tempdir_in("/var/tmp").unwrap();
        let file = folder.path().join("file");
        std::fs::write(&file, "abc").unwrap();
        let digest = read(&root, &file.display().to_string()).unwrap();
        // The example of FIPS 180-2.
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(digest.to_string(), expected);
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        for other in
            [link.display().to_string(), folder.path().display().to_string(), "/proc/version".to_owned()]
        {
            assert!(read(&root, &other).is_err(), "{other}");
        }
    }

    #[test]
    fn a_root_that_a_process_has_chosen_is_not_read() {
        let own = std::process::id();
        assert!(root_of(own, Some(None)).is_err(), "no filesystem is known");
        assert!(root_of(own, Some(Some(u64::MAX))).is_err(), "another filesystem is known");
    }
}
