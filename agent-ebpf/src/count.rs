//! Counting what went wrong, and where.

use crate::maps::ERRORS;

/// Counts one failure at `site` ([`palisade_abi::codes::error`]).
#[inline(always)]
pub fn error(site: u32) {
    if let Some(counter) = ERRORS.get_ptr_mut(site) {
        add(counter, 1);
    }
}

/// Adds to a counter that several CPUs and tasks share.
#[inline(always)]
pub fn add(counter: *mut u64, amount: u64) {
    // SAFETY: the pointer comes from a map lookup and is valid for the program's run. Inline assembly, since
    // the core library offers no atomic addition for BPF that works on every kernel: this is BPF_XADD.
    unsafe {
        core::arch::asm!("lock *(u64 *)({place} + 0) += {amount}", place = in(reg) counter, amount = in(reg) amount);
    }
}
