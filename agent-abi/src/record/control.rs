//! What the agent must act on: it travels in a ring of its own.

#[cfg(feature = "user")]
use super::bytes::{DecodeError, fixed, of_this_version, part};

/// Longest cgroup name that travels.
pub const CGROUP_NAME: usize = 128;
/// Longest path of a cgroup within its hierarchy that travels.
pub const CGROUP_PATH: usize = 512;

/// A cgroup of a container came or went.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct ControlRecord {
    /// [`crate::codes::control`].
    pub kind: u16,
    /// [`crate::RECORDS_VERSION`].
    pub version: u16,
    /// Bytes used of `name`.
    pub name_length: u32,
    pub slot: u64,
    pub time: u64,
    pub name: [u8; CGROUP_NAME],
    /// The cgroup's path within its hierarchy, zero padded; empty when it is longer.
    pub path: [u8; CGROUP_PATH],
}
layout!(ControlRecord, 24 + CGROUP_NAME + CGROUP_PATH);

/// Reads one control record. Returns it with the name of its cgroup.
///
/// # Errors
///
/// As [`super::decode`].
#[cfg(feature = "user")]
pub fn decode_control(bytes: &[u8]) -> Result<(ControlRecord, &[u8]), DecodeError> {
    let record: ControlRecord = fixed(bytes)?;
    of_this_version(record.version)?;
    let length = u16::try_from(record.name_length).unwrap_or(u16::MAX);
    let at = core::mem::offset_of!(ControlRecord, name);
    Ok((record, part(bytes, "name", at, CGROUP_NAME, length)?))
}
