//! Palisade's eBPF programs: one module per hook family, and below them what they share.
//!
//! A hook decides first and reports afterwards, so that no verdict depends on room in a ring. What cannot be
//! read or looked up is unknown, and in enforce mode unknown is refused; each such place is counted in
//! `ERRORS`. Nothing here knows about profiles: a decision is a lookup in maps that the agent filled.

#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]
#![expect(unsafe_code, reason = "maps, helpers and the kernel's memory; each block says why it is sound")]
#![cfg_attr(feature = "fetch-add", expect(internal_features, reason = "the only way to a BPF fetch-add"))]
#![cfg_attr(feature = "fetch-add", feature(core_intrinsics))]

mod code;
mod containers;
mod context;
mod count;
mod exec;
#[cfg(feature = "generator")]
mod generate;
mod interpreter;
mod judge;
mod kernel;
mod layers;
mod maps;
mod origin;
mod path;
mod processes;
mod record;
mod repeat;
mod scratch;
mod tamper;
mod volumes;

use aya_ebpf::{
    EbpfContext as _,
    macros::{fexit, lsm, raw_tracepoint},
    programs::{FExitContext, LsmContext, RawTracePointContext},
};
use palisade_abi::codes::{code_act, tampering};

use crate::{
    kernel::KernelPtr,
    maps::{offset, setting},
};

/// `int security_bprm_check(struct linux_binprm *bprm)`: once per pass of the binary format loop.
#[lsm(hook = "bprm_check_security")]
pub fn bprm_check_security(ctx: LsmContext) -> i32 {
    let refused = exec::check(ctx.arg(0), false);
    #[cfg(feature = "log")]
    if refused {
        aya_log_ebpf::debug!(&ctx, "an exec is refused");
    }
    // The verifier wants a return value that is provably zero or a small negative number (6.12 and later).
    if refused { -1 } else { 0 }
}

/// `int security_bprm_creds_for_exec(struct linux_binprm *bprm)`
#[lsm(hook = "bprm_creds_for_exec")]
pub fn bprm_creds_for_exec(ctx: LsmContext) -> i32 {
    if exec::asked(ctx.arg(0)) { -1 } else { 0 }
}

/// `int security_bprm_creds_from_file(struct linux_binprm *bprm, const struct file *file)`: the new credentials are known, and the
/// point of no return is not reached.
#[lsm(hook = "bprm_creds_from_file")]
pub fn bprm_creds_from_file(ctx: LsmContext) -> i32 {
    if exec::elevates(ctx.arg(0)) { -1 } else { 0 }
}

/// `void security_bprm_committed_creds(struct linux_binprm *bprm)`: past the point of no return. What waits for its
/// container to be identified is stopped here, since a kernel may skip a tracepoint program.
#[lsm(hook = "bprm_committed_creds")]
pub fn bprm_committed_creds(_ctx: LsmContext) -> i32 {
    exec::committed();
    0
}

const SIGCONT: i32 = 18;

/// `int security_task_kill(struct task_struct *p, struct kernel_siginfo *info, int sig, const struct cred *cred)`:
/// nobody lets go what is held, and no container signals the agent. The agent notes first that something is not held any more.
#[lsm(hook = "task_kill")]
pub fn task_kill(ctx: LsmContext) -> i32 {
    let signal: i32 = ctx.arg(2);
    let refused = (signal == SIGCONT && processes::must_stay_stopped(ctx.arg(0)))
        // Number 0 asks whether the process is there.
        || (signal != 0 && tamper::on_process(tampering::SIGNAL, ctx.arg(0), signal as u32));
    if refused { -1 } else { 0 }
}

/// `int security_file_send_sigiotask(struct task_struct *tsk, struct fown_struct *fown, int sig)`: nor does a file
/// descriptor with `F_SETSIG`.
#[lsm(hook = "file_send_sigiotask")]
pub fn file_send_sigiotask(ctx: LsmContext) -> i32 {
    let signal: i32 = ctx.arg(2);
    let refused =
        (signal == SIGCONT && processes::must_stay_stopped(ctx.arg(0))) || tamper::by_descriptor(ctx.arg(0));
    if refused { -1 } else { 0 }
}

/// `int security_ptrace_access_check(struct task_struct *child, unsigned int mode)`: nor does a tracer.
#[lsm(hook = "ptrace_access_check")]
pub fn ptrace_access_check(ctx: LsmContext) -> i32 {
    /// `PTRACE_MODE_ATTACH` of include/linux/ptrace.h; reading procfs asks for less.
    const ATTACH: u32 = 2;
    let mode: u32 = ctx.arg(1);
    let refused = mode & ATTACH != 0
        && (processes::may_not_be_traced(ctx.arg(0))
            || tamper::on_process(tampering::TRACE, ctx.arg(0), 0)
            || code::traces(ctx.arg(0)));
    if refused { -1 } else { 0 }
}

/// `int security_ptrace_traceme(struct task_struct *parent)`: a child may ask for it where nobody could attach to it.
#[lsm(hook = "ptrace_traceme")]
pub fn ptrace_traceme(ctx: LsmContext) -> i32 {
    if code::be_traced(ctx.arg(0)) { -1 } else { 0 }
}

/// `int security_file_open(struct file *file)`
#[lsm(hook = "file_open")]
pub fn file_open(ctx: LsmContext) -> i32 {
    let refused =
        code::opens_memory(ctx.arg(0)) || interpreter::opens(ctx.arg(0)) || layers::opens(ctx.arg(0));
    if refused { -1 } else { 0 }
}

/// `int security_mmap_file(struct file *file, unsigned long reqprot, unsigned long prot, unsigned long flags)`: `prot` is what
/// it will be, `READ_IMPLIES_EXEC` included.
#[lsm(hook = "mmap_file")]
pub fn mmap_file(ctx: LsmContext) -> i32 {
    if code::mapped(ctx.arg(0), ctx.arg(2), ctx.arg(3)) { -1 } else { 0 }
}

/// `int security_mmap_addr(unsigned long addr)`: whatever gets a place in memory, also by calls that have no hook of their own.
#[lsm(hook = "mmap_addr")]
pub fn mmap_addr(_ctx: LsmContext) -> i32 {
    if code::implies_exec() { -1 } else { 0 }
}

/// `int security_file_mprotect(struct vm_area_struct *vma, unsigned long reqprot, unsigned long prot)`, also for
/// `pkey_mprotect`.
#[lsm(hook = "file_mprotect")]
pub fn file_mprotect(ctx: LsmContext) -> i32 {
    if code::protected(ctx.arg(0), ctx.arg(2)) { -1 } else { 0 }
}

/// `int security_task_setscheduler(struct task_struct *p)`: policy, real-time priority and processors.
#[lsm(hook = "task_setscheduler")]
pub fn task_setscheduler(ctx: LsmContext) -> i32 {
    if tamper::on_process(tampering::SCHEDULE, ctx.arg(0), 0) { -1 } else { 0 }
}

/// `int security_task_setnice(struct task_struct *p, int nice)`
#[lsm(hook = "task_setnice")]
pub fn task_setnice(ctx: LsmContext) -> i32 {
    if tamper::on_process(tampering::SCHEDULE, ctx.arg(0), 0) { -1 } else { 0 }
}

/// `int security_task_setrlimit(struct task_struct *p, unsigned int resource, struct rlimit *new_rlim)`
#[lsm(hook = "task_setrlimit")]
pub fn task_setrlimit(ctx: LsmContext) -> i32 {
    let resource: u32 = ctx.arg(1);
    if tamper::on_process(tampering::LIMIT, ctx.arg(0), resource) { -1 } else { 0 }
}

/// `int security_bpf_map(struct bpf_map *map, fmode_t fmode)`: whoever gets a file descriptor of a map.
#[lsm(hook = "bpf_map")]
pub fn bpf_map(ctx: LsmContext) -> i32 {
    let id = KernelPtr(ctx.arg(0)).read(offset!(map_id));
    if tamper::on_object(tampering::OPEN_MAP, id) { -1 } else { 0 }
}

/// `int security_bpf_prog(struct bpf_prog *prog)`
#[lsm(hook = "bpf_prog")]
pub fn bpf_prog(ctx: LsmContext) -> i32 {
    let id =
        KernelPtr(ctx.arg(0)).follow(offset!(program_aux)).and_then(|aux| aux.read(offset!(program_aux_id)));
    if tamper::on_object(tampering::OPEN_PROGRAM, id) { -1 } else { 0 }
}

/// `int security_inode_unlink(struct inode *dir, struct dentry *dentry)`
#[lsm(hook = "inode_unlink")]
pub fn inode_unlink(ctx: LsmContext) -> i32 {
    if tamper::on_pin(ctx.arg(1)) || code::spoils(code_act::REMOVE, ctx.arg(1)) { -1 } else { 0 }
}

/// `int security_inode_copy_up(struct dentry *src, struct cred **new)`: what overlayfs copies before it is written to, linked, or
/// its attributes change.
#[lsm(hook = "inode_copy_up")]
pub fn inode_copy_up(ctx: LsmContext) -> i32 {
    if code::spoils(code_act::CHANGE, ctx.arg(0)) { -1 } else { 0 }
}

/// `int security_sb_mount(const char *dev_name, const struct path *path, const char *type, unsigned long flags, void *data)`
#[lsm(hook = "sb_mount")]
pub fn sb_mount(ctx: LsmContext) -> i32 {
    if code::mounts_over(ctx.arg(1)) { -1 } else { 0 }
}

/// `int security_move_mount(const struct path *from_path, const struct path *to_path)`
#[lsm(hook = "move_mount")]
pub fn move_mount(ctx: LsmContext) -> i32 {
    if code::mounts_over(ctx.arg(1)) { -1 } else { 0 }
}

/// `int security_inode_rmdir(struct inode *dir, struct dentry *dentry)`
#[lsm(hook = "inode_rmdir")]
pub fn inode_rmdir(ctx: LsmContext) -> i32 {
    if tamper::on_pin(ctx.arg(1)) { -1 } else { 0 }
}

/// `int security_inode_rename(struct inode *old_dir, struct dentry *old_dentry, struct inode *new_dir, struct dentry
/// *new_dentry, unsigned int flags)`: for an exchange the kernel asks both ways.
#[lsm(hook = "inode_rename")]
pub fn inode_rename(ctx: LsmContext) -> i32 {
    // What is in the new place goes.
    let refused = tamper::on_pin(ctx.arg(1))
        || tamper::on_pin(ctx.arg(3))
        || code::spoils(code_act::RENAME, ctx.arg(1))
        || code::spoils(code_act::RENAME, ctx.arg(3));
    if refused { -1 } else { 0 }
}

/// `int security_sb_umount(struct vfsmount *mnt, int flags)`
#[lsm(hook = "sb_umount")]
pub fn sb_umount(ctx: LsmContext) -> i32 {
    if tamper::on_mount(ctx.arg(0)) { -1 } else { 0 }
}

/// SIGSTOP, SIGTSTP, SIGTTIN and SIGTTOU: whoever gets one is about to stop.
const STOPS: core::ops::RangeInclusive<i32> = 19..=22;

/// `int dequeue_signal(…)`, when it is done: a task that was stopped calls it on its way back to user space. The kernel itself lets go what
/// is stopped (an orphaned process group, a terminal that hangs up), and asks nobody. It is called with the lock of the signals held and
/// interrupts off, so no other task can be in the program on that processor, and it is never skipped. The signal that stops the task
/// again comes when interrupts are on again (`irq_work`).
#[fexit(function = "dequeue_signal")]
pub fn dequeue_signal(ctx: FExitContext) -> u32 {
    let context = ctx.as_ptr();
    let result: u64;
    // The result stands behind the arguments. By inline assembly, since the compiler would make one access of the two, at a place that the
    // verifier does not know.
    // SAFETY: the verifier checks that the function has as many.
    unsafe {
        match setting!(dequeue_arguments) {
            3 => core::arch::asm!("{0} = *(u64 *)({1} + 24)", out(reg) result, in(reg) context),
            4 => core::arch::asm!("{0} = *(u64 *)({1} + 32)", out(reg) result, in(reg) context),
            _ => return 0,
        }
    }
    if !STOPS.contains(&(result as i32)) {
        exec::woken();
    }
    0
}

/// `TP_PROTO(struct task_struct *p, pid_t old_pid, struct linux_binprm *bprm)`
#[raw_tracepoint(tracepoint = "sched_process_exec")]
pub fn sched_process_exec(ctx: RawTracePointContext) -> i32 {
    exec::executed(ctx.arg(2));
    0
}

/// `TP_PROTO(struct task_struct *parent, struct task_struct *child)`
#[raw_tracepoint(tracepoint = "sched_process_fork")]
pub fn sched_process_fork(ctx: RawTracePointContext) -> i32 {
    processes::forked(ctx.arg(0), ctx.arg(1));
    0
}

/// `int security_task_alloc(struct task_struct *task, unsigned long clone_flags)`: the second line of the tracepoint for forks, which a
/// kernel may skip.
#[lsm(hook = "task_alloc")]
pub fn task_alloc(ctx: LsmContext) -> i32 {
    processes::forking(ctx.arg(0), ctx.arg(1));
    0
}

/// `void security_task_free(struct task_struct *task)`: the second line of the tracepoint for exits, which a kernel may skip.
#[lsm(hook = "task_free")]
pub fn task_free(ctx: LsmContext) -> i32 {
    processes::freed(ctx.arg(0));
    0
}

/// `TP_PROTO(struct task_struct *p)`
#[raw_tracepoint(tracepoint = "sched_process_exit")]
pub fn sched_process_exit(ctx: RawTracePointContext) -> i32 {
    processes::exited(ctx.arg(0));
    0
}

/// `TP_PROTO(struct cgroup *cgrp, const char *path)`
#[raw_tracepoint(tracepoint = "cgroup_mkdir")]
pub fn cgroup_mkdir(ctx: RawTracePointContext) -> i32 {
    let _slot = containers::cgroup_made(ctx.arg(0), ctx.arg(1));
    #[cfg(feature = "log")]
    if let Some(slot) = _slot {
        aya_log_ebpf::debug!(&ctx, "slot {} begins", slot);
    }
    0
}

/// `TP_PROTO(struct cgroup *cgrp, const char *path)`
#[raw_tracepoint(tracepoint = "cgroup_rmdir")]
pub fn cgroup_rmdir(ctx: RawTracePointContext) -> i32 {
    containers::cgroup_removed(ctx.arg(0));
    0
}

/// `TP_PROTO(struct cgroup *dst_cgrp, const char *path, struct task_struct *task, bool threadgroup)`
#[raw_tracepoint(tracepoint = "cgroup_attach_task")]
pub fn cgroup_attach_task(ctx: RawTracePointContext) -> i32 {
    containers::task_attached(ctx.arg(0), ctx.arg(2));
    0
}

/// Never attached: a benchmark runs it. Slot, processes, first process id.
#[cfg(feature = "generator")]
#[raw_tracepoint(tracepoint = "sys_enter")]
pub fn generate_records(ctx: RawTracePointContext) -> i32 {
    generate::generate(ctx.arg(0), ctx.arg(1), ctx.arg(2))
}

/// Never attached: the agent runs it on demand (`BPF_PROG_TEST_RUN`) from a thread whose root directory is the
/// one to learn. The first argument is the slot, or `HOST_ROOT`, the second the time, in seconds since the Unix epoch. Written out, since the macro of the others
/// discards the result.
#[unsafe(no_mangle)]
#[unsafe(link_section = "raw_tp")]
pub extern "C" fn learn_root(ctx: *mut core::ffi::c_void) -> u32 {
    let ctx = RawTracePointContext::new(ctx);
    u32::from(!containers::learn_root(ctx.arg(0), ctx.arg(1)))
}

/// Never attached, run on demand by a thread that holds the root of a mount open. The arguments are the slot, the file
/// descriptor, the index of the mount's name, and its flags.
#[unsafe(no_mangle)]
#[unsafe(link_section = "raw_tp")]
pub extern "C" fn learn_volume(ctx: *mut core::ffi::c_void) -> u32 {
    let ctx = RawTracePointContext::new(ctx);
    u32::from(!volumes::learn(ctx.arg(0), ctx.arg(1), ctx.arg(2), ctx.arg(3)))
}

/// Never attached, run on demand: the origin that the overlay logic gives the file that is open as the first argument says.
#[unsafe(no_mangle)]
#[unsafe(link_section = "raw_tp")]
pub extern "C" fn probe_origin(ctx: *mut core::ffi::c_void) -> u32 {
    u32::from(origin::of_descriptor(RawTracePointContext::new(ctx).arg(0)))
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";

// A panic that survives optimisation is an endless loop, which the verifier refuses: it fails at load time.
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
