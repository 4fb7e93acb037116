//! Where a file's bytes come from.

use palisade_abi::{
    codes::{error, origin},
    offsets::ABSENT,
    state::{HOST_ROOT, RootIdentity},
};

use crate::{
    context, count, judging,
    kernel::{KernelPtr, S_IFMT, S_IFREG},
    layers,
    maps::{ROOTS, offset, planted},
    overlay::OVERLAYFS,
    roots::identity,
    scratch::EXECUTABLE,
    task,
    volumes::palisade_name_volume,
};

// Magic numbers of include/uapi/linux/magic.h.
const TMPFS: u64 = 0x0102_1994;
const RAMFS: u64 = 0x8584_58f6;
const HUGETLBFS: u64 = 0x9584_58f6;

/// Classifies the file that `claim` judges. Returns an [`origin`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_classify(claim: u64) -> u64 {
    let Some(scratch) = judging::of(claim) else { return u64::from(origin::UNKNOWN) };
    // SAFETY: the memory belongs to this task until it is released.
    let (slot, dentry, renamed) =
        unsafe { ((*scratch).slot, KernelPtr((*scratch).dentry), (*scratch).executable.renamed) };
    let found = classify(claim, slot, dentry);
    u64::from(if found == origin::IMAGE && renamed != 0 { origin::DRIFT } else { found })
}

/// Whether the file at `dentry` is an unmodified file of the image of `slot`.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_is_of_image(slot: u64, dentry: u64) -> u64 {
    let dentry = KernelPtr(dentry);
    let own = identity(dentry).and_then(|file| origin_on_root(slot, &file, dentry));
    u64::from(own == Some(origin::IMAGE))
}

/// The origin of a file on the root filesystem of `slot`; `None` when it is elsewhere.
#[inline(always)]
fn origin_on_root(slot: u64, file: &RootIdentity, dentry: KernelPtr) -> Option<u8> {
    // SAFETY: the entry is written once, before any task of the slot executes its workload.
    let root = unsafe { ROOTS.get(slot) }?;
    let same = root.superblock == file.superblock
        && root.device == file.device
        && root.magic == file.magic
        && root.user_namespace == file.user_namespace;
    if !same {
        return None;
    }
    if planted!(DRIFT_IS_IMAGE) {
        return Some(origin::IMAGE);
    }
    // A device node has other bytes than the image's, whatever the layer.
    let inode = context::palisade_pointer(dentry.0, u64::from(offset!(dentry_inode)));
    if context::palisade_word(inode, u64::from(offset!(inode_mode))) & S_IFMT != S_IFREG {
        return Some(origin::UNKNOWN);
    }
    Some(if file.magic == OVERLAYFS { overlay_origin(dentry) } else { origin::UNKNOWN })
}

#[inline(always)]
fn classify(claim: u64, slot: u64, dentry: KernelPtr) -> u8 {
    let Some(file) = identity(dentry) else {
        count::error(error::ORIGIN_READ);
        return origin::UNKNOWN;
    };
    if let Some(own) = origin_on_root(slot, &file, dentry) {
        return own;
    }
    if palisade_name_volume(claim, EXECUTABLE) != 0 {
        return origin::VOLUME;
    }
    if file.magic == TMPFS || file.magic == RAMFS || file.magic == HUGETLBFS {
        return origin::MEMORY;
    }
    // SAFETY: the host's entry is written before any program is attached and never again.
    match unsafe { ROOTS.get(HOST_ROOT) } {
        Some(host) if host.superblock == file.superblock => origin::HOST,
        Some(_) => origin::UNKNOWN,
        None => {
            count::error(error::HOST_ROOT_MISSING);
            origin::UNKNOWN
        }
    }
}

/// What [`overlay_origin`] says of a file that the current process has open.
#[inline(always)]
pub fn of_descriptor(descriptor: u64) -> u8 {
    task::opened(descriptor).map_or(origin::UNKNOWN, overlay_origin)
}

/// On overlayfs an inode without an upper dentry is the image's own.
#[inline(always)]
fn overlay_origin(dentry: KernelPtr) -> u8 {
    let vfs = offset!(ovl_inode_vfs);
    let upper = offset!(ovl_inode_upper);
    if vfs == ABSENT || upper == ABSENT {
        return origin::UNKNOWN;
    }
    let Some(inode) = dentry.follow(offset!(dentry_inode)) else {
        count::error(error::ORIGIN_READ);
        return origin::UNKNOWN;
    };
    let overlay_inode = KernelPtr(inode.0 - u64::from(vfs));
    match overlay_inode.read::<u64>(upper) {
        Some(0) if layers::palisade_changed_below(dentry.0) != 0 => origin::DRIFT,
        Some(0) => origin::IMAGE,
        Some(_) => origin::DRIFT,
        None => {
            count::error(error::ORIGIN_READ);
            origin::UNKNOWN
        }
    }
}
