//! Cgroups: containers come and go. The tracepoints are there since 4.18 (`cgroup_attach_task` since 3.19).

use aya_ebpf::{macros::raw_tracepoint, programs::RawTracePointContext};

use crate::cgroups;

/// `TP_PROTO(struct cgroup *cgrp, const char *path)`
#[raw_tracepoint(tracepoint = "cgroup_mkdir")]
pub fn cgroup_mkdir(ctx: RawTracePointContext) -> i32 {
    let _slot = cgroups::made(ctx.arg(0), ctx.arg(1));
    #[cfg(feature = "log")]
    if let Some(slot) = _slot {
        aya_log_ebpf::debug!(&ctx, "slot {} begins", slot);
    }
    0
}

/// `TP_PROTO(struct cgroup *cgrp, const char *path)`
#[raw_tracepoint(tracepoint = "cgroup_rmdir")]
pub fn cgroup_rmdir(ctx: RawTracePointContext) -> i32 {
    cgroups::removed(ctx.arg(0));
    0
}

/// `TP_PROTO(struct cgroup *dst_cgrp, const char *path, struct task_struct *task, bool threadgroup)`
#[raw_tracepoint(tracepoint = "cgroup_attach_task")]
pub fn cgroup_attach_task(ctx: RawTracePointContext) -> i32 {
    cgroups::task_attached(ctx.arg(0), ctx.arg(2));
    0
}
