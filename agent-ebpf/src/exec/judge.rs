//! The decision: does what holds for the slot allow this execution.
//!
//! `profile`'s evaluation of a policy image is the same function in ordinary Rust, so a change here is a change there. The scenario
//! `differential` compares the two on profiles and files drawn at random.

use aya_ebpf::helpers::bpf_ktime_get_boot_ns;
use palisade_abi::{
    PATH_CAPACITY,
    codes::{action, mode, origin, reason, verdict},
    policy::exec::{EXEC_GRANTS, grant, grant_to_any},
    record::DecisionPart,
    section,
    state::AdmittedKey,
};

use crate::{
    area, context,
    exec::arguments::palisade_read_arguments,
    judging,
    maps::{ADMITTED, AGENT, offset, planted},
    matching::{granted, run},
    record,
    scratch::Scratch,
    standing::{self, ground},
};

/// Judges the execution that `claim` has examined, and writes the decision into its memory. Returns the
/// [`verdict`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_judge(claim: u64) -> u64 {
    let Some(scratch) = judging::of(claim) else {
        return u64::from(verdict::DENIED);
    };
    // SAFETY: the memory belongs to this task until it is released.
    let slot = unsafe { (*scratch).slot };
    let decision = decide(slot, Some((claim, scratch)));
    // SAFETY: as above.
    unsafe {
        (*scratch).decision = decision;
    }
    u64::from(decision.verdict)
}

/// Whether the file that `claim` judges may start in a container that is not identified.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_is_admitted(claim: u64) -> u64 {
    let Some(scratch) = judging::of(claim) else { return 0 };
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
    let key = AdmittedKey { path_hash: area::hash(scratch, area, start), inode };
    // SAFETY: only presence matters.
    u64::from(unsafe { ADMITTED.get(key) }.is_some())
}

/// Whether an execution is refused that could not be examined for want of memory.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_refuses_unexamined(slot: u64) -> u64 {
    u64::from(decide(slot, None).verdict == verdict::DENIED)
}

/// What `mode` makes of a mismatch. Anything but a clear `AUDIT` is refused.
#[inline(always)]
fn mismatch(reason: u8, mode: u8, revision: u32) -> DecisionPart {
    let verdict = if mode == mode::AUDIT { verdict::AUDITED } else { verdict::DENIED };
    DecisionPart { verdict, action: action::NONE, reason, mode, revision }
}

#[inline(always)]
fn allowed(reason: u8, mode: u8, revision: u32) -> DecisionPart {
    DecisionPart { verdict: verdict::ALLOWED, action: action::NONE, reason, mode, revision }
}

#[inline(always)]
fn decide(slot: u64, claimed: Option<(u64, *mut Scratch)>) -> DecisionPart {
    let standing = standing::of(slot, section::EXEC);
    let (mode, number) = (standing.mode(), standing.revision());
    match standing.ground() {
        // Nobody can say which container this is, so no profile can say that it only audits.
        ground::TOO_DEEP => return mismatch(reason::UNIDENTIFIED, mode, 0),
        ground::UNIDENTIFIED => return unidentified(claimed),
        ground::NO_PROFILE => return allowed(reason::NO_PROFILE, 0, 0),
        ground::MISSED => return mismatch(reason::LOOKUP_MISSED, mode, number),
        _ => {}
    }
    // SAFETY: the memory belongs to this task until it is released.
    let escaped = claimed.is_some_and(|(_, scratch)| unsafe { (*scratch).escaped } != 0);
    if escaped {
        return mismatch(reason::ESCAPED, mode, number);
    }
    if standing.ground() == ground::UNRESTRICTED {
        return allowed(reason::NO_RULE, mode, number);
    }
    let Some((claim, scratch)) = claimed else { return mismatch(reason::NO_SCRATCH, mode, number) };
    // SAFETY: the memory belongs to this task until it is released.
    let (failure, file_origin, session) =
        unsafe { ((*scratch).executable.failure as u8, (*scratch).origin, (*scratch).session.kind) };
    if failure != 0 {
        if planted!(FAILED_WALK_ALLOWED) {
            return allowed(reason::RULE, mode, number);
        }
        return mismatch(failure, mode, number);
    }
    let wanted = if planted!(ORIGIN_IGNORED) {
        u32::MAX
    } else if planted!(SESSIONS_IGNORED) {
        grant_to_any(file_origin)
    } else {
        grant(file_origin, session)
    };
    let (now, any) = granted(claim, number, wanted);
    // SAFETY: the memory belongs to this task until it is released.
    let (with_arguments, arguments_known) =
        unsafe { ((*scratch).with_arguments & EXEC_GRANTS, (*scratch).arguments_known) };
    if now & EXEC_GRANTS & wanted != 0 {
        allowed(reason::RULE, mode, number)
    } else if file_origin == origin::UNKNOWN {
        mismatch(reason::ORIGIN_UNKNOWN, mode, number)
    } else if with_arguments & wanted != 0 {
        if planted!(CONDITIONS_ARGUMENTS_IGNORED) {
            allowed(reason::RULE, mode, number)
        } else if arguments_known == 0 {
            // The tracepoint judges them, before the program's first instruction.
            allowed(reason::ARGUMENTS, mode, number)
        } else if palisade_granted_to_arguments(claim) as u32 & wanted != 0 {
            allowed(reason::RULE, mode, number)
        } else {
            mismatch(reason::ARGUMENTS, mode, number)
        }
    } else if any & EXEC_GRANTS & wanted != 0 {
        if planted!(CONDITIONS_PARENTS_IGNORED) {
            return allowed(reason::RULE, mode, number);
        }
        mismatch(reason::PARENT, mode, number)
    } else if any & grant_to_any(file_origin) != 0 {
        mismatch(reason::SESSION, mode, number)
    } else if any & EXEC_GRANTS != 0 {
        mismatch(reason::ORIGIN, mode, number)
    } else {
        mismatch(reason::NO_RULE, mode, number)
    }
}

/// What the automata that [`palisade_granted`] has noted grant to the arguments of what `claim` has executed.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_granted_to_arguments(claim: u64) -> u64 {
    let length = palisade_read_arguments(claim);
    if length > PATH_CAPACITY as u64 {
        return 0;
    }
    palisade_run_on_arguments(claim, 0, length) | palisade_run_on_arguments(claim, 1, length)
}

/// What one of the automata grants to the `length` bytes of arguments that were copied.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_run_on_arguments(claim: u64, which: u64, length: u64) -> u64 {
    let Some(scratch) = judging::of(claim) else { return 0 };
    // SAFETY: the memory belongs to this task until it is released.
    let (area, automaton) = unsafe {
        let automata = &raw const (*scratch).automata;
        let automaton = if which == 0 { (*automata)[0] } else { (*automata)[1] };
        (&raw mut (*scratch).cwd, automaton)
    };
    u64::from(run(scratch, area, (0, length as u32), automaton))
}

/// The verdict on what a container executes that nobody has identified yet.
#[inline(always)]
fn unidentified(claimed: Option<(u64, *mut Scratch)>) -> DecisionPart {
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
    if let Some((claim, _)) = claimed
        && palisade_is_admitted(claim) != 0
    {
        return allowed(reason::ADMITTED, mode, 0);
    }
    if mode == mode::HOLD {
        // Without memory there is nothing to settle later.
        let Some((_, scratch)) = claimed else { return mismatch(reason::NO_SCRATCH, mode::ENFORCE, 0) };
        // SAFETY: the memory belongs to this task until it is released.
        let failure = unsafe { (*scratch).executable.failure as u8 };
        let reason = if failure == 0 { reason } else { failure };
        return DecisionPart { verdict: verdict::HELD, action: action::NONE, reason, mode, revision: 0 };
    }
    mismatch(reason, mode, 0)
}
