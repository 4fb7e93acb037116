//! Where a file's bytes come from.

use palisade_abi::{
    codes::{error, origin},
    maps::{HOST_ROOT, RootIdentity},
    offsets::ABSENT,
};

use crate::{
    count,
    kernel::KernelPtr,
    maps::{ROOTS, offset},
    scratch::{self, EXECUTABLE},
    volumes::palisade_name_volume,
};

// Magic numbers of include/uapi/linux/magic.h.
pub const OVERLAYFS: u64 = 0x794c_7630;
const TMPFS: u64 = 0x0102_1994;
const RAMFS: u64 = 0x8584_58f6;
const HUGETLBFS: u64 = 0x9584_58f6;

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

/// Classifies the file that `task` judges. Returns an [`origin`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_classify(task: u64) -> u64 {
    let Some(scratch) = scratch::of(task) else { return u64::from(origin::UNKNOWN) };
    // SAFETY: the memory belongs to this task until it is released.
    let (slot, dentry) = unsafe { ((*scratch).slot, KernelPtr((*scratch).dentry)) };
    u64::from(classify(task, slot, dentry))
}

#[inline(always)]
fn classify(task: u64, slot: u64, dentry: KernelPtr) -> u8 {
    let Some(file) = identity(dentry) else {
        count::error(error::ORIGIN_READ);
        return origin::UNKNOWN;
    };
    // SAFETY: the entry is written once, before any task of the slot executes its workload.
    if let Some(root) = unsafe { ROOTS.get(slot) } {
        let same = root.superblock == file.superblock
            && root.device == file.device
            && root.magic == file.magic
            && root.user_namespace == file.user_namespace;
        if same {
            if cfg!(feature = "plant-drift-is-image") {
                return origin::IMAGE;
            }
            return if file.magic == OVERLAYFS { overlay_origin(dentry) } else { origin::UNKNOWN };
        }
    }
    if palisade_name_volume(task, EXECUTABLE) != 0 {
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

/// What [`overlay_origin`] says of the current working directory.
#[inline(always)]
pub fn of_working_directory() -> u8 {
    match KernelPtr::current_task().follow(offset!(task_fs)).and_then(|fs| fs.follow(offset!(fs_pwd_dentry)))
    {
        Some(dentry) => overlay_origin(dentry),
        None => origin::UNKNOWN,
    }
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
        Some(0) => origin::IMAGE,
        Some(_) => origin::DRIFT,
        None => {
            count::error(error::ORIGIN_READ);
            origin::UNKNOWN
        }
    }
}
