//! The decision: which slot, which revision, and does it allow this file.
//!
//! `profile`'s evaluation of a policy image is the same function in ordinary Rust, so a change here is a change there. The scenario
//! `differential` compares the two on profiles and files drawn at random.

use aya_ebpf::helpers::{bpf_ktime_get_boot_ns, bpf_probe_read_user_buf};
use core::hint::black_box;
use palisade_abi::{
    PATH_CAPACITY,
    codes::{action, code_flags, error, mode, origin, reason, verdict},
    policy::exec::{EXEC_GRANTS, RuleKey, grant, grant_to_any, library_grant},
    policy::{GLOB_BYTES, GLOB_CHUNK, GLOB_DEAD},
    record::DecisionPart,
    section,
    state::AdmittedKey,
};

use crate::{
    containers::TOO_DEEP,
    context, count, exec,
    maps::{ADMITTED, AGENT, GLOBS, REVISIONS, RULES, SLOT_POLICIES, offset, planted},
    path, record,
    repeat::{AGAIN, DONE, repeat},
    scratch::{self, Area, Automaton, Scratch, Turns},
};

/// Judges the execution that `claim` has examined, and writes the decision into its memory. Returns the
/// [`verdict`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_judge(claim: u64) -> u64 {
    let Some(scratch) = scratch::of(claim) else {
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
    let Some(scratch) = scratch::of(claim) else { return 0 };
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
    let key = AdmittedKey { path_hash: path::hash(scratch, area, start), inode };
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
    if slot == TOO_DEEP {
        // Nobody can say which container this is, so no profile can say that it only audits.
        return mismatch(reason::UNIDENTIFIED, mode::ENFORCE, 0);
    }
    // SAFETY: one word, written by the agent in one map update; read once, so that one revision decides.
    let Some(policy) = (unsafe { SLOT_POLICIES.get(slot) }) else {
        return unidentified(claimed);
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
    let escaped = claimed.is_some_and(|(_, scratch)| unsafe { (*scratch).escaped } != 0);
    // SAFETY: a revision is written before a slot points to it and removed after the last one left it.
    let Some(revision) = (unsafe { REVISIONS.get(number) }) else {
        count::error(error::REVISION_MISSED);
        return mismatch(reason::LOOKUP_MISSED, mode::ENFORCE, number);
    };
    let mode = if planted!(ENFORCE_IS_AUDIT) { mode::AUDIT } else { revision.mode as u8 };
    if escaped {
        return mismatch(reason::ESCAPED, mode, number);
    }
    if revision.sections[section::EXEC].restricts == 0 {
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

/// What the rules of revision `number` grant to the path that `claim` has examined: what holds whatever the arguments are in the
/// lower word, what does under any condition in the upper one; or as much of both as answers `wanted`. Notes in the task's
/// memory what depends on arguments. A step of its own, since its loops are most of what the verifier follows.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_granted(claim: u64, number: u64, wanted: u64) -> u64 {
    let Some(scratch) = scratch::of(claim) else { return 0 };
    let number = number as u32;
    // SAFETY: as in `decide`.
    let Some(revision) = (unsafe { REVISIONS.get(number) }) else { return 0 };
    // SAFETY: the memory belongs to this task until it is released.
    let (area, start) = unsafe { (&raw mut (*scratch).path, (*scratch).executable.start) };
    let path_hash = path::hash(scratch, area, start);
    let (mut now, mut any, mut with_arguments) = (0, 0, 0);
    // SAFETY: rules of a revision do not change while a slot points to it. The memory is as above.
    unsafe {
        if let Some(rule) = RULES.get(RuleKey { path_hash, revision: number, parent: 0 }) {
            now = rule.grants;
            any = rule.any;
            with_arguments = rule.with_arguments;
            (*scratch).automata[0] = Automaton { base: rule.arguments_base, width: rule.arguments_width };
        }
        // Only a rule with parents grants under a condition what it does not grant now.
        let parent = if any & !now == 0 { 0 } else { caller_as_parent(scratch, number) };
        if parent != 0
            && let Some(rule) = RULES.get(RuleKey { path_hash, revision: number, parent })
        {
            now |= rule.grants;
            with_arguments |= rule.with_arguments;
            (*scratch).automata[1] = Automaton { base: rule.arguments_base, width: rule.arguments_width };
        }
        (*scratch).with_arguments = with_arguments;
    }
    let head = &revision.sections[section::EXEC];
    if now & wanted as u32 == 0 && head.automaton_chunks != 0 {
        let automaton = Automaton { base: head.automaton_base, width: head.automaton_width };
        let globs = run(scratch, area, (start, PATH_CAPACITY as u32), automaton);
        now |= globs;
        any |= globs;
    }
    u64::from(now) | u64::from(any) << 32
}

/// The number that the caller has as a parent in revision `number`; 0 when it is none.
#[inline(always)]
fn caller_as_parent(scratch: *mut Scratch, number: u32) -> u32 {
    // SAFETY: the memory belongs to this task until it is released.
    let path_hash = unsafe { (*scratch).caller };
    if path_hash[0] | path_hash[1] == 0 {
        return 0;
    }
    // SAFETY: as in `palisade_granted`.
    unsafe { RULES.get(RuleKey { path_hash, revision: number, parent: 0 }) }.map_or(0, |rule| rule.parent)
}

/// The same, taken apart.
#[inline(always)]
fn granted(claim: u64, number: u32, wanted: u32) -> (u32, u32) {
    let granted = palisade_granted(claim, u64::from(number), u64::from(wanted));
    (granted as u32, (granted >> 32) as u32)
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

/// Copies all arguments to where the working directory will stand. Returns how many bytes they are; more than [`PATH_CAPACITY`]
/// when they are more, or cannot be read.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_read_arguments(claim: u64) -> u64 {
    let Some(scratch) = scratch::of(claim) else { return u64::MAX };
    let Some((begin, end)) = exec::arguments_of_new_image() else { return u64::MAX };
    let length = black_box(end - begin);
    if length == 0 {
        return 0;
    }
    if length > PATH_CAPACITY as u64 {
        return u64::MAX;
    }
    // SAFETY: the memory belongs to this task until it is released; the area is longer, and the helper checks the user address.
    let read = unsafe {
        let area = (&raw mut (*scratch).cwd).cast::<u8>();
        bpf_probe_read_user_buf(begin as *const u8, core::slice::from_raw_parts_mut(area, length as usize))
    };
    if read.is_err() {
        count::error(error::ARGV_READ);
        return u64::MAX;
    }
    length
}

/// What one of the automata grants to the `length` bytes of arguments that were copied.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_run_on_arguments(claim: u64, which: u64, length: u64) -> u64 {
    let Some(scratch) = scratch::of(claim) else { return 0 };
    // SAFETY: the memory belongs to this task until it is released.
    let (area, automaton) = unsafe {
        let automata = &raw const (*scratch).automata;
        let automaton = if which == 0 { (*automata)[0] } else { (*automata)[1] };
        (&raw mut (*scratch).cwd, automaton)
    };
    u64::from(run(scratch, area, (0, length as u32), automaton))
}

/// Marks the rules of a slot as such, so that they are not 0.
const RESTRICTED: u64 = 1 << 31;

/// What holds in `slot` for code that is not executed: [`code_flags`], the [`mode`] in the second byte, and the revision in the
/// upper word. 0 when that is not restricted.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_code_rules(slot: u64) -> u64 {
    let packed = |number: u32, mode: u8, flags: u32| {
        RESTRICTED | u64::from(number) << 32 | u64::from(mode) << 8 | u64::from(flags)
    };
    if slot == TOO_DEEP {
        return packed(0, mode::ENFORCE, 0);
    }
    // SAFETY: as in `decide`.
    let Some(policy) = (unsafe { SLOT_POLICIES.get(slot) }) else { return 0 };
    let number = policy.revision;
    if policy.slot != slot {
        count::error(error::POLICY_MOVED);
        return packed(0, mode::ENFORCE, 0);
    }
    if number == 0 {
        return 0;
    }
    // SAFETY: as in `decide`.
    let Some(revision) = (unsafe { REVISIONS.get(number) }) else {
        count::error(error::REVISION_MISSED);
        return packed(number, mode::ENFORCE, 0);
    };
    if revision.sections[section::EXEC].restricts == 0 {
        return 0;
    }
    let mode = if planted!(ENFORCE_IS_AUDIT) { mode::AUDIT } else { revision.mode as u8 };
    packed(number, mode, revision.sections[section::EXEC].flags & 0xff)
}

/// Whether what [`palisade_code_rules`] returned lets no program have rights that its caller has not.
#[inline(always)]
pub fn rules_forbid_elevation(rules: u64) -> bool {
    rules & u64::from(code_flags::NO_ELEVATION) != 0
}

/// The [`mode`] of what [`palisade_code_rules`] returned.
#[inline(always)]
pub fn rules_mode(rules: u64) -> u8 {
    (rules >> 8) as u8
}

/// Judges the file that `claim` has examined and that is to be mapped executable, under `rules`. Returns the [`reason`] against
/// it; 0 when it is allowed.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_judge_mapped(claim: u64, rules: u64) -> u64 {
    let Some(scratch) = scratch::of(claim) else { return reason::NO_SCRATCH.into() };
    let number = (rules >> 32) as u32;
    // SAFETY: as in `decide`.
    if unsafe { REVISIONS.get(number) }.is_none() {
        return reason::LOOKUP_MISSED.into();
    }
    // SAFETY: the memory belongs to this task until it is released.
    let (failure, file_origin, session) =
        unsafe { ((*scratch).executable.failure as u8, (*scratch).origin, (*scratch).session.kind) };
    let in_memory = file_origin == origin::MEMORY;
    let any_of_image = rules & u64::from(code_flags::LIBRARIES_OF_IMAGE) != 0;
    if file_origin == origin::IMAGE && any_of_image {
        return 0;
    }
    if in_memory && (rules & u64::from(code_flags::MEMORY) != 0 || planted!(CODE_MEMORY_ALLOWED)) {
        return 0;
    }
    if failure != 0 {
        return u64::from(if in_memory { reason::MEMORY } else { failure });
    }
    let wanted = grant(file_origin, session) | library_grant(file_origin);
    let (now, mut any) = granted(claim, number, wanted);
    if any_of_image {
        any |= library_grant(origin::IMAGE);
    }
    // SAFETY: as above.
    let with_arguments = unsafe { (*scratch).with_arguments };
    u64::from(if now & wanted != 0 {
        0
    } else if file_origin == origin::UNKNOWN {
        reason::ORIGIN_UNKNOWN
    } else if with_arguments & grant(file_origin, session) != 0 {
        // What may be executed with certain arguments is mapped by its exec alone, which is judged itself.
        reason::ARGUMENTS
    } else if any & grant(file_origin, session) != 0 {
        reason::PARENT
    } else if any & grant_to_any(file_origin) != 0 {
        reason::SESSION
    } else if in_memory {
        reason::MEMORY
    } else if any != 0 {
        reason::ORIGIN
    } else {
        reason::NO_RULE
    })
}

/// Whether rules allow anybody to execute the file that `claim` has examined.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_is_allowed_executable(claim: u64, rules: u64) -> u64 {
    let Some(scratch) = scratch::of(claim) else { return 1 };
    let number = (rules >> 32) as u32;
    // SAFETY: as in `decide`.
    if unsafe { REVISIONS.get(number) }.is_none() {
        return 1;
    }
    // SAFETY: the memory belongs to this task until it is released.
    let (failure, file_origin) = unsafe { ((*scratch).executable.failure, (*scratch).origin) };
    // What may run when it has been changed as well is not taken from anybody by a change.
    let (_, any) = granted(claim, number, 0);
    let only_unchanged = any & grant_to_any(origin::DRIFT) == 0;
    u64::from(failure == 0 && only_unchanged && any & grant_to_any(file_origin) != 0)
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

/// Runs an automaton over the bytes of `area`, the task's own, from a place to an end, and returns what it grants.
#[inline(always)]
fn run(scratch: *mut Scratch, area: *mut Area, (start, end): (u32, u32), automaton: Automaton) -> u32 {
    let Automaton { base, width } = automaton;
    if width == 0 {
        return 0;
    }
    // SAFETY: the memory belongs to this task until it is released.
    let turns = unsafe {
        let turns = &raw mut (*scratch).turns;
        (&raw mut (*turns).at).write_volatile(start);
        (&raw mut (*turns).state).write_volatile(0);
        (&raw mut (*turns).outcome).write_volatile(0);
        turns
    };
    repeat(PATH_CAPACITY as u32, &mut Run { turns, area, end, base, width }, read_byte);
    // SAFETY: as above.
    let (state, stuck) = unsafe {
        ((&raw const (*turns).state).read_volatile(), (&raw const (*turns).outcome).read_volatile() != 0)
    };
    if stuck {
        return 0;
    }
    let row = row(state, width);
    match (glob_word(base, row), glob_word(base, row + 1)) {
        (Some(low), Some(high)) => u32::from(low) | u32::from(high) << 16,
        _ => 0,
    }
}

/// What an automaton reads.
struct Run {
    turns: *mut Turns,
    area: *mut Area,
    end: u32,
    base: u32,
    width: u32,
}

/// Where the words of a state begin.
#[inline(always)]
fn row(state: u32, width: u32) -> u32 {
    GLOB_BYTES as u32 + state * width
}

/// One byte that an automaton reads.
///
/// # Safety
///
/// `run` must be of the current task's claimed memory.
#[inline(always)]
unsafe extern "C" fn read_byte(_turn: u64, run: *mut Run) -> i64 {
    // SAFETY: the caller's promise.
    unsafe {
        let Run { turns, area, end, base, width } = *run;
        let at = (&raw const (*turns).at).read_volatile();
        if at >= end {
            return DONE;
        }
        let state = (&raw const (*turns).state).read_volatile();
        let next = glob_word(base, u32::from(path::byte(area, at)))
            .and_then(|column| glob_word(base, row(state, width) + u32::from(column)))
            .unwrap_or(GLOB_DEAD);
        if next == GLOB_DEAD {
            (&raw mut (*turns).outcome).write_volatile(1);
            return DONE;
        }
        (&raw mut (*turns).state).write_volatile(u32::from(next));
        (&raw mut (*turns).at).write_volatile(at + 1);
    }
    AGAIN
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
