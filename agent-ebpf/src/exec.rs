//! Execution: the decision at `bprm_check_security`, and what was executed at `sched_process_exec`.
//!
//! The check runs once per pass of the binary format loop: a script first, then its interpreter. Where LSM
//! programs cannot be loaded, the tracepoint is the first and only place, and a denial there kills the process
//! before its first instruction. Where both run, the tracepoint judges again: should a kernel have skipped the
//! check, the process still dies.

use aya_ebpf::helpers::{
    bpf_ktime_get_boot_ns, bpf_probe_read_user_buf, bpf_probe_read_user_str_bytes, bpf_send_signal,
    generated::{bpf_get_current_task_btf, bpf_probe_read_kernel, bpf_task_pt_regs},
};
use core::hint::black_box;
use palisade_abi::{
    PATH_CAPACITY,
    codes::{action, argv_source, error, exec_flags, kind, mode, origin, reason, slot_flags, verdict},
    offsets::ABSENT,
    record::{
        ExecPart, ExecRecord, INTERPRETER, LARGE_ARGV, LARGE_CWD, LARGE_PATH, LONGEST_ARGUMENT, SMALL_ARGV,
        SMALL_CWD, SMALL_PATH,
    },
    state::{HOST_ROOT, Process},
};

use crate::{
    containers, context, count,
    interpreter::palisade_recall_interpreter,
    judge::{
        palisade_code_rules, palisade_judge, palisade_refuses_unexamined, rules_forbid_elevation, rules_mode,
    },
    kernel::{KernelPtr, plain, read_user_word},
    maps::{INTERPRETERS, PROCESSES, ROOTS, SCRIPTS, SLOT_POLICIES, SLOTS, offset, planted, setting},
    origin::{self as origins, palisade_classify},
    path::{self, palisade_walk},
    processes::{self, Address},
    record::{self, Lane},
    repeat::{AGAIN, DONE, repeat},
    scratch::{self, Area, EXECUTABLE, Scratch, Turns, WORKING_DIRECTORY, arguments},
    volumes::palisade_name_volume,
};

const SIGKILL: u32 = 9;
const SIGCONT: u32 = 18;
const SIGSTOP: u32 = 19;
/// Numbers of `execve` and `execveat` on x86-64.
const SYS_EXECVE: u64 = 59;
const SYS_EXECVEAT: u64 = 322;
/// Of include/uapi/linux/fcntl.h.
const AT_EXECVE_CHECK: u64 = 0x10000;
/// `#!`, little endian.
const SCRIPT_MAGIC: u64 = 0x2123;
/// `\x7fELF`, little endian.
const ELF_MAGIC: u64 = 0x464c_457f;
/// `execveat` of 32-bit programs.
const SYS_EXECVEAT_32: u64 = 358;
/// The same by the numbers of x32.
const SYS_EXECVEAT_X32: u64 = 0x4000_0221;
/// Most arguments of a refused exec that are read.
const MOST_ARGUMENTS: u32 = 64;

/// Claims memory for the current task, with what is known of its process in it.
#[inline(always)]
fn claim() -> Option<(u64, *mut Scratch)> {
    let (claim, scratch) = scratch::claim()?;
    if processes::palisade_recall_process(claim) != 0 {
        scratch::release(claim);
        return None;
    }
    Some((claim, scratch))
}

/// The LSM hook: whether to refuse this pass. With `asked`, nothing will be executed.
#[inline(always)]
pub fn check(bprm: Address, asked: bool) -> bool {
    processes::palisade_adopt_started(plain(bprm));
    let slot = processes::palisade_current_slot();
    if slot == 0 {
        return false;
    }
    if processes::is_held() {
        // It was to wait for a verdict on what it executed before this.
        kill();
        return true;
    }
    let Some((claim, scratch)) = claim() else {
        let denied = palisade_refuses_unexamined(slot) != 0;
        if denied || (asked && record::is_active()) {
            record::lose(slot, Lane::Check);
        }
        return denied;
    };
    // SAFETY: the memory belongs to this task until it is released.
    let process = unsafe { &(*scratch).process };
    let verdict = examine(claim, scratch, bprm);
    // SAFETY: the memory belongs to this task until it is released.
    let unjudged = planted!(SCRIPTS_UNJUDGED) && unsafe { is_script(scratch) };
    let verdict = if unjudged { verdict::ALLOWED } else { verdict };
    // In the first pass the interpreter is the file itself; what an earlier exec that failed left is void then.
    // SAFETY: the memory belongs to this task until it is released.
    let bprm = unsafe { (&raw const (*scratch).bprm).read_volatile() };
    let interpreter = context::palisade_pointer(bprm, u64::from(offset!(binprm_interp)));
    let first = interpreter == context::palisade_pointer(bprm, u64::from(offset!(binprm_filename)));
    if first {
        // SAFETY: as above.
        unsafe { (&raw mut (*scratch).script_start).write_volatile(PATH_CAPACITY as u16) };
    }
    let depends = process.pending_verdict == verdict::ALLOWED && process.pending_reason == reason::ARGUMENTS;
    // SAFETY: as above.
    let verdict = unsafe {
        let unknowable = asked || is_script(scratch) || entry_is_missing();
        if !first && depends && verdict == verdict::ALLOWED {
            // The arguments will be the interpreter's.
            (*scratch).of_script = 1;
            without_arguments(scratch, verdict)
        } else if unknowable && (*scratch).decision.reason == reason::ARGUMENTS {
            without_arguments(scratch, verdict)
        } else {
            verdict
        }
    };
    let denied = verdict == verdict::DENIED;
    if asked {
        // SAFETY: as above.
        unsafe { (*scratch).flags |= exec_flags::ONLY_ASKED };
    }
    if asked && verdict == verdict::AUDITED {
        // Nothing comes that would be recorded.
        palisade_report(claim);
    }
    if denied {
        // SAFETY: as above.
        unsafe { (*scratch).decision.action = action::REFUSED };
        palisade_report(claim);
        no_exec_any_more();
    } else if verdict == verdict::HELD && entry_is_missing() {
        // Nobody could say later that it waits.
        // SAFETY: as above.
        unsafe {
            (*scratch).decision.verdict = verdict::DENIED;
            (*scratch).decision.action = action::REFUSED;
        }
        palisade_report(claim);
        scratch::release(claim);
        return true;
    } else if let Some(entry) = PROCESSES.get_ptr_mut(processes::current_pid()) {
        // SAFETY: the pointers come from map lookups. One exec of a process runs at a time: the kernel holds
        // `cred_guard_mutex` from before the first pass until after the tracepoint.
        unsafe {
            let pending = (&raw const (*entry).pending_verdict).read_volatile();
            let passes = (&raw const (*entry).passes).read_volatile();
            (&raw mut (*entry).passes).write_volatile(if first { 1 } else { passes.saturating_add(1) });
            if first {
                if (&raw const (*entry).committed).read_volatile() != 0 && record::is_active() {
                    // The tracepoint was skipped that would have recorded the exec before this.
                    record::lose((*scratch).slot, Lane::Exec);
                }
                (&raw mut (*entry).committed).write_volatile(0);
                (&raw mut (*entry).foreign_interpreter).write_volatile(0);
                (&raw mut (*entry).elevates).write_volatile(0);
                (&raw mut (*entry).has_interpreter).write_volatile(0);
            }
            (&raw mut (*entry).bprm).write_volatile((&raw const (*scratch).bprm).read_volatile());
            (&raw mut (*entry).expects_interpreter).write_volatile(u8::from(is_elf(scratch)));
            keep_script(scratch, entry, first);
            if first || verdict > pending || pending == verdict::ALLOWED {
                (&raw mut (*entry).pending_verdict).write_volatile(verdict);
                (&raw mut (*entry).pending_reason).write_volatile((*scratch).decision.reason);
            }
        }
    }
    scratch::release(claim);
    denied
}

/// The verdict on what is allowed with certain arguments alone, where nobody will ever compare them. A worse one stays.
///
/// # Safety
///
/// `scratch` must be the current task's claimed memory.
#[inline(always)]
unsafe fn without_arguments(scratch: *mut Scratch, verdict: u8) -> u8 {
    if verdict != verdict::ALLOWED {
        return verdict;
    }
    // SAFETY: the caller's promise.
    unsafe {
        let audits = (*scratch).decision.mode == mode::AUDIT;
        (*scratch).decision.verdict = if audits { verdict::AUDITED } else { verdict::DENIED };
        (*scratch).decision.reason = reason::ARGUMENTS;
        (*scratch).decision.verdict
    }
}

/// Whether what is executed in this pass begins as a script.
///
/// # Safety
///
/// `scratch` must be the current task's claimed memory.
#[inline(always)]
unsafe fn is_script(scratch: *mut Scratch) -> bool {
    // SAFETY: the caller's promise.
    let bprm = unsafe { (&raw const (*scratch).bprm).read_volatile() };
    context::palisade_word(bprm, u64::from(offset!(binprm_buffer))) & 0xffff == SCRIPT_MAGIC
}

/// Whether what is executed in this pass begins as an ELF file.
///
/// # Safety
///
/// `scratch` must be the current task's claimed memory.
#[inline(always)]
unsafe fn is_elf(scratch: *mut Scratch) -> bool {
    // SAFETY: the caller's promise.
    let bprm = unsafe { (&raw const (*scratch).bprm).read_volatile() };
    context::palisade_word(bprm, u64::from(offset!(binprm_buffer))) & 0xffff_ffff == ELF_MAGIC
}

/// Keeps the canonical path of a script for the record of the exec, which names the interpreter.
///
/// # Safety
///
/// `scratch` must be the current task's claimed memory, `entry` the current process's entry.
#[inline(always)]
unsafe fn keep_script(scratch: *mut Scratch, entry: *mut Process, first: bool) {
    if !first {
        // Of several scripts in a row the first is the one that was executed.
        return;
    }
    // SAFETY: the caller's promise. The value is the path's place in the scratch memory, of the map's value size.
    unsafe {
        let start = (*scratch).executable.start as u16;
        let is_script = is_script(scratch) && (*scratch).executable.failure == 0;
        let path = (&raw const (*scratch).path).cast::<[u8; PATH_CAPACITY]>();
        let kept = is_script && SCRIPTS.insert(processes::current_pid(), &*path, 0).is_ok();
        if is_script && !kept {
            count::error(error::SCRIPT_MAP_FULL);
        }
        if !kept && usize::from((&raw const (*entry).script_start).read_volatile()) < PATH_CAPACITY {
            let _may_be_gone = SCRIPTS.remove(processes::current_pid());
        }
        (&raw mut (*entry).script_start).write_volatile(if kept { start } else { PATH_CAPACITY as u16 });
        (&raw mut (*entry).script_origin).write_volatile((*scratch).origin);
        let superblock = (*scratch).executable.superblock;
        let device = context::palisade_word(superblock, u64::from(offset!(superblock_device)));
        (&raw mut (*entry).script_device).write_volatile(device as u32);
    }
}

/// The hook after the last pass: whether to refuse a program that would have rights which its caller has not.
#[inline(always)]
pub fn elevates(bprm: Address) -> bool {
    let Some(new) = KernelPtr(bprm).follow(offset!(binprm_cred)) else { return false };
    if palisade_gains_rights(new.0) == 0 {
        return false;
    }
    let slot = processes::palisade_current_slot();
    if slot == 0 {
        return false;
    }
    if let Some(entry) = PROCESSES.get_ptr_mut(processes::current_pid()) {
        // SAFETY: as in `check`.
        unsafe { (&raw mut (*entry).elevates).write_volatile(1) };
    }
    let rules = palisade_code_rules(slot);
    if !rules_forbid_elevation(rules) || rules_mode(rules) == mode::AUDIT {
        // Audited at the tracepoint.
        return false;
    }
    let Some((claim, scratch)) = claim() else {
        record::lose(slot, Lane::Check);
        return true;
    };
    let of_runtime = examine(claim, scratch, bprm) == verdict::ALLOWED
        // SAFETY: the memory belongs to this task until it is released.
        && unsafe { (*scratch).decision.reason } == reason::RUNTIME;
    if !of_runtime {
        // SAFETY: as above.
        unsafe {
            (*scratch).decision.verdict = verdict::DENIED;
            (*scratch).decision.reason = reason::ELEVATION;
            (*scratch).decision.action = action::REFUSED;
            (*scratch).flags |= exec_flags::ELEVATED;
        }
        palisade_report(claim);
        no_exec_any_more();
    }
    scratch::release(claim);
    !of_runtime
}

/// Notes that the current process is in no exec, since that was refused.
#[inline(always)]
pub fn no_exec_any_more() {
    if let Some(entry) = PROCESSES.get_ptr_mut(processes::current_pid()) {
        // SAFETY: as in `check`.
        unsafe { (&raw mut (*entry).pending_verdict).write_volatile(0) };
    }
}

/// The hook before any pass, for a call that does not execute but asks whether it might: no other one comes. Whether to answer
/// that it may not.
#[inline(always)]
pub fn asked(bprm: Address) -> bool {
    if !only_asked() {
        return false;
    }
    let refused = check(bprm, true);
    no_exec_any_more();
    refused
}

/// Whether credentials have a user, a group or a capability that the current task has not.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_gains_rights(new: u64) -> u64 {
    let old = context::palisade_pointer(KernelPtr::current_task().0, u64::from(offset!(task_cred)));
    let word = |place: u64, field: u32| context::palisade_word(place, u64::from(field));
    let set = |place: u64| context::palisade_pointer(place, u64::from(offset!(cred_cap_permitted)));
    let other_user = word(new, offset!(cred_euid)) != word(old, offset!(cred_euid));
    let other_group = word(new, offset!(cred_egid)) != word(old, offset!(cred_egid));
    u64::from(other_user || other_group || set(new) & !set(old) != 0)
}

/// Whether there is no entry of the current process to note anything in.
#[inline(always)]
fn entry_is_missing() -> bool {
    PROCESSES.get_ptr_mut(processes::current_pid()).is_none()
}

/// An exec that is past its point of no return, at a hook that no kernel since 6.2 skips. A tracepoint may be (since 7.0), so
/// what only that could say is not taken for granted: who executes it from now on, and whether its arguments are allowed.
#[inline(always)]
pub fn committed() {
    let Some(entry) = PROCESSES.get_ptr_mut(processes::current_pid()) else { return };
    // SAFETY: as in `check`.
    unsafe {
        let caller = (&raw const (*entry).program).read_volatile();
        (&raw mut (*entry).caller).write_volatile(caller);
        (&raw mut (*entry).program).write_volatile([0; 2]);
        (&raw mut (*entry).committed).write_volatile(1);
        (&raw mut (*entry).leader).write_volatile(KernelPtr::current_task().0);
        let verdict = (&raw const (*entry).pending_verdict).read_volatile();
        let depends = verdict == verdict::ALLOWED
            && (&raw const (*entry).pending_reason).read_volatile() == reason::ARGUMENTS;
        if verdict == verdict::HELD {
            let _killed_instead = !stop(entry);
        } else if depends && !processes::is_traced() {
            // The tracepoint lets it go on. A tracer would not let it stop; a profile that allows one allows other arguments.
            let _killed_instead = !stop(entry);
        }
    }
}

/// Whether the current process, past its point of no return, was stopped until its arguments are judged.
#[inline(always)]
fn waits_for_arguments(process: &Process) -> bool {
    process.held != 0
        && process.pending_verdict == verdict::ALLOWED
        && process.pending_reason == reason::ARGUMENTS
}

/// The tracepoint: an exec that passed its point of no return.
#[inline(always)]
pub fn executed(bprm: Address) {
    processes::palisade_adopt_started(plain(bprm));
    let slot = processes::palisade_current_slot();
    if slot == 0 {
        return;
    }
    let Some((claim, scratch)) = claim() else {
        palisade_executed_unexamined(slot);
        return;
    };
    // SAFETY: the memory belongs to this task until it is released.
    let process = unsafe { &mut (*scratch).process };
    let waits = waits_for_arguments(process);
    if waits {
        process.held = 0;
    }
    note_executed();
    // SAFETY: the memory belongs to this task until it is released.
    unsafe {
        (*scratch).arguments_known = 1;
        (*scratch).caller = if process.committed == 0 { process.program } else { process.caller };
    }
    let interpreter_is_lost = process.has_interpreter != 0 && palisade_recall_interpreter(claim) != 0;
    let mut verdict = examine(claim, scratch, bprm);
    // SAFETY: the memory belongs to this task until it is released.
    unsafe {
        // Only a pass before the last one, that is a script's, can know better than this judgement.
        if process.passes > 1 && process.pending_verdict > verdict {
            verdict = process.pending_verdict;
            (*scratch).decision.verdict = verdict;
            (*scratch).decision.reason = process.pending_reason;
            (*scratch).of_script = 1;
        } else if process.pending_reason == reason::INTERPRETER && process.pending_verdict > verdict {
            verdict = process.pending_verdict;
            (*scratch).decision.verdict = verdict;
            (*scratch).decision.reason = reason::INTERPRETER;
        }
        if process.elevates != 0 {
            (*scratch).flags |= exec_flags::ELEVATED;
            let rules = palisade_code_rules(process.slot);
            if rules_forbid_elevation(rules)
                && verdict == verdict::ALLOWED
                && (*scratch).decision.reason != reason::RUNTIME
            {
                let audits = rules_mode(rules) == mode::AUDIT;
                verdict = if audits { verdict::AUDITED } else { verdict::DENIED };
                (*scratch).decision.verdict = verdict;
                (*scratch).decision.reason = reason::ELEVATION;
            }
        }
        if process.held != 0 {
            // It is stopped already, and must be let go by whoever settles it.
            verdict = verdict::HELD;
            (*scratch).decision.verdict = verdict;
            (*scratch).decision.reason = process.pending_reason;
        }
        if verdict == verdict::HELD && process.foreign_interpreter != 0 {
            (*scratch).flags |= exec_flags::FOREIGN_INTERPRETER;
        }
        if verdict == verdict::HELD && interpreter_is_lost {
            (*scratch).decision.reason = reason::LOOKUP_MISSED;
        }
        if verdict == verdict::HELD && process.passes > 1 {
            // It can only be settled later if its script is known: one, by its whole path.
            let known = SCRIPTS.get_ptr_mut(processes::current_pid()).is_some();
            let one = process.passes == 2 && usize::from(process.script_start) < PATH_CAPACITY && known;
            if !one {
                (*scratch).decision.reason = reason::LOOKUP_MISSED;
            }
        }
        if verdict == verdict::DENIED && kill() {
            (*scratch).decision.action = action::KILLED;
        }
        if verdict == verdict::HELD {
            hold(scratch);
        }
        if (*scratch).decision.reason != reason::RUNTIME {
            note_first_exec(process.slot);
        }
    }
    palisade_remember_program(claim);
    if waits && verdict != verdict::DENIED {
        go_on();
    }
    if palisade_report(claim) != 0 && verdict == verdict::HELD {
        // Nobody would know that it waits.
        kill();
    }
    let has_script = usize::from(process.script_start) < PATH_CAPACITY;
    scratch::release(claim);
    if has_script {
        let _may_be_gone = SCRIPTS.remove(processes::current_pid());
        if let Some(entry) = PROCESSES.get_ptr_mut(processes::current_pid()) {
            // SAFETY: as in `check`.
            unsafe { (&raw mut (*entry).script_start).write_volatile(PATH_CAPACITY as u16) };
        }
    }
}

/// Notes that the current process is past an exec. What it executes is to be noted once it is known.
#[inline(always)]
fn note_executed() {
    if let Some(entry) = PROCESSES.get_ptr_mut(processes::current_pid()) {
        // SAFETY: as in `check`.
        unsafe {
            (&raw mut (*entry).pending_verdict).write_volatile(0);
            (&raw mut (*entry).jit_noted).write_volatile(0);
            (&raw mut (*entry).committed).write_volatile(0);
            (&raw mut (*entry).program).write_volatile([0; 2]);
        }
    }
}

/// What becomes of an exec of `slot` that there is no memory to judge in.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_executed_unexamined(slot: u64) -> u64 {
    // SAFETY: only fields are read.
    let waits = unsafe { PROCESSES.get(processes::current_pid()) }.is_some_and(waits_for_arguments);
    note_executed();
    if palisade_refuses_unexamined(slot) != 0 {
        kill();
    } else if waits {
        go_on();
    }
    if record::is_active() {
        record::lose(slot, Lane::Exec);
    }
    0
}

/// Lets the current process go on, which was stopped until its arguments were judged: nothing has come of the signal yet, and
/// this one takes it back.
#[inline(always)]
fn go_on() {
    if let Some(entry) = PROCESSES.get_ptr_mut(processes::current_pid()) {
        // SAFETY: as in `check`.
        unsafe { (&raw mut (*entry).held).write_volatile(0) };
    }
    // SAFETY: the helper has no preconditions; the signal goes to the current process.
    if unsafe { bpf_send_signal(SIGCONT) } != 0 {
        count::error(error::STOP_FAILED);
        kill();
    }
}

/// Notes what the current process executes from now on, for what rules say of those that it executes in turn. Only an unmodified
/// file of the image has a name that can be relied on. A script has none of its own: whoever may execute it can have its
/// interpreter do something else (`BASH_ENV`, `#!/usr/bin/env`).
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_remember_program(claim: u64) -> u64 {
    let Some(scratch) = scratch::of(claim) else { return 1 };
    let Some(entry) = PROCESSES.get_ptr_mut(processes::current_pid()) else { return 1 };
    // SAFETY: the memory belongs to this task until it is released; the entry belongs to this process.
    unsafe {
        let of_image = (*scratch).origin == origin::IMAGE && (*scratch).executable.failure == 0;
        if of_image {
            let program = path::hash(scratch, &raw mut (*scratch).path, (*scratch).executable.start);
            (&raw mut (*entry).program).write_volatile(program);
        }
    }
    0
}

/// Stops the current process before it returns to user space, until the agent has settled what it may do. One that
/// cannot be stopped dies; returns whether it is stopped.
#[inline(always)]
fn stop(entry: *mut Process) -> bool {
    // SAFETY: the pointer comes from a map lookup; the entry belongs to this process.
    unsafe { (&raw mut (*entry).held).write_volatile(1) };
    send_stop()
}

/// Sends the signal that stops the current process, or ends it; returns whether it is stopped.
#[inline(always)]
fn send_stop() -> bool {
    // SAFETY: the helper has no preconditions; the signal goes to the current process.
    if !processes::is_traced() && unsafe { bpf_send_signal(SIGSTOP) } == 0 {
        return true;
    }
    count::error(error::STOP_FAILED);
    kill();
    false
}

/// A task that comes back from having been stopped: one that is held goes on being so, whatever let it go.
#[inline(always)]
pub fn woken() {
    let Some(entry) = PROCESSES.get_ptr_mut(processes::current_pid()) else { return };
    // SAFETY: the pointer comes from a map lookup; the entry belongs to this process, and the agent changes it before it lets it go.
    if unsafe { (&raw const (*entry).held).read_volatile() } == 0 {
        return;
    }
    if offset!(mutex_owner) == ABSENT {
        // `PREEMPT_RT`, where the lock of the signals is held with interrupts on, and the signal would wait for it.
        return;
    }
    count::error(error::HELD_WOKEN);
    send_stop();
}

/// The same at the tracepoint, where it is recorded.
///
/// # Safety
///
/// `scratch` must be the current task's claimed memory.
#[inline(always)]
unsafe fn hold(scratch: *mut Scratch) {
    if let Some(entry) = PROCESSES.get_ptr_mut(processes::current_pid())
        && stop(entry)
    {
        return;
    }
    // Without an entry nobody would know whom to let go.
    // SAFETY: the caller's promise.
    unsafe {
        (*scratch).decision.verdict = verdict::DENIED;
        if kill() {
            (*scratch).decision.action = action::KILLED;
        }
    }
}

/// Ends the current process before it returns to user space.
#[inline(always)]
pub fn kill() -> bool {
    // SAFETY: the helper has no preconditions; the signal goes to the current process.
    let sent = unsafe { bpf_send_signal(SIGKILL) } == 0;
    if !sent {
        count::error(error::KILL_FAILED);
    }
    sent
}

#[inline(always)]
fn note_first_exec(slot: u64) {
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

/// Walks, classifies and judges. Returns the verdict; all else is in the scratch memory.
#[inline(always)]
fn examine(claim: u64, scratch: *mut Scratch, bprm: Address) -> u8 {
    // SAFETY: the memory belongs to this task until it is released; what is known of the process was recalled into it.
    let process = unsafe { &(*scratch).process };
    // SAFETY: the memory belongs to this task until it is released.
    unsafe {
        // Read back from the map, the hook's typed pointer becomes a plain number, which global functions take.
        (&raw mut (*scratch).bprm).write_volatile(bprm);
        let bprm = KernelPtr((&raw const (*scratch).bprm).read_volatile());
        let dentry = bprm
            .follow(offset!(binprm_file))
            .and_then(|file| file.follow(offset!(file_dentry)))
            .unwrap_or(KernelPtr(0));
        (*scratch).slot = process.slot;
        (*scratch).dentry = dentry.0;
        if (*scratch).arguments_known == 0 {
            (*scratch).caller = process.program;
        }
        (*scratch).script_start = process.script_start;
        (*scratch).script_origin = process.script_origin;
        (*scratch).script_device = process.script_device;
        palisade_walk(claim, dentry.0, EXECUTABLE);
    }
    let runtime = process.entering != 0 && palisade_is_runtime_step(process.slot) != 0;
    let origin = palisade_classify(claim) as u8;
    let escaped = !runtime && palisade_is_outside(process.slot) != 0;
    // SAFETY: as above. The session is read anew, since the step before may have begun one.
    unsafe {
        (*scratch).origin = origin;
        (*scratch).escaped = u8::from(escaped);
        (&raw mut (*scratch).session).write_volatile(processes::session_of(processes::current_pid()));
    }
    if runtime {
        // SAFETY: as above.
        unsafe {
            (*scratch).decision.verdict = verdict::ALLOWED;
            (*scratch).decision.reason = reason::RUNTIME;
        }
        return verdict::ALLOWED;
    }
    palisade_judge(claim) as u8
}

/// Whether the current task, which entered `slot` from outside, is still the runtime's. Clears its latch at the
/// first exec outside the host's root.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_is_runtime_step(slot: u64) -> u64 {
    let Some(root) = origins::current_root() else {
        count::error(error::ROOT_READ);
        return 0;
    };
    // SAFETY: the host's entry is written before any program is attached and never again.
    let Some(host) = (unsafe { ROOTS.get(HOST_ROOT) }) else {
        count::error(error::HOST_ROOT_MISSING);
        return 0;
    };
    let hosts_root = root.superblock == host.superblock && root.dentry == host.dentry;
    // Also in a mount namespace of its own: the runtime's hooks run there before the root is switched.
    // SAFETY: only a field is read.
    let host_is_root = unsafe { SLOT_POLICIES.get(slot) }
        .is_some_and(|policy| policy.flags & slot_flags::ROOT_IS_HOSTS != 0);
    if (hosts_root || planted!(LATCH_STAYS)) && !host_is_root {
        return 1;
    }
    if !hosts_root {
        // The runtime has run nothing but itself so far, so the root it chose is the container's.
        containers::first_root(slot, root);
    }
    processes::begin_session(slot);
    0
}

/// Whether the current task, which belongs to `slot`, has left it: it has the host's root directory, or is in the host's
/// mount namespace with any other root than its container's. Of a container whose root is the host's own, only the
/// mount namespace tells. What cannot be read counts as having left.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_is_outside(slot: u64) -> u64 {
    let in_hosts_namespace =
        context::mount_namespace(KernelPtr::current_task()) == setting!(host_mount_namespace);
    // SAFETY: only a field is read.
    let host_is_root = unsafe { SLOT_POLICIES.get(slot) }
        .is_some_and(|policy| policy.flags & slot_flags::ROOT_IS_HOSTS != 0);
    if host_is_root {
        return u64::from(in_hosts_namespace);
    }
    let Some(root) = origins::current_root() else {
        count::error(error::ROOT_READ);
        return 1;
    };
    // SAFETY: the entry is written when the root is learned.
    let own = unsafe { ROOTS.get(slot) }.is_some_and(|own| own.superblock == root.superblock);
    if in_hosts_namespace && !own {
        return 1;
    }
    // SAFETY: the host's entry is written before any program is attached and never again.
    match unsafe { ROOTS.get(HOST_ROOT) } {
        Some(host) => u64::from(root.superblock == host.superblock && root.dentry == host.dentry),
        None => {
            count::error(error::HOST_ROOT_MISSING);
            1
        }
    }
}

/// Whether what is reported comes from the hook, before anything was executed.
///
/// # Safety
///
/// `scratch` must be the current task's claimed memory.
#[inline(always)]
unsafe fn is_early(scratch: *mut Scratch) -> bool {
    // SAFETY: the caller's promise.
    unsafe { (*scratch).decision.action == action::REFUSED || (*scratch).flags & exec_flags::ONLY_ASKED != 0 }
}

/// Finds the arguments and reports what `claim` has judged.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_report(claim: u64) -> u64 {
    let Some(scratch) = scratch::of(claim) else { return 1 };
    // SAFETY: the memory belongs to this task until it is released.
    let early = unsafe { is_early(scratch) };
    palisade_walk(claim, working_directory().0, WORKING_DIRECTORY);
    palisade_name_volume(claim, WORKING_DIRECTORY);
    let (kind, at, length) = if early {
        arguments_of_caller()
    } else {
        match arguments_of_new_image() {
            Some((begin, end)) => (arguments::NEW_IMAGE, begin, end - begin),
            None => (arguments::UNAVAILABLE, 0, 0),
        }
    };
    // SAFETY: as above.
    let (path_length, cwd_length, script_length) = unsafe {
        (*scratch).arguments_kind = kind;
        (*scratch).arguments_at = at;
        (*scratch).arguments_length = length;
        (
            PATH_CAPACITY as u32 - (*scratch).executable.start,
            PATH_CAPACITY as u32 - (*scratch).working_directory.start,
            PATH_CAPACITY as u32 - u32::from((*scratch).script_start),
        )
    };
    if early && !record::is_active() {
        // SAFETY: as above.
        unsafe {
            if (*scratch).decision.action == action::REFUSED {
                // The set that records is not asked any more: a hook ends with the first refusal.
                record::lose((*scratch).slot, Lane::Check);
            }
        }
        return 1;
    }
    let small = path_length <= SMALL_PATH as u32
        && cwd_length <= SMALL_CWD as u32
        && script_length <= SMALL_PATH as u32
        && kind != arguments::CALLER
        && length <= SMALL_ARGV as u64;
    if small { palisade_write_small(claim) } else { palisade_write_large(claim) }
}

#[inline(always)]
fn working_directory() -> KernelPtr {
    KernelPtr::current_task()
        .follow(offset!(task_fs))
        .and_then(|fs| fs.follow(offset!(fs_pwd_dentry)))
        .unwrap_or(KernelPtr(0))
}

/// Where the arguments of what was executed begin and end.
#[inline(always)]
pub fn arguments_of_new_image() -> Option<(u64, u64)> {
    let mm = KernelPtr::current_task().follow(offset!(task_mm))?;
    let (begin, end) = (mm.read::<u64>(offset!(mm_arg_start))?, mm.read::<u64>(offset!(mm_arg_end))?);
    (end >= begin).then_some((begin, end))
}

/// The registers that the current system call was made with.
#[inline(always)]
pub fn registers() -> Option<KernelPtr> {
    if setting!(have_task_pt_regs) == 1 {
        // SAFETY: the helpers have no preconditions; the task is the current one.
        return Some(KernelPtr(unsafe { bpf_task_pt_regs(bpf_get_current_task_btf()) } as u64));
    }
    let at = setting!(pt_regs_at);
    match KernelPtr::current_task().follow(offset!(task_stack)) {
        Some(stack) if at != 0 => Some(KernelPtr(stack.0 + u64::from(at))),
        _ => None,
    }
}

/// Whether the current system call is one that executes something.
#[inline(always)]
pub fn is_called() -> bool {
    // Of 64-bit callers, and of 32-bit ones, whose numbers are `munmap` and none for the others; no memory is mapped by these.
    let call = registers().and_then(|registers| registers.read::<u64>(offset!(pt_regs_orig_ax)));
    matches!(call, Some(SYS_EXECVE | SYS_EXECVEAT | 11 | 358 | 0x4000_0208 | 0x4000_0221))
}

/// Whether the call does not execute anything, but asks whether it might (6.14 and later).
#[inline(always)]
fn only_asked() -> bool {
    let Some(registers) = registers() else { return false };
    let flags: Option<u64> = match registers.read::<u64>(offset!(pt_regs_orig_ax)) {
        Some(SYS_EXECVEAT | SYS_EXECVEAT_X32) => registers.read(offset!(pt_regs_r8)),
        // Also of a 64-bit program, by `int 0x80`.
        Some(SYS_EXECVEAT_32) => registers.read(offset!(pt_regs_di)),
        _ => None,
    };
    flags.is_some_and(|flags| flags & AT_EXECVE_CHECK != 0)
}

/// From the registers of the system call that is being refused.
#[inline(always)]
fn arguments_of_caller() -> (u32, u64, u64) {
    let Some(registers) = registers() else { return (arguments::UNAVAILABLE, 0, 0) };
    // The number of the call is also the check that these are the registers.
    let array = match registers.read::<u64>(offset!(pt_regs_orig_ax)) {
        Some(SYS_EXECVE) => registers.read::<u64>(offset!(pt_regs_si)),
        Some(SYS_EXECVEAT) => registers.read::<u64>(offset!(pt_regs_dx)),
        _ => None,
    };
    array.map_or((arguments::UNAVAILABLE, 0, 0), |array| (arguments::CALLER, array, 0))
}

// The lengths that the copies below arrive at are noted in the scratch memory, not returned: the verifier knows
// nothing of a number that it reads from a map, and so does not follow every possible length through all that
// comes after.

/// Notes a length and adds flags.
#[inline(always)]
fn note(length: *mut u16, value: usize, judged: *mut Scratch, flags: u8) {
    // SAFETY: both point into memory that belongs to this task.
    unsafe {
        length.write_volatile(value as u16);
        let place = &raw mut (*judged).flags;
        place.write_volatile(place.read_volatile() | flags);
    }
}

/// Copies the path that starts at `start` of `area` to `target`; returns its length.
#[inline(always)]
pub fn copy_path<const CAPACITY: usize>(area: *mut Area, start: u32, target: *mut [u8; CAPACITY]) -> usize {
    let length = PATH_CAPACITY as u32 - start;
    let size = black_box(length);
    if size == 0 || size > CAPACITY as u32 {
        return 0;
    }
    // SAFETY: `target` holds CAPACITY bytes; the helper checks what it reads, which is this task's own memory.
    let copied = unsafe {
        bpf_probe_read_kernel(target.cast(), size, area.cast::<u8>().wrapping_add(start as usize).cast())
    };
    if copied == 0 { size as usize } else { 0 }
}

/// Copies the run of strings at `start` to `target`.
#[inline(always)]
fn copy_run<const CAPACITY: usize>(judged: *mut Scratch, target: *mut [u8; CAPACITY]) {
    // SAFETY: the memory belongs to this task.
    let (start, length) = unsafe { ((*judged).arguments_at, (*judged).arguments_length) };
    let size = black_box(if length > CAPACITY as u64 { CAPACITY } else { length as usize });
    let mut copied = 0;
    let mut flags = exec_flags::ARGV_TRUNCATED;
    if size <= CAPACITY {
        // SAFETY: `target` holds CAPACITY bytes; the helper checks the user address.
        let read = unsafe {
            bpf_probe_read_user_buf(
                start as *const u8,
                core::slice::from_raw_parts_mut(target.cast::<u8>(), size),
            )
        };
        if read.is_ok() {
            copied = size;
            if length <= CAPACITY as u64 {
                flags = 0;
            }
        } else {
            count::error(error::ARGV_READ);
        }
    }
    // SAFETY: the place is in the task's own memory.
    note(unsafe { &raw mut (*judged).argv_length }, copied, judged, flags);
}

/// Copies the strings that the caller's array points to. `target` is followed by room for one more longest
/// argument.
#[inline(always)]
fn copy_strings<const CAPACITY: usize>(judged: *mut Scratch, target: *mut [u8; CAPACITY]) {
    // SAFETY: the memory belongs to this task.
    let (array, turns) = unsafe {
        let turns = &raw mut (*judged).turns;
        (&raw mut (*turns).at).write_volatile(0);
        (&raw mut (*turns).outcome).write_volatile(u32::from(exec_flags::ARGV_TRUNCATED));
        ((*judged).arguments_at, turns)
    };
    repeat(MOST_ARGUMENTS, &mut Strings { turns, array, target }, string::<CAPACITY>);
    // SAFETY: as above.
    let (at, flags) = unsafe {
        ((&raw const (*turns).at).read_volatile() as usize, (&raw const (*turns).outcome).read_volatile())
    };
    let used = if at > CAPACITY { CAPACITY } else { at };
    // SAFETY: the place is in the task's own memory.
    note(unsafe { &raw mut (*judged).argv_length }, used, judged, flags as u8);
}

/// Strings that are copied.
struct Strings<const CAPACITY: usize> {
    turns: *mut Turns,
    array: u64,
    target: *mut [u8; CAPACITY],
}

/// One string.
///
/// # Safety
///
/// `strings` must be of the current task's claimed memory, with a target that has room for a longest argument behind it.
#[inline(always)]
unsafe extern "C" fn string<const CAPACITY: usize>(index: u64, strings: *mut Strings<CAPACITY>) -> i64 {
    // SAFETY: the caller's promise.
    let (turns, array, target) = unsafe { ((*strings).turns, (*strings).array, (*strings).target) };
    let pointer = match read_user_word(array + index * 8) {
        Some(0) => {
            // SAFETY: as above.
            unsafe { (&raw mut (*turns).outcome).write_volatile(0) };
            return DONE;
        }
        Some(pointer) => pointer,
        None => {
            count::error(error::ARGV_READ);
            return DONE;
        }
    };
    // SAFETY: as above.
    let at = unsafe { (&raw const (*turns).at).read_volatile() };
    let place = black_box(at as usize);
    if place >= CAPACITY {
        return DONE;
    }
    // SAFETY: place < CAPACITY and room for a longest argument follows; the helper checks the user address
    // and writes at most the slice's length.
    let read = unsafe {
        bpf_probe_read_user_str_bytes(
            pointer as *const u8,
            core::slice::from_raw_parts_mut(target.cast::<u8>().add(place), LONGEST_ARGUMENT),
        )
    };
    let Ok(string) = read else {
        count::error(error::ARGV_READ);
        return DONE;
    };
    // The helper leaves out the zero byte that it wrote.
    // SAFETY: as above.
    unsafe { (&raw mut (*turns).at).write_volatile(at + string.len() as u32 + 1) };
    AGAIN
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_write_small(claim: u64) -> u64 {
    u64::from(!write::<SMALL_PATH, SMALL_CWD, SMALL_ARGV, 0>(claim, 0))
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_write_large(claim: u64) -> u64 {
    u64::from(!write::<LARGE_PATH, LARGE_CWD, LARGE_ARGV, LONGEST_ARGUMENT>(claim, 1))
}

#[inline(always)]
fn write<const PATH: usize, const CWD: usize, const ARGV: usize, const SLACK: usize>(
    claim: u64,
    class: u16,
) -> bool {
    let Some(scratch) = scratch::of(claim) else { return false };
    // SAFETY: the memory belongs to this task until it is released.
    let (slot, early, kind) = unsafe { ((*scratch).slot, is_early(scratch), (*scratch).arguments_kind) };
    let lane = if early { Lane::Check } else { Lane::Exec };
    // SAFETY: as above.
    let urgent = unsafe { (*scratch).decision.verdict } != verdict::ALLOWED;
    let Some((mut entry, header)) =
        record::reserve::<ExecRecord<PATH, CWD, ARGV, SLACK>>(slot, kind::EXEC, lane, urgent)
    else {
        return false;
    };
    let place = entry.as_mut_ptr();
    let current = KernelPtr::current_task();
    // SAFETY: the place is a whole reserved record; the scratch memory belongs to this task.
    unsafe {
        (&raw mut (*place).head.header).write(header);
        let executable = &raw const (*scratch).executable;
        let length = copy_path(&raw mut (*scratch).path, (*executable).start, &raw mut (*place).path);
        let failure = (*executable).failure as u8;
        let cut = matches!(failure, reason::PATH_TOO_LONG | reason::PATH_TOO_DEEP);
        note(
            &raw mut (*scratch).path_length,
            length,
            scratch,
            if cut { exec_flags::PATH_TRUNCATED } else { 0 },
        );
        let working_directory = &raw const (*scratch).working_directory;
        let length = copy_path(&raw mut (*scratch).cwd, (*working_directory).start, &raw mut (*place).cwd);
        let cut = (*working_directory).failure != 0;
        note(
            &raw mut (*scratch).cwd_length,
            length,
            scratch,
            if cut { exec_flags::CWD_TRUNCATED } else { 0 },
        );
        let start = u32::from((&raw const (*scratch).script_start).read_volatile());
        let mut length = 0;
        if start < PATH_CAPACITY as u32
            && let Some(script) = SCRIPTS.get_ptr_mut(processes::current_pid())
        {
            length = copy_path(script.cast(), start, &raw mut (*place).script);
        }
        note(&raw mut (*scratch).script_length, length, scratch, 0);
        let of_interpreter = &raw mut (*place).interpreter;
        let found = match INTERPRETERS.get_ptr_mut(processes::current_pid()) {
            Some(found) if (*scratch).interpreter != [0; 2] => found,
            _ => core::ptr::null_mut(),
        };
        if found.is_null() {
            of_interpreter.write([0; INTERPRETER]);
        } else {
            of_interpreter.write((*found).shown);
        }
        let argv = &raw mut (*place).argv;
        let source = &raw mut (*scratch).argv_source;
        match kind {
            arguments::NEW_IMAGE => {
                source.write_volatile(argv_source::NEW_IMAGE);
                copy_run(scratch, argv);
            }
            arguments::CALLER if SLACK >= LONGEST_ARGUMENT => {
                source.write_volatile(argv_source::SYSCALL);
                copy_strings(scratch, argv);
            }
            _ => note(&raw mut (*scratch).argv_length, 0, scratch, exec_flags::ARGV_TRUNCATED),
        }
        context::describe(current, &raw mut (*place).head.process);
        (&raw mut (*place).head.session).write((&raw const (*scratch).session).read_volatile());
        context::describe_context(current, &raw mut (*place).head.context);
        (&raw mut (*place).head.decision).write((&raw const (*scratch).decision).read());
        write_exec_part(scratch, &raw mut (*place).head.exec, class);
        record::submit(entry, urgent);
    }
    true
}

/// Fills in what was executed and decided.
///
/// # Safety
///
/// `scratch` must be the current task's claimed memory and `exec` writable.
#[inline(always)]
unsafe fn write_exec_part(scratch: *mut Scratch, exec: *mut ExecPart, class: u16) {
    // SAFETY: the caller's promise.
    unsafe {
        let inode = context::palisade_pointer((*scratch).dentry, u64::from(offset!(dentry_inode)));
        (&raw mut (*exec).origin).write((*scratch).origin);
        (&raw mut (*exec).argv_source).write((&raw const (*scratch).argv_source).read_volatile());
        let flags = (&raw const (*scratch).flags).read_volatile();
        // `of_script` is 0 or 1.
        let of_script = (*scratch).of_script * exec_flags::VERDICT_OF_SCRIPT;
        let escaped = (*scratch).escaped * exec_flags::ESCAPED;
        (&raw mut (*exec).flags).write(flags | of_script | escaped);
        (&raw mut (*exec).reserved).write(0);
        let argc = context::palisade_word((*scratch).bprm, u64::from(offset!(binprm_argc)));
        (&raw mut (*exec).argc).write(argc as u32);
        (&raw mut (*exec).inode).write(context::palisade_pointer(inode, u64::from(offset!(inode_number))));
        let superblock = (*scratch).executable.superblock;
        let device = context::palisade_word(superblock, u64::from(offset!(superblock_device)));
        (&raw mut (*exec).device).write(device as u32);
        let mode = context::palisade_word(inode, u64::from(offset!(inode_mode)));
        (&raw mut (*exec).file_mode).write(mode as u32 & 0xffff);
        (&raw mut (*exec).path_length).write((&raw const (*scratch).path_length).read_volatile());
        (&raw mut (*exec).cwd_length).write((&raw const (*scratch).cwd_length).read_volatile());
        (&raw mut (*exec).argv_length).write((&raw const (*scratch).argv_length).read_volatile());
        (&raw mut (*exec).class).write(class);
        (&raw mut (*exec).script_length).write((&raw const (*scratch).script_length).read_volatile());
        (&raw mut (*exec).script_origin).write((*scratch).script_origin);
        (&raw mut (*exec).interpreter_origin).write((*scratch).interpreter_origin);
        (&raw mut (*exec).interpreter).write((*scratch).interpreter);
        (&raw mut (*exec).interpreter_name).write((*scratch).interpreter_name);
        (&raw mut (*exec).script_device).write((*scratch).script_device);
        (&raw mut (*exec).caller).write((*scratch).caller);
    }
}
