//! What containers try on the agent.

use super::{DecisionPart, Header, ProcessPart, SessionPart};

/// A process of a container tried something on the agent.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct TamperRecord {
    pub header: Header,
    pub process: ProcessPart,
    pub session: SessionPart,
    /// Without a reason, a mode and a revision: the agent's own protection is no matter of profiles.
    pub decision: DecisionPart,
    /// [`crate::codes::tampering`].
    pub act: u8,
    pub reserved: [u8; 3],
    /// The agent's process id, or the id of the map or program; 0 for pins.
    pub target: u32,
    /// As [`crate::codes::tampering`] says.
    pub detail: u32,
    pub reserved_too: u32,
}
layout!(TamperRecord, 176);
