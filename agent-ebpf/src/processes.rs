//! Processes of containers: who belongs to which slot, from fork to exit.

use aya_ebpf::{bindings::BPF_ANY, helpers::bpf_get_current_pid_tgid};
use palisade_abi::{
    codes::{error, kind},
    maps::Process,
    record::{ExitRecord, ForkRecord},
};

use crate::{
    containers, context, count,
    kernel::KernelPtr,
    maps::{CGROUPS, PROCESSES, SCRIPTS, offset},
    record::{self, Lane},
};

/// The current process's tgid.
#[inline(always)]
pub fn current_pid() -> u32 {
    // The upper half of the helper's result is the tgid.
    (bpf_get_current_pid_tgid() >> 32) as u32
}

/// What is known of the current process: its entry, or where its cgroup says it belongs. A process without an
/// entry counts as workload.
#[inline(always)]
pub fn current() -> Option<Process> {
    // SAFETY: the entry is written by this process's own hooks or before it runs.
    if let Some(process) = unsafe { PROCESSES.get(current_pid()) } {
        return Some(*process);
    }
    let slot = containers::current_slot()?;
    Some(Process::new(slot, 0))
}

/// Gives the process `pid` to `slot`.
#[inline(always)]
pub fn adopt(pid: u32, slot: u64, entering: u8) {
    let process = Process::new(slot, entering);
    if PROCESSES.insert(pid, process, u64::from(BPF_ANY)).is_err() {
        count::error(error::PROCESS_MAP_FULL);
    }
}

#[inline(always)]
pub fn forked(parent: Address, child: Address) {
    let (parent, child) = (KernelPtr(parent), KernelPtr(child));
    let (Some(pid), Some(tid)) =
        (child.read::<u32>(offset!(task_tgid)), child.read::<u32>(offset!(task_pid)))
    else {
        count::error(error::TASK_READ);
        return;
    };
    if pid != tid {
        return;
    }
    let parent_pid: u32 = parent.read(offset!(task_tgid)).unwrap_or(0);
    // SAFETY: as in `current`.
    let (slot, entering) = if let Some(known) = unsafe { PROCESSES.get(parent_pid) } {
        (known.slot, known.entering)
    } else {
        let Some(slot) = containers::slot_of_task(child) else {
            // A process of the host with a number that a container's process had: an entry that outlived it must not
            // put this one under a profile.
            // SAFETY: only presence matters.
            if unsafe { PROCESSES.get(pid) }.is_some() && PROCESSES.remove(pid).is_err() {
                count::error(error::PROCESS_MAP_FULL);
            }
            return;
        };
        // A child in the container's cgroup of a parent outside it entered by CLONE_INTO_CGROUP. If the parent
        // is inside, it lost its entry, and counts as workload.
        (slot, u8::from(containers::slot_of_task(parent).is_none()))
    };
    adopt(pid, slot, entering);
    if let Some((mut entry, header)) = record::reserve::<ForkRecord>(slot, kind::FORK, Lane::Fork) {
        let place = entry.as_mut_ptr();
        // SAFETY: the place is a whole reserved record.
        unsafe {
            (&raw mut (*place).header).write(header);
            context::describe(child, &raw mut (*place).process);
        }
        record::submit(entry, false);
    }
}

#[inline(always)]
pub fn exited(task: Address) {
    let task = KernelPtr(task);
    let live: Option<u32> =
        task.follow(offset!(task_signal)).and_then(|signal| signal.read(offset!(signal_live)));
    // The counter is decremented before the tracepoint: zero means that the last thread is going.
    if live != Some(0) {
        return;
    }
    let pid = current_pid();
    // SAFETY: as in `current`.
    let Some(process) = (unsafe { PROCESSES.get(pid) }) else { return };
    let slot = process.slot;
    if usize::from(process.script_start) < palisade_abi::PATH_CAPACITY {
        // An exec that a script began and that failed.
        let _may_be_gone = SCRIPTS.remove(pid);
    }
    // Two last threads may both see zero; the removal succeeds for one.
    if PROCESSES.remove(pid).is_err() {
        return;
    }
    if let Some((mut entry, header)) = record::reserve::<ExitRecord>(slot, kind::EXIT, Lane::Exit) {
        let place = entry.as_mut_ptr();
        let exit_code = task.read(offset!(task_exit_code)).unwrap_or(0);
        // SAFETY: the place is a whole reserved record.
        unsafe {
            (&raw mut (*place).header).write(header);
            context::describe(task, &raw mut (*place).process);
            (&raw mut (*place).exit_code).write(exit_code);
            (&raw mut (*place).reserved).write(0);
        }
        record::submit(entry, false);
    }
}

/// The slot of the cgroup with id `cgroup`, if it is a container's.
#[inline(always)]
pub fn slot_of_cgroup(cgroup: u64) -> Option<u64> {
    // SAFETY: one word, written once when the cgroup is made.
    unsafe { CGROUPS.get(cgroup) }.copied()
}

/// A kernel address as a hook's argument delivers it.
pub type Address = u64;
