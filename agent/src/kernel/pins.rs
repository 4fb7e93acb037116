//! The folder on the host's bpffs in which programs, maps and links outlive the agent.
//!
//! | entry | what |
//! |---|---|
//! | `active_epoch` | the one map that all sets share: which of them makes records |
//! | `<set>/maps`, `<set>/programs`, `<set>/links` | a set that is in force |
//! | `<set>-new/` | one that is being put in force; whoever finds it takes it away |
//!
//! A set is named by the versions of its layouts and a fingerprint of its programs and map sizes. One agent at a time holds the lock
//! of the folder: two readers of one ring corrupt each other.

use std::{
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use rustix::{
    fs::{FlockOperation, Mode, OFlags, flock, open, statfs},
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen},
};

/// `BPF_FS_MAGIC` of include/uapi/linux/magic.h.
const BPFFS: u64 = 0xcafe_4a11;
/// How long an agent that still ends is waited for.
const PATIENCE: Duration = Duration::from_secs(10);
const RETRY: Duration = Duration::from_millis(100);
/// Ends the name of a set that is not complete. A bpffs keeps names with dots for itself.
const UNFINISHED: &str = "-new";
const ACTIVE_EPOCH: &str = "active_epoch";
/// The kinds of things in a set, in the order in which they are taken away: what is attached first.
const KINDS: [&str; 3] = ["links", "programs", "maps"];

/// The folder, locked.
pub struct Pins {
    root: PathBuf,
    /// Whether it is on the host's bpffs, and so outlives the agent.
    pub lasting: bool,
    held: OwnedFd,
}

/// One set's place.
#[derive(Clone, Debug)]
pub struct SetFolder(PathBuf);

impl SetFolder {
    /// Names of the maps that are pinned.
    ///
    /// # Errors
    ///
    /// When the folder cannot be read.
    pub fn map_names(&self) -> Result<Vec<String>> {
        let folder = self.0.join("maps");
        let entries =
            std::fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
        entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    }

    pub fn map(&self, name: &str) -> PathBuf {
        self.0.join("maps").join(name)
    }

    pub fn program(&self, name: &str) -> PathBuf {
        self.0.join("programs").join(name)
    }

    pub fn link(&self, name: &str) -> PathBuf {
        self.0.join("links").join(name)
    }
}

impl Pins {
    /// Opens the folder `root` on the host's bpffs, makes it where it is missing, and locks it.
    ///
    /// # Errors
    ///
    /// When it is not on a bpffs, not root's alone, or held by another agent.
    pub fn open(root: &Path) -> Result<Self> {
        let above = root.parent().context("pins: names no folder below a bpffs")?;
        if !Self::is_bpffs(above) {
            bail!(
                "{} is not a bpffs, so enforcement would end with the agent; mount one (mount -t bpf bpf {}), or write pins: \
                 none",
                above.display(),
                above.display()
            );
        }
        match std::fs::DirBuilder::new().mode(0o700).create(root) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(error).with_context(|| format!("cannot make {}", root.display()));
            }
            _ => {}
        }
        // Anybody may make links on a bpffs: one would lead to a folder of somebody else's.
        let metadata =
            std::fs::symlink_metadata(root).with_context(|| format!("cannot look at {}", root.display()))?;
        if !metadata.is_dir() || metadata.uid() != 0 || metadata.permissions().mode() & 0o077 != 0 {
            bail!(
                "{} must be a folder of root's alone and no link (chown root, chmod 700): whoever writes there can end \
                 enforcement",
                root.display()
            );
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let held =
            open(root, flags, Mode::empty()).with_context(|| format!("cannot open {}", root.display()))?;
        let begun = Instant::now();
        while let Err(error) = flock(&held, FlockOperation::NonBlockingLockExclusive) {
            if error != rustix::io::Errno::WOULDBLOCK {
                return Err(error).with_context(|| format!("cannot lock {}", root.display()));
            }
            if begun.elapsed() > PATIENCE {
                bail!(
                    "another agent holds {}; stop it first: delete its DaemonSet, or disable its unit",
                    root.display()
                );
            }
            std::thread::sleep(RETRY);
        }
        let pins = Self { root: root.to_owned(), lasting: true, held };
        // Whoever held it may have taken the folder away.
        if pins.is_in_place() { Ok(pins) } else { Self::open(root) }
    }

    /// Whether a folder is on a bpffs.
    pub fn is_bpffs(folder: &Path) -> bool {
        statfs(folder).is_ok_and(|found| found.f_type as u64 == BPFFS)
    }

    /// The process that holds the lock of `root`, by the kernel's list of locks; `None` when nobody does.
    ///
    /// # Errors
    ///
    /// When the list cannot be read.
    pub fn holder(root: &Path) -> Result<Option<u32>> {
        let metadata =
            std::fs::metadata(root).with_context(|| format!("cannot look at {}", root.display()))?;
        let (major, minor) = (rustix::fs::major(metadata.dev()), rustix::fs::minor(metadata.dev()));
        let file = format!("{major:02x}:{minor:02x}:{}", metadata.ino());
        let locks = std::fs::read_to_string("/proc/locks").context("cannot read /proc/locks")?;
        // `1: FLOCK  ADVISORY  WRITE 4242 00:1a:7 0 EOF`; one that waits has `->` after its number.
        Ok(locks.lines().find_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            match fields.as_slice() {
                [_, "FLOCK", _, "WRITE", pid, found, ..] if *found == file => pid.parse().ok(),
                _ => None,
            }
        }))
    }

    /// A folder on a bpffs of this process's own, which ends with it.
    ///
    /// # Errors
    ///
    /// Without the right to mount.
    pub fn private() -> Result<Self> {
        let made = || {
            let context = fsopen("bpf", FsOpenFlags::FSOPEN_CLOEXEC)?;
            fsconfig_create(&context)?;
            fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())
        };
        let held = made().context("cannot make a bpffs of the agent's own")?;
        let root = PathBuf::from(format!("/proc/self/fd/{}", held.as_raw_fd()));
        Ok(Self { root, lasting: false, held })
    }

    /// All complete sets below `root`, and the map that says which of them records; nothing where nothing is pinned.
    ///
    /// # Errors
    ///
    /// When the folder cannot be read.
    pub fn complete(root: &Path) -> Result<(Vec<SetFolder>, PathBuf)> {
        let mut sets = Vec::new();
        if root.exists() {
            for entry in std::fs::read_dir(root).with_context(|| format!("cannot read {}", root.display()))? {
                let entry = entry?;
                if entry.file_type()?.is_dir() && !Self::is_unfinished(&entry.file_name().to_string_lossy()) {
                    sets.push(SetFolder(entry.path()));
                }
            }
        }
        Ok((sets, root.join(ACTIVE_EPOCH)))
    }

    /// Device number in the kernel's encoding (`major << 20 | minor`) and inode of the folder on the host's bpffs.
    pub fn identity(&self) -> Option<(u32, u64)> {
        let found = rustix::fs::fstat(&self.held).ok().filter(|_| self.lasting)?;
        let device = rustix::fs::major(found.st_dev) << 20 | rustix::fs::minor(found.st_dev);
        Some((device, found.st_ino))
    }

    /// Whether the folder is still the one that was locked.
    pub fn is_in_place(&self) -> bool {
        let held = rustix::fs::fstat(&self.held).map(|found| (found.st_dev, found.st_ino)).ok();
        let there = std::fs::metadata(&self.root).map(|found| (found.dev(), found.ino())).ok();
        held.is_some() && (!self.lasting || held == there)
    }

    /// Makes the folder anew after somebody took it away; mounts a bpffs where there is none any more.
    ///
    /// # Errors
    ///
    /// When that cannot be done.
    pub fn restore(&mut self) -> Result<()> {
        let above = self.root.parent().context("pins: names no folder below a bpffs")?;
        if !Self::is_bpffs(above) {
            rustix::mount::mount("bpf", above, "bpf", rustix::mount::MountFlags::empty(), None)
                .with_context(|| format!("cannot mount a bpffs at {}", above.display()))?;
        }
        self.held = Self::open(&self.root)?.held;
        Ok(())
    }

    /// The place of the set `name`, with whatever folders of it are missing.
    ///
    /// # Errors
    ///
    /// When they cannot be made.
    pub fn make(&self, name: &str) -> Result<SetFolder> {
        let folder = self.root.join(name);
        for kind in KINDS {
            let path = folder.join(kind);
            std::fs::DirBuilder::new()
                .mode(0o700)
                .recursive(true)
                .create(&path)
                .with_context(|| format!("cannot make {}", path.display()))?;
        }
        Ok(SetFolder(folder))
    }

    /// Where the map is pinned that says which set records.
    pub fn active_epoch(&self) -> PathBuf {
        self.root.join(ACTIVE_EPOCH)
    }

    /// The place of the complete set `name`, if there is one.
    pub fn find(&self, name: &str) -> Option<SetFolder> {
        let folder = self.root.join(name);
        folder.is_dir().then_some(SetFolder(folder))
    }

    /// Names of all sets, those that are not complete among them.
    ///
    /// # Errors
    ///
    /// When the folder cannot be read.
    pub fn sets(&self) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in
            std::fs::read_dir(&self.root).with_context(|| format!("cannot read {}", self.root.display()))?
        {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                names.push(entry.file_name().to_string_lossy().into_owned());
            }
        }
        names.sort();
        Ok(names)
    }

    /// Whether a set of this name was never completed.
    pub fn is_unfinished(name: &str) -> bool {
        name.ends_with(UNFINISHED)
    }

    /// Makes the place of a new set, which is not complete until [`Pins::finish`].
    ///
    /// # Errors
    ///
    /// When it cannot be made.
    pub fn begin(&self, name: &str) -> Result<SetFolder> {
        let unfinished = format!("{name}{UNFINISHED}");
        self.remove(&unfinished)?;
        self.make(&unfinished)
    }

    /// Makes room for a set of the same name as one that is no use; that one stays in force until it is removed.
    ///
    /// # Errors
    ///
    /// When it cannot be renamed.
    pub fn set_aside(&self, name: &str) -> Result<()> {
        let aside = (0_u32..)
            .map(|number| self.root.join(format!("{name}-old{number}")))
            .find(|path| !path.exists())
            .context("no name is free")?;
        std::fs::rename(self.root.join(name), &aside)
            .with_context(|| format!("cannot rename {name} to {}", aside.display()))
    }

    /// Takes the programs of a set out of force, and leaves its maps.
    ///
    /// # Errors
    ///
    /// When a link stays.
    pub fn detach(&self, name: &str) -> Result<()> {
        let links = self.root.join(name).join(KINDS[0]);
        let entries = match std::fs::read_dir(&links) {
            // What is no folder, somebody else has put there.
            Err(error)
                if matches!(
                    error.kind(),
                    std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory
                ) =>
            {
                return Ok(());
            }
            entries => entries.with_context(|| format!("cannot read {}", links.display()))?,
        };
        for entry in entries {
            let path = entry?.path();
            std::fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
        Ok(())
    }

    /// Says that a set is complete; returns its place.
    ///
    /// # Errors
    ///
    /// When it cannot be renamed.
    pub fn finish(&self, name: &str) -> Result<SetFolder> {
        let folder = self.root.join(name);
        std::fs::rename(self.root.join(format!("{name}{UNFINISHED}")), &folder)
            .with_context(|| format!("cannot complete {}", folder.display()))?;
        Ok(SetFolder(folder))
    }

    /// Takes a set away, the links first; what is not there is taken away already.
    ///
    /// # Errors
    ///
    /// When something of it stays.
    pub fn remove(&self, name: &str) -> Result<()> {
        let mut folder = self.root.join(name);
        if !Self::is_unfinished(name) && folder.exists() {
            // Nobody may take over half of it.
            let unfinished = self.root.join(format!("{name}{UNFINISHED}"));
            if unfinished.exists() {
                self.remove(&format!("{name}{UNFINISHED}"))?;
            }
            std::fs::rename(&folder, &unfinished)
                .with_context(|| format!("cannot rename {}", folder.display()))?;
            folder = unfinished;
        }
        // And whatever somebody else has put there.
        for below in KINDS.map(|kind| folder.join(kind)).iter().chain([&folder]) {
            let removed = match std::fs::symlink_metadata(below) {
                Ok(found) if !found.is_dir() => std::fs::remove_file(below),
                _ => std::fs::remove_dir_all(below),
            };
            match removed {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("cannot remove {}", below.display()));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Takes everything away, the folder itself included. Returns the names of the sets that were there.
    ///
    /// # Errors
    ///
    /// When something stays.
    pub fn remove_all(self) -> Result<Vec<String>> {
        let sets = self.sets()?;
        for set in &sets {
            self.remove(set)?;
        }
        match std::fs::remove_file(self.active_epoch()) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error)
                    .with_context(|| format!("cannot remove {}", self.active_epoch().display()));
            }
            _ => {}
        }
        std::fs::remove_dir(&self.root).with_context(|| format!("cannot remove {}", self.root.display()))?;
        Ok(sets)
    }
}
