//! Every byte that crosses the kernel boundary: map keys and values, records, settings and field offsets.
//!
//! The eBPF programs and the agent are compiled by different compilers for different targets, and an agent may
//! meet maps that an older one left behind. Nothing here may therefore depend on a compiler's choice: all types
//! are `repr(C)` without implicit padding, sizes are asserted, enumerations travel as plain integers
//! ([`codes`]), and a change of a layout raises the version of its kind ([`Versions`]).

#![cfg_attr(not(test), no_std)]

/// Says how large a type is that crosses the boundary, and makes it a key or value of aya's maps. To stand behind the type.
macro_rules! layout {
    ($type:ty, $size:expr) => {
        const _: () = assert!(size_of::<$type>() == $size);
        // SAFETY: the type is bytemuck::Pod, which is the stronger promise: any bit pattern is valid and there is no padding.
        #[cfg(feature = "user")]
        #[expect(unsafe_code, reason = "plain old data for aya's maps")]
        unsafe impl aya::Pod for $type {}
    };
}

pub mod codes;
pub mod hash;
pub mod ledger;
pub mod offsets;
pub mod policy;
pub mod record;
pub mod section;
pub mod settings;
pub mod state;
mod versions;
pub mod volume;

pub use versions::{LEDGER_VERSION, POLICY_VERSION, RECORDS_VERSION, STATE_VERSION, VERSIONS, Versions};

/// Longest canonical path that is judged, in bytes. A longer one is [`codes::reason::PATH_TOO_LONG`].
pub const PATH_CAPACITY: usize = 1024;

/// Most path components that a walk follows. A deeper file is [`codes::reason::PATH_TOO_DEEP`].
pub const PATH_DEPTH: usize = 64;
