//! Executables of the image that the profile allows: what would take one from the workload.

use palisade_abi::{codes::code_act, section};

use crate::{
    code::act::{palisade_refuses, refused},
    context,
    kernel::{Address, KernelPtr, S_IFMT, S_IFREG, plain},
    maps::offset,
    origin::palisade_is_of_image,
    standing::{self, palisade_slot_under_profile},
};

/// Of include/uapi/linux/stat.h: anybody may execute it.
const ANY_EXECUTE: u64 = 0o111;

/// Whether an act on the file at `dentry` is refused, since it would take an allowed executable from the workload.
#[inline(always)]
pub fn spoils(act: u8, dentry: Address) -> bool {
    refused(palisade_spoils(act.into(), plain(dentry)))
}

/// Whether mounting something at `path` is refused: it would hide an allowed executable.
#[inline(always)]
pub fn mounts_over(path: Address) -> bool {
    KernelPtr(path)
        .follow(offset!(path_dentry))
        .is_some_and(|dentry| refused(palisade_spoils(code_act::MOUNT_OVER.into(), dentry.0)))
}

/// Judges an act on the file at `dentry`. Returns 1 when it is refused. Only what is executable and the image's is looked at:
/// anything else is no loss, or is one already.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_spoils(act: u64, dentry: u64) -> u64 {
    let inode = context::palisade_pointer(dentry, u64::from(offset!(dentry_inode)));
    let mode = context::palisade_word(inode, u64::from(offset!(inode_mode))) & 0xffff;
    if mode & S_IFMT != S_IFREG || mode & ANY_EXECUTE == 0 {
        return 0;
    }
    let slot = palisade_slot_under_profile();
    if slot == 0 || palisade_is_of_image(slot, dentry) == 0 {
        return 0;
    }
    let rules = standing::of(slot, section::EXEC);
    if !rules.restricts() {
        return 0;
    }
    palisade_refuses(slot, dentry, rules.0, act)
}
