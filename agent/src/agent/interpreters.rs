//! Where the names lead by which programs ask for their interpreters (`PT_INTERP`): found in the container's image before its policy
//! is in force, following links of the image alone. The kernel programs compare with that what is opened on behalf of an exec.

use std::{
    collections::{BTreeMap, VecDeque},
    os::{
        fd::{AsFd as _, BorrowedFd, OwnedFd},
        unix::fs::FileExt as _,
    },
    sync::mpsc,
    time::Duration,
};

use palisade_abi::codes::origin;
use palisade_profile::policy::Policy;
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, fstat, openat2, readlinkat};

use super::{Agent, digests::root_of};
use crate::kernel::Tier;

/// The names that the ABIs of Linux have, which nearly all programs ask for. What leads there without a link needs no entry.
const COMMON: &[&str] = &[
    "/lib64/ld-linux-x86-64.so.2",
    "/lib/ld-linux-x86-64.so.2",
    "/lib/ld-linux.so.2",
    "/libx32/ld-linux-x32.so.2",
    "/lib/ld-musl-x86_64.so.1",
    "/lib/ld-musl-i386.so.1",
    "/lib/ld-linux-aarch64.so.1",
    "/lib/ld-musl-aarch64.so.1",
];
/// Executables that rules name, of which the interpreter's name is read.
const MOST_EXECUTABLES: usize = 64;
/// Links that one name may lead through: as many as the kernel follows (`MAXSYMLINKS` of include/linux/namei.h).
const MOST_LINKS: u32 = 40;
/// How long the agent, and with NRI the container's start, waits for the container's file system.
const PATIENCE: Duration = Duration::from_millis(500);
/// Attempts, one each second.
const MOST_ATTEMPTS: u32 = 5;

/// What is known of a container's interpreters.
#[derive(Clone, Debug, Default)]
pub struct Interpreters {
    /// The revision for which names were looked for.
    revision: Option<String>,
    attempts: u32,
    /// Names, and the paths to which they lead.
    known: BTreeMap<String, String>,
}

impl Agent {
    /// Tells the kernel where the names of interpreters lead in a container. Returns whether that is settled: else it is to be tried
    /// again.
    pub(super) fn learn_interpreters(&mut self, slot: u64, policy: &Policy) -> bool {
        if self.kernel.tier != Tier::Full || policy.exec.is_none() {
            return true;
        }
        let name = policy.revision_name();
        let Some(container) = self.containers.get_mut(&slot) else { return true };
        let interpreters = &mut container.interpreters;
        if interpreters.revision.as_ref() == Some(&name) || interpreters.attempts >= MOST_ATTEMPTS {
            return true;
        }
        interpreters.attempts += 1;
        let last = interpreters.attempts == MOST_ATTEMPTS;
        let id = container.id.clone();
        let Some(found) = self.names_in_image(slot, policy) else {
            if last {
                tracing::warn!(
                    container = id,
                    "where its interpreters are cannot be found out: a program whose interpreter's name leads through a link is \
                     refused, unless a rule names the interpreter"
                );
            }
            return last;
        };
        for (name, path) in &found {
            if let Err(error) = self.kernel.maps.state.learn_link(slot, name, path) {
                tracing::error!(
                    container = id,
                    error = format!("{error:#}"),
                    "an interpreter cannot be noted"
                );
            }
        }
        if let Some(container) = self.containers.get_mut(&slot) {
            container.interpreters.known.extend(found);
            container.interpreters.revision = Some(name);
        }
        true
    }

    /// Whether a name leads to a path in the image of a container, both by their hashes.
    pub(super) fn leads(&self, slot: u64, name_hash: [u64; 2], path_hash: [u64; 2]) -> bool {
        self.containers.get(&slot).is_some_and(|container| {
            container.interpreters.known.iter().any(|(name, path)| {
                self.source.hash(name.as_bytes()) == name_hash
                    && self.source.hash(path.as_bytes()) == path_hash
            })
        })
    }

    /// Names of interpreters that lead elsewhere in a container's image, and where. `None` when its file system cannot be looked at.
    fn names_in_image(&self, slot: u64, policy: &Policy) -> Option<BTreeMap<String, String>> {
        let pid = self.process_in_its_root(slot)?;
        let untouched = self.is_untouched(slot, pid);
        let device = if untouched { None } else { Some(self.kernel.maps.state.root_device(slot)) };
        let executables: Vec<String> = policy
            .exec
            .iter()
            .flat_map(|exec| exec.allowed.keys())
            .filter_map(|pattern| Some(pattern.exact()?.to_owned()))
            .take(MOST_EXECUTABLES)
            .collect();
        let (sender, found) = mpsc::channel();
        // A thread that the container's file system keeps waiting is left behind.
        std::thread::spawn(move || {
            let Ok(root) = root_of(pid, device) else { return };
            let mut names: Vec<String> = COMMON.iter().map(|name| (*name).to_owned()).collect();
            names.extend(executables.iter().filter_map(|path| interpreter_of(&root, path)));
            names.sort();
            names.dedup();
            let ways: Vec<Way> = names.into_iter().filter_map(|name| way(&root, name)).collect();
            let _nobody_waits = sender.send(ways);
        });
        let ways = found.recv_timeout(PATIENCE).ok()?;
        // Before anything of the container ran, all that is there is the image's.
        let of_image = |link: BorrowedFd| {
            untouched || self.kernel.origin_of(link).is_ok_and(|found| found == origin::IMAGE)
        };
        let ways = ways.into_iter().filter(|way| way.links.iter().all(|link| of_image(link.as_fd())));
        Some(ways.map(|way| (way.name, way.path)).collect())
    }
}

/// How a name leads to a file: the links on the way, and the path without any.
struct Way {
    name: String,
    path: String,
    links: Vec<OwnedFd>,
}

/// Follows `name` below `root`, whose filesystem it must not leave. `None` when it leads to no file, or to itself.
fn way(root: &OwnedFd, name: String) -> Option<Way> {
    let resolve = ResolveFlags::NO_XDEV | ResolveFlags::NO_MAGICLINKS;
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut left: VecDeque<String> = components(&name).collect();
    // The folders on the way, without the root.
    let mut folders: Vec<(String, OwnedFd)> = Vec::new();
    let mut links = Vec::new();
    while let Some(component) = left.pop_front() {
        if component == ".." {
            folders.pop();
            continue;
        }
        let folder = folders.last().map_or(root, |(_, folder)| folder);
        let found = openat2(folder, component.as_str(), flags, Mode::empty(), resolve).ok()?;
        match FileType::from_raw_mode(fstat(&found).ok()?.st_mode) {
            FileType::Symlink => {
                if links.len() as u32 >= MOST_LINKS {
                    return None;
                }
                let target = readlinkat(&found, "", Vec::new()).ok()?.into_string().ok()?;
                if target.starts_with('/') {
                    folders.clear();
                }
                for component in components(&target).collect::<Vec<_>>().into_iter().rev() {
                    left.push_front(component);
                }
                links.push(found);
            }
            FileType::Directory => folders.push((component, found)),
            FileType::RegularFile if left.is_empty() => {
                let folders = folders.iter().map(|(name, _)| name.as_str()).chain([component.as_str()]);
                let path = folders.fold(String::new(), |path, name| path + "/" + name);
                return (path != name).then_some(Way { name, path, links });
            }
            _ => return None,
        }
    }
    None
}

fn components(path: &str) -> impl Iterator<Item = String> {
    path.split('/').filter(|component| !component.is_empty() && *component != ".").map(str::to_owned)
}

/// The name of the interpreter that the executable at `path` asks for; `None` for what is no ELF file, or has none.
fn interpreter_of(root: &OwnedFd, path: &str) -> Option<String> {
    let resolve = ResolveFlags::IN_ROOT
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_MAGICLINKS
        | ResolveFlags::NO_XDEV;
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = openat2(root, path, flags, Mode::empty(), resolve).ok()?;
    if FileType::from_raw_mode(fstat(&file).ok()?.st_mode) != FileType::RegularFile {
        return None;
    }
    let file = std::fs::File::from(file);
    interpreter(|at, length| {
        let mut bytes = vec![0; length];
        file.read_exact_at(&mut bytes, at).ok()?;
        Some(bytes)
    })
}

/// Most program headers that are read, and the longest name, its zero byte included, which is as much as the kernel programs compare.
const MOST_HEADERS: u16 = 64;
const LONGEST_NAME: u64 = 255;

/// `PT_INTERP` of the file that `read` gives bytes of, by place and length. The layout is that of elf(5), for both word sizes, little
/// endian.
fn interpreter(read: impl Fn(u64, usize) -> Option<Vec<u8>>) -> Option<String> {
    const INTERP: u64 = 3;
    let head = read(0, 52)?;
    if !head.starts_with(b"\x7fELF") || head[5] != 1 {
        return None;
    }
    let long = match head[4] {
        1 => false,
        2 => true,
        _ => return None,
    };
    let head = if long { read(0, 64)? } else { head };
    let number = |bytes: &[u8], at: usize, length: usize| -> Option<u64> {
        let mut number = [0; 8];
        number.get_mut(..length)?.copy_from_slice(bytes.get(at..at + length)?);
        Some(u64::from_le_bytes(number))
    };
    let (table, size, count) = if long {
        (number(&head, 32, 8)?, number(&head, 54, 2)?, number(&head, 56, 2)?)
    } else {
        (number(&head, 28, 4)?, number(&head, 42, 2)?, number(&head, 44, 2)?)
    };
    for index in 0..count.min(u64::from(MOST_HEADERS)) {
        let header = read(table.checked_add(index * size)?, if long { 56 } else { 32 })?;
        if number(&header, 0, 4)? != INTERP {
            continue;
        }
        let (at, length) = if long {
            (number(&header, 8, 8)?, number(&header, 32, 8)?)
        } else {
            (number(&header, 4, 4)?, number(&header, 16, 4)?)
        };
        if !(2..=LONGEST_NAME).contains(&length) {
            return None;
        }
        let name = read(at, usize::try_from(length).ok()?)?;
        let name = name.split(|byte| *byte == 0).next()?;
        return String::from_utf8(name.to_vec()).ok();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> (tempfile::TempDir, OwnedFd) {
        let folder = tempfile::tempdir().unwrap();
        let root: OwnedFd = std::fs::File::open(folder.path()).unwrap().into();
        (folder, root)
    }

    #[test]
    fn a_name_is_followed_as_the_kernel_does_below_the_root() {
        let (folder, root) = root();
        let at = |path: &str| folder.path().join(path);
        std::fs::create_dir_all(at("usr/lib/x86_64-linux-gnu")).unwrap();
        std::fs::write(at("usr/lib/x86_64-linux-gnu/ld.so"), "").unwrap();
        let link = |to: &str, from: &str| std::os::unix::fs::symlink(to, at(from)).unwrap();
        link("usr/lib64", "lib64");
        std::fs::create_dir(at("usr/lib64")).unwrap();
        link("../lib/x86_64-linux-gnu/ld.so", "usr/lib64/ld-linux.so.2");
        link("/usr/lib/./x86_64-linux-gnu/ld.so", "absolute");
        link("/../../../../usr/lib/x86_64-linux-gnu/ld.so", "above");
        link("circle", "circle");
        link("/absent", "broken");
        let lead = |name: &str| way(&root, name.to_owned()).map(|way| (way.path, way.links.len()));
        let there = "/usr/lib/x86_64-linux-gnu/ld.so".to_owned();
        assert_eq!(lead("/lib64/ld-linux.so.2"), Some((there.clone(), 2)));
        assert_eq!(lead("/absolute"), Some((there.clone(), 1)));
        assert_eq!(lead("/above"), Some((there.clone(), 1)));
        assert_eq!(lead("//usr/lib/x86_64-linux-gnu/../x86_64-linux-gnu/ld.so"), Some((there.clone(), 0)));
        for nothing in ["/circle", "/broken", "/usr", "/absolute/x", "/", "", &there] {
            assert_eq!(lead(nothing), None, "{nothing}");
        }
    }

    #[test]
    fn the_name_is_read_of_this_test_and_of_nothing_else() {
        let own = std::fs::read("/proc/self/exe").unwrap();
        let of = |bytes: &[u8]| {
            interpreter(|at, length| {
                let at = usize::try_from(at).ok()?;
                Some(bytes.get(at..at.checked_add(length)?)?.to_vec())
            })
        };
        assert!(of(&own).unwrap().starts_with('/'));
        for length in 0..1024 {
            // A cut file has none, and is no reason to panic.
            let _whatever = of(&own[..length]);
        }
        for place in 0..256 {
            let mut other = own.clone();
            other[place] = 0xff;
            let _whatever = of(&other);
        }
        assert_eq!(of(b"#!/bin/sh\n"), None);
    }
}
