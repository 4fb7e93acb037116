//! Whether rules allow a file to be mapped executable, or name it as one that may be executed.

use palisade_abi::{
    codes::{code_flags, origin, reason},
    policy::exec::{grant, grant_to_any, library_grant},
};

use crate::{
    judging,
    maps::{REVISIONS, planted},
    matching::granted,
    standing::Standing,
};

/// Judges the file that `claim` has examined and that is to be mapped executable, under `rules`. Returns the [`reason`] against
/// it; 0 when it is allowed.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_judge_mapped(claim: u64, rules: u64) -> u64 {
    let Some(scratch) = judging::of(claim) else { return reason::NO_SCRATCH.into() };
    let rules = Standing(rules);
    let number = rules.revision();
    // SAFETY: a revision is removed after the last slot has left it.
    if unsafe { REVISIONS.get(number) }.is_none() {
        return reason::LOOKUP_MISSED.into();
    }
    // SAFETY: the memory belongs to this task until it is released.
    let (failure, file_origin, session) =
        unsafe { ((*scratch).executable.failure as u8, (*scratch).origin, (*scratch).session.kind) };
    let in_memory = file_origin == origin::MEMORY;
    let any_of_image = rules.has(code_flags::LIBRARIES_OF_IMAGE);
    if file_origin == origin::IMAGE && any_of_image {
        return 0;
    }
    if in_memory && (rules.has(code_flags::MEMORY) || planted!(CODE_MEMORY_ALLOWED)) {
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
    let Some(scratch) = judging::of(claim) else { return 1 };
    let rules = Standing(rules);
    let number = rules.revision();
    // SAFETY: a revision is removed after the last slot has left it.
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
