//! The life of a process: its birth and its end.

use super::{Header, ProcessPart, SessionPart};

/// A process came to be.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct ForkRecord {
    pub header: Header,
    pub process: ProcessPart,
    pub session: SessionPart,
}
layout!(ForkRecord, 152);

/// A process ended.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct ExitRecord {
    pub header: Header,
    pub process: ProcessPart,
    pub session: SessionPart,
    /// As `wait(2)` encodes it: `status << 8 | core << 7 | signal`.
    pub exit_code: u32,
    pub reserved: u32,
}
layout!(ExitRecord, 160);
