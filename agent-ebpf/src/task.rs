//! The current task: its numbers, the call that it is in, and what it has open.

use aya_ebpf::helpers::{
    bpf_get_current_pid_tgid,
    generated::{bpf_get_current_task_btf, bpf_task_pt_regs},
};

use crate::{
    kernel::KernelPtr,
    maps::{offset, setting},
};

/// Numbers of `execve` and `execveat` on x86-64.
pub const SYS_EXECVE: u64 = 59;
pub const SYS_EXECVEAT: u64 = 322;
/// `execveat` of 32-bit programs.
pub const SYS_EXECVEAT_32: u64 = 358;
/// The same by the numbers of x32.
pub const SYS_EXECVEAT_X32: u64 = 0x4000_0221;

/// The current process's tgid.
#[inline(always)]
pub fn current_pid() -> u32 {
    // The upper half of the helper's result is the tgid.
    (bpf_get_current_pid_tgid() >> 32) as u32
}

/// Whether the current process is being traced: a tracer can discard the signal that stops it.
#[inline(always)]
pub fn is_traced() -> bool {
    KernelPtr::current_task().read::<u32>(offset!(task_ptrace)) != Some(0)
}

/// The registers that the current system call was made with.
#[inline(always)]
pub fn registers() -> Option<KernelPtr> {
    if setting!(have_task_pt_regs) == 1 {
        // SAFETY: the helpers have no preconditions; the task is the current one.
        return Some(KernelPtr(unsafe { bpf_task_pt_regs(bpf_get_current_task_btf()) } as u64));
    }
    let at = setting!(pt_regs_at);
    match KernelPtr::current_task().follow(offset!(task_stack)) {
        Some(stack) if at != 0 => Some(KernelPtr(stack.0 + u64::from(at))),
        _ => None,
    }
}

/// Whether the current system call is one that executes something.
#[inline(always)]
pub fn is_executing_call() -> bool {
    // Of 64-bit callers, and of 32-bit ones, whose numbers are `munmap` and none for the others; no memory is mapped by these.
    let call = registers().and_then(|registers| registers.read::<u64>(offset!(pt_regs_orig_ax)));
    matches!(call, Some(SYS_EXECVE | SYS_EXECVEAT | 11 | SYS_EXECVEAT_32 | 0x4000_0208 | SYS_EXECVEAT_X32))
}

/// Where the arguments of what was executed begin and end.
#[inline(always)]
pub fn arguments_of_new_image() -> Option<(u64, u64)> {
    let mm = KernelPtr::current_task().follow(offset!(task_mm))?;
    let (begin, end) = (mm.read::<u64>(offset!(mm_arg_start))?, mm.read::<u64>(offset!(mm_arg_end))?);
    (end >= begin).then_some((begin, end))
}

#[inline(always)]
pub fn working_directory() -> KernelPtr {
    KernelPtr::current_task()
        .follow(offset!(task_fs))
        .and_then(|fs| fs.follow(offset!(fs_pwd_dentry)))
        .unwrap_or(KernelPtr(0))
}

/// Size of a pointer, of which the table of open files consists.
const POINTER: u64 = 8;

/// The dentry of a file that the current process has open.
#[inline(always)]
pub fn opened(descriptor: u64) -> Option<KernelPtr> {
    let table = KernelPtr::current_task().follow(offset!(task_files))?.follow(offset!(files_table))?;
    let files = table.follow(offset!(table_files))?;
    KernelPtr(files.0 + descriptor * POINTER).follow(0)?.follow(offset!(file_dentry))
}
