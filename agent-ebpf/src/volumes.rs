//! Volumes: mounts of a container that are not its root filesystem, and the names of files on them.
//!
//! A volume usually shares its superblock with the host, so it is known by the inode that is the mount's root: whatever
//! file has that inode above it, next above first, is on the volume. Bind mounts, chroots and namespaces made inside
//! the container do not take part.

use aya_ebpf::{bindings::BPF_ANY, helpers::generated::bpf_probe_read_kernel};
use core::hint::black_box;
use palisade_abi::{
    PATH_CAPACITY,
    codes::{error, reason},
    state::{HOST_ROOT, VOLUME_NAME_CAPACITY, Volume, VolumeKey},
};

use crate::{
    area::clear_front,
    context, count, judging,
    kernel::KernelPtr,
    maps::{ROOTS, VOLUME_NAMES, VOLUMES, offset},
    roots,
    scratch::EXECUTABLE,
    task,
};

/// Notes that the file open as `descriptor` is the root of a mount of `slot`, named by `name` of `VOLUME_NAMES`. Returns
/// whether it could.
#[inline(always)]
pub fn learn(slot: u64, descriptor: u64, name: u64, flags: u64) -> bool {
    let Some(dentry) = task::opened(descriptor) else { return false };
    let Some(found) = roots::identity(dentry) else { return false };
    // SAFETY: the host's entry is written before any program is attached and never again.
    let Some(host) = (unsafe { ROOTS.get(HOST_ROOT) }) else {
        count::error(error::HOST_ROOT_MISSING);
        return false;
    };
    // What was mounted from a user namespace is the container's own doing.
    if found.user_namespace != host.user_namespace {
        return false;
    }
    let Some(inode) = dentry.follow(offset!(dentry_inode)) else { return false };
    let Some(inode_number) = inode.read(offset!(inode_number)) else { return false };
    let volume =
        Volume { superblock: found.superblock, inode_number, name: name as u32, flags: flags as u32 };
    let stored = VOLUMES.insert(VolumeKey { slot, inode: inode.0 }, volume, u64::from(BPF_ANY)).is_ok();
    if !stored {
        count::error(error::VOLUME_MAP_FULL);
    }
    stored
}

/// Whether `superblock` is the root filesystem of `slot`.
#[inline(always)]
pub fn is_own_root(slot: u64, superblock: u64) -> bool {
    // SAFETY: the entry is written when the root is learned.
    unsafe { ROOTS.get(slot) }.is_some_and(|root| root.superblock == superblock)
}

/// The mount of `slot` whose root is `dentry`, on `superblock`.
#[inline(always)]
pub fn rooted_at(slot: u64, superblock: u64, dentry: KernelPtr) -> Option<Volume> {
    let inode = context::palisade_pointer(dentry.0, u64::from(offset!(dentry_inode)));
    // SAFETY: the entry is written once, by the agent.
    let volume = unsafe { VOLUMES.get(VolumeKey { slot, inode }) }?;
    let number = context::palisade_pointer(inode, u64::from(offset!(inode_number)));
    (volume.superblock == superblock && volume.inode_number == number).then_some(*volume)
}

/// Names what `claim` has walked to, area `which`, by the volume that it is on: the executable as
/// [`palisade_abi::volume`] has it, the working directory by its path alone. Returns 0 and changes nothing when it is
/// on none.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_name_volume(claim: u64, which: u64) -> u64 {
    let Some(scratch) = judging::of(claim) else { return 0 };
    // SAFETY: the memory belongs to this task until it is released.
    let (area, walk) = unsafe {
        if which == EXECUTABLE {
            (&raw mut (*scratch).path, &raw mut (*scratch).executable)
        } else {
            (&raw mut (*scratch).cwd, &raw mut (*scratch).working_directory)
        }
    };
    // SAFETY: as above.
    let (volume, start) = unsafe { ((*walk).volume, (*walk).start) };
    if volume == 0 {
        return 0;
    }
    let Some(name) = VOLUME_NAMES.get(volume - 1) else {
        count::error(error::VOLUME_NAME_MISSED);
        // SAFETY: as above.
        unsafe { (&raw mut (*walk).failure).write_volatile(u32::from(reason::LOOKUP_MISSED)) };
        return 1;
    };
    let (length, mark) = (name.length, name.mark);
    let too_long = start < VOLUME_NAME_CAPACITY as u32;
    if !too_long {
        let at = (black_box(start - VOLUME_NAME_CAPACITY as u32) as usize) & (PATH_CAPACITY - 1);
        // SAFETY: at + VOLUME_NAME_CAPACITY is within the area, whose slack is as long. The name is right-aligned, and
        // the zeros before it are what the path's hash expects there.
        let failed = unsafe {
            let target = area.cast::<u8>().add(at);
            let text = (&raw const (*name).text).cast();
            bpf_probe_read_kernel(target.cast(), VOLUME_NAME_CAPACITY as u32, text)
        };
        if failed != 0 {
            // SAFETY: as above.
            unsafe { (&raw mut (*walk).failure).write_volatile(u32::from(reason::READ_FAILED)) };
            return 1;
        }
    }
    let shown = if which == EXECUTABLE { length } else { length.wrapping_sub(mark) };
    // SAFETY: as above.
    unsafe {
        if too_long || shown > start {
            (&raw mut (*walk).failure).write_volatile(u32::from(reason::PATH_TOO_LONG));
            count::error(error::WALK_LONG);
        } else {
            (&raw mut (*walk).start).write_volatile(start - shown);
            clear_front(area, start - shown);
        }
    }
    1
}
