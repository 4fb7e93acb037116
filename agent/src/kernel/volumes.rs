//! Telling the kernel which inode is the root of a mount in a container.
//!
//! A mount is opened by its path as the kernel prints it, without following symbolic links, and must then be the mount
//! that was meant: nothing that a container renames or links can put another in its place.

use std::{
    collections::HashMap as Table,
    os::fd::{AsRawFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use aya::{
    maps::{Array, HashMap, MapData},
    programs::{RawTracePoint, RawTracePointRunOptions, TestRun as _},
};
use palisade_abi::maps::{VOLUME_NAME_CAPACITY, Volume, VolumeKey, VolumeName};
use rustix::fs::{Mode, OFlags, ResolveFlags, open, openat2};

/// Mounts that are looked at in one container; a container may make more for itself.
const MOST_MOUNTS: usize = 1024;

/// An entry of the kernel's table of mounts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mounted {
    pub id: i32,
    /// Major and minor number of the superblock.
    pub device: String,
    /// What of the superblock is mounted, as a path in it.
    pub root: PathBuf,
    /// Where, seen from the process's root directory; no part of it is a symbolic link.
    pub point: PathBuf,
    pub filesystem: String,
}

/// The maps of volumes and of their names. A name is shared by all containers that have a volume of that name in the same
/// place.
pub(super) struct VolumeMaps {
    pub volumes: HashMap<MapData, VolumeKey, Volume>,
    pub names: Array<MapData, VolumeName>,
    /// Index of each text, and how many slots use it.
    indices: Table<String, (u32, usize)>,
    of_slot: Table<u64, Vec<String>>,
}

impl VolumeMaps {
    pub fn new(volumes: HashMap<MapData, VolumeKey, Volume>, names: Array<MapData, VolumeName>) -> Self {
        Self { volumes, names, indices: Table::new(), of_slot: Table::new() }
    }

    /// The index of `text`, whose first `mark` bytes are the name, for `slot`.
    pub fn index(&mut self, slot: u64, text: &str, mark: usize) -> Result<u32> {
        let own = self.of_slot.entry(slot).or_default();
        let known = self.indices.get_mut(text);
        if let Some((index, users)) = known {
            if !own.iter().any(|used| used == text) {
                *users += 1;
                own.push(text.to_owned());
            }
            return Ok(*index);
        }
        let taken: std::collections::HashSet<u32> = self.indices.values().map(|(index, _)| *index).collect();
        let index = (0..self.names.len()).find(|index| !taken.contains(index)).context(
            "no room for another name of a volume; raise maps.volumeNames in the agent's configuration",
        )?;
        let start =
            VOLUME_NAME_CAPACITY.checked_sub(text.len()).context("the name of a volume is too long")?;
        let mut name = VolumeName {
            text: [0; VOLUME_NAME_CAPACITY],
            length: u32::try_from(text.len())?,
            mark: u32::try_from(mark)?,
        };
        name.text[start..].copy_from_slice(text.as_bytes());
        self.names.set(index, name, 0).context("cannot write the name of a volume")?;
        self.indices.insert(text.to_owned(), (index, 1));
        own.push(text.to_owned());
        Ok(index)
    }

    /// Forgets the volumes of a slot that no process is in any more.
    pub fn forget(&mut self, slot: u64) {
        let Some(texts) = self.of_slot.remove(&slot) else { return };
        let keys: Vec<VolumeKey> =
            self.volumes.keys().filter_map(Result::ok).filter(|key| key.slot == slot).collect();
        for key in keys {
            let _gone_is_gone = self.volumes.remove(&key);
        }
        for text in texts {
            if let Some((_, users)) = self.indices.get_mut(&text) {
                *users -= 1;
                if *users == 0 {
                    self.indices.remove(&text);
                }
            }
        }
    }
}

/// The mounts that the process `pid` has.
///
/// # Errors
///
/// When they cannot be read.
pub fn mounts_of(pid: u32) -> Result<Vec<Mounted>> {
    let table = procfs::process::Process::new(i32::try_from(pid)?)?.mountinfo()?;
    let mounts = table.into_iter().take(MOST_MOUNTS);
    Ok(mounts
        .map(|mount| Mounted {
            id: mount.mnt_id,
            device: mount.majmin,
            root: unescaped(&mount.root).into(),
            point: unescaped(&mount.mount_point.to_string_lossy()).into(),
            filesystem: mount.fs_type,
        })
        .collect())
}

/// The root directory of the process `pid`, as a place to look from.
///
/// # Errors
///
/// When it cannot be opened.
pub fn root_of(pid: u32) -> Result<OwnedFd> {
    let path = format!("/proc/{pid}/root");
    open(&path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .with_context(|| format!("cannot open {path}"))
}

/// Opens what is at `path` below `root`. Symbolic links are followed where `links` says so, and never out of it.
fn look(root: &OwnedFd, path: &Path, links: bool) -> Result<OwnedFd> {
    let mut resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    if !links {
        resolve |= ResolveFlags::NO_SYMLINKS;
    }
    openat2(root, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)
        .with_context(|| format!("cannot open {}", path.display()))
}

/// The number of the mount that `file` is on, as the table of mounts has it.
fn mount_of(file: &OwnedFd) -> Result<i32> {
    let path = format!("/proc/self/fdinfo/{}", file.as_raw_fd());
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let number = text.lines().find_map(|line| line.strip_prefix("mnt_id:"));
    number.and_then(|number| number.trim().parse().ok()).with_context(|| format!("{path} names no mount"))
}

/// The number of the mount at `path` below `root`, symbolic links followed.
///
/// # Errors
///
/// When there is nothing.
pub fn mount_at(root: &OwnedFd, path: &Path) -> Result<i32> {
    mount_of(&look(root, path, true)?)
}

/// Lets the program `learn_volume` note `mounted` as a volume of `slot`, by the index of its name.
pub(super) fn learn(
    program: &RawTracePoint,
    slot: u64,
    root: &OwnedFd,
    mounted: &Mounted,
    name: u32,
) -> Result<()> {
    let file = look(root, &mounted.point, false)?;
    let found = mount_of(&file)?;
    if found != mounted.id {
        bail!("{} is covered by another mount", mounted.point.display());
    }
    let mut options = RawTracePointRunOptions::default();
    options.args[0] = slot;
    options.args[1] = u64::try_from(file.as_raw_fd())?;
    options.args[2] = u64::from(name);
    if program.test_run(options)?.return_value != 0 {
        bail!("the kernel could not note the mount at {}", mounted.point.display());
    }
    Ok(())
}

/// A field of the table of mounts, in which blanks, line ends and backslashes stand as octal numbers.
fn unescaped(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, others)) = rest.split_first() {
        let number = (*first == b'\\')
            .then(|| others.get(..3).and_then(|digits| std::str::from_utf8(digits).ok()))
            .flatten()
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match number {
            Some(byte) => {
                bytes.push(byte);
                rest = &others[3..];
            }
            None => {
                bytes.push(*first);
                rest = others;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn octal_numbers_in_the_table_are_bytes() {
        assert_eq!(unescaped(r"/a\040b\134c"), r"/a b\c");
        assert_eq!(unescaped(r"/ends\04"), r"/ends\04");
        assert_eq!(unescaped(r"\9"), r"\9");
    }

    #[test]
    fn a_link_is_followed_inside_the_root_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(folder.path().join("etc")).unwrap();
        std::fs::write(folder.path().join("etc/passwd"), "mine").unwrap();
        std::os::unix::fs::symlink("/etc/passwd", folder.path().join("link")).unwrap();
        let root = open(folder.path(), OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
        let found = look(&root, Path::new("/link"), true).unwrap();
        let path = std::fs::read_link(format!("/proc/self/fd/{}", found.as_raw_fd())).unwrap();
        assert_eq!(path, folder.path().join("etc/passwd"));
        assert!(look(&root, Path::new("/link"), false).is_err());
        assert!(mount_at(&root, Path::new("/none")).is_err());
    }
}
