//! Programs that are never attached: the agent runs them (`BPF_PROG_TEST_RUN`, of raw tracepoints since 5.10).

#[cfg(feature = "generator")]
use aya_ebpf::macros::raw_tracepoint;
use aya_ebpf::programs::RawTracePointContext;

#[cfg(feature = "generator")]
use crate::generate;
use crate::{origin, roots, volumes};

/// Never attached: the agent runs it on demand (`BPF_PROG_TEST_RUN`) from a thread whose root directory is the
/// one to learn. The first argument is the slot, or `HOST_ROOT`, the second the time, in seconds since the Unix epoch. Written out, since the macro of the others
/// discards the result.
#[unsafe(no_mangle)]
#[unsafe(link_section = "raw_tp")]
pub extern "C" fn learn_root(ctx: *mut core::ffi::c_void) -> u32 {
    let ctx = RawTracePointContext::new(ctx);
    u32::from(!roots::learn(ctx.arg(0), ctx.arg(1)))
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

/// Never attached: a benchmark runs it. Slot, processes, first process id.
#[cfg(feature = "generator")]
#[raw_tracepoint(tracepoint = "sys_enter")]
pub fn generate_records(ctx: RawTracePointContext) -> i32 {
    generate::generate(ctx.arg(0), ctx.arg(1), ctx.arg(2))
}
