//! The record of an exec: in the small form when it fits, else in the large one.

use palisade_abi::{
    PATH_CAPACITY,
    codes::{action, argv_source, exec_flags, kind, reason, verdict},
    record::{
        ExecPart, ExecRecord, INTERPRETER, LARGE_ARGV, LARGE_CWD, LARGE_PATH, LONGEST_ARGUMENT, SMALL_ARGV,
        SMALL_CWD, SMALL_PATH,
    },
};

use crate::{
    area::copy_path,
    context,
    exec::arguments::{copy_run, copy_strings, note, of_caller},
    judging,
    kernel::KernelPtr,
    maps::{INTERPRETERS, SCRIPTS, offset},
    path::palisade_walk,
    record::{self, Lane},
    scratch::{Scratch, WORKING_DIRECTORY, arguments},
    task,
    volumes::palisade_name_volume,
};

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
    let Some(scratch) = judging::of(claim) else { return 1 };
    // SAFETY: the memory belongs to this task until it is released.
    let early = unsafe { is_early(scratch) };
    palisade_walk(claim, task::working_directory().0, WORKING_DIRECTORY);
    palisade_name_volume(claim, WORKING_DIRECTORY);
    let (kind, at, length) = if early {
        of_caller()
    } else {
        match task::arguments_of_new_image() {
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
    let Some(scratch) = judging::of(claim) else { return false };
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
            && let Some(script) = SCRIPTS.get_ptr_mut(task::current_pid())
        {
            length = copy_path(script.cast(), start, &raw mut (*place).script);
        }
        note(&raw mut (*scratch).script_length, length, scratch, 0);
        let of_interpreter = &raw mut (*place).interpreter;
        let found = match INTERPRETERS.get_ptr_mut(task::current_pid()) {
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
