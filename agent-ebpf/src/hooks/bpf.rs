//! Maps and programs that a process gets a file descriptor of. Both hooks are older than BPF LSM (5.7).

use aya_ebpf::{macros::lsm, programs::LsmContext};
use palisade_abi::codes::tampering;

use crate::{kernel::KernelPtr, maps::offset, tamper};

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
