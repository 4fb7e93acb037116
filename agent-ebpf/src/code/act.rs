//! An act that was not allowed at once: judged by the rules, and recorded.

use palisade_abi::codes::{action, code_act, code_flags, reason, verdict};

use crate::{
    code::{
        judge::{palisade_is_allowed_executable, palisade_judge_mapped},
        report::palisade_report_code,
    },
    exec::pending::palisade_executes,
    judging,
    maps::{PROCESSES, planted},
    origin::palisade_classify,
    path::palisade_walk,
    processes,
    record::{self, Lane},
    scratch::EXECUTABLE,
    standing::Standing,
    task,
};

/// What a step answered. Laundered: the compiler knows that it is 0 or 1 and would compute a hook's return value from it, which
/// the verifier, who does not know, refuses.
#[inline(always)]
pub fn refused(answer: u64) -> bool {
    core::hint::black_box(answer) != 0
}

/// 1 in the second byte of [`how`].
pub const GENERATED: u64 = 1 << 8;

/// How the steps below hand an act to each other.
#[inline(always)]
pub fn how(act: u8, generated: bool, protection: u64) -> u64 {
    u64::from(act) | u64::from(generated) << 8 | (protection & 0xffff) << 16
}

/// Judges and records what was not allowed at once. `how` is the act, 1 in the second byte for generated code, the protection
/// in the upper half of the lower word, and the other process in the upper word.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_refuses(slot: u64, dentry: u64, rules: u64, how: u64) -> u64 {
    let rules = Standing(rules);
    let denies = u64::from(rules.refuses());
    let Some(memory) = judging::claim() else {
        if denies != 0 {
            record::lose(slot, Lane::Check);
        }
        return denies;
    };
    let (claim, scratch) = (memory.number, memory.scratch);
    let act = how as u8;
    let is_memory = act == code_act::MAP || act == code_act::PROTECT;
    let traces = !is_memory && act < code_act::CHANGE;
    // SAFETY: the memory belongs to this task until it is released.
    unsafe {
        (*scratch).slot = slot;
        (*scratch).dentry = dentry;
        (*scratch).act = act;
        (*scratch).protection = (how >> 16) as u32 & 0xffff;
        (*scratch).target = (how >> 32) as u32;
        (*scratch).decision.revision = rules.revision();
        (*scratch).decision.mode = rules.mode();
        (&raw mut (*scratch).session).write(processes::session_of(task::current_pid()));
        (*scratch).caller = processes::program_of(task::current_pid());
    }
    let mut reason = if traces { u64::from(reason::TRACE) } else { 0 };
    if !traces && dentry != 0 {
        palisade_walk(claim, dentry, EXECUTABLE);
        let origin = palisade_classify(claim) as u8;
        // SAFETY: as above.
        unsafe { (*scratch).origin = origin };
        reason = if is_memory {
            // The program itself was judged as an exec already.
            if palisade_executes(dentry) != 0 { 0 } else { palisade_judge_mapped(claim, rules.0) }
        } else if act == code_act::OPEN_LAYER {
            reason::LAYER.into()
        } else if !planted!(CODE_EXECUTABLES_UNPROTECTED)
            && palisade_is_allowed_executable(claim, rules.0) != 0
        {
            reason::PROTECTED.into()
        } else {
            0
        };
    }
    if is_memory
        && reason == 0
        && how & GENERATED != 0
        && !planted!(CODE_JIT_ALLOWED)
        && !rules.has(code_flags::JIT)
    {
        reason = reason::JIT.into();
    }
    let mut refused = 0;
    if reason != 0 {
        refused = denies;
        // SAFETY: as above.
        unsafe {
            (*scratch).decision.reason = reason as u8;
            (*scratch).decision.verdict = if denies != 0 { verdict::DENIED } else { verdict::AUDITED };
            (*scratch).decision.action = if denies != 0 { action::REFUSED } else { action::NONE };
        }
        if denies != 0 || reason != u64::from(reason::JIT) || first_of_program() {
            palisade_report_code(claim);
        }
    }
    refused
}

/// Whether code of its own making is recorded of this program for the first time.
#[inline(always)]
fn first_of_program() -> bool {
    let Some(entry) = PROCESSES.get_ptr_mut(task::current_pid()) else { return true };
    // SAFETY: the pointer comes from a map lookup. Two threads may both be first: then there are two records.
    unsafe {
        let noted = &raw mut (*entry).jit_noted;
        let first = noted.read_volatile() == 0;
        noted.write_volatile(1);
        first
    }
}
