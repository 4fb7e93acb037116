//! Execution: the decision at `bprm_check_security`, and what was executed at `sched_process_exec`.
//!
//! The check runs once per pass of the binary format loop: a script first, then its interpreter. Where LSM
//! programs cannot be loaded, the tracepoint is the first and only place, and a denial there kills the process
//! before its first instruction. Where both run, the tracepoint judges again: should a kernel have skipped the
//! check, the process still dies.

use aya_ebpf::helpers::{
    bpf_get_current_pid_tgid, bpf_probe_read_user_buf, bpf_probe_read_user_str_bytes, bpf_send_signal,
    generated::{bpf_get_current_task_btf, bpf_task_pt_regs},
};
use core::hint::black_box;
use palisade_abi::{
    codes::{action, argv_source, error, exec_flags, kind, origin, reason, verdict},
    maps::{HOST_ROOT, Process, Scratch},
    record::{
        ExecPart, ExecRecord, LARGE_ARGV, LARGE_CWD, LARGE_PATH, LONGEST_ARGUMENT, SMALL_ARGV, SMALL_CWD,
        SMALL_PATH,
    },
};

use crate::{
    containers, context, count,
    judge::{Judgement, judge},
    kernel::{KernelPtr, read_user_word},
    maps::{PROCESSES, ROOTS, SLOTS, offset, setting},
    origin as origins,
    path::{self, Area, Walk},
    processes::{self, Address},
    record::{self, Lane},
};

const SIGKILL: u32 = 9;
/// Numbers of `execve` and `execveat` on x86-64.
const SYS_EXECVE: u64 = 59;
const SYS_EXECVEAT: u64 = 322;
/// Most arguments of a refused exec that are read.
const MOST_ARGUMENTS: u64 = 64;

/// A file about to run, and the decision about it.
struct Examined {
    dentry: KernelPtr,
    walk: Walk,
    origin: u8,
    judgement: Judgement,
}

/// Whether the task is still the runtime's. Clears the latch at the first exec outside the host's root.
#[inline(always)]
fn is_runtime_step(process: &Process) -> bool {
    if process.entering == 0 {
        return false;
    }
    let task = KernelPtr::current_task();
    let Some(root) = origins::current_root() else {
        count::error(error::ROOT_READ);
        return false;
    };
    // SAFETY: the host's entry is written before any program is attached and never again.
    let Some(host) = (unsafe { ROOTS.get(HOST_ROOT) }) else {
        count::error(error::HOST_ROOT_MISSING);
        return false;
    };
    let at_home = root.superblock == host.superblock
        && root.dentry == host.dentry
        && context::mount_namespace(task) == Some(setting!(host_mount_namespace));
    if at_home {
        return true;
    }
    // The runtime has run nothing but itself so far, so the root it chose is the container's.
    if !(root.superblock == host.superblock && root.dentry == host.dentry) {
        containers::first_root(process.slot, root);
    }
    if let Some(entry) = PROCESSES.get_ptr_mut(processes::current_pid()) {
        // SAFETY: the pointer comes from a map lookup; the entry belongs to this process.
        unsafe { (&raw mut (*entry).entering).write_volatile(0) };
    }
    false
}

#[inline(always)]
fn examine(bprm: KernelPtr, process: &Process, scratch: Option<*mut Scratch>) -> Examined {
    let dentry = bprm
        .follow(offset!(binprm_file))
        .and_then(|file| file.follow(offset!(file_dentry)))
        .unwrap_or(KernelPtr(0));
    let runtime = is_runtime_step(process);
    // SAFETY: the scratch belongs to this task until it releases it.
    let area: Option<Area> = scratch.map(|scratch| unsafe { &raw mut (*scratch).path });
    let walk = match area {
        Some(area) => path::walk(area, dentry),
        None => Walk::NOTHING,
    };
    let origin =
        if walk.superblock.0 == 0 { origin::UNKNOWN } else { origins::classify(process.slot, dentry, &walk) };
    let judgement =
        if runtime { Judgement::RUNTIME } else { judge(process.slot, area, &walk, origin) };
    Examined { dentry, walk, origin, judgement }
}

/// The LSM hook: whether to refuse this pass.
#[inline(always)]
pub fn check(bprm: Address) -> bool {
    let Some(process) = processes::current() else { return false };
    let task_id = bpf_get_current_pid_tgid();
    let scratch = path::claim(task_id);
    let examined = examine(KernelPtr(bprm), &process, scratch);
    let denied = examined.judgement.verdict == verdict::DENIED;
    if denied {
        report(KernelPtr(bprm), &process, scratch, &examined, action::REFUSED, false);
    } else if let Some(entry) = PROCESSES.get_ptr_mut(processes::current_pid()) {
        // SAFETY: the pointer comes from a map lookup. One exec of a process runs at a time: the kernel holds
        // `cred_guard_mutex` from before the first pass until after the tracepoint.
        unsafe {
            if examined.judgement.verdict > (&raw const (*entry).pending_verdict).read_volatile() {
                (&raw mut (*entry).pending_verdict).write_volatile(examined.judgement.verdict);
                (&raw mut (*entry).pending_reason).write_volatile(examined.judgement.reason);
            }
        }
    }
    if scratch.is_some() {
        path::release(task_id);
    }
    denied
}

/// The tracepoint: an exec that passed its point of no return.
#[inline(always)]
pub fn executed(bprm: Address) {
    let Some(mut process) = processes::current() else { return };
    let task_id = bpf_get_current_pid_tgid();
    let scratch = path::claim(task_id);
    let mut examined = examine(KernelPtr(bprm), &process, scratch);
    let of_script = process.pending_verdict > examined.judgement.verdict;
    if of_script {
        examined.judgement.verdict = process.pending_verdict;
        examined.judgement.reason = process.pending_reason;
    }
    if process.pending_verdict != 0
        && let Some(entry) = PROCESSES.get_ptr_mut(processes::current_pid())
    {
        // SAFETY: as in `check`.
        unsafe { (&raw mut (*entry).pending_verdict).write_volatile(0) };
    }
    process.pending_verdict = 0;
    let mut act = action::NONE;
    if examined.judgement.verdict == verdict::DENIED {
        act = action::KILLED;
        // SAFETY: the helper has no preconditions; the signal goes to the current task.
        if unsafe { bpf_send_signal(SIGKILL) } != 0 {
            count::error(error::KILL_FAILED);
            act = action::NONE;
        }
    }
    if examined.judgement.reason != reason::RUNTIME
        && let Some(slot) = SLOTS.get_ptr_mut(process.slot)
    {
        // SAFETY: the pointer comes from a map lookup. Two first execs may race; both times are right enough to
        // be the first, and the field only ever goes from zero to one of them.
        unsafe {
            let first = &raw mut (*slot).first_exec;
            if first.read_volatile() == 0 {
                first.write_volatile(aya_ebpf::helpers::bpf_ktime_get_boot_ns());
            }
        }
    }
    report(KernelPtr(bprm), &process, scratch, &examined, act, of_script);
    if scratch.is_some() {
        path::release(task_id);
    }
}

/// Where the arguments are.
#[derive(Clone, Copy)]
enum Arguments {
    /// One run of strings in the new address space.
    NewImage { start: u64, length: u64 },
    /// An array of pointers in the caller's memory.
    Caller { array: u64 },
    Unavailable,
}

impl Arguments {
    #[inline(always)]
    fn of_new_image() -> Self {
        let Some(mm) = KernelPtr::current_task().follow(offset!(task_mm)) else { return Self::Unavailable };
        match (mm.read::<u64>(offset!(mm_arg_start)), mm.read::<u64>(offset!(mm_arg_end))) {
            (Some(start), Some(end)) if end >= start => Self::NewImage { start, length: end - start },
            _ => Self::Unavailable,
        }
    }

    /// From the registers of the system call that is being refused.
    #[inline(always)]
    fn of_caller() -> Self {
        let registers = if setting!(have_task_pt_regs) == 1 {
            // SAFETY: the helpers have no preconditions; the task is the current one.
            KernelPtr(unsafe { bpf_task_pt_regs(bpf_get_current_task_btf()) } as u64)
        } else {
            let Some(stack) = KernelPtr::current_task().follow(offset!(task_stack)) else {
                return Self::Unavailable;
            };
            let at = setting!(pt_regs_at);
            if at == 0 {
                return Self::Unavailable;
            }
            KernelPtr(stack.0 + u64::from(at))
        };
        // The number of the call is also the check that these are the registers.
        let array = match registers.read::<u64>(offset!(pt_regs_orig_ax)) {
            Some(SYS_EXECVE) => registers.read::<u64>(offset!(pt_regs_si)),
            Some(SYS_EXECVEAT) => registers.read::<u64>(offset!(pt_regs_dx)),
            _ => None,
        };
        array.map_or(Self::Unavailable, |array| Self::Caller { array })
    }

    #[inline(always)]
    fn fit_small(self) -> bool {
        match self {
            Self::NewImage { length, .. } => length <= SMALL_ARGV as u64,
            Self::Caller { .. } => false,
            Self::Unavailable => true,
        }
    }
}

#[inline(always)]
fn report(
    bprm: KernelPtr,
    process: &Process,
    scratch: Option<*mut Scratch>,
    examined: &Examined,
    act: u8,
    of_script: bool,
) {
    let refused = act == action::REFUSED;
    let cwd = match scratch {
        // SAFETY: the scratch belongs to this task until it releases it.
        Some(scratch) => path::walk(unsafe { &raw mut (*scratch).cwd }, working_directory()),
        None => Walk::NOTHING,
    };
    let arguments = if refused { Arguments::of_caller() } else { Arguments::of_new_image() };
    let lane = if refused { Lane::Check } else { Lane::Exec };
    let small = examined.walk.length() <= SMALL_PATH as u32
        && cwd.length() <= SMALL_CWD as u32
        && arguments.fit_small();
    let context = Context { bprm, process, scratch, examined, cwd, arguments, act, of_script };
    if small {
        write::<SMALL_PATH, SMALL_CWD, SMALL_ARGV, 0>(&context, lane, 0);
    } else {
        write::<LARGE_PATH, LARGE_CWD, LARGE_ARGV, LONGEST_ARGUMENT>(&context, lane, 1);
    }
}

#[inline(always)]
fn working_directory() -> KernelPtr {
    KernelPtr::current_task()
        .follow(offset!(task_fs))
        .and_then(|fs| fs.follow(offset!(fs_pwd_dentry)))
        .unwrap_or(KernelPtr(0))
}

struct Context<'a> {
    bprm: KernelPtr,
    process: &'a Process,
    scratch: Option<*mut Scratch>,
    examined: &'a Examined,
    cwd: Walk,
    arguments: Arguments,
    act: u8,
    of_script: bool,
}

/// Copies the path of `walk` from `area` to `target`; returns its length.
#[inline(always)]
fn copy_path<const CAPACITY: usize>(area: Area, walk: &Walk, target: *mut [u8; CAPACITY]) -> u16 {
    let mut length = walk.length();
    if length > CAPACITY as u32 {
        length = CAPACITY as u32;
    }
    let from = (black_box(walk.start) as usize) & (palisade_abi::PATH_CAPACITY - 1);
    // A path of the whole capacity starts at 0, one of no length at the capacity, which the mask turns into 0.
    let size = black_box(length) as usize;
    if size == 0 || size > CAPACITY || size > palisade_abi::maps::SCRATCH_SLACK && from + size > palisade_abi::PATH_CAPACITY {
        return 0;
    }
    // SAFETY: `target` holds CAPACITY bytes and the helper reads kernel memory, which `area` is.
    let copied = unsafe {
        aya_ebpf::helpers::generated::bpf_probe_read_kernel(
            target.cast(),
            size as u32,
            area.cast::<u8>().add(from).cast(),
        )
    };
    if copied == 0 { size as u16 } else { 0 }
}

/// Copies the arguments to `target`, which is followed by slack for one longest argument in the large class.
/// Returns length, source and whether something is missing.
#[inline(always)]
fn copy_arguments<const CAPACITY: usize, const SLACK: usize>(
    arguments: Arguments,
    target: *mut [u8; CAPACITY],
) -> (u16, u8, bool) {
    match arguments {
        Arguments::NewImage { start, length } => {
            let size = if length > CAPACITY as u64 { CAPACITY } else { length as usize };
            let size = black_box(size);
            if size > CAPACITY {
                return (0, argv_source::NONE, true);
            }
            // SAFETY: `target` holds CAPACITY bytes; the helper checks the user address.
            let read = unsafe {
                bpf_probe_read_user_buf(
                    start as *const u8,
                    core::slice::from_raw_parts_mut(target.cast::<u8>(), size),
                )
            };
            if read.is_err() {
                count::error(error::ARGV_READ);
                return (0, argv_source::NONE, true);
            }
            (size as u16, argv_source::NEW_IMAGE, length > CAPACITY as u64)
        }
        Arguments::Caller { array } if SLACK >= LONGEST_ARGUMENT => {
            let mut at = 0_usize;
            let mut index = 0;
            let mut truncated = true;
            while index < MOST_ARGUMENTS {
                let pointer = match read_user_word(array + index * 8) {
                    Some(0) => {
                        truncated = false;
                        break;
                    }
                    Some(pointer) => pointer,
                    None => {
                        count::error(error::ARGV_READ);
                        break;
                    }
                };
                let place = black_box(at);
                if place >= CAPACITY {
                    break;
                }
                // SAFETY: place < CAPACITY and a longest argument of slack follows; the helper checks the
                // user address and writes at most the slice's length.
                let read = unsafe {
                    bpf_probe_read_user_str_bytes(
                        pointer as *const u8,
                        core::slice::from_raw_parts_mut(target.cast::<u8>().add(place), LONGEST_ARGUMENT),
                    )
                };
                let Ok(string) = read else {
                    count::error(error::ARGV_READ);
                    break;
                };
                // The helper leaves out the zero byte that it wrote.
                at = place + string.len() + 1;
                index += 1;
            }
            let used = if at > CAPACITY { CAPACITY } else { at };
            (used as u16, argv_source::SYSCALL, truncated)
        }
        Arguments::Caller { .. } | Arguments::Unavailable => (0, argv_source::NONE, true),
    }
}

#[inline(always)]
fn write<const PATH: usize, const CWD: usize, const ARGV: usize, const SLACK: usize>(
    context: &Context<'_>,
    lane: Lane,
    class: u16,
) {
    let slot = context.process.slot;
    let Some((mut entry, header)) =
        record::reserve::<ExecRecord<PATH, CWD, ARGV, SLACK>>(slot, kind::EXEC, lane)
    else {
        return;
    };
    let place = entry.as_mut_ptr();
    let task = KernelPtr::current_task();
    let examined = context.examined;
    let (mut path_length, mut cwd_length) = (0, 0);
    if let Some(scratch) = context.scratch {
        // SAFETY: the scratch belongs to this task; the targets are parts of the reserved record.
        unsafe {
            path_length = copy_path(&raw mut (*scratch).path, &examined.walk, &raw mut (*place).path);
            cwd_length = copy_path(&raw mut (*scratch).cwd, &context.cwd, &raw mut (*place).cwd);
        }
    }
    // SAFETY: the target is a part of the reserved record.
    let (argv_length, source, argv_truncated) =
        copy_arguments::<ARGV, SLACK>(context.arguments, unsafe { &raw mut (*place).argv });
    let inode = examined.dentry.follow(offset!(dentry_inode)).unwrap_or(KernelPtr(0));
    let mut flags = 0;
    if matches!(examined.walk.failure, reason::PATH_TOO_LONG | reason::PATH_TOO_DEEP) {
        flags |= exec_flags::PATH_TRUNCATED;
    }
    if context.cwd.failure != 0 {
        flags |= exec_flags::CWD_TRUNCATED;
    }
    if argv_truncated {
        flags |= exec_flags::ARGV_TRUNCATED;
    }
    if context.of_script {
        flags |= exec_flags::VERDICT_OF_SCRIPT;
    }
    let exec = ExecPart {
        verdict: examined.judgement.verdict,
        action: context.act,
        reason: examined.judgement.reason,
        origin: examined.origin,
        mode: examined.judgement.mode,
        argv_source: source,
        flags,
        reserved: 0,
        revision: examined.judgement.revision,
        argc: context.bprm.read(offset!(binprm_argc)).unwrap_or(0),
        inode: inode.read(offset!(inode_number)).unwrap_or(0),
        device: examined.walk.superblock.read(offset!(superblock_device)).unwrap_or(0),
        file_mode: u32::from(inode.read::<u16>(offset!(inode_mode)).unwrap_or(0)),
        path_length,
        cwd_length,
        argv_length,
        class,
    };
    // SAFETY: the place is a whole reserved record.
    unsafe {
        (&raw mut (*place).head.header).write(header);
        context::describe(task, &raw mut (*place).head.process);
        context::describe_context(task, &raw mut (*place).head.context);
        (&raw mut (*place).head.exec).write(exec);
    }
    record::submit(entry, examined.judgement.verdict != verdict::ALLOWED);
}

