//! The tracepoint: an exec that passed its point of no return.

use palisade_abi::{
    PATH_CAPACITY,
    codes::{action, code_flags, exec_flags, reason, verdict},
    section,
};

use crate::{
    exec::{
        examine::{claim, examine},
        interpreter::palisade_recall_interpreter,
        judge::palisade_refuses_unexamined,
        pending::{note_executed, note_first_exec, palisade_remember_program, waits_for_arguments},
        report::palisade_report,
        signals::{go_on, hold, kill},
    },
    kernel::{Address, plain},
    maps::{PROCESSES, SCRIPTS},
    processes,
    record::{self, Lane},
    standing, task,
};

/// The tracepoint: an exec that passed its point of no return.
#[inline(always)]
pub fn executed(bprm: Address) {
    processes::palisade_adopt_started(plain(bprm));
    let slot = processes::palisade_current_slot();
    if slot == 0 {
        return;
    }
    let Some(memory) = claim() else {
        palisade_executed_unexamined(slot);
        return;
    };
    let (claim, scratch) = (memory.number, memory.scratch);
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
            let rules = standing::of(process.slot, section::EXEC);
            if rules.has(code_flags::NO_ELEVATION)
                && verdict == verdict::ALLOWED
                && (*scratch).decision.reason != reason::RUNTIME
            {
                let audits = !rules.refuses();
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
            let known = SCRIPTS.get_ptr_mut(task::current_pid()).is_some();
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
    if has_script {
        let _may_be_gone = SCRIPTS.remove(task::current_pid());
        if let Some(entry) = PROCESSES.get_ptr_mut(task::current_pid()) {
            // SAFETY: the pointer comes from a map lookup; the entry belongs to this process.
            unsafe { (&raw mut (*entry).script_start).write_volatile(PATH_CAPACITY as u16) };
        }
    }
}

/// What becomes of an exec of `slot` that there is no memory to judge in.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_executed_unexamined(slot: u64) -> u64 {
    // SAFETY: only fields are read.
    let waits = unsafe { PROCESSES.get(task::current_pid()) }.is_some_and(waits_for_arguments);
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
