//! Processes of containers: who belongs to which slot, from fork to exit.

use aya_ebpf::{bindings::BPF_ANY, helpers::bpf_get_current_pid_tgid};
use palisade_abi::{
    codes::{error, kind, session},
    maps::Process,
    record::{ExitRecord, ForkRecord, SessionPart},
};

use crate::{
    containers, context, count,
    kernel::KernelPtr,
    maps::{CGROUPS, PROCESSES, SCRIPTS, SLOTS, offset},
    record::{self, Lane},
    tamper,
};

/// The current process's tgid.
#[inline(always)]
pub fn current_pid() -> u32 {
    // The upper half of the helper's result is the tgid.
    (bpf_get_current_pid_tgid() >> 32) as u32
}

/// What is known of the current process: its entry, or where its cgroup says it belongs. Without either it may have
/// come in by the mount namespace alone (`nsenter --mount`): then its root directory says so, and its session
/// begins. A process of the container's cgroup without an entry is the runtime's if it is only just coming in; else it counts
/// as one of no known session.
#[inline(always)]
pub fn current() -> Option<Process> {
    // SAFETY: the entry is written by this process's own hooks or before it runs.
    if let Some(process) = unsafe { PROCESSES.get(current_pid()) } {
        return Some(*process);
    }
    if let Some(slot) = containers::current_slot() {
        let entering = containers::palisade_is_arriving(slot) as u8;
        let process = Process::new(slot, entering);
        if entering != 0 {
            store(current_pid(), process);
        }
        return Some(process);
    }
    let mut process = Process::new(containers::slot_of_root()?, 0);
    process.session_start = context::palisade_start_time(KernelPtr::current_task().0);
    process.session_pid = current_pid();
    process.session_kind = session::ENTERED;
    store(current_pid(), process);
    Some(process)
}

/// `PF_KTHREAD` of include/linux/sched.h.
const OF_KERNEL: u32 = 0x0020_0000;

/// Gives the current process, which executes what the `struct linux_binprm` at `bprm` says, to a container if the kernel itself starts
/// it from that one's file (`core_pattern`, `modprobe`, `uevent_helper`, `release_agent`, request-key): it is that container's doing. A
/// process of the host that executes such a file is the host's.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_adopt_started(bprm: u64) -> u64 {
    // SAFETY: only presence matters.
    if unsafe { PROCESSES.get(current_pid()) }.is_some() {
        return 0;
    }
    let Some(parent) = KernelPtr::current_task().follow(offset!(task_real_parent)) else { return 0 };
    if parent.read::<u32>(offset!(task_flags)).unwrap_or(0) & OF_KERNEL == 0 {
        return 0;
    }
    let file =
        KernelPtr(bprm).follow(offset!(binprm_file)).and_then(|file| file.follow(offset!(file_dentry)));
    let Some(slot) = file.and_then(containers::slot_of_file) else { return 0 };
    let mut process = Process::new(slot, 0);
    process.session_start = context::palisade_start_time(KernelPtr::current_task().0);
    process.session_pid = current_pid();
    process.session_kind = session::ENTERED;
    store(current_pid(), process);
    1
}

/// Gives the process `pid` to `slot`.
#[inline(always)]
pub fn adopt(pid: u32, slot: u64, entering: u8) {
    store(pid, Process::new(slot, entering));
}

#[inline(always)]
fn store(pid: u32, process: Process) {
    if PROCESSES.insert(pid, process, u64::from(BPF_ANY)).is_err() {
        count::error(error::PROCESS_MAP_FULL);
        if let Some(slot) = SLOTS.get_ptr_mut(process.slot) {
            // SAFETY: the pointer comes from a map lookup; the field changes once.
            unsafe { (&raw mut (*slot).entries_lost).write_volatile(1) };
        }
    }
}

/// Begins the session of the current process, which has just entered `slot` and executes something there: as
/// the workload if it is the first. What the runtime itself starts there (a hook, whose parent belongs to the slot) is
/// neither.
#[inline(always)]
pub fn begin_session(slot: u64) {
    let pid = current_pid();
    let parent = context::palisade_pointer(KernelPtr::current_task().0, u64::from(offset!(task_real_parent)));
    let parent = context::palisade_word(parent, u64::from(offset!(task_tgid))) as u32;
    // SAFETY: only presence matters.
    let of_runtime = unsafe { PROCESSES.get(parent) }.is_some();
    let mut kind = if of_runtime { session::UNKNOWN } else { session::ENTERED };
    if !of_runtime && let Some(slot) = SLOTS.get_ptr_mut(slot) {
        // SAFETY: the pointer comes from a map lookup. The runtime starts the entrypoint before it lets anybody in,
        // so two processes do not race for the field.
        unsafe {
            let first = &raw mut (*slot).workload_pid;
            if first.read_volatile() == 0 {
                first.write_volatile(pid);
                kind = session::WORKLOAD;
            }
        }
    }
    let Some(entry) = PROCESSES.get_ptr_mut(pid) else { return };
    // SAFETY: the pointer comes from a map lookup; the entry belongs to this process.
    unsafe {
        (&raw mut (*entry).entering).write_volatile(0);
        (&raw mut (*entry).session_start)
            .write_volatile(context::palisade_start_time(KernelPtr::current_task().0));
        (&raw mut (*entry).session_pid).write_volatile(pid);
        (&raw mut (*entry).session_kind).write_volatile(kind);
    }
}

/// The session that the process `pid` belongs to.
#[inline(always)]
pub fn session_of(pid: u32) -> SessionPart {
    // SAFETY: as in `current`.
    match unsafe { PROCESSES.get(pid) } {
        Some(process) => session_part(process),
        None => SessionPart { start: 0, pid: 0, kind: session::UNKNOWN, reserved: [0; 3] },
    }
}

/// What the process `pid` executes, as [`Process::program`]; 0 when that is not known.
#[inline(always)]
pub fn program_of(pid: u32) -> [u64; 2] {
    // SAFETY: as in `current`.
    unsafe { PROCESSES.get(pid) }.map_or([0; 2], |process| process.program)
}

#[inline(always)]
fn session_part(process: &Process) -> SessionPart {
    SessionPart {
        start: process.session_start,
        pid: process.session_pid,
        kind: process.session_kind,
        reserved: [0; 3],
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
    let process = if let Some(known) = unsafe { PROCESSES.get(parent_pid) } {
        let mut process = Process::new(known.slot, known.entering);
        process.session_start = known.session_start;
        process.session_pid = known.session_pid;
        process.session_kind = known.session_kind;
        process.jit_noted = known.jit_noted;
        process.program = known.program;
        process
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
        Process::new(slot, u8::from(containers::slot_of_task(parent).is_none()))
    };
    store(pid, process);
    if let Some((mut entry, header)) =
        record::reserve::<ForkRecord>(process.slot, kind::FORK, Lane::Fork, false)
    {
        let place = entry.as_mut_ptr();
        // SAFETY: the place is a whole reserved record.
        unsafe {
            (&raw mut (*place).header).write(header);
            context::describe(child, &raw mut (*place).process);
            (&raw mut (*place).session).write(session_part(&process));
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
    tamper::ended(pid);
    // SAFETY: as in `current`.
    let Some(process) = (unsafe { PROCESSES.get(pid) }) else { return };
    let (slot, session) = (process.slot, session_part(process));
    if usize::from(process.script_start) < palisade_abi::PATH_CAPACITY {
        // An exec that a script began and that failed.
        let _may_be_gone = SCRIPTS.remove(pid);
    }
    // Two last threads may both see zero; the removal succeeds for one.
    if PROCESSES.remove(pid).is_err() {
        return;
    }
    if let Some((mut entry, header)) = record::reserve::<ExitRecord>(slot, kind::EXIT, Lane::Exit, false) {
        let place = entry.as_mut_ptr();
        let exit_code = task.read(offset!(task_exit_code)).unwrap_or(0);
        // SAFETY: the place is a whole reserved record.
        unsafe {
            (&raw mut (*place).header).write(header);
            context::describe(task, &raw mut (*place).process);
            (&raw mut (*place).session).write(session);
            (&raw mut (*place).exit_code).write(exit_code);
            (&raw mut (*place).reserved).write(0);
        }
        record::submit(entry, false);
    }
}

/// Whether `task` is stopped because its container is not identified, or is about to be: one that the runtime prepares
/// may be stopped at its next exec, and a signal that is on its way then would undo it.
#[inline(always)]
pub fn must_stay_stopped(task: Address) -> bool {
    let Some(pid) = KernelPtr(task).read::<u32>(offset!(task_tgid)) else { return false };
    // SAFETY: only fields are read.
    unsafe { PROCESSES.get(pid) }.is_some_and(|process| process.held != 0 || process.entering != 0)
}

/// Whether `task` is held, or is prepared by the runtime and a process of a container wants to trace it.
#[inline(always)]
pub fn may_not_be_traced(task: Address) -> bool {
    let Some(pid) = KernelPtr(task).read::<u32>(offset!(task_tgid)) else { return false };
    // SAFETY: only fields are read.
    let Some((held, entering)) =
        unsafe { PROCESSES.get(pid) }.map(|process| (process.held, process.entering))
    else {
        return false;
    };
    // SAFETY: only presence matters.
    held != 0 || (entering != 0 && unsafe { PROCESSES.get(current_pid()) }.is_some())
}

/// Whether the current process is being traced: a tracer can discard the signal that stops it.
#[inline(always)]
pub fn is_traced() -> bool {
    KernelPtr::current_task().read::<u32>(offset!(task_ptrace)) != Some(0)
}

/// The slot of the cgroup with id `cgroup`, if it is a container's.
#[inline(always)]
pub fn slot_of_cgroup(cgroup: u64) -> Option<u64> {
    // SAFETY: one word, written once when the cgroup is made.
    unsafe { CGROUPS.get(cgroup) }.copied()
}

/// A kernel address as a hook's argument delivers it.
pub type Address = u64;
