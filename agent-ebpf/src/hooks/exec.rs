//! What is executed. All hooks are there since 5.8, those of `bprm_check` and `bprm_committed_creds` since 5.7.

use aya_ebpf::{
    macros::{lsm, raw_tracepoint},
    programs::{LsmContext, RawTracePointContext},
};

use crate::exec::{check, executed};

/// `int security_bprm_creds_for_exec(struct linux_binprm *bprm)`
#[lsm(hook = "bprm_creds_for_exec")]
pub fn bprm_creds_for_exec(ctx: LsmContext) -> i32 {
    if check::asked(ctx.arg(0)) { -1 } else { 0 }
}

/// `int security_bprm_check(struct linux_binprm *bprm)`: once per pass of the binary format loop.
#[lsm(hook = "bprm_check_security")]
pub fn bprm_check_security(ctx: LsmContext) -> i32 {
    let refused = check::check(ctx.arg(0), false);
    #[cfg(feature = "log")]
    if refused {
        aya_log_ebpf::debug!(&ctx, "an exec is refused");
    }
    // The verifier wants a return value that is provably zero or a small negative number (6.12 and later).
    if refused { -1 } else { 0 }
}

/// `int security_bprm_creds_from_file(struct linux_binprm *bprm, const struct file *file)`: the new credentials are known, and the
/// point of no return is not reached.
#[lsm(hook = "bprm_creds_from_file")]
pub fn bprm_creds_from_file(ctx: LsmContext) -> i32 {
    if check::elevates(ctx.arg(0)) { -1 } else { 0 }
}

/// `void security_bprm_committed_creds(struct linux_binprm *bprm)`: past the point of no return. What waits for its
/// container to be identified is stopped here, since a kernel may skip a tracepoint program.
#[lsm(hook = "bprm_committed_creds")]
pub fn bprm_committed_creds(_ctx: LsmContext) -> i32 {
    check::committed();
    0
}

/// `TP_PROTO(struct task_struct *p, pid_t old_pid, struct linux_binprm *bprm)`
#[raw_tracepoint(tracepoint = "sched_process_exec")]
pub fn sched_process_exec(ctx: RawTracePointContext) -> i32 {
    executed::executed(ctx.arg(2));
    0
}
