//! Reading parts of records out of the ring's bytes, none of which is trusted.

use crate::RECORDS_VERSION;

/// Why bytes are not a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecodeError {
    /// Fewer bytes than the kind needs.
    Short { have: usize, need: usize },
    /// Written by programs whose records have another version.
    Version(u16),
    /// A kind this build does not know.
    Kind(u16),
    /// A size class this build does not know.
    Class(u16),
    /// A length that exceeds its part's capacity.
    Length { part: &'static str, length: usize, capacity: usize },
}

impl core::fmt::Display for DecodeError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Short { have, need } => write!(f, "record of {have} bytes where {need} are needed"),
            Self::Version(version) => {
                write!(f, "record of version {version}, this build reads {RECORDS_VERSION}")
            }
            Self::Kind(kind) => write!(f, "record of unknown kind {kind}"),
            Self::Class(class) => write!(f, "record of unknown size class {class}"),
            Self::Length { part, length, capacity } => {
                write!(f, "a record's {part} claims {length} bytes of {capacity}")
            }
        }
    }
}

impl core::error::Error for DecodeError {}

pub(super) fn fixed<T: bytemuck::Pod>(bytes: &[u8]) -> Result<T, DecodeError> {
    bytes
        .get(..size_of::<T>())
        .map(bytemuck::pod_read_unaligned)
        .ok_or(DecodeError::Short { have: bytes.len(), need: size_of::<T>() })
}

pub(super) fn part<'a>(
    bytes: &'a [u8],
    name: &'static str,
    at: usize,
    capacity: usize,
    length: u16,
) -> Result<&'a [u8], DecodeError> {
    let length = usize::from(length);
    if length > capacity {
        return Err(DecodeError::Length { part: name, length, capacity });
    }
    bytes.get(at..at + length).ok_or(DecodeError::Short { have: bytes.len(), need: at + length })
}

/// What stands behind the zero bytes in front.
pub(super) fn behind_zeros(bytes: &[u8]) -> &[u8] {
    let start = bytes.iter().position(|byte| *byte != 0).unwrap_or(bytes.len());
    &bytes[start..]
}

pub(super) fn of_this_version(version: u16) -> Result<(), DecodeError> {
    if version == RECORDS_VERSION { Ok(()) } else { Err(DecodeError::Version(version)) }
}
