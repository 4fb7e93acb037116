//! The decision: which slot, which revision, and does it allow this file.
//!
//! `profile`'s evaluation of a policy image is the same function in ordinary Rust. The scenarios compare the two at
//! their cases only; nothing generates more of them yet, so a change here is a change there.

use aya_ebpf::helpers::{bpf_get_current_pid_tgid, bpf_ktime_get_boot_ns};
use palisade_abi::{
    PATH_CAPACITY,
    codes::{error, mode, origin, reason, verdict},
    maps::{AdmittedKey, GLOB_BYTES, GLOB_CHUNK, GLOB_DEAD, Revision, RuleKey, grant, grant_to_any},
};

use crate::{
    containers::TOO_DEEP,
    context, count,
    maps::{ADMITTED, AGENT, GLOBS, REVISIONS, RULES, SLOT_POLICIES, offset},
    path, record,
    scratch::{self, Area, Scratch},
};

/// Judges the execution that `task` has examined, and writes the decision into its memory. Returns the
/// [`verdict`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_judge(task: u64) -> u64 {
    let Some(scratch) = scratch::of(task) else {
        return u64::from(verdict::DENIED);
    };
    // SAFETY: the memory belongs to this task until it is released.
    let slot = unsafe { (*scratch).slot };
    let decision = decide(slot, Some(scratch));
    // SAFETY: as above.
    unsafe {
        (*scratch).verdict = decision.verdict;
        (*scratch).reason = decision.reason;
        (*scratch).mode = decision.mode;
        (*scratch).revision = decision.revision;
    }
    u64::from(decision.verdict)
}

/// Whether the file that `task` judges may start in a container that is not identified.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_is_admitted(task: u64) -> u64 {
    let Some(scratch) = scratch::of(task) else { return 0 };
    // SAFETY: the memory belongs to this task until it is released.
    let (area, start, failure, file_origin, dentry) = unsafe {
        (
            &raw mut (*scratch).path,
            (*scratch).executable.start,
            (*scratch).executable.failure,
            (*scratch).origin,
            (*scratch).dentry,
        )
    };
    if failure != 0 || file_origin != origin::IMAGE {
        return 0;
    }
    let inode = context::palisade_pointer(dentry, u64::from(offset!(dentry_inode)));
    let inode = context::palisade_pointer(inode, u64::from(offset!(inode_number)));
    let key = AdmittedKey { path_hash: path::hash(area, start), inode };
    // SAFETY: only presence matters.
    u64::from(unsafe { ADMITTED.get(key) }.is_some())
}

/// The verdict on an execution that could not be examined for want of memory.
#[inline(always)]
pub fn unexamined(slot: u64) -> u8 {
    decide(slot, None).verdict
}

/// A decision and what it rests on.
#[derive(Clone, Copy)]
struct Decision {
    verdict: u8,
    reason: u8,
    mode: u8,
    revision: u32,
}

/// What `mode` makes of a mismatch. Anything but a clear `AUDIT` is refused.
#[inline(always)]
fn mismatch(reason: u8, mode: u8, revision: u32) -> Decision {
    let verdict = if mode == mode::AUDIT { verdict::AUDITED } else { verdict::DENIED };
    Decision { verdict, reason, mode, revision }
}

#[inline(always)]
fn allowed(reason: u8, mode: u8, revision: u32) -> Decision {
    Decision { verdict: verdict::ALLOWED, reason, mode, revision }
}

#[inline(always)]
fn decide(slot: u64, scratch: Option<*mut Scratch>) -> Decision {
    if slot == TOO_DEEP {
        // Nobody can say which container this is, so no profile can say that it only audits.
        return mismatch(reason::UNIDENTIFIED, mode::ENFORCE, 0);
    }
    // SAFETY: one word, written by the agent in one map update; read once, so that one revision decides.
    let Some(policy) = (unsafe { SLOT_POLICIES.get(slot) }) else {
        return unidentified(scratch);
    };
    let number = policy.revision;
    if policy.slot != slot {
        count::error(error::POLICY_MOVED);
        return mismatch(reason::LOOKUP_MISSED, mode::ENFORCE, 0);
    }
    if number == 0 {
        return allowed(reason::NO_PROFILE, 0, 0);
    }
    // SAFETY: the memory belongs to this task until it is released.
    let escaped = scratch.is_some_and(|scratch| unsafe { (*scratch).escaped } != 0);
    // SAFETY: a revision is written before a slot points to it and removed after the last one left it.
    let Some(revision) = (unsafe { REVISIONS.get(number) }) else {
        count::error(error::REVISION_MISSED);
        return mismatch(reason::LOOKUP_MISSED, mode::ENFORCE, number);
    };
    let mode = if cfg!(feature = "plant-enforce-is-audit") { mode::AUDIT } else { revision.mode as u8 };
    if escaped {
        return mismatch(reason::ESCAPED, mode, number);
    }
    if revision.restricts_exec == 0 {
        return allowed(reason::NO_RULE, mode, number);
    }
    let Some(scratch) = scratch else { return mismatch(reason::NO_SCRATCH, mode, number) };
    // SAFETY: the memory belongs to this task until it is released.
    let (area, start, failure, file_origin, session) = unsafe {
        (
            &raw mut (*scratch).path,
            (*scratch).executable.start,
            (*scratch).executable.failure as u8,
            (*scratch).origin,
            (*scratch).session.kind,
        )
    };
    if failure != 0 {
        if cfg!(feature = "plant-failed-walk-allowed") {
            return allowed(reason::RULE, mode, number);
        }
        return mismatch(failure, mode, number);
    }
    let wanted = if cfg!(feature = "plant-origin-ignored") { u32::MAX } else { grant(file_origin, session) };
    let key = RuleKey { path_hash: path::hash(area, start), revision: number, reserved: 0 };
    // SAFETY: rules of a revision do not change while a slot points to it.
    let mut grants = unsafe { RULES.get(key) }.map_or(0, |rule| rule.grants);
    if grants & wanted == 0 {
        grants |= match_globs(area, start, revision);
    }
    if grants & wanted != 0 {
        allowed(reason::RULE, mode, number)
    } else if file_origin == origin::UNKNOWN {
        mismatch(reason::ORIGIN_UNKNOWN, mode, number)
    } else if grants & grant_to_any(file_origin) != 0 {
        mismatch(reason::SESSION, mode, number)
    } else if grants != 0 {
        mismatch(reason::ORIGIN, mode, number)
    } else {
        mismatch(reason::NO_RULE, mode, number)
    }
}

/// The verdict on what a container executes that nobody has identified yet.
#[inline(always)]
fn unidentified(scratch: Option<*mut Scratch>) -> Decision {
    if !record::is_active() {
        // The set that is active knows the container, or gates it.
        return allowed(reason::UNIDENTIFIED, 0, 0);
    }
    // SAFETY: the helper has no preconditions.
    let now = unsafe { bpf_ktime_get_boot_ns() };
    // Without an entry both modes are 0, which is none of them and so refuses.
    let (until, unidentified, when_absent) = AGENT
        .get(0)
        .map_or((0, 0, 0), |agent| (agent.lease_until, agent.unidentified, agent.when_agent_absent));
    let (mode, reason) = if now < until {
        (unidentified as u8, reason::UNIDENTIFIED)
    } else {
        (when_absent as u8, reason::AGENT_ABSENT)
    };
    if mode == mode::AUDIT {
        return mismatch(reason, mode, 0);
    }
    if scratch.is_some() && palisade_is_admitted(bpf_get_current_pid_tgid()) != 0 {
        return allowed(reason::ADMITTED, mode, 0);
    }
    if mode == mode::HOLD {
        // Without memory there is nothing to settle later.
        let Some(scratch) = scratch else { return mismatch(reason::NO_SCRATCH, mode::ENFORCE, 0) };
        // SAFETY: the memory belongs to this task until it is released.
        let failure = unsafe { (*scratch).executable.failure as u8 };
        let reason = if failure == 0 { reason } else { failure };
        return Decision { verdict: verdict::HELD, reason, mode, revision: 0 };
    }
    mismatch(reason, mode, 0)
}

/// Runs the revision's automaton over the path and returns what it grants.
#[inline(always)]
fn match_globs(area: *mut Area, start: u32, revision: &Revision) -> u32 {
    if revision.glob_chunks == 0 {
        return 0;
    }
    let base = revision.glob_base;
    let row = |state: u32| GLOB_BYTES as u32 + state * revision.glob_width;
    let mut state = 0_u32;
    let mut at = start;
    let mut turn = 0;
    while turn < PATH_CAPACITY {
        if at >= PATH_CAPACITY as u32 {
            break;
        }
        let Some(column) = glob_word(base, u32::from(path::byte(area, at))) else { return 0 };
        let Some(next) = glob_word(base, row(state) + u32::from(column)) else { return 0 };
        if next == GLOB_DEAD {
            return 0;
        }
        state = u32::from(next);
        at += 1;
        turn += 1;
    }
    match (glob_word(base, row(state)), glob_word(base, row(state) + 1)) {
        (Some(low), Some(high)) => u32::from(low) | u32::from(high) << 16,
        _ => 0,
    }
}

/// A word of the automaton whose chunks begin at `base`.
#[inline(always)]
fn glob_word(base: u32, index: u32) -> Option<u16> {
    let Some(chunk) = GLOBS.get(base + index / GLOB_CHUNK as u32) else {
        count::error(error::GLOB_WORD_MISSED);
        return None;
    };
    Some(chunk.words[index as usize % GLOB_CHUNK])
}
