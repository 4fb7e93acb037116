//! What overlayfs keeps of a file: whether it is the image's own, and which file of a layer stands below.

use palisade_abi::offsets::ABSENT;

use crate::{kernel::KernelPtr, maps::offset};

/// `OVERLAYFS_SUPER_MAGIC` of include/uapi/linux/magic.h.
pub const OVERLAYFS: u64 = 0x794c_7630;

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
