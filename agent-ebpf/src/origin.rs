//! Where a file's bytes come from.

use palisade_abi::{
    codes::{error, origin},
    offsets::ABSENT,
    state::{HOST_ROOT, RootIdentity},
};

use crate::{
    context, count,
    kernel::KernelPtr,
    layers,
    maps::{ROOTS, offset, planted},
    scratch::{self, EXECUTABLE},
    volumes::{self, palisade_name_volume},
};

// Magic numbers of include/uapi/linux/magic.h.
pub const OVERLAYFS: u64 = 0x794c_7630;
const TMPFS: u64 = 0x0102_1994;
const RAMFS: u64 = 0x8584_58f6;
const HUGETLBFS: u64 = 0x9584_58f6;

/// Of include/uapi/linux/stat.h.
pub const S_IFMT: u64 = 0o170_000;
pub const S_IFREG: u64 = 0o100_000;

/// Reads the identity of the superblock of `dentry`, and the dentry itself.
#[inline(always)]
pub fn identity(dentry: KernelPtr) -> Option<RootIdentity> {
    let superblock = dentry.follow(offset!(dentry_superblock))?;
    Some(RootIdentity {
        superblock: superblock.0,
        dentry: dentry.0,
        user_namespace: superblock.read(offset!(superblock_user_ns))?,
        magic: superblock.read(offset!(superblock_magic))?,
        device: superblock.read(offset!(superblock_device))?,
        reserved: 0,
    })
}

/// The current task's root directory.
#[inline(always)]
pub fn current_root() -> Option<RootIdentity> {
    let root = KernelPtr::current_task().follow(offset!(task_fs))?.follow(offset!(fs_root_dentry))?;
    identity(root)
}

/// Classifies the file that `claim` judges. Returns an [`origin`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_classify(claim: u64) -> u64 {
    let Some(scratch) = scratch::of(claim) else { return u64::from(origin::UNKNOWN) };
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
    volumes::opened(descriptor).map_or(origin::UNKNOWN, overlay_origin)
}

/// Whether the overlay's folder that has the inode at `inode` stands under another name than in its layer.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_is_redirected(inode: u64) -> u64 {
    let redirect = offset!(ovl_inode_redirect);
    let vfs = offset!(ovl_inode_vfs);
    if redirect == ABSENT || vfs == ABSENT {
        return 0;
    }
    if inode == 0 {
        return 1;
    }
    u64::from(KernelPtr(inode - u64::from(vfs)).read::<u64>(redirect) != Some(0))
}

/// The inode of the layer in which the bytes of an overlay's file are.
#[inline(always)]
pub fn layer_inode(dentry: KernelPtr) -> Option<KernelPtr> {
    let lowers = offset!(ovl_entry_lowers);
    let inode = dentry.follow(offset!(dentry_inode))?;
    let own = KernelPtr(inode.0 - u64::from(offset!(ovl_inode_vfs)));
    let layer = match own.read::<u64>(offset!(ovl_inode_upper))? {
        0 if lowers == ABSENT => return None,
        0 => KernelPtr(own.follow(offset!(ovl_inode_entry))?.0 + u64::from(lowers))
            .follow(offset!(ovl_path_dentry))?,
        upper => KernelPtr(upper),
    };
    layer.follow(offset!(dentry_inode))
}

/// When the inode of `dentry` was changed last, in seconds since the Unix epoch: nobody sets that time. 0 when it cannot be told.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_changed(dentry: u64) -> u64 {
    let Some(inode) = KernelPtr(dentry).follow(offset!(dentry_inode)) else { return 0 };
    let mut place = offset!(inode_changed);
    if place == ABSENT {
        place = offset!(inode_changed_before_6_11);
    }
    if place == ABSENT {
        place = offset!(inode_changed_before_6_6);
    }
    inode.read::<u64>(place).unwrap_or(0)
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
