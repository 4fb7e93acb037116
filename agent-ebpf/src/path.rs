//! The canonical path: from a dentry up to its superblock's root.
//!
//! Neither the string that was typed nor the process's root or mount namespace takes part, so no symlink, bind
//! mount, chroot or namespace changes the outcome.

use aya_ebpf::helpers::{bpf_probe_read_kernel, bpf_probe_read_kernel_buf};
use core::hint::black_box;
use palisade_abi::{
    PATH_CAPACITY, PATH_DEPTH,
    codes::{error, reason, volume_flags},
    hash::SipHasher,
};

use crate::{
    count,
    kernel::KernelPtr,
    maps::{offset, setting},
    origin,
    scratch::{self, Area, EXECUTABLE, Walk},
    volumes,
};

/// Copies one name in front of `start`. `None` when it does not fit or cannot be read.
#[inline(always)]
fn prepend(area: *mut Area, start: u32, dentry: KernelPtr, separator: u32) -> Result<u32, u8> {
    let length: u32 = dentry.read(offset!(dentry_name_length)).ok_or(reason::READ_FAILED)?;
    let name: u64 = dentry.read(offset!(dentry_name)).ok_or(reason::READ_FAILED)?;
    if length == 0 || length > 255 {
        return Err(reason::READ_FAILED);
    }
    let needed = length + separator;
    if needed > start {
        return Err(reason::PATH_TOO_LONG);
    }
    let start = start - needed;
    // Laundered before masking: the compiler can prove the mask redundant, the verifier cannot.
    let at = (black_box(start) as usize) & (PATH_CAPACITY - 1);
    let size = (black_box(length) as usize) & 255;
    // SAFETY: at + 1 + 255 is within the area, which the caller claimed for this task.
    unsafe {
        let place = area.cast::<u8>().add(at);
        if separator == 1 {
            place.write(b'/');
        }
        let target = core::slice::from_raw_parts_mut(place.add(separator as usize), size);
        bpf_probe_read_kernel_buf(name as *const u8, target).map_err(|_| reason::READ_FAILED)?;
    }
    Ok(start)
}

/// Walks that are tried until one is of one moment: a rename takes a microsecond.
const WALKS: u32 = 4;

/// How often names have changed on this node (`rename_lock` of fs/dcache.c): odd while one does. Always 0 where that cannot be read.
#[inline(always)]
fn renames() -> u32 {
    match setting!(rename_lock) {
        0 => 0,
        // SAFETY: the helper checks the address.
        place => unsafe { bpf_probe_read_kernel(place as *const u32) }.unwrap_or(1),
    }
}

/// Walks from `dentry` to the root of its superblock and writes the path into the memory of `task`, area `which`. Returns 0, or
/// the [`reason`] why the path is not known.
///
/// A rename beside it could give a walk half of the old name and half of the new one, so it is repeated until nothing was renamed
/// meanwhile.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_walk(task: u64, dentry: u64, which: u64) -> u64 {
    let mut turn = 0;
    while turn < WALKS {
        let before = renames();
        let failure = palisade_walk_once(task, dentry, which);
        if before & 1 == 0 && renames() == before {
            return failure;
        }
        turn += 1;
        palisade_clear_front(task, which);
    }
    count::error(error::WALK_TORN);
    let Some(scratch) = scratch::of(task) else { return u64::from(reason::NO_SCRATCH) };
    // SAFETY: the memory belongs to this task until it is released.
    unsafe {
        let walk = if which == EXECUTABLE {
            &raw mut (*scratch).executable
        } else {
            &raw mut (*scratch).working_directory
        };
        (&raw mut (*walk).failure).write_volatile(u32::from(reason::PATH_CHANGES));
    }
    u64::from(reason::PATH_CHANGES)
}

/// Clears the place of a path that was walked, so that nothing of it is hashed with the next one.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_clear_front(task: u64, which: u64) -> u64 {
    let Some(scratch) = scratch::of(task) else { return 1 };
    // SAFETY: the memory belongs to this task until it is released.
    let area =
        unsafe { if which == EXECUTABLE { &raw mut (*scratch).path } else { &raw mut (*scratch).cwd } };
    let mut word = 0;
    while word < PATH_CAPACITY / 8 {
        // SAFETY: the index is within the area, whose own alignment is eight (a map value).
        unsafe { area.cast::<u64>().add(word).write_volatile(0) };
        word += 1;
    }
    0
}

/// One walk, whatever is renamed meanwhile.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_walk_once(task: u64, dentry: u64, which: u64) -> u64 {
    let Some(scratch) = scratch::of(task) else { return u64::from(reason::NO_SCRATCH) };
    // SAFETY: the memory belongs to this task until it is released.
    let (slot, area, walk) = unsafe {
        if which == EXECUTABLE {
            ((*scratch).slot, &raw mut (*scratch).path, &raw mut (*scratch).executable)
        } else {
            ((*scratch).slot, &raw mut (*scratch).cwd, &raw mut (*scratch).working_directory)
        }
    };
    let mut way = Way { start: PATH_CAPACITY as u32, superblock: 0, volume: 0, renamed: 0 };
    let failure = climb(slot, area, KernelPtr(dentry), &mut way);
    match failure {
        reason::PATH_TOO_DEEP => count::error(error::WALK_DEEP),
        reason::PATH_TOO_LONG => count::error(error::WALK_LONG),
        reason::READ_FAILED => count::error(error::WALK_READ),
        _ => {}
    }
    let Way { start, superblock, volume, renamed } = way;
    // SAFETY: as above.
    unsafe { walk.write(Walk { superblock, start, failure: u32::from(failure), volume, renamed }) };
    u64::from(failure)
}

/// What a climb comes by. One climb tells both the path and the mount that it is on: two could be told of different
/// places, when somebody renames meanwhile.
struct Way {
    start: u32,
    superblock: u64,
    /// See [`Walk`].
    volume: u32,
    renamed: u32,
}

#[inline(always)]
fn climb(slot: u64, area: *mut Area, dentry: KernelPtr, way: &mut Way) -> u8 {
    let Some(found) = dentry.follow(offset!(dentry_superblock)) else { return reason::READ_FAILED };
    way.superblock = found.0;
    // What is on the container's own root is on no volume.
    let may_be_volume = !volumes::is_own_root(slot, found.0);
    let on_overlay =
        !may_be_volume && found.read::<u64>(offset!(superblock_magic)) == Some(origin::OVERLAYFS);
    let mut outer = PATH_CAPACITY as u32;
    let Some(root) = found.follow(offset!(superblock_root)) else { return reason::READ_FAILED };
    let mut current = dentry;
    let mut depth = 0;
    while depth < PATH_DEPTH {
        if may_be_volume && let Some(volume) = volumes::rooted_at(slot, found.0, current) {
            // The rest of the way is the host's affair; on NFS it does not even lead to the superblock's root.
            let hidden =
                volume.flags & volume_flags::REPLACED_WHOLE != 0 && names_a_generation(area, way.start);
            if hidden {
                way.start = outer;
            }
            way.volume = volume.name + 1;
            return 0;
        }
        if current == root {
            let start = &mut way.start;
            if *start == PATH_CAPACITY as u32 {
                *start -= 1;
                // SAFETY: the last byte of the path's place, within the area.
                unsafe { area.cast::<u8>().add(PATH_CAPACITY - 1).write(b'/') };
            }
            return 0;
        }
        let Some(parent) = current.follow(offset!(dentry_parent)) else { return reason::READ_FAILED };
        if parent == current {
            // A memfd, a pipe, or a subtree that was cut off: its own name is all there is to show.
            if depth == 0
                && let Ok(shown) = prepend(area, way.start, current, 0)
            {
                way.start = shown;
            }
            return reason::WALK_INCOMPLETE;
        }
        outer = way.start;
        match prepend(area, way.start, current, 1) {
            Ok(next) => way.start = next,
            Err(reason) => return reason,
        }
        // After its name: overlayfs notes a new name before it gives it.
        if on_overlay && origin::palisade_is_redirected(current.0) != 0 {
            way.renamed = 1;
        }
        current = parent;
        depth += 1;
    }
    reason::PATH_TOO_DEEP
}

/// Whether the first component of the path that starts at `start` is `..` and more, which only names a generation of files.
#[inline(always)]
fn names_a_generation(area: *mut Area, start: u32) -> bool {
    start + 3 < PATH_CAPACITY as u32
        && byte(area, start + 1) == b'.'
        && byte(area, start + 2) == b'.'
        && byte(area, start + 3) != b'/'
}

/// The lookup name of the path; see [`palisade_abi::hash::hash_path`].
#[inline(always)]
pub fn hash(area: *mut [u8; PATH_CAPACITY], start: u32) -> [u64; 2] {
    let mut hasher = SipHasher::new([setting!(hash_key)[0], setting!(hash_key)[1]]);
    let first = start & !7;
    let mut at = first;
    let mut turn = 0;
    while turn < PATH_CAPACITY / 8 {
        if at >= PATH_CAPACITY as u32 {
            break;
        }
        let index = (black_box(at) as usize) & (PATH_CAPACITY - 8);
        // SAFETY: the index is a multiple of eight within the area, whose own alignment is eight (a map value).
        hasher.word(unsafe { area.cast::<u8>().add(index).cast::<u64>().read_volatile() });
        at += 8;
        turn += 1;
    }
    hasher.finish(u64::from(PATH_CAPACITY as u32 - first))
}

/// A byte of the path.
#[inline(always)]
pub fn byte(area: *mut Area, at: u32) -> u8 {
    let index = (black_box(at) as usize) & (PATH_CAPACITY - 1);
    // SAFETY: the index is within the area.
    unsafe { area.cast::<u8>().add(index).read_volatile() }
}
