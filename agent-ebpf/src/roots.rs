//! Root filesystems: the host's, and that of each slot. By them a task has left its container, or has entered one.

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use palisade_abi::{
    codes::error,
    state::{HOST_ROOT, RootIdentity},
};

use crate::{
    count,
    kernel::KernelPtr,
    layers,
    maps::{ROOT_SLOTS, ROOTS, SLOTS, offset},
    overlay,
};

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

/// Whether the current task's root directory is the host's.
#[inline(always)]
pub fn has_hosts_root() -> bool {
    let Some(root) = current_root() else { return false };
    // SAFETY: the host's entry is written before any program is attached and never again.
    unsafe { ROOTS.get(HOST_ROOT) }
        .is_some_and(|host| host.superblock == root.superblock && host.dentry == root.dentry)
}

/// Stores the current task's root directory as that of `slot`, at `now` in seconds since the Unix epoch. Returns whether it could.
#[inline(always)]
pub fn learn(slot: u64, now: u64) -> bool {
    let Some(root) = current_root() else {
        count::error(error::ROOT_READ);
        return false;
    };
    layers::palisade_learn_layers(root.superblock, now);
    store(slot, root, u64::from(BPF_ANY))
}

/// Stores `root` as that of `slot` unless one is known.
#[inline(always)]
pub fn first_root(slot: u64, root: RootIdentity) {
    // SAFETY: only presence matters.
    if unsafe { ROOTS.get(slot) }.is_none() {
        // Its own folder was made after the layers, and before anything of the container ran.
        layers::palisade_learn_layers(root.superblock, overlay::palisade_changed(root.dentry));
        store(slot, root, u64::from(BPF_NOEXIST));
    }
}

#[inline(always)]
fn store(slot: u64, root: RootIdentity, flags: u64) -> bool {
    if slot != HOST_ROOT {
        // SAFETY: the host's entry is written before any program is attached and never again.
        let Some(host) = (unsafe { ROOTS.get(HOST_ROOT) }) else {
            count::error(error::HOST_ROOT_MISSING);
            return false;
        };
        // What was mounted from a user namespace may hold anything, and the host's own file system is no image.
        if root.user_namespace != host.user_namespace || root.superblock == host.superblock {
            count::error(error::ROOT_REFUSED);
            return false;
        }
    }
    let stored = ROOTS.insert(slot, root, flags).is_ok()
        && (slot == HOST_ROOT || ROOT_SLOTS.insert(root.superblock, slot, u64::from(BPF_ANY)).is_ok());
    if !stored {
        count::error(error::ROOT_MAP_FULL);
    }
    stored
}

/// The slot whose root filesystem the current task's root directory is on. `None` when there is none, or its
/// container has ended: the superblock's address may by then be another's.
#[inline(always)]
pub fn slot_of_root() -> Option<u64> {
    slot_of(current_root()?, false)
}

/// The slot on whose root filesystem the file at `dentry` is.
#[inline(always)]
pub fn slot_of_file(dentry: KernelPtr) -> Option<u64> {
    slot_of(identity(dentry)?, true)
}

#[inline(always)]
fn slot_of(root: RootIdentity, any_file: bool) -> Option<u64> {
    // SAFETY: one word, written when the root is learned.
    let slot = *unsafe { ROOT_SLOTS.get(root.superblock) }?;
    // SAFETY: as above.
    let known = unsafe { ROOTS.get(slot) }?;
    // SAFETY: only a field is read.
    let ended = unsafe { SLOTS.get(slot) }?.ended;
    let same =
        known.superblock == root.superblock && known.device == root.device && known.magic == root.magic;
    // Other filesystems than overlays may be shared by containers; then only the very directory tells.
    let own = root.magic == overlay::OVERLAYFS || (!any_file && known.dentry == root.dentry);
    (same && own && ended == 0).then_some(slot)
}
