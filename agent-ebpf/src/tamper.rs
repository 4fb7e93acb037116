//! Self-protection: what a process of a container does to the agent, to its maps and programs, and to their pins.
//!
//! It lasts as long as the agent: nobody but the agent's own container may touch these while it lives. What is refused
//! without it is what profiles say; a new agent must be able to take over what is pinned.

use palisade_abi::{
    codes::{action, error, kind, mode, tampering, verdict},
    record::{DecisionPart, TamperRecord},
    state::PROBE_SLOT,
};

use crate::{
    agent, context, count,
    kernel::{Address, KernelPtr},
    maps::{PROTECTED, offset},
    processes::{self, palisade_slot_of_process},
    record::{self, Lane},
    slots, task,
};

/// `BPF_FS_MAGIC` of include/uapi/linux/magic.h.
const BPF_FILESYSTEM: u64 = 0xcafe_4a11;
/// Folders between a pin and the folder of all pins, at most.
const PIN_DEPTH: u32 = 6;

/// Whether an act on the process `task` is refused, since it is the agent or one of its own. `detail` is what the act's code says.
#[inline(always)]
pub fn on_process(act: u8, task: Address, detail: u32) -> bool {
    let Some(pid) = KernelPtr(task).read::<u32>(offset!(task_tgid)) else { return false };
    palisade_is_guarded(u64::from(pid)) != 0
        && palisade_attempt(u64::from(act), u64::from(pid), u64::from(detail)) != 0
}

/// Whether a process is the agent's own: itself, what runs beside it in its container and may do what it may, the child with
/// which it proves that it enforces, and the runtime's process above its container, with which the container ends.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_is_guarded(pid: u64) -> u64 {
    let Some(agent) = agent::state() else { return 0 };
    if pid == u64::from(agent.pid) {
        return 1;
    }
    let own = palisade_slot_of_process(u64::from(agent.pid));
    if own != 0 && pid == u64::from(agent.parent) {
        return 1;
    }
    let slot = palisade_slot_of_process(pid);
    u64::from(slot != 0 && (slot == own || slot == PROBE_SLOT))
}

/// Whether a file descriptor may not send `task` signals: nobody can say who arranged for that.
#[inline(always)]
pub fn by_descriptor(task: Address) -> bool {
    let Some(agent) = agent::state() else { return false };
    let is_agent = KernelPtr(task).read::<u32>(offset!(task_tgid)) == Some(agent.pid);
    if is_agent {
        count::error(error::DESCRIPTOR_SIGNAL);
    }
    is_agent && agent::lives(agent) && agent.self_protection == u32::from(mode::ENFORCE)
}

/// Whether opening the map or program `object` is refused.
#[inline(always)]
pub fn on_object(act: u8, object: Option<u32>) -> bool {
    let Some(id) = object else { return false };
    // SAFETY: only presence matters.
    let ours = unsafe { PROTECTED.get(u64::from(act) << 32 | u64::from(id)) }.is_some();
    ours && palisade_attempt(u64::from(act), u64::from(id), 0) != 0
}

/// Whether taking away the file of `dentry` is refused: a pin, or a folder of pins.
#[inline(always)]
pub fn on_pin(dentry: Address) -> bool {
    let dentry = KernelPtr(dentry);
    dentry.follow(offset!(dentry_superblock)).is_some_and(shows_pins)
        && is_pin(dentry)
        && palisade_attempt(u64::from(tampering::REMOVE_PIN), 0, 0) != 0
}

/// Whether unmounting `mount` is refused: it shows the pins.
#[inline(always)]
pub fn on_mount(mount: Address) -> bool {
    let Some(superblock) = KernelPtr(mount).follow(offset!(vfsmount_superblock)) else { return false };
    shows_pins(superblock) && palisade_attempt(u64::from(tampering::UNMOUNT), 0, 0) != 0
}

/// Whether a superblock is that of the bpffs with the pins.
#[inline(always)]
fn shows_pins(superblock: KernelPtr) -> bool {
    superblock.read::<u64>(offset!(superblock_magic)) == Some(BPF_FILESYSTEM)
        && superblock.read::<u32>(offset!(superblock_device)) == agent::state().map(|agent| agent.pins_device)
}

/// Whether the file at `dentry` is the folder of all pins, or below it. Not a global function, which would not take the
/// hook's typed pointer.
#[inline(always)]
fn is_pin(dentry: KernelPtr) -> bool {
    let Some(agent) = agent::state() else { return false };
    let mut current = dentry;
    let mut depth = 0;
    while depth < PIN_DEPTH {
        let inode = current.follow(offset!(dentry_inode)).and_then(|inode| inode.read(offset!(inode_number)));
        if inode == Some(agent.pins_inode) {
            return true;
        }
        let Some(parent) = current.follow(offset!(dentry_parent)) else { return false };
        current = parent;
        depth += 1;
    }
    false
}

/// Judges and records what the current process tries on the agent. Returns whether it is refused.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_attempt(act: u64, target: u64, detail: u64) -> u64 {
    let Some(agent) = agent::state() else { return 0 };
    let pid = task::current_pid();
    if pid == agent.pid || !agent::lives(agent) {
        return 0;
    }
    let slot = match palisade_slot_of_process(u64::from(pid)) {
        0 => match slots::current_slot() {
            Some(slot) => slot,
            None => return 0,
        },
        slot => slot,
    };
    if slot == palisade_slot_of_process(u64::from(agent.pid)) {
        return 0;
    }
    let refused = agent.self_protection == u32::from(mode::ENFORCE);
    if let Some((mut entry, header)) = record::reserve::<TamperRecord>(slot, kind::TAMPER, Lane::Tamper, true)
    {
        let place = entry.as_mut_ptr();
        // SAFETY: the place is a whole reserved record.
        unsafe {
            (&raw mut (*place).header).write(header);
            context::describe(KernelPtr::current_task(), &raw mut (*place).process);
            (&raw mut (*place).session).write(processes::session_of(pid));
            (&raw mut (*place).decision).write(DecisionPart {
                verdict: if refused { verdict::DENIED } else { verdict::AUDITED },
                action: if refused { action::REFUSED } else { action::NONE },
                reason: 0,
                mode: 0,
                revision: 0,
            });
            (&raw mut (*place).act).write(act as u8);
            (&raw mut (*place).reserved).write([0; 3]);
            (&raw mut (*place).target).write(target as u32);
            (&raw mut (*place).detail).write(detail as u32);
            (&raw mut (*place).reserved_too).write(0);
        }
        record::submit(entry, true);
    } else if refused && !record::is_active() {
        // As for an exec: the set that records is not asked any more.
        record::lose(slot, Lane::Tamper);
    }
    u64::from(refused)
}
