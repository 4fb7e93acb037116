//! The LSM hooks of an exec: before its point of no return, and at it.

use palisade_abi::{
    PATH_CAPACITY,
    codes::{action, code_flags, error, exec_flags, mode, reason, verdict},
    section,
    state::Process,
};

use crate::{
    context, count,
    exec::{
        arguments::only_asked,
        examine::{claim, examine, is_elf, is_script},
        judge::palisade_refuses_unexamined,
        pending::{self, entry_is_missing},
        report::palisade_report,
        signals::{kill, stop},
    },
    kernel::{Address, KernelPtr, plain},
    maps::{PROCESSES, SCRIPTS, offset, planted},
    processes,
    record::{self, Lane},
    scratch::Scratch,
    standing, task,
};

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
    let Some(memory) = claim() else {
        let denied = palisade_refuses_unexamined(slot) != 0;
        if denied || (asked && record::is_active()) {
            record::lose(slot, Lane::Check);
        }
        return denied;
    };
    let (claim, scratch) = (memory.number, memory.scratch);
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
        pending::none_any_more();
    } else if verdict == verdict::HELD && entry_is_missing() {
        // Nobody could say later that it waits.
        // SAFETY: as above.
        unsafe {
            (*scratch).decision.verdict = verdict::DENIED;
            (*scratch).decision.action = action::REFUSED;
        }
        palisade_report(claim);
        return true;
    } else if let Some(entry) = PROCESSES.get_ptr_mut(task::current_pid()) {
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
        let kept = is_script && SCRIPTS.insert(task::current_pid(), &*path, 0).is_ok();
        if is_script && !kept {
            count::error(error::SCRIPT_MAP_FULL);
        }
        if !kept && usize::from((&raw const (*entry).script_start).read_volatile()) < PATH_CAPACITY {
            let _may_be_gone = SCRIPTS.remove(task::current_pid());
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
    if let Some(entry) = PROCESSES.get_ptr_mut(task::current_pid()) {
        // SAFETY: the pointer comes from a map lookup; the entry belongs to this process.
        unsafe { (&raw mut (*entry).elevates).write_volatile(1) };
    }
    let rules = standing::of(slot, section::EXEC);
    if !rules.has(code_flags::NO_ELEVATION) || !rules.refuses() {
        // Audited at the tracepoint.
        return false;
    }
    let Some(memory) = claim() else {
        record::lose(slot, Lane::Check);
        return true;
    };
    let (claim, scratch) = (memory.number, memory.scratch);
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
        pending::none_any_more();
    }
    !of_runtime
}

/// The hook before any pass, for a call that does not execute but asks whether it might: no other one comes. Whether to answer
/// that it may not.
#[inline(always)]
pub fn asked(bprm: Address) -> bool {
    if !only_asked() {
        return false;
    }
    let refused = check(bprm, true);
    pending::none_any_more();
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

/// An exec that is past its point of no return, at a hook that no kernel since 6.2 skips. A tracepoint may be (since 7.0), so
/// what only that could say is not taken for granted: who executes it from now on, and whether its arguments are allowed.
#[inline(always)]
pub fn committed() {
    let Some(entry) = PROCESSES.get_ptr_mut(task::current_pid()) else { return };
    // SAFETY: the pointer comes from a map lookup; the entry belongs to this process.
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
        } else if depends && !task::is_traced() {
            // The tracepoint lets it go on. A tracer would not let it stop; a profile that allows one allows other arguments.
            let _killed_instead = !stop(entry);
        }
    }
}
