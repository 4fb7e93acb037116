//! Files of an image's layers, below the file systems of containers: a container under a profile may not write there.

use palisade_abi::{codes::code_act, section, state::LayerKey};

use crate::{
    code::act::{palisade_refuses, refused},
    kernel::{Address, FMODE_WRITE, KernelPtr},
    layers::palisade_is_in_layer,
    maps::{LAYERS, offset},
    standing::{self, palisade_slot_under_profile},
};

/// `FMODE_NOACCOUNT` of include/linux/fs.h: overlayfs opens the file of a layer for one of its own. User space cannot ask for it.
const FMODE_NOACCOUNT: u32 = 0x2000_0000;

/// Whether opening `file` is refused: it is in a layer of an image and would be written to, below the file systems of containers.
#[inline(always)]
pub fn opens(file: Address) -> bool {
    let file = KernelPtr(file);
    let mode: u32 = file.read(offset!(file_open_mode)).unwrap_or(0);
    if mode & FMODE_WRITE == 0 || mode & FMODE_NOACCOUNT != 0 {
        return false;
    }
    let Some(dentry) = file.follow(offset!(file_dentry)) else { return false };
    refused(palisade_opens_layer(dentry.0))
}

/// Judges opening the file at `dentry` to write. Returns 1 when it is refused.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_opens_layer(dentry: u64) -> u64 {
    let Some(superblock) = KernelPtr(dentry).follow(offset!(dentry_superblock)) else { return 0 };
    let Some(device) = superblock.read::<u32>(offset!(superblock_device)) else { return 0 };
    // SAFETY: only presence matters.
    if unsafe { LAYERS.get(LayerKey { device, generation: 0, inode: 0 }) }.is_none() {
        return 0;
    }
    let slot = palisade_slot_under_profile();
    if slot == 0 {
        return 0;
    }
    let rules = standing::of(slot, section::EXEC);
    if !rules.restricts() || palisade_is_in_layer(dentry) == 0 {
        return 0;
    }
    palisade_refuses(slot, dentry, rules.0, code_act::OPEN_LAYER.into())
}
