//! The canonical path: from a dentry up to its superblock's root.
//!
//! Neither the string that was typed nor the process's root or mount namespace takes part, so no symlink, bind
//! mount, chroot or namespace changes the outcome.

use aya_ebpf::helpers::bpf_probe_read_kernel_buf;
use core::hint::black_box;
use palisade_abi::{
    PATH_CAPACITY, PATH_DEPTH,
    codes::{error, reason, volume_flags},
    offsets::DENTRY_BYTES,
};

use crate::{
    area::{byte, clear_front},
    context, count, judging,
    kernel::KernelPtr,
    maps::offset,
    overlay,
    repeat::{AGAIN, DONE, repeat},
    scratch::{Area, EXECUTABLE, Scratch, Turns, Walk},
    volumes,
};

/// Copies one name in front of `start`. `None` when it does not fit or cannot be read.
#[inline(always)]
fn prepend(area: *mut Area, start: u32, (name, length): (u64, u32), separator: u32) -> Result<u32, u8> {
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

/// Walks from `dentry` to the root of its superblock and writes the path into the memory of `claim`, area `which`. Returns 0, or
/// the [`reason`] why the path is not known.
///
/// A rename beside it could give a walk half of the old name and half of the new one, so it is repeated until nothing on the way was
/// renamed meanwhile. What is renamed elsewhere costs nothing, so that a container can keep another one's paths from being known only on
/// a volume that both have.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_walk(claim: u64, dentry: u64, which: u64) -> u64 {
    let mut turn = 0;
    while turn < WALKS {
        let failure = palisade_walk_once(claim, dentry, which);
        if palisade_was_one_moment(claim, dentry) != 0 {
            return failure;
        }
        turn += 1;
    }
    count::error(error::WALK_TORN);
    let Some(scratch) = judging::of(claim) else { return u64::from(reason::NO_SCRATCH) };
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

/// Whether every folder on the way from `dentry` is as the walk of `claim` that has just ended has found it. All of them were so at one
/// moment then: each in between of when the walk saw it and of now.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_was_one_moment(claim: u64, dentry: u64) -> u64 {
    let Some(scratch) = judging::of(claim) else { return 1 };
    // SAFETY: the memory belongs to this task until it is released.
    unsafe {
        let turns = &raw mut (*scratch).turns;
        let mut about = Comparison {
            turns,
            end: (&raw const (*turns).current).read_volatile(),
            seal: (&raw const (*turns).seal).read_volatile(),
        };
        (&raw mut (*turns).current).write_volatile(dentry);
        (&raw mut (*turns).seal).write_volatile(0);
        repeat(PATH_DEPTH as u32, &mut about, compare);
        let (at, seal) =
            ((&raw const (*turns).current).read_volatile(), (&raw const (*turns).seal).read_volatile());
        u64::from(at == about.end && seal == about.seal)
    }
}

/// A second climb, which only compares.
struct Comparison {
    turns: *mut Turns,
    /// Where the first one has ended.
    end: u64,
    seal: u64,
}

/// One component of it.
///
/// # Safety
///
/// `comparison` must be of the current task's claimed memory.
#[inline(always)]
unsafe extern "C" fn compare(_turn: u64, comparison: *mut Comparison) -> i64 {
    // SAFETY: the caller's promise.
    unsafe {
        let turns = (*comparison).turns;
        let current = KernelPtr((&raw const (*turns).current).read_volatile());
        if current.0 == (*comparison).end {
            return DONE;
        }
        // An odd one is being renamed, and may have been all the time.
        if !look(turns, current) || half(turns, offset!(dentry_sequence)) & 1 != 0 {
            return DONE;
        }
        add_to_seal(turns, current);
        (&raw mut (*turns).current).write_volatile(word(turns, offset!(dentry_parent)));
    }
    AGAIN
}

/// Reads the dentry at `current` into the memory of the walk, all of it at once: to call a helper costs more than what it copies. It
/// copies upwards, so the counter comes before what it counts the changes of (x86 keeps loads in order). Returns whether it could.
///
/// # Safety
///
/// `turns` must be of the current task's claimed memory.
#[inline(always)]
unsafe fn look(turns: *mut Turns, current: KernelPtr) -> bool {
    // SAFETY: the caller's promise.
    unsafe {
        let place = (&raw mut (*turns).dentry).cast::<u8>();
        let target = core::slice::from_raw_parts_mut(place, DENTRY_BYTES as usize);
        bpf_probe_read_kernel_buf((current.0 + u64::from(begin())) as *const u8, target).is_ok()
    }
}

/// Where in a dentry that begins.
#[inline(always)]
fn begin() -> u32 {
    offset!(dentry_sequence) & !7
}

/// Eight bytes of what [`look`] has read, those with the field at `offset`. Read where they are needed, not kept on the stack.
///
/// # Safety
///
/// `turns` must be of the current task's claimed memory.
#[inline(always)]
unsafe fn word(turns: *mut Turns, offset: u32) -> u64 {
    // SAFETY: the caller's promise; the agent loads these programs only where all the fields are within what is read.
    unsafe { (&raw mut (*turns).dentry).cast::<u64>().add(((offset - begin()) / 8) as usize).read_volatile() }
}

/// Four of them.
///
/// # Safety
///
/// As [`word`].
#[inline(always)]
unsafe fn half(turns: *mut Turns, offset: u32) -> u32 {
    // SAFETY: the caller's promise.
    (unsafe { word(turns, offset) } >> (8 * (offset & 4))) as u32
}

/// Adds a folder to what is compared. Its counter (`d_seq` of include/linux/dcache.h) goes up by one before its name or its parent
/// changes and by one afterwards. Where folders are in the kernel's memory no container
/// knows, so none can have others add up to the same.
///
/// # Safety
///
/// `turns` must be of the current task's claimed memory.
#[inline(always)]
unsafe fn add_to_seal(turns: *mut Turns, folder: KernelPtr) {
    /// 2^64 divided by the golden ratio: odd, and its bits are mixed well.
    const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;
    // SAFETY: the caller's promise.
    unsafe {
        let seal = (&raw const (*turns).seal).read_volatile();
        let sequence = half(turns, offset!(dentry_sequence));
        let seal = (seal ^ folder.0).wrapping_mul(MULTIPLIER) ^ u64::from(sequence);
        (&raw mut (*turns).seal).write_volatile(seal);
    }
}

/// One walk, whatever is renamed meanwhile.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_walk_once(claim: u64, dentry: u64, which: u64) -> u64 {
    let Some(scratch) = judging::of(claim) else { return u64::from(reason::NO_SCRATCH) };
    // SAFETY: the memory belongs to this task until it is released.
    let (area, walk) = unsafe {
        if which == EXECUTABLE {
            (&raw mut (*scratch).path, &raw mut (*scratch).executable)
        } else {
            (&raw mut (*scratch).cwd, &raw mut (*scratch).working_directory)
        }
    };
    let failure = climb(scratch, area, KernelPtr(dentry));
    match failure {
        reason::PATH_TOO_DEEP => count::error(error::WALK_DEEP),
        reason::PATH_TOO_LONG => count::error(error::WALK_LONG),
        reason::READ_FAILED => count::error(error::WALK_READ),
        _ => {}
    }
    let superblock = context::palisade_pointer(dentry, u64::from(offset!(dentry_superblock)));
    // SAFETY: as above.
    unsafe {
        let turns = &raw const (*scratch).turns;
        clear_front(area, (&raw const (*turns).at).read_volatile());
        walk.write(Walk {
            superblock,
            start: (&raw const (*turns).at).read_volatile(),
            failure: u32::from(failure),
            volume: (&raw const (*turns).volume).read_volatile(),
            renamed: (&raw const (*turns).renamed).read_volatile(),
        });
    }
    u64::from(failure)
}

/// A climb, as far as it stays the same from component to component.
struct Climb {
    turns: *mut Turns,
    area: *mut Area,
    slot: u64,
    superblock: u64,
    /// What is on the container's own root is on no volume.
    may_be_volume: u64,
    on_overlay: u64,
    root: u64,
}

/// Climbs from `dentry` to the root of its superblock, or to that of the container's mount that it is on. One climb tells both the path and
/// the mount: two could be told of different places, when somebody renames meanwhile.
#[inline(always)]
fn climb(scratch: *mut Scratch, area: *mut Area, dentry: KernelPtr) -> u8 {
    // SAFETY: the memory belongs to this task until it is released.
    let (slot, turns) = unsafe {
        let turns = &raw mut (*scratch).turns;
        (&raw mut (*turns).current).write_volatile(dentry.0);
        (&raw mut (*turns).seal).write_volatile(0);
        (&raw mut (*turns).at).write_volatile(PATH_CAPACITY as u32);
        (&raw mut (*turns).outer).write_volatile(PATH_CAPACITY as u32);
        (&raw mut (*turns).outcome).write_volatile(u32::from(reason::PATH_TOO_DEEP));
        (&raw mut (*turns).volume).write_volatile(0);
        (&raw mut (*turns).renamed).write_volatile(0);
        ((*scratch).slot, turns)
    };
    let Some(superblock) = dentry.follow(offset!(dentry_superblock)) else { return reason::READ_FAILED };
    let Some(root) = superblock.follow(offset!(superblock_root)) else { return reason::READ_FAILED };
    let may_be_volume = !volumes::is_own_root(slot, superblock.0);
    let on_overlay =
        !may_be_volume && superblock.read::<u64>(offset!(superblock_magic)) == Some(overlay::OVERLAYFS);
    let mut about = Climb {
        turns,
        area,
        slot,
        superblock: superblock.0,
        may_be_volume: u64::from(may_be_volume),
        on_overlay: u64::from(on_overlay),
        root: root.0,
    };
    repeat(PATH_DEPTH as u32, &mut about, component);
    // SAFETY: as above.
    unsafe { (&raw const (*turns).outcome).read_volatile() as u8 }
}

/// One component of a climb.
///
/// # Safety
///
/// `climb` must be of the current task's claimed memory.
#[inline(always)]
unsafe extern "C" fn component(depth: u64, climb: *mut Climb) -> i64 {
    // SAFETY: the caller's promise.
    unsafe {
        let turns = (*climb).turns;
        let outcome = step_up(depth, &*climb);
        if outcome == STILL_CLIMBING {
            return AGAIN;
        }
        (&raw mut (*turns).outcome).write_volatile(outcome);
    }
    DONE
}

/// No [`reason`].
const STILL_CLIMBING: u32 = u32::MAX;

/// Takes one component; returns how the climb ends with it, as a [`reason`], or [`STILL_CLIMBING`].
///
/// # Safety
///
/// `climb` must be of the current task's claimed memory.
#[inline(always)]
unsafe fn step_up(depth: u64, climb: &Climb) -> u32 {
    let Climb { turns, area, slot, superblock, may_be_volume, on_overlay, root } = *climb;
    // SAFETY: the caller's promise.
    let (current, start) = unsafe {
        let current = (&raw const (*turns).current).read_volatile();
        (KernelPtr(current), (&raw const (*turns).at).read_volatile())
    };
    if may_be_volume != 0
        && let Some(volume) = volumes::rooted_at(slot, superblock, current)
    {
        // The rest of the way is the host's affair; on NFS it does not even lead to the superblock's root.
        let hidden = volume.flags & volume_flags::REPLACED_WHOLE != 0 && names_a_generation(area, start);
        // SAFETY: as above.
        unsafe {
            if hidden {
                let outer = (&raw const (*turns).outer).read_volatile();
                (&raw mut (*turns).at).write_volatile(outer);
            }
            (&raw mut (*turns).volume).write_volatile(volume.name + 1);
        }
        return 0;
    }
    if current.0 == root {
        if start == PATH_CAPACITY as u32 {
            // SAFETY: the last byte of the path's place, within the area; else as above.
            unsafe {
                (&raw mut (*turns).at).write_volatile(PATH_CAPACITY as u32 - 1);
                area.cast::<u8>().add(PATH_CAPACITY - 1).write(b'/');
            }
        }
        return 0;
    }
    // SAFETY: as above.
    let parent = unsafe { if look(turns, current) { word(turns, offset!(dentry_parent)) } else { 0 } };
    if parent == 0 {
        return reason::READ_FAILED.into();
    }
    let orphan = parent == current.0;
    if orphan && depth != 0 {
        return reason::WALK_INCOMPLETE.into();
    }
    // SAFETY: as above.
    let name = unsafe { (word(turns, offset!(dentry_name)), half(turns, offset!(dentry_name_length))) };
    match prepend(area, start, name, u32::from(!orphan)) {
        // SAFETY: as above.
        Ok(next) => unsafe { (&raw mut (*turns).at).write_volatile(next) },
        Err(_) if orphan => {}
        Err(reason) => return reason.into(),
    }
    if orphan {
        // A memfd, a pipe, or a subtree that was cut off: its own name is all there is to show.
        return reason::WALK_INCOMPLETE.into();
    }
    // SAFETY: as above.
    unsafe {
        (&raw mut (*turns).outer).write_volatile(start);
        // After its name: overlayfs notes a new name before it gives it.
        if on_overlay != 0 && overlay::palisade_is_redirected(word(turns, offset!(dentry_inode))) != 0 {
            (&raw mut (*turns).renamed).write_volatile(1);
        }
        add_to_seal(turns, current);
        (&raw mut (*turns).current).write_volatile(word(turns, offset!(dentry_parent)));
    }
    STILL_CLIMBING
}

/// Whether the first component of the path that starts at `start` is `..` and more, which only names a generation of files.
#[inline(always)]
fn names_a_generation(area: *mut Area, start: u32) -> bool {
    start + 3 < PATH_CAPACITY as u32
        && byte(area, start + 1) == b'.'
        && byte(area, start + 2) == b'.'
        && byte(area, start + 3) != b'/'
}
