//! Reading kernel structures through the frozen offsets.

use aya_ebpf::helpers::{bpf_get_current_task, bpf_probe_read_kernel, bpf_probe_read_user};
use palisade_abi::offsets::ABSENT;

/// A kernel address as a hook's argument delivers it.
pub type Address = u64;

// Of include/uapi/linux/stat.h.
pub const S_IFMT: u64 = 0o170_000;
pub const S_IFREG: u64 = 0o100_000;

/// Of include/linux/fs.h: the file was opened to write.
pub const FMODE_WRITE: u32 = 1 << 1;

/// An address in the kernel. It may be stale or null: every read through it can fail.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct KernelPtr(pub u64);

impl KernelPtr {
    /// The task that runs this program.
    #[inline(always)]
    pub fn current_task() -> Self {
        // SAFETY: the helper has no preconditions.
        Self(unsafe { bpf_get_current_task() })
    }

    /// Reads the field at `offset`; `None` when the field is absent on this kernel or the read faults.
    #[inline(always)]
    pub fn read<T: Copy>(self, offset: u32) -> Option<T> {
        if offset == ABSENT || self.0 == 0 {
            return None;
        }
        let place = (self.0 + u64::from(offset)) as *const T;
        // SAFETY: the helper checks the address and fails on a bad one; T is plain old data at every call.
        unsafe { bpf_probe_read_kernel(place) }.ok()
    }

    /// Follows the pointer at `offset`; null is `None`.
    #[inline(always)]
    pub fn follow(self, offset: u32) -> Option<Self> {
        match self.read::<u64>(offset) {
            Some(0) | None => None,
            Some(address) => Some(Self(address)),
        }
    }
}

/// A hook's typed pointer as a plain number, which global functions take: copied through the stack by a helper, it loses its
/// type.
#[inline(always)]
pub fn plain(address: u64) -> u64 {
    let place = address;
    // SAFETY: the place is a local's.
    unsafe { bpf_probe_read_kernel(core::hint::black_box(&raw const place)) }.unwrap_or(0)
}

/// Reads a word of the current process's memory.
#[inline(always)]
pub fn read_user_word(address: u64) -> Option<u64> {
    // SAFETY: the helper checks the address and fails on a bad one.
    unsafe { bpf_probe_read_user(address as *const u64) }.ok()
}
