//! The memory and registers of a running process: who may trace whom.

use palisade_abi::{
    codes::{code_act, code_flags},
    section,
};

use crate::{
    code::act::{palisade_refuses, refused},
    kernel::{Address, FMODE_WRITE, KernelPtr, plain},
    maps::{offset, planted},
    processes::{self, palisade_slot_of_process},
    standing::{self, Standing, palisade_slot_under_profile},
    task,
};

/// `PROC_SUPER_MAGIC` of include/uapi/linux/magic.h.
const PROCFS: u64 = 0x9fa0;
/// The name `mem`, little endian, with the zero that ends it.
const MEM: u32 = 0x006d_656d;

/// Whether the current process may not attach to `task`.
#[inline(always)]
pub fn traces(task: Address) -> bool {
    processes::palisade_catch_up(plain(task));
    let Some(pid) = KernelPtr(task).read::<u32>(offset!(task_tgid)) else { return false };
    refused(palisade_traces(code_act::TRACE.into(), u64::from(pid)))
}

/// Whether the current process may not be traced by `tracer`.
#[inline(always)]
pub fn be_traced(tracer: Address) -> bool {
    processes::palisade_catch_up(plain(tracer));
    let Some(pid) = KernelPtr(tracer).read::<u32>(offset!(task_tgid)) else { return false };
    refused(palisade_traces(code_act::BE_TRACED.into(), u64::from(pid)))
}

/// Whether opening `file` is refused: it is the memory of a process, and it would be written to. A process needs no right to
/// trace for its own, and can change code there that it has mapped read-only.
#[inline(always)]
pub fn opens_memory(file: Address) -> bool {
    let file = KernelPtr(file);
    let Some(dentry) = file.follow(offset!(file_dentry)) else { return false };
    let Some(superblock) = dentry.follow(offset!(dentry_superblock)) else { return false };
    if superblock.read::<u64>(offset!(superblock_magic)) != Some(PROCFS) {
        return false;
    }
    let writes = file.read::<u32>(offset!(file_open_mode)).unwrap_or(0) & FMODE_WRITE != 0;
    let is_memory = dentry.read::<u32>(offset!(dentry_name_length)) == Some(3)
        && dentry.follow(offset!(dentry_name)).and_then(|name| name.read::<u32>(0)) == Some(MEM);
    writes && is_memory && refused(palisade_traces(code_act::OPEN_MEMORY.into(), 0))
}

/// Judges an act on a running process, by the profiles of both: where containers see each other's processes, neither the one
/// that may trace nor the one that may be traced speaks for the other. Returns 1 when it is refused.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_traces(act: u64, target: u64) -> u64 {
    if target == u64::from(task::current_pid()) {
        return 0;
    }
    // Both arguments are used, or the compiler would not pass them, which the verifier refuses.
    if planted!(CODE_TRACE_ALLOWED) && core::hint::black_box(act | target) != 0 {
        return 0;
    }
    let slot = palisade_slot_under_profile();
    if slot == 0 {
        return 0;
    }
    let how = act | target << 32;
    let own = palisade_forbids_tracing(slot);
    if own != 0 && Standing(own).refuses() {
        return palisade_refuses(slot, 0, own, how);
    }
    let others = match palisade_slot_of_process(target) {
        0 => 0,
        other if other == slot => 0,
        other => palisade_forbids_tracing(other),
    };
    match (own, others) {
        (0, 0) => 0,
        (own, 0) => palisade_refuses(slot, 0, own, how),
        (_, others) => palisade_refuses(slot, 0, others, how),
    }
}

/// The rules of `slot`, if they do not allow tracing.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_forbids_tracing(slot: u64) -> u64 {
    let rules = standing::of(slot, section::EXEC);
    if !rules.restricts() || rules.has(code_flags::TRACE) { 0 } else { rules.0 }
}
