//! Memory that becomes executable. All hooks are older than BPF LSM (5.7).

use aya_ebpf::{macros::lsm, programs::LsmContext};

use crate::code::memory;

/// `int security_mmap_file(struct file *file, unsigned long reqprot, unsigned long prot, unsigned long flags)`: `prot` is what
/// it will be, `READ_IMPLIES_EXEC` included.
#[lsm(hook = "mmap_file")]
pub fn mmap_file(ctx: LsmContext) -> i32 {
    if memory::mapped(ctx.arg(0), ctx.arg(2), ctx.arg(3)) { -1 } else { 0 }
}

/// `int security_mmap_addr(unsigned long addr)`: whatever gets a place in memory, also by calls that have no hook of their own.
#[lsm(hook = "mmap_addr")]
pub fn mmap_addr(_ctx: LsmContext) -> i32 {
    if memory::implies_exec() { -1 } else { 0 }
}

/// `int security_file_mprotect(struct vm_area_struct *vma, unsigned long reqprot, unsigned long prot)`, also for
/// `pkey_mprotect`.
#[lsm(hook = "file_mprotect")]
pub fn file_mprotect(ctx: LsmContext) -> i32 {
    if memory::protected(ctx.arg(0), ctx.arg(2)) { -1 } else { 0 }
}
