//! From a path, and the program that acts, to what rules grant: by the exact rule, or by the automaton of all patterns.

use palisade_abi::{
    PATH_CAPACITY,
    codes::error,
    policy::exec::RuleKey,
    policy::{GLOB_BYTES, GLOB_CHUNK, GLOB_DEAD},
    section,
};

use crate::{
    area, count, judging,
    maps::{GLOBS, REVISIONS, RULES},
    repeat::{AGAIN, DONE, repeat},
    scratch::{Area, Automaton, Scratch, Turns},
};

/// What [`palisade_granted`] says, taken apart: what holds whatever the arguments are, and what does under any condition.
#[inline(always)]
pub fn granted(claim: u64, number: u32, wanted: u32) -> (u32, u32) {
    let granted = palisade_granted(claim, u64::from(number), u64::from(wanted));
    (granted as u32, (granted >> 32) as u32)
}

/// What the rules of revision `number` grant to the path that `claim` has examined: what holds whatever the arguments are in the
/// lower word, what does under any condition in the upper one; or as much of both as answers `wanted`. Notes in the task's
/// memory what depends on arguments. A step of its own, since its loops are most of what the verifier follows.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_granted(claim: u64, number: u64, wanted: u64) -> u64 {
    let Some(scratch) = judging::of(claim) else { return 0 };
    let number = number as u32;
    // SAFETY: a revision is written before a slot points to it and removed after the last one left it.
    let Some(revision) = (unsafe { REVISIONS.get(number) }) else { return 0 };
    // SAFETY: the memory belongs to this task until it is released.
    let (area, start) = unsafe { (&raw mut (*scratch).path, (*scratch).executable.start) };
    let path_hash = area::hash(scratch, area, start);
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
    // SAFETY: rules of a revision do not change while a slot points to it.
    unsafe { RULES.get(RuleKey { path_hash, revision: number, parent: 0 }) }.map_or(0, |rule| rule.parent)
}

/// Runs an automaton over the bytes of `area`, the task's own, from a place to an end, and returns what it grants.
#[inline(always)]
pub fn run(scratch: *mut Scratch, area: *mut Area, (start, end): (u32, u32), automaton: Automaton) -> u32 {
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
        let next = glob_word(base, u32::from(area::byte(area, at)))
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
