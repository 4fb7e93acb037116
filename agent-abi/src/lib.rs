//! Every byte that crosses the kernel boundary: map keys and values, records, settings and field offsets.
//!
//! The eBPF programs and the agent are compiled by different compilers for different targets, and an agent may
//! meet maps that an older one left behind. Nothing here may therefore depend on a compiler's choice: all types
//! are `repr(C)` without implicit padding, sizes are asserted, enumerations travel as plain integers
//! ([`codes`]), and a change of any layout raises [`ABI_VERSION`].

#![cfg_attr(not(test), no_std)]

pub mod codes;
pub mod hash;
pub mod maps;
pub mod offsets;
pub mod record;
pub mod volume;

/// Version of every layout in this crate. It names the pin directory, so that two layouts never share a map.
pub const ABI_VERSION: u32 = if cfg!(feature = "another-abi") { 12 } else { 11 };

/// Longest canonical path that is judged, in bytes. A longer one is [`codes::reason::PATH_TOO_LONG`].
pub const PATH_CAPACITY: usize = 1024;

/// Most path components that a walk follows. A deeper file is [`codes::reason::PATH_TOO_DEEP`].
pub const PATH_DEPTH: usize = 64;
