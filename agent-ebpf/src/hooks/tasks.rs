//! Processes: from fork to exit, signals, tracing, scheduling and limits. All hooks are older than BPF LSM (5.7); `dequeue_signal` has had
//! several lists of arguments.

use aya_ebpf::{
    EbpfContext as _,
    macros::{fexit, lsm, raw_tracepoint},
    programs::{FExitContext, LsmContext, RawTracePointContext},
};
use palisade_abi::codes::tampering;

use crate::{code::tracing, exec::signals, maps::setting, processes, tamper};

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

/// `TP_PROTO(struct task_struct *p)`
#[raw_tracepoint(tracepoint = "sched_process_exit")]
pub fn sched_process_exit(ctx: RawTracePointContext) -> i32 {
    processes::exited(ctx.arg(0));
    0
}

/// `void security_task_free(struct task_struct *task)`: the second line of the tracepoint for exits, which a kernel may skip.
#[lsm(hook = "task_free")]
pub fn task_free(ctx: LsmContext) -> i32 {
    processes::freed(ctx.arg(0));
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

/// `int security_ptrace_access_check(struct task_struct *child, unsigned int mode)`: no tracer lets go what is held, none traces the agent,
/// nor what a profile guards. One program: the agent is asked for first, so that an act on it is recorded as such.
#[lsm(hook = "ptrace_access_check")]
pub fn ptrace_access_check(ctx: LsmContext) -> i32 {
    /// `PTRACE_MODE_ATTACH` of include/linux/ptrace.h; reading procfs asks for less.
    const ATTACH: u32 = 2;
    let mode: u32 = ctx.arg(1);
    let refused = mode & ATTACH != 0
        && (processes::may_not_be_traced(ctx.arg(0))
            || tamper::on_process(tampering::TRACE, ctx.arg(0), 0)
            || tracing::traces(ctx.arg(0)));
    if refused { -1 } else { 0 }
}

/// `int security_ptrace_traceme(struct task_struct *parent)`: a child may ask for it where nobody could attach to it.
#[lsm(hook = "ptrace_traceme")]
pub fn ptrace_traceme(ctx: LsmContext) -> i32 {
    if tracing::be_traced(ctx.arg(0)) { -1 } else { 0 }
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
        signals::woken();
    }
    0
}
