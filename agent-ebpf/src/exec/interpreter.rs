//! The program that loads another one: the ELF interpreter, which the kernel opens and starts on behalf of an exec.
//!
//! Its name (`PT_INTERP`) is the file's, but what it leads to is decided by the mounts and the root of the caller, who could have any
//! program of the image started with arguments of his own. So it must be the unmodified file to which that name leads in the image: by
//! itself, or by links of the image that the agent has followed; or one that a rule allows to execute.

use aya_ebpf::helpers::generated::{bpf_probe_read_kernel, bpf_probe_read_kernel_str};
use core::hint::black_box;
use palisade_abi::{
    PATH_CAPACITY,
    codes::{action, error, origin, reason, verdict},
    offsets::ABSENT,
    policy::exec::{EXEC_GRANTS, grant},
    record::INTERPRETER,
    section,
    state::LinkKey,
};

use crate::{
    area, count,
    exec::{judge::palisade_refuses_unexamined, pending, report::palisade_report},
    judging,
    kernel::{Address, KernelPtr, plain},
    maps::{INTERPRETERS, LINKS, PROCESSES, REVISIONS, offset, planted},
    matching::palisade_granted,
    origin::palisade_classify,
    path::palisade_walk,
    processes,
    record::{self, Lane},
    scratch::{EXECUTABLE, Scratch},
    slots, standing, task,
};

/// `__FMODE_EXEC` of include/linux/fs.h: opened to be executed. `open(2)` does not let it through.
const FMODE_EXEC: u32 = 0x20;
/// Longest name of an interpreter that is compared, its zero byte included; a power of two.
const LONGEST_NAME: usize = 256;

/// Whether opening `file` is refused: it is the interpreter of the program that is being executed.
#[inline(always)]
pub fn opens(file: Address) -> bool {
    let flags: u32 = KernelPtr(file).read(offset!(file_flags)).unwrap_or(0);
    flags & FMODE_EXEC != 0 && black_box(palisade_opens_interpreter(plain(file))) != 0
}

/// Bits of a mutex's owner that are not its address (`MUTEX_FLAGS` of kernel/locking/mutex.h).
const MUTEX_FLAGS: u64 = 7;

/// Whether the current task, not another thread of its process, is in an exec: it holds `cred_guard_mutex`. Always, where the kernel
/// does not say who has a mutex (`PREEMPT_RT`).
#[inline(always)]
fn is_executing() -> bool {
    let task = KernelPtr::current_task();
    if offset!(signal_exec_mutex) == ABSENT || offset!(mutex_owner) == ABSENT {
        return true;
    }
    let owner = task
        .follow(offset!(task_signal))
        .and_then(|signal| signal.read::<u64>(offset!(signal_exec_mutex) + offset!(mutex_owner)));
    owner.is_none_or(|owner| owner & !MUTEX_FLAGS == task.0)
}

/// The name by which the kernel itself opens something for the current task. What a program opens by a name of its own has an
/// address in user space, and so has the program that it executes, which since 6.9 is opened before the mutex is taken, too.
#[inline(always)]
fn name_of_kernel() -> Option<KernelPtr> {
    let name = KernelPtr::current_task().follow(offset!(task_nameidata))?.follow(offset!(nameidata_name))?;
    // Before 6.19, or so.
    if offset!(filename_user) != ABSENT && name.read::<u64>(offset!(filename_user)) != Some(0) {
        return None;
    }
    name.follow(offset!(filename_name))
}

/// Fills the memory of `claim` with what was noted of its interpreter. Returns 1 when it has one of which nothing is known any more.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_recall_interpreter(claim: u64) -> u64 {
    let Some(scratch) = judging::of(claim) else { return 1 };
    let Some(opened) = INTERPRETERS.get_ptr_mut(task::current_pid()) else { return 1 };
    // SAFETY: the memory belongs to this task until it is released, the entry to this process.
    unsafe {
        (*scratch).interpreter = (*opened).path;
        (*scratch).interpreter_name = (*opened).name;
        (*scratch).interpreter_origin = (*opened).origin as u8;
    }
    0
}

/// Judges the file that is opened, if it is an interpreter. Returns 1 when it is refused.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_opens_interpreter(file: u64) -> u64 {
    if offset!(task_nameidata) == ABSENT || offset!(nameidata_name) == ABSENT {
        return 0;
    }
    let entry = PROCESSES.get_ptr_mut(task::current_pid());
    // SAFETY: the pointer comes from a map lookup; the entry belongs to this process.
    if entry.is_some_and(|entry| unsafe { (&raw const (*entry).expects_interpreter).read_volatile() } == 0) {
        return 0;
    }
    if !is_executing() {
        return 0;
    }
    let Some(name) = name_of_kernel() else { return 0 };
    let (slot, entering, caller) = match entry {
        // SAFETY: as above. What is read was written by this process's own hooks.
        Some(entry) => unsafe {
            (&raw mut (*entry).expects_interpreter).write_volatile(0);
            ((*entry).slot, (*entry).entering, (*entry).program)
        },
        // Without an entry nothing tells it from the interpreter of a script, so that is judged, too. It may be the runtime's, and have come in
        // since its program was judged.
        None => match slots::current_slot() {
            Some(slot) => (slot, processes::palisade_take_in(slot) as u8, [0; 2]),
            None => return 0,
        },
    };
    if entering != 0 {
        // The runtime's own.
        return 0;
    }
    let Some(memory) = judging::claim() else {
        if palisade_refuses_unexamined(slot) == 0 {
            return 0;
        }
        record::lose(slot, Lane::Check);
        return 1;
    };
    let (claim, scratch) = (memory.number, memory.scratch);
    // SAFETY: the memory belongs to this task until it is released.
    unsafe {
        (*scratch).slot = slot;
        (*scratch).caller = caller;
        (*scratch).dentry = KernelPtr(file).follow(offset!(file_dentry)).unwrap_or(KernelPtr(0)).0;
        (&raw mut (*scratch).session).write(processes::session_of(task::current_pid()));
    }
    palisade_examine_interpreter(claim, name.0);
    let reason = if planted!(INTERPRETER_UNJUDGED) { 0 } else { palisade_judge_interpreter(claim) };
    let refused = if reason == 0 { 0 } else { palisade_refuse_interpreter(claim) };
    refused
}

/// Finds path and origin of the interpreter that `claim` opens, and the hash of the name that it is asked for by; notes them.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_examine_interpreter(claim: u64, name: u64) -> u64 {
    let Some(scratch) = judging::of(claim) else { return 1 };
    // SAFETY: the memory belongs to this task until it is released.
    let dentry = unsafe { (*scratch).dentry };
    palisade_walk(claim, dentry, EXECUTABLE);
    let origin = palisade_classify(claim) as u8;
    // SAFETY: as above.
    unsafe {
        (*scratch).origin = origin;
        (*scratch).interpreter_origin = origin;
        (*scratch).interpreter = area::hash(scratch, &raw mut (*scratch).path, (*scratch).executable.start);
        (*scratch).interpreter_name = hash_name(scratch, name);
        area::clear_end_before::<INTERPRETER>(&raw mut (*scratch).path, (*scratch).executable.start);
        // The end of the path, with zeros in front if it is shorter.
        let end = (&raw const (*scratch).path).cast::<u8>().add(PATH_CAPACITY - INTERPRETER);
        let opened = &raw mut (*scratch).opened;
        (*opened).path = (*scratch).interpreter;
        (*opened).name = (*scratch).interpreter_name;
        (*opened).origin = u64::from(origin);
        (&raw mut (*opened).shown).write(end.cast::<[u8; INTERPRETER]>().read());
        if INTERPRETERS.insert(task::current_pid(), &*opened, 0).is_err() {
            count::error(error::INTERPRETER_MAP_FULL);
        }
        if let Some(entry) = PROCESSES.get_ptr_mut(task::current_pid()) {
            (&raw mut (*entry).has_interpreter).write_volatile(1);
        }
    }
    0
}

/// The hash of the name in the kernel's memory at `name`, as if it were a path; 0 when it is too long to be compared.
///
/// # Safety
///
/// `scratch` must be the current task's claimed memory, in which no working directory stands yet.
#[inline(always)]
unsafe fn hash_name(scratch: *mut Scratch, name: u64) -> [u64; 2] {
    // SAFETY: the caller's promise. The area is longer than what is read to its begin; the helper checks the address.
    let read = unsafe {
        let area = (&raw mut (*scratch).cwd).cast::<u8>();
        bpf_probe_read_kernel_str(area.cast(), LONGEST_NAME as u32, name as *const _)
    };
    // With the zero byte; what fills the place was cut.
    if read <= 1 || read >= LONGEST_NAME as i64 {
        return [0; 2];
    }
    let length = (black_box(read - 1) as usize) & (LONGEST_NAME - 1);
    let start = PATH_CAPACITY - length;
    let at = (black_box(start) as usize) & (PATH_CAPACITY - 1);
    // SAFETY: as above; the copy ends where a path ends.
    let failed = unsafe {
        let area = (&raw mut (*scratch).cwd).cast::<u8>();
        bpf_probe_read_kernel(
            area.add(at).cast(),
            black_box(length) as u32 & (LONGEST_NAME as u32 - 1),
            name as *const _,
        )
    };
    if failed != 0 {
        return [0; 2];
    }
    // SAFETY: as above.
    let area = unsafe { &raw mut (*scratch).cwd };
    area::clear_front(area, start as u32);
    area::hash(scratch, area, start as u32)
}

/// The [`reason`] against the interpreter that `claim` has examined; 0 when there is none.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_judge_interpreter(claim: u64) -> u64 {
    let Some(scratch) = judging::of(claim) else { return reason::NO_SCRATCH.into() };
    // SAFETY: the memory belongs to this task until it is released.
    let (slot, file_origin, session, failure, path, name) = unsafe {
        (
            (*scratch).slot,
            (*scratch).origin,
            (*scratch).session.kind,
            (*scratch).executable.failure,
            (*scratch).interpreter,
            (*scratch).interpreter_name,
        )
    };
    let rules = standing::of(slot, section::EXEC);
    if !rules.restricts() {
        return 0;
    }
    if failure == 0 && file_origin == origin::IMAGE {
        // SAFETY: the value is written once, before the name is used.
        let leads_there = path == name
            || unsafe { LINKS.get(LinkKey { slot, name }) }.is_some_and(|link| link.path == path);
        if leads_there {
            return 0;
        }
    }
    let number = rules.revision();
    // SAFETY: a revision is removed after the last slot has left it.
    if failure == 0 && unsafe { REVISIONS.get(number) }.is_some() {
        let wanted = grant(file_origin, session);
        let granted = palisade_granted(claim, u64::from(number), u64::from(wanted)) as u32;
        if granted & EXEC_GRANTS & wanted != 0 {
            return 0;
        }
    }
    reason::INTERPRETER.into()
}

/// What comes of an interpreter that is not allowed. Returns 1 when the exec ends here.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_refuse_interpreter(claim: u64) -> u64 {
    let Some(scratch) = judging::of(claim) else { return 1 };
    // SAFETY: the memory belongs to this task until it is released.
    let slot = unsafe { (*scratch).slot };
    let rules = standing::of(slot, section::EXEC);
    let entry = PROCESSES.get_ptr_mut(task::current_pid());
    if !rules.refuses() {
        if let Some(entry) = entry {
            // Recorded with the exec, unless something worse is.
            // SAFETY: the pointer comes from a map lookup; the entry belongs to this process.
            unsafe {
                if (&raw const (*entry).pending_verdict).read_volatile() == verdict::ALLOWED {
                    (&raw mut (*entry).pending_verdict).write_volatile(verdict::AUDITED);
                    (&raw mut (*entry).pending_reason).write_volatile(reason::INTERPRETER);
                }
            }
        }
        return 0;
    }
    // The record is of the program that was to be loaded.
    // SAFETY: as above.
    unsafe {
        let bprm = entry.map_or(0, |entry| (&raw const (*entry).bprm).read_volatile());
        (*scratch).bprm = bprm;
        let dentry = KernelPtr(bprm)
            .follow(offset!(binprm_file))
            .and_then(|file| file.follow(offset!(file_dentry)))
            .unwrap_or(KernelPtr(0));
        (*scratch).dentry = dentry.0;
        palisade_walk(claim, dentry.0, EXECUTABLE);
        (*scratch).origin = palisade_classify(claim) as u8;
        (*scratch).decision.verdict = verdict::DENIED;
        (*scratch).decision.reason = reason::INTERPRETER;
        (*scratch).decision.action = action::REFUSED;
        (*scratch).decision.mode = rules.mode();
        (*scratch).decision.revision = rules.revision();
    }
    palisade_report(claim);
    pending::none_any_more();
    1
}
