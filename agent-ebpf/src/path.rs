//! The canonical path: from a dentry up to its superblock's root.
//!
//! Neither the string that was typed nor the process's root or mount namespace takes part, so no symlink, bind
//! mount, chroot or namespace changes the outcome.

use aya_ebpf::{bindings::BPF_NOEXIST, helpers::bpf_probe_read_kernel_buf};
use core::hint::black_box;
use palisade_abi::{
    PATH_CAPACITY, PATH_DEPTH,
    codes::{error, reason},
    hash::SipHasher,
    maps::{SCRATCH_SLACK, Scratch},
};

use crate::{
    count,
    kernel::KernelPtr,
    maps::{SCRATCH, offset, setting},
};

const AREA: usize = PATH_CAPACITY + SCRATCH_SLACK;
/// A path area of a claimed [`Scratch`].
pub type Area = *mut [u8; AREA];

static EMPTY: Scratch = Scratch { path: [0; AREA], cwd: [0; AREA] };

/// Claims scratch memory for the task `task` (pid and tgid). Give it back with [`release`].
#[inline(always)]
pub fn claim(task: u64) -> Option<*mut Scratch> {
    if SCRATCH.insert(task, &EMPTY, u64::from(BPF_NOEXIST)).is_err() {
        count::error(error::SCRATCH_FULL);
        return None;
    }
    let claimed = SCRATCH.get_ptr_mut(task);
    if claimed.is_none() {
        count::error(error::SCRATCH_LOST);
    }
    claimed
}

#[inline(always)]
pub fn release(task: u64) {
    if SCRATCH.remove(task).is_err() {
        count::error(error::SCRATCH_LOST);
    }
}

/// Where a walk ended.
#[derive(Clone, Copy)]
pub struct Walk {
    pub superblock: KernelPtr,
    /// The path stands at `start..PATH_CAPACITY` of the area.
    pub start: u32,
    /// 0 when the walk reached the superblock's root; else a [`reason`].
    pub failure: u8,
}

impl Walk {
    /// Bytes of the path, at most [`PATH_CAPACITY`].
    #[inline(always)]
    pub fn length(&self) -> u32 {
        PATH_CAPACITY as u32 - self.start
    }

    pub const NOTHING: Self =
        Self { superblock: KernelPtr(0), start: PATH_CAPACITY as u32, failure: reason::READ_FAILED };
}

/// Copies one name in front of `start`. `None` when it does not fit or cannot be read.
#[inline(always)]
fn prepend(area: Area, start: u32, dentry: KernelPtr, separator: u32) -> Result<u32, u8> {
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

/// Walks from `dentry` to the root of its superblock and writes the path into `area`, which must be zero.
#[inline(always)]
pub fn walk(area: Area, dentry: KernelPtr) -> Walk {
    let mut walk = Walk::NOTHING;
    let Some(superblock) = dentry.follow(offset!(dentry_superblock)) else {
        count::error(error::WALK_READ);
        return walk;
    };
    walk.superblock = superblock;
    let Some(root) = superblock.follow(offset!(superblock_root)) else {
        count::error(error::WALK_READ);
        return walk;
    };
    let mut current = dentry;
    let mut failure = reason::PATH_TOO_DEEP;
    let mut start = PATH_CAPACITY as u32;
    let mut depth = 0;
    while depth < PATH_DEPTH {
        if current == root {
            failure = 0;
            break;
        }
        let Some(parent) = current.follow(offset!(dentry_parent)) else {
            failure = reason::READ_FAILED;
            break;
        };
        if parent == current {
            // A memfd, a pipe, or a subtree that was cut off: its own name is all there is to show.
            failure = reason::WALK_INCOMPLETE;
            if depth == 0
                && let Ok(shown) = prepend(area, start, current, 0)
            {
                start = shown;
            }
            break;
        }
        match prepend(area, start, current, 1) {
            Ok(next) => start = next,
            Err(reason) => {
                failure = reason;
                break;
            }
        }
        current = parent;
        depth += 1;
    }
    if failure == 0 && start == PATH_CAPACITY as u32 {
        start -= 1;
        // SAFETY: one byte before the end of the path's place, within the area.
        unsafe { area.cast::<u8>().add(PATH_CAPACITY - 1).write(b'/') };
    }
    match failure {
        reason::PATH_TOO_DEEP => count::error(error::WALK_DEEP),
        reason::PATH_TOO_LONG => count::error(error::WALK_LONG),
        reason::READ_FAILED => count::error(error::WALK_READ),
        _ => {}
    }
    walk.start = start;
    walk.failure = failure;
    walk
}

/// The lookup name of the path; see [`palisade_abi::hash::hash_path`].
#[inline(always)]
pub fn hash(area: Area, walk: &Walk) -> [u64; 2] {
    let mut hasher = SipHasher::new([setting!(hash_key)[0], setting!(hash_key)[1]]);
    let first = walk.start & !7;
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
pub fn byte(area: Area, at: u32) -> u8 {
    let index = (black_box(at) as usize) & (PATH_CAPACITY - 1);
    // SAFETY: the index is within the area.
    unsafe { area.cast::<u8>().add(index).read_volatile() }
}
