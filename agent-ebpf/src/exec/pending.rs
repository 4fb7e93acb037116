//! The exec that a process is in: what its entry keeps of it from hook to hook. One exec of a process runs at a time: the kernel holds
//! `cred_guard_mutex` from before the first pass until after the tracepoint. So what is kept has one writer.

use aya_ebpf::helpers::bpf_ktime_get_boot_ns;
use palisade_abi::{
    codes::{origin, reason, verdict},
    state::Process,
};

use crate::{
    area, judging,
    kernel::KernelPtr,
    maps::{PROCESSES, SLOTS, offset},
    task,
};

/// Whether there is no entry of the current process to note anything in.
#[inline(always)]
pub fn entry_is_missing() -> bool {
    PROCESSES.get_ptr_mut(task::current_pid()).is_none()
}

/// Notes that the current process is in no exec, since that was refused.
#[inline(always)]
pub fn none_any_more() {
    if let Some(entry) = PROCESSES.get_ptr_mut(task::current_pid()) {
        // SAFETY: the pointer comes from a map lookup; what is written has one writer.
        unsafe { (&raw mut (*entry).pending_verdict).write_volatile(0) };
    }
}

/// Notes that the current process is past an exec. What it executes is to be noted once it is known.
#[inline(always)]
pub fn note_executed() {
    if let Some(entry) = PROCESSES.get_ptr_mut(task::current_pid()) {
        // SAFETY: the pointer comes from a map lookup; what is written has one writer.
        unsafe {
            (&raw mut (*entry).pending_verdict).write_volatile(0);
            (&raw mut (*entry).jit_noted).write_volatile(0);
            (&raw mut (*entry).committed).write_volatile(0);
            (&raw mut (*entry).program).write_volatile([0; 2]);
        }
    }
}

/// Whether the current process, past its point of no return, was stopped until its arguments are judged.
#[inline(always)]
pub fn waits_for_arguments(process: &Process) -> bool {
    process.held != 0
        && process.pending_verdict == verdict::ALLOWED
        && process.pending_reason == reason::ARGUMENTS
}

/// The verdict on the exec that the current process is in; 0 when it is in none. The call is looked at, too: an exec may fail
/// where no hook tells, and what it left would pass for one that goes on.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_pending_verdict() -> u64 {
    if !task::is_executing_call() {
        return 0;
    }
    let Some(entry) = PROCESSES.get_ptr_mut(task::current_pid()) else { return 0 };
    // SAFETY: the pointer comes from a map lookup; the entry belongs to this process.
    u64::from(unsafe { (&raw const (*entry).pending_verdict).read_volatile() })
}

/// Whether the file at `dentry` is the one that is being executed: its own mapping follows the verdict on the exec.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_executes(dentry: u64) -> u64 {
    let own = KernelPtr::current_task()
        .follow(offset!(task_mm))
        .and_then(|mm| mm.follow(offset!(mm_exe_file)))
        .and_then(|file| file.follow(offset!(file_dentry)));
    u64::from(palisade_pending_verdict() != 0 && own == Some(KernelPtr(dentry)))
}

/// Notes what the current process executes from now on, for what rules say of those that it executes in turn. Only an unmodified
/// file of the image has a name that can be relied on. A script has none of its own: whoever may execute it can have its
/// interpreter do something else (`BASH_ENV`, `#!/usr/bin/env`).
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_remember_program(claim: u64) -> u64 {
    let Some(scratch) = judging::of(claim) else { return 1 };
    let Some(entry) = PROCESSES.get_ptr_mut(task::current_pid()) else { return 1 };
    // SAFETY: the memory belongs to this task until it is released; the entry belongs to this process.
    unsafe {
        let of_image = (*scratch).origin == origin::IMAGE && (*scratch).executable.failure == 0;
        if of_image {
            let program = area::hash(scratch, &raw mut (*scratch).path, (*scratch).executable.start);
            (&raw mut (*entry).program).write_volatile(program);
        }
    }
    0
}

/// Notes when the first exec of a slot was.
#[inline(always)]
pub fn note_first_exec(slot: u64) {
    let Some(slot) = SLOTS.get_ptr_mut(slot) else { return };
    // SAFETY: the pointer comes from a map lookup. Two first execs may race; either time will do, and the field
    // changes once.
    unsafe {
        let first = &raw mut (*slot).first_exec;
        if first.read_volatile() == 0 {
            first.write_volatile(bpf_ktime_get_boot_ns());
        }
    }
}
