//! What is executed.
//!
//! The variable parts (path, working directory, arguments) stand at fixed places after the fixed part, in one of two size classes, so that
//! the kernel writes each with a single bounded copy and most execs take the small class.

#[cfg(feature = "user")]
use super::bytes::{DecodeError, behind_zeros, fixed, part};
use super::{ContextPart, DecisionPart, Header, LARGE_PATH, ProcessPart, SMALL_PATH, SessionPart};
use crate::PATH_CAPACITY;

/// What was executed, and the decision.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct ExecPart {
    /// [`crate::codes::origin`].
    pub origin: u8,
    /// [`crate::codes::argv_source`].
    pub argv_source: u8,
    /// [`crate::codes::exec_flags`].
    pub flags: u8,
    pub reserved: u8,
    /// The true number of arguments.
    pub argc: u32,
    /// Inode number and device of the executable.
    pub inode: u64,
    pub device: u32,
    /// Mode bits of the executable.
    pub file_mode: u32,
    /// Bytes used of each variable part.
    pub path_length: u16,
    pub cwd_length: u16,
    pub argv_length: u16,
    /// 0: [`SmallExec`], 1: [`LargeExec`].
    pub class: u16,
    /// Bytes used of the script's path; 0 when no script led to this executable.
    pub script_length: u16,
    /// [`crate::codes::origin`] of the script.
    pub script_origin: u8,
    /// [`crate::codes::origin`] of the interpreter.
    pub interpreter_origin: u8,
    /// Device of the script.
    pub script_device: u32,
    /// [`crate::state::Process::program`] of what called exec.
    pub caller: [u64; 2],
    /// Hash of the path of the interpreter (`PT_INTERP`), and of the name by which the file asks for it; 0 without one.
    pub interpreter: [u64; 2],
    pub interpreter_name: [u64; 2],
}
layout!(ExecPart, 88);

/// The part of an exec record that has a fixed size.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct ExecHead {
    pub header: Header,
    pub process: ProcessPart,
    pub session: SessionPart,
    pub context: ContextPart,
    pub decision: DecisionPart,
    pub exec: ExecPart,
}
layout!(ExecHead, 344);

/// An exec record of one size class.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct ExecRecord<const PATH: usize, const CWD: usize, const ARGV: usize, const SLACK: usize> {
    pub head: ExecHead,
    pub path: [u8; PATH],
    pub cwd: [u8; CWD],
    /// The script that named this executable as its interpreter. As long as a path.
    pub script: [u8; PATH],
    /// The end of the path of the program that loads this executable, right-aligned, zero in front; empty without one.
    pub interpreter: [u8; INTERPRETER],
    pub argv: [u8; ARGV],
    /// Room behind the arguments, so that a string of bounded length may be copied to any place among them.
    pub slack: [u8; SLACK],
}

/// Bytes of an interpreter's path that travel; a power of two. Of a longer one it is the end.
pub const INTERPRETER: usize = 128;

pub const SMALL_CWD: usize = 64;
pub const SMALL_ARGV: usize = if cfg!(feature = "another-records") { 512 } else { 256 };
pub const LARGE_CWD: usize = PATH_CAPACITY;
pub const LARGE_ARGV: usize = 4096;
/// Longest single argument that is read from a caller's memory, its zero byte included.
pub const LONGEST_ARGUMENT: usize = 1024;

pub type SmallExec = ExecRecord<SMALL_PATH, SMALL_CWD, SMALL_ARGV, 0>;
pub type LargeExec = ExecRecord<LARGE_PATH, LARGE_CWD, LARGE_ARGV, LONGEST_ARGUMENT>;

const _: () = assert!(size_of::<SmallExec>() == 344 + 2 * SMALL_PATH + SMALL_CWD + INTERPRETER + SMALL_ARGV);
const _: () = assert!(
    size_of::<LargeExec>() == 344 + 2 * LARGE_PATH + LARGE_CWD + INTERPRETER + LARGE_ARGV + LONGEST_ARGUMENT
);

/// An exec with its variable parts, borrowed from the ring.
#[cfg(feature = "user")]
#[derive(Clone, Copy, Debug)]
pub struct DecodedExec<'a> {
    pub head: ExecHead,
    pub path: &'a [u8],
    pub cwd: &'a [u8],
    pub script: &'a [u8],
    pub interpreter: &'a [u8],
    /// Arguments, each ended by a zero byte (the last may be cut).
    pub argv: &'a [u8],
}

#[cfg(feature = "user")]
impl<'a> DecodedExec<'a> {
    pub(super) fn decode(bytes: &'a [u8]) -> Result<Self, DecodeError> {
        let head: ExecHead = fixed(bytes)?;
        let (path, cwd, argv) = match head.exec.class {
            0 => (SMALL_PATH, SMALL_CWD, SMALL_ARGV),
            1 => (LARGE_PATH, LARGE_CWD, LARGE_ARGV),
            other => return Err(DecodeError::Class(other)),
        };
        let at = size_of::<ExecHead>();
        let interpreter = at + 2 * path + cwd;
        Ok(Self {
            head,
            path: part(bytes, "path", at, path, head.exec.path_length)?,
            cwd: part(bytes, "working directory", at + path, cwd, head.exec.cwd_length)?,
            script: part(bytes, "script", at + path + cwd, path, head.exec.script_length)?,
            interpreter: behind_zeros(part(
                bytes,
                "interpreter",
                interpreter,
                INTERPRETER,
                INTERPRETER as u16,
            )?),
            argv: part(bytes, "arguments", interpreter + INTERPRETER, argv, head.exec.argv_length)?,
        })
    }
}
