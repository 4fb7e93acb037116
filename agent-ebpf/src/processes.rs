//! Processes of containers: who belongs to which slot, from fork to exit.

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use palisade_abi::{
    codes::{error, kind, session},
    record::{ExitRecord, ForkRecord, SessionPart},
    state::Process,
};

use crate::{
    agent, context, count,
    kernel::{Address, KernelPtr, plain},
    maps::{FORKING, PROCESSES, SCRIPTS, SLOTS, offset, setting},
    record::{self, Lane},
    roots, slots, task,
};

/// What is known of the current process: its entry, or where its cgroup says it belongs. Without either it may have
/// come in by the mount namespace alone (`nsenter --mount`): then its root directory says so, and its session
/// begins. A process of the container's cgroup without an entry is the runtime's if it is only just coming in; else it counts
/// as one of no known session.
#[inline(always)]
pub fn current() -> Option<Process> {
    // SAFETY: the entry is written by this process's own hooks or before it runs.
    if let Some(process) = unsafe { PROCESSES.get(task::current_pid()) } {
        return Some(*process);
    }
    if palisade_catch_up(KernelPtr::current_task().0) != 0 {
        // SAFETY: as above.
        return unsafe { PROCESSES.get(task::current_pid()) }.copied();
    }
    if let Some(slot) = slots::current_slot() {
        return Some(Process::new(slot, palisade_take_in(slot) as u8));
    }
    let mut process = Process::new(roots::slot_of_root()?, 0);
    process.session_start = context::palisade_start_time(KernelPtr::current_task().0);
    process.session_pid = task::current_pid();
    process.session_kind = session::ENTERED;
    store(task::current_pid(), process);
    Some(process)
}

/// The slot of the current process; 0 when it belongs to none. A step of its own, as is the next one: an entry takes much of a stack.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_current_slot() -> u64 {
    current().map_or(0, |process| process.slot)
}

/// The slot that the process `pid` has an entry for; 0 without one.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_slot_of_process(pid: u64) -> u64 {
    // SAFETY: only a field is read.
    unsafe { PROCESSES.get(pid as u32) }.map_or(0, |process| process.slot)
}

/// Whether the current process, which is in the cgroup of `slot` and has no entry, is only just coming in; it gets one then.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_take_in(slot: u64) -> u64 {
    if !slots::knows_all_members(slot) || !slots::is_arriving() {
        return 0;
    }
    store(task::current_pid(), Process::new(slot, 1));
    1
}

/// What a child of `known` is before it executes anything.
#[inline(always)]
fn child_of(known: &Process) -> Process {
    let mut process = Process::new(known.slot, known.entering);
    process.session_start = known.session_start;
    process.session_pid = known.session_pid;
    process.session_kind = known.session_kind;
    process.jit_noted = known.jit_noted;
    process.program = known.program;
    process
}

/// `CLONE_THREAD` of include/uapi/linux/sched.h.
const CLONE_THREAD: u64 = 0x0001_0000;

/// The current process makes a child, `child`, which has no number yet. Noted where the program that is told of forks may be skipped.
#[inline(always)]
pub fn forking(child: Address, flags: u64) {
    if setting!(skips_tracepoints) == 0 || flags & CLONE_THREAD != 0 {
        return;
    }
    palisade_catch_up(KernelPtr::current_task().0);
    // SAFETY: as in `current`.
    let Some(known) = (unsafe { PROCESSES.get(task::current_pid()) }) else { return };
    let child = plain(child);
    let process = Process { leader: child, ..child_of(known) };
    if FORKING.insert(child, process, u64::from(BPF_ANY)).is_err() {
        count::error(error::FORK_MAP_FULL);
    }
}

/// Gives the process of the task at `task` the entry that it lacks because the program that is told of forks was skipped, and counts the
/// record as lost. To be called wherever a process without an entry would count as nobody's. Returns its slot; 0 when it lacks none.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_catch_up(task: u64) -> u64 {
    if setting!(skips_tracepoints) == 0 {
        return 0;
    }
    let leader = context::palisade_pointer(task, u64::from(offset!(task_group_leader)));
    // SAFETY: the entry changes no more.
    let Some(process) = (unsafe { FORKING.get(leader) }) else { return 0 };
    let slot = process.slot;
    let pid = context::palisade_word(leader, u64::from(offset!(task_tgid))) as u32;
    // What another of its threads has given it meanwhile stays.
    if PROCESSES.insert(pid, process, u64::from(BPF_NOEXIST)).is_err()
        // SAFETY: only presence matters.
        && unsafe { PROCESSES.get(pid) }.is_none()
    {
        no_room(slot);
    }
    // Of several of its threads one does it.
    if FORKING.remove(leader).is_ok() && record::is_active() {
        record::lose(slot, Lane::Fork);
    }
    slot
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
    if unsafe { PROCESSES.get(task::current_pid()) }.is_some() {
        return 0;
    }
    let Some(parent) = KernelPtr::current_task().follow(offset!(task_real_parent)) else { return 0 };
    if parent.read::<u32>(offset!(task_flags)).unwrap_or(0) & OF_KERNEL == 0 {
        return 0;
    }
    let file =
        KernelPtr(bprm).follow(offset!(binprm_file)).and_then(|file| file.follow(offset!(file_dentry)));
    let Some(slot) = file.and_then(roots::slot_of_file) else { return 0 };
    let mut process = Process::new(slot, 0);
    process.session_start = context::palisade_start_time(KernelPtr::current_task().0);
    process.session_pid = task::current_pid();
    process.session_kind = session::ENTERED;
    store(task::current_pid(), process);
    1
}

/// Gives the process `pid`, whose leader is at `leader`, to `slot`.
#[inline(always)]
pub fn adopt(pid: u32, leader: u64, slot: u64, entering: u8) {
    store(pid, Process { leader, ..Process::new(slot, entering) });
}

#[inline(always)]
fn store(pid: u32, process: Process) {
    if PROCESSES.insert(pid, process, u64::from(BPF_ANY)).is_err() {
        no_room(process.slot);
    }
}

/// Notes that a process of `slot` has no entry, for want of room.
#[inline(always)]
fn no_room(slot: u64) {
    count::error(error::PROCESS_MAP_FULL);
    if let Some(slot) = SLOTS.get_ptr_mut(slot) {
        // SAFETY: the pointer comes from a map lookup; the field changes once.
        unsafe { (&raw mut (*slot).entries_lost).write_volatile(1) };
    }
}

/// Begins the session of the current process, which has just entered `slot` and executes something there: as
/// the workload if it is the first. What the runtime itself starts there (a hook, whose parent belongs to the slot) is
/// neither.
#[inline(always)]
pub fn begin_session(slot: u64) {
    let pid = task::current_pid();
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
    if setting!(skips_tracepoints) == 1 {
        // It is told now.
        let _may_have_none = FORKING.remove(plain(child.0));
    }
    // SAFETY: as in `current`.
    let process = if let Some(known) = unsafe { PROCESSES.get(parent_pid) } {
        child_of(known)
    } else {
        let Some(slot) = slots::slot_of_task(child) else {
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
        Process::new(slot, u8::from(slots::slot_of_task(parent).is_none()))
    };
    let process = Process { leader: child.0, ..process };
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
    let pid = task::current_pid();
    agent::ended(pid);
    palisade_catch_up(KernelPtr::current_task().0);
    // SAFETY: as in `current`.
    let Some(process) = (unsafe { PROCESSES.get(pid) }) else { return };
    let (slot, session, committed) = (process.slot, session_part(process), process.committed);
    if usize::from(process.script_start) < palisade_abi::PATH_CAPACITY {
        // An exec that a script began and that failed.
        let _may_be_gone = SCRIPTS.remove(pid);
    }
    // Two last threads may both see zero; the removal succeeds for one.
    if PROCESSES.remove(pid).is_err() {
        return;
    }
    // One that ends within the call has failed past the point of no return.
    if committed != 0 && !task::is_executing_call() && record::is_active() {
        record::lose(slot, Lane::Exec);
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

/// A task whose memory the kernel gives back, one that never came to run among them. The entry of a process is gone by then, unless the
/// program that is told of exits was skipped: then nobody else with its number may have it, and the record is counted as lost.
#[inline(always)]
pub fn freed(task: Address) {
    if setting!(skips_tracepoints) == 0 {
        return;
    }
    let task = plain(task);
    let _may_have_none = FORKING.remove(task);
    let pid = context::palisade_word(task, u64::from(offset!(task_tgid))) as u32;
    if pid != context::palisade_word(task, u64::from(offset!(task_pid))) as u32 {
        return;
    }
    // SAFETY: only fields are read.
    let Some((leader, slot, committed)) =
        unsafe { PROCESSES.get(pid) }.map(|process| (process.leader, process.slot, process.committed))
    else {
        return;
    };
    // A child that was never completed has its parent's number.
    if leader != task || PROCESSES.remove(pid).is_err() {
        return;
    }
    let _may_have_none = SCRIPTS.remove(pid);
    if record::is_active() {
        record::lose(slot, Lane::Exit);
        if committed != 0 {
            record::lose(slot, Lane::Exec);
        }
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
    palisade_catch_up(plain(task));
    // SAFETY: only fields are read.
    let Some((held, entering)) =
        unsafe { PROCESSES.get(pid) }.map(|process| (process.held, process.entering))
    else {
        return false;
    };
    // SAFETY: only presence matters.
    held != 0 || (entering != 0 && unsafe { PROCESSES.get(task::current_pid()) }.is_some())
}

/// Whether the current process is held.
#[inline(always)]
pub fn is_held() -> bool {
    // SAFETY: only a field is read.
    unsafe { PROCESSES.get(task::current_pid()) }.is_some_and(|process| process.held != 0)
}
