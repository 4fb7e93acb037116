//! The decision: which slot, which revision, and does it allow this file.
//!
//! `profile`'s evaluation of a policy image is the same function in ordinary Rust; a differential test holds the
//! two against each other.

use palisade_abi::{
    PATH_CAPACITY,
    codes::{error, mode, reason, verdict},
    maps::{GLOB_DEAD, Revision, RuleKey},
};

use crate::{
    count,
    maps::{GLOB_STATES, REVISIONS, RULES, SLOT_POLICIES, setting},
    path::{self, Area, Walk},
};

/// A decision and what it rests on.
#[derive(Clone, Copy)]
pub struct Judgement {
    pub verdict: u8,
    pub reason: u8,
    pub mode: u8,
    pub revision: u32,
}

impl Judgement {
    #[inline(always)]
    fn allowed(reason: u8, mode: u8, revision: u32) -> Self {
        Self { verdict: verdict::ALLOWED, reason, mode, revision }
    }

    /// What `mode` makes of a mismatch. Anything but a clear `AUDIT` is refused.
    #[inline(always)]
    fn mismatch(reason: u8, mode: u8, revision: u32) -> Self {
        let verdict = if mode == mode::AUDIT { verdict::AUDITED } else { verdict::DENIED };
        Self { verdict, reason, mode, revision }
    }

    pub const RUNTIME: Self =
        Self { verdict: verdict::ALLOWED, reason: reason::RUNTIME, mode: 0, revision: 0 };
}

/// Judges the execution of the file at `walk` with origin `file_origin` by a task of `slot`. Without `area`
/// there was no memory to walk in, and the path is unknown.
#[inline(always)]
pub fn judge(slot: u64, area: Option<Area>, walk: &Walk, file_origin: u8) -> Judgement {
    // SAFETY: one word, written by the agent in one map update; read once, so that one revision decides.
    let Some(policy) = (unsafe { SLOT_POLICIES.get(slot) }) else {
        return Judgement::mismatch(reason::UNIDENTIFIED, setting!(unidentified) as u8, 0);
    };
    let number = policy.revision;
    if number == 0 {
        return Judgement::allowed(reason::NO_PROFILE, 0, 0);
    }
    // SAFETY: a revision is written before a slot points to it and removed after the last one left it.
    let Some(revision) = (unsafe { REVISIONS.get(number) }) else {
        count::error(error::REVISION_MISSED);
        return Judgement::mismatch(reason::LOOKUP_MISSED, mode::ENFORCE, number);
    };
    let mode = revision.mode as u8;
    if revision.restricts_exec == 0 {
        return Judgement::allowed(reason::NO_RULE, mode, number);
    }
    let Some(area) = area else {
        return Judgement::mismatch(reason::NO_SCRATCH, mode, number);
    };
    if walk.failure != 0 {
        return Judgement::mismatch(walk.failure, mode, number);
    }
    let key = RuleKey { path_hash: path::hash(area, walk), revision: number, reserved: 0 };
    // SAFETY: rules of a revision do not change while a slot points to it.
    let exact = unsafe { RULES.get(key) }.map_or(0, |rule| rule.origins);
    let origins = if exact & (1 << u32::from(file_origin)) != 0 {
        exact
    } else {
        exact | match_globs(area, walk, revision)
    };
    if origins & (1 << u32::from(file_origin)) != 0 {
        Judgement::allowed(reason::RULE, mode, number)
    } else if file_origin == palisade_abi::codes::origin::UNKNOWN {
        Judgement::mismatch(reason::ORIGIN_UNKNOWN, mode, number)
    } else if origins != 0 {
        Judgement::mismatch(reason::ORIGIN, mode, number)
    } else {
        Judgement::mismatch(reason::NO_RULE, mode, number)
    }
}

/// Runs the revision's automaton over the path and returns the origins it allows.
#[inline(always)]
fn match_globs(area: Area, walk: &Walk, revision: &Revision) -> u32 {
    let base = revision.glob_base;
    if revision.glob_states == 0 {
        return 0;
    }
    let mut state = 0_u32;
    let mut at = walk.start;
    let mut turn = 0;
    while turn < PATH_CAPACITY {
        if at >= PATH_CAPACITY as u32 {
            break;
        }
        let Some(row) = GLOB_STATES.get(base + state) else {
            count::error(error::GLOB_STATE_MISSED);
            return 0;
        };
        let next = row.next[path::byte(area, at) as usize];
        if next == GLOB_DEAD {
            return 0;
        }
        state = u32::from(next);
        at += 1;
        turn += 1;
    }
    if let Some(row) = GLOB_STATES.get(base + state) {
        row.origins
    } else {
        count::error(error::GLOB_STATE_MISSED);
        0
    }
}
