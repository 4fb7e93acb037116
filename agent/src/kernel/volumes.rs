//! Telling the kernel which inode is the root of a mount in a container.
//!
//! A mount is opened by its path as the kernel prints it, without following symbolic links, and must then be the mount
//! that was meant: nothing that a container renames or links can put another in its place.

use std::{
    collections::{HashMap as Names, HashSet},
    io::{BufRead as _, BufReader, Read as _},
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::ffi::OsStringExt as _,
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use aya::{
    maps::{Array, HashMap, MapData},
    programs::{RawTracePoint, RawTracePointRunOptions, TestRun as _},
};
use palisade_abi::state::{VOLUME_NAME_CAPACITY, Volume, VolumeKey, VolumeName};
use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, StatxFlags, open, openat2, statx};

use crate::containers::mounts::{self, Described};

/// What of a table of mounts is read; a container may make more for itself.
const MOST_MOUNTS: usize = 1024;
const MOST_BYTES: u64 = 1 << 20;
/// How long a container's mounts are waited for.
const PATIENCE: Duration = Duration::from_secs(1);
/// Threads that may wait for file systems that do not answer.
const MOST_STUCK: usize = 16;

/// Threads that look at mounts just now.
static LOOKING: AtomicUsize = AtomicUsize::new(0);

/// An entry of the kernel's table of mounts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mounted {
    pub id: i32,
    /// The number of the mount that it is mounted on.
    pub parent: i32,
    /// Major and minor number of the superblock.
    pub device: String,
    /// What of the superblock is mounted, as a path in it.
    pub root: PathBuf,
    /// Where, seen from the process's root directory; no part of it is a symbolic link.
    pub point: PathBuf,
    pub filesystem: String,
}

/// A mount that was opened, with what the runtime says of it.
#[derive(Debug)]
pub struct Opened {
    pub mounted: Mounted,
    pub described: Option<Described>,
    file: OwnedFd,
}

/// A container's mounts, as far as they could be opened.
#[derive(Debug, Default)]
pub struct Table {
    pub opened: Vec<Opened>,
    /// Whether no other attempt would find more.
    pub complete: bool,
}

/// Opens the mounts of the process `pid` that may be volumes. `untouched` says that nothing but the runtime has run in the
/// container; otherwise what it describes must be the very thing that it mounted, which the process `host` of procfs shows.
///
/// It is done on a thread of its own: a file system that a container or a remote server answers for may keep it
/// waiting for ever.
///
/// # Errors
///
/// When the table of mounts or the root directory cannot be read.
pub(super) fn open_mounts(
    pid: u32,
    described: Vec<Described>,
    untouched: bool,
    host: &'static Path,
) -> Result<Table> {
    if LOOKING.load(Ordering::Relaxed) >= MOST_STUCK {
        bail!("{MOST_STUCK} file systems of containers do not answer");
    }
    let (sender, results) = mpsc::channel();
    let looking = Arc::new(Looking::begin());
    std::thread::Builder::new().name("mounts".to_owned()).spawn(move || {
        let _until_it_ends = looking;
        if let Err(error) = open_all(pid, described, untouched, host, &sender) {
            let _nobody_waits_any_more = sender.send(Err(error));
        }
    })?;
    let begun = Instant::now();
    let mut table = Table { opened: Vec::new(), complete: true };
    loop {
        match results.recv_timeout(PATIENCE.saturating_sub(begun.elapsed())) {
            Ok(Ok(Some(opened))) => table.opened.push(opened),
            Ok(Ok(None)) => table.complete = false,
            Ok(Err(error)) => return Err(error),
            Err(mpsc::RecvTimeoutError::Disconnected) => return Ok(table),
            Err(mpsc::RecvTimeoutError::Timeout) => {
                table.complete = false;
                return Ok(table);
            }
        }
    }
}

struct Looking;

impl Looking {
    fn begin() -> Self {
        LOOKING.fetch_add(1, Ordering::Relaxed);
        Self
    }
}

impl Drop for Looking {
    fn drop(&mut self) {
        LOOKING.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Opens one mount after the other and hands each over; `None` for one that cannot be opened now.
fn open_all(
    pid: u32,
    described: Vec<Described>,
    untouched: bool,
    host: &Path,
    found: &mpsc::Sender<Result<Option<Opened>>>,
) -> Result<()> {
    let path = format!("/proc/{pid}/root");
    let root = open(&path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .with_context(|| format!("cannot open {path}"))?;
    let table = table_of(pid)?;
    // A destination may lead over links.
    let by_links: Vec<(i32, &Described)> = described
        .iter()
        .filter(|described| table.iter().all(|mounted| mounted.point != described.destination))
        .filter_map(|described| {
            let file = look(&root, &described.destination, true).ok()?;
            Some((mount_of(&file).ok()?, described))
        })
        .collect();
    for mounted in table.iter().filter(|mounted| mounts::may_be_volume(mounted)) {
        let named = described
            .iter()
            .find(|described| described.destination == mounted.point)
            .or_else(|| Some(by_links.iter().find(|(id, _)| *id == mounted.id)?.1));
        // One that is covered by another cannot be reached, and so needs no name.
        let Ok(file) = look(&root, &mounted.point, false) else {
            let _as_below = found.send(Ok(None));
            continue;
        };
        if mount_of(&file)? != mounted.id {
            continue;
        }
        let named = named.filter(|described| untouched || is_source(&file, host, &described.source));
        let opened = Opened { mounted: mounted.clone(), described: named.cloned(), file };
        if found.send(Ok(Some(opened))).is_err() {
            // Nobody waits any more.
            return Ok(());
        }
    }
    Ok(())
}

/// Whether `file` is what the host has at `source`.
fn is_source(file: &OwnedFd, host: &Path, source: &Path) -> bool {
    let identity = |found: rustix::fs::Statx| (found.stx_dev_major, found.stx_dev_minor, found.stx_ino);
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
    let Ok(opened) = statx(file, c"", flags | AtFlags::EMPTY_PATH, StatxFlags::INO) else { return false };
    let Ok(below) = source.strip_prefix("/") else { return false };
    let path = host.join("root").join(below);
    statx(rustix::fs::CWD, &path, flags, StatxFlags::INO)
        .is_ok_and(|expected| identity(expected) == identity(opened))
}

/// The mounts that the process `pid` has, as far as lines and memory allow.
fn table_of(pid: u32) -> Result<Vec<Mounted>> {
    let path = format!("/proc/{pid}/mountinfo");
    let file = std::fs::File::open(&path).with_context(|| format!("cannot read {path}"))?;
    let mut lines = BufReader::new(file.take(MOST_BYTES)).split(b'\n');
    let mut table = Vec::new();
    while table.len() < MOST_MOUNTS
        && let Some(line) = lines.next()
    {
        table.extend(mounted(&line.with_context(|| format!("cannot read {path}"))?));
    }
    Ok(table)
}

/// One line of a table of mounts: `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw` (proc(5)). `None` for any
/// other.
pub fn mounted(line: &[u8]) -> Option<Mounted> {
    let mut fields = line.split(|byte| *byte == b' ');
    let mut text = || std::str::from_utf8(fields.next()?).ok();
    let id = text()?.parse().ok()?;
    let parent = text()?.parse().ok()?;
    let device = text()?.to_owned();
    let root = unescaped(fields.next()?);
    let point = unescaped(fields.next()?);
    fields.find(|field| *field == b"-")?;
    let filesystem = std::str::from_utf8(fields.next()?).ok()?.to_owned();
    Some(Mounted { id, parent, device, root, point, filesystem })
}

/// A field of the table, in which blanks, line ends and backslashes stand as octal numbers.
fn unescaped(text: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
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
    std::ffi::OsString::from_vec(bytes).into()
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
///
/// # Errors
///
/// When procfs cannot be read.
pub fn mount_of(file: &OwnedFd) -> Result<i32> {
    let path = format!("/proc/self/fdinfo/{}", file.as_raw_fd());
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let number = text.lines().find_map(|line| line.strip_prefix("mnt_id:"));
    number.and_then(|number| number.trim().parse().ok()).with_context(|| format!("{path} names no mount"))
}

/// Lets the program `learn_volume` note a mount as a volume of `slot`, by the index of its name.
pub(super) fn learn(
    program: &RawTracePoint,
    slot: u64,
    opened: &Opened,
    name: u32,
    flags: u32,
) -> Result<()> {
    let mut options = RawTracePointRunOptions::default();
    options.args[0] = slot;
    options.args[1] = u64::try_from(opened.file.as_raw_fd())?;
    options.args[2] = u64::from(name);
    options.args[3] = u64::from(flags);
    if program.test_run(options)?.return_value != 0 {
        bail!("the kernel could not note the mount at {}", opened.mounted.point.display());
    }
    Ok(())
}

/// The maps of volumes and of their names. A name is shared by all containers that have a volume of that name in the same
/// place.
pub(super) struct VolumeMaps {
    pub volumes: HashMap<MapData, VolumeKey, Volume>,
    pub names: Array<MapData, VolumeName>,
    /// Index of each text, and how many slots use it.
    indices: Names<String, (u32, usize)>,
    of_slot: Names<u64, Vec<String>>,
}

impl VolumeMaps {
    pub fn new(volumes: HashMap<MapData, VolumeKey, Volume>, names: Array<MapData, VolumeName>) -> Self {
        Self { volumes, names, indices: Names::new(), of_slot: Names::new() }
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
        let taken: HashSet<u32> = self.indices.values().map(|(index, _)| *index).collect();
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

    /// Copies what another set has, and this one has not.
    pub fn inherit(&mut self, old: &Self) -> Result<()> {
        for volume in old.volumes.iter() {
            let (key, volume) = volume?;
            let name = old.names.get(&volume.name, 0).context("a volume has no name")?;
            self.names
                .set(volume.name, name, 0)
                .context("no room for the names of volumes; raise maps.volumeNames")?;
            self.volumes.insert(key, volume, 0).context("no room for volumes; raise maps.volumes")?;
        }
        Ok(())
    }

    /// Reads what an agent before this one noted.
    pub fn read_back(&mut self) -> Result<()> {
        for volume in self.volumes.iter() {
            let (VolumeKey { slot, .. }, Volume { name, .. }) = volume?;
            let Some((text, _)) = self.text(name) else { continue };
            let own = self.of_slot.entry(slot).or_default();
            if own.contains(&text) {
                continue;
            }
            own.push(text.clone());
            self.indices.entry(text).or_insert((name, 0)).1 += 1;
        }
        Ok(())
    }

    fn text(&self, index: u32) -> Option<(String, usize)> {
        let name = self.names.get(&index, 0).ok()?;
        let used = name.text.get(VOLUME_NAME_CAPACITY.checked_sub(name.length as usize)?..)?;
        Some((String::from_utf8(used.to_vec()).ok()?, name.mark as usize))
    }

    /// Names and mount points of a slot's volumes.
    pub fn of(&self, slot: u64) -> Vec<(String, String)> {
        let texts = self.of_slot.get(&slot).into_iter().flatten();
        texts
            .filter_map(|text| {
                let (name, point) = palisade_abi::volume::split(text.as_bytes())?;
                Some((String::from_utf8(name.to_vec()).ok()?, String::from_utf8(point.to_vec()).ok()?))
            })
            .collect()
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_line_of_the_table_is_read_with_its_octal_numbers() {
        let line =
            br"36 35 98:0 /a\040b /mnt\134c rw,noatime master:1 shared:2 - ext3 /dev/root rw,errors=continue";
        let expected = Mounted {
            id: 36,
            parent: 35,
            device: "98:0".to_owned(),
            root: "/a b".into(),
            point: r"/mnt\c".into(),
            filesystem: "ext3".to_owned(),
        };
        assert_eq!(mounted(line), Some(expected));
        assert_eq!(unescaped(br"/ends\04"), Path::new(r"/ends\04"));
        assert_eq!(mounted(b"36 35 98:0 / /mnt rw master:1"), None);
    }

    proptest! {
        #[test]
        fn no_line_makes_the_reader_panic(line in prop::collection::vec(any::<u8>(), 0..120)) {
            let _found = mounted(&line);
        }
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
        assert!(mount_of(&found).unwrap() > 0);
    }

    #[test]
    fn what_is_described_must_be_what_is_mounted() {
        let folder = tempfile::tempdir().unwrap();
        let place = |name: &str| folder.path().join(name);
        for name in ["meant", "other"] {
            std::fs::create_dir(place(name)).unwrap();
        }
        let file = open(place("meant"), OFlags::PATH, Mode::empty()).unwrap();
        let own = Path::new("/proc/self");
        assert!(is_source(&file, own, &place("meant")));
        assert!(!is_source(&file, own, &place("other")));
        assert!(!is_source(&file, own, Path::new("relative")));
    }
}
