//! Code that comes into a process by other means than an exec.

#[cfg(feature = "user")]
use super::bytes::{DecodeError, fixed, part};
use super::{DecisionPart, Header, LARGE_PATH, ProcessPart, SMALL_PATH, SessionPart};

/// Code came into a process by other means than an exec, or was refused to.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct CodePart {
    /// [`crate::codes::origin`].
    pub origin: u8,
    /// [`crate::codes::code_act`].
    pub act: u8,
    /// [`crate::codes::exec_flags::PATH_TRUNCATED`] and [`crate::codes::code_record_flags`].
    pub flags: u8,
    pub reserved: u8,
    /// The protection that the memory would have (`PROT_*` of `mmap(2)`); 0 where the act is on no memory of its own.
    pub protection: u32,
    /// Inode number and device of the file; 0 without one.
    pub inode: u64,
    pub device: u32,
    /// The process that is traced, or that is to be the tracer; 0 for other acts.
    pub target: u32,
    /// Bytes used of the path; 0 for what is in no file.
    pub path_length: u16,
    /// 0: [`SmallCode`], 1: [`LargeCode`].
    pub class: u16,
    pub reserved_too: u32,
}
layout!(CodePart, 32);

/// The part of a code record that has a fixed size.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct CodeHead {
    pub header: Header,
    pub process: ProcessPart,
    pub session: SessionPart,
    pub decision: DecisionPart,
    pub code: CodePart,
}
layout!(CodeHead, 192);

/// A code record of one size class.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct CodeRecord<const PATH: usize> {
    pub head: CodeHead,
    pub path: [u8; PATH],
}

pub type SmallCode = CodeRecord<SMALL_PATH>;
pub type LargeCode = CodeRecord<LARGE_PATH>;

const _: () = assert!(size_of::<SmallCode>() == 192 + SMALL_PATH);
const _: () = assert!(size_of::<LargeCode>() == 192 + LARGE_PATH);

/// A code record with its path, borrowed from the ring.
#[cfg(feature = "user")]
#[derive(Clone, Copy, Debug)]
pub struct DecodedCode<'a> {
    pub head: CodeHead,
    pub path: &'a [u8],
}

#[cfg(feature = "user")]
impl<'a> DecodedCode<'a> {
    pub(super) fn decode(bytes: &'a [u8]) -> Result<Self, DecodeError> {
        let head: CodeHead = fixed(bytes)?;
        let capacity = match head.code.class {
            0 => SMALL_PATH,
            1 => LARGE_PATH,
            other => return Err(DecodeError::Class(other)),
        };
        Ok(Self { head, path: part(bytes, "path", size_of::<CodeHead>(), capacity, head.code.path_length)? })
    }
}
