//! Records as they lie in the ring.
//!
//! Every record starts with a [`Header`]. The variable parts of an exec (path, working directory, arguments)
//! stand at fixed places after the fixed part, in one of two size classes, so that the kernel writes each with a
//! single bounded copy and most execs take the small class.

use crate::PATH_CAPACITY;

/// The head of every record: its kind and its identity.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Header {
    /// [`crate::codes::kind`].
    pub kind: u16,
    /// [`crate::ABI_VERSION`].
    pub abi: u16,
    /// Bytes of the whole record, this header included.
    pub size: u32,
    /// The container's slot.
    pub slot: u64,
    /// Number within slot and lane, from 1, without holes.
    pub sequence: u64,
    /// 0 where one counter serves the slot; else `cpu << 4 | program context`, plus 1.
    pub lane: u32,
    pub cpu: u32,
    /// Nanoseconds since boot, suspend included (`CLOCK_BOOTTIME`).
    pub time: u64,
}

/// Who: the process that a record is about.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct ProcessPart {
    /// Process id as the host sees it (the kernel's tgid).
    pub pid: u32,
    /// Thread id as the host sees it.
    pub tid: u32,
    /// Process id in the innermost pid namespace.
    pub namespace_pid: u32,
    pub parent_pid: u32,
    /// Boot time of the start, nanoseconds; with `pid` it names the process.
    pub start_time: u64,
    pub parent_start_time: u64,
    /// Real, saved, effective and filesystem user and group, in the kernel's order.
    pub uid: u32,
    pub gid: u32,
    pub suid: u32,
    pub sgid: u32,
    pub euid: u32,
    pub egid: u32,
    pub fsuid: u32,
    pub fsgid: u32,
    pub comm: [u8; 16],
    /// The parent's, which may be gone when the record is read.
    pub parent_comm: [u8; 16],
}

/// How the process came into its container.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct SessionPart {
    /// The session's root, by start (boot time, nanoseconds) and process id; 0 when unknown.
    pub start: u64,
    pub pid: u32,
    /// [`crate::codes::session`].
    pub kind: u8,
    pub reserved: [u8; 3],
}

/// The rest of the context, which only an exec carries.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct ContextPart {
    /// The cgroup of the process at the time, which need not be the slot's.
    pub cgroup: u64,
    pub capabilities_inheritable: u64,
    pub capabilities_permitted: u64,
    pub capabilities_effective: u64,
    pub capabilities_bounding: u64,
    pub capabilities_ambient: u64,
    /// Inode numbers of the namespaces.
    pub mount_namespace: u32,
    pub pid_namespace: u32,
    pub network_namespace: u32,
    pub uts_namespace: u32,
    pub ipc_namespace: u32,
    pub cgroup_namespace: u32,
    pub user_namespace: u32,
    pub reserved: u32,
    /// Name of the controlling terminal, zero padded; empty without one.
    pub tty: [u8; 16],
}

/// What was executed, and the decision.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct ExecPart {
    /// Codes of [`crate::codes`].
    pub verdict: u8,
    pub action: u8,
    pub reason: u8,
    pub origin: u8,
    pub mode: u8,
    pub argv_source: u8,
    /// [`crate::codes::exec_flags`].
    pub flags: u8,
    pub reserved: u8,
    /// The revision that decided; 0 when none was consulted.
    pub revision: u32,
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
    /// [`crate::maps::Process::program`] of what called exec.
    pub caller: [u64; 2],
    /// Hash of the path of the interpreter (`PT_INTERP`), and of the name by which the file asks for it; 0 without one.
    pub interpreter: [u64; 2],
    pub interpreter_name: [u64; 2],
    pub reserved_too: [u8; 8],
}

/// A process came to be.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct ForkRecord {
    pub header: Header,
    pub process: ProcessPart,
    pub session: SessionPart,
}

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

/// A process of a container tried something on the agent.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct TamperRecord {
    pub header: Header,
    pub process: ProcessPart,
    pub session: SessionPart,
    /// [`crate::codes::tampering`].
    pub act: u8,
    /// [`crate::codes::verdict`].
    pub verdict: u8,
    pub reserved: [u8; 2],
    /// The agent's process id, or the id of the map or program; 0 for pins.
    pub target: u32,
    /// As [`crate::codes::tampering`] says.
    pub detail: u32,
    pub reserved_too: u32,
}

/// Code came into a process by other means than an exec, or was refused to.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct CodePart {
    /// Codes of [`crate::codes`].
    pub verdict: u8,
    pub action: u8,
    pub reason: u8,
    pub origin: u8,
    pub mode: u8,
    /// [`crate::codes::code_act`].
    pub act: u8,
    /// [`crate::codes::exec_flags::PATH_TRUNCATED`] and [`crate::codes::code_record_flags`].
    pub flags: u8,
    pub reserved: u8,
    /// The revision that decided; 0 when none was consulted.
    pub revision: u32,
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

/// The part of a code record that has a fixed size.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct CodeHead {
    pub header: Header,
    pub process: ProcessPart,
    pub session: SessionPart,
    pub code: CodePart,
}

/// A code record of one size class.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct CodeRecord<const PATH: usize> {
    pub head: CodeHead,
    pub path: [u8; PATH],
}

/// The part of an exec record that has a fixed size.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct ExecHead {
    pub header: Header,
    pub process: ProcessPart,
    pub session: SessionPart,
    pub context: ContextPart,
    pub exec: ExecPart,
}

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

/// Bytes for each variable part in the small class; powers of two.
pub const SMALL_PATH: usize = 128;
pub const SMALL_CWD: usize = 64;
pub const SMALL_ARGV: usize = 256;
/// Bytes for each variable part in the large class; powers of two.
pub const LARGE_PATH: usize = PATH_CAPACITY;
pub const LARGE_CWD: usize = PATH_CAPACITY;
pub const LARGE_ARGV: usize = 4096;
/// Longest single argument that is read from a caller's memory, its zero byte included.
pub const LONGEST_ARGUMENT: usize = 1024;

pub type SmallCode = CodeRecord<SMALL_PATH>;
pub type LargeCode = CodeRecord<LARGE_PATH>;

pub type SmallExec = ExecRecord<SMALL_PATH, SMALL_CWD, SMALL_ARGV, 0>;
pub type LargeExec = ExecRecord<LARGE_PATH, LARGE_CWD, LARGE_ARGV, LONGEST_ARGUMENT>;

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
    pub abi: u16,
    /// Bytes used of `name`.
    pub name_length: u32,
    pub slot: u64,
    pub time: u64,
    pub name: [u8; CGROUP_NAME],
    /// The cgroup's path within its hierarchy, zero padded; empty when it is longer.
    pub path: [u8; CGROUP_PATH],
}

const _: () = assert!(size_of::<Header>() == 40);
const _: () = assert!(size_of::<ProcessPart>() == 96);
const _: () = assert!(size_of::<ContextPart>() == 96);
const _: () = assert!(size_of::<ExecPart>() == 104);
const _: () = assert!(size_of::<SessionPart>() == 16);
const _: () = assert!(size_of::<ForkRecord>() == 152);
const _: () = assert!(size_of::<ExitRecord>() == 160);
const _: () = assert!(size_of::<TamperRecord>() == 168);
const _: () = assert!(size_of::<CodePart>() == 40);
const _: () = assert!(size_of::<SmallCode>() == 192 + SMALL_PATH);
const _: () = assert!(size_of::<LargeCode>() == 192 + LARGE_PATH);
const _: () = assert!(size_of::<ExecHead>() == 352);
const _: () = assert!(size_of::<SmallExec>() == 352 + 2 * SMALL_PATH + SMALL_CWD + INTERPRETER + SMALL_ARGV);
const _: () = assert!(
    size_of::<LargeExec>() == 352 + 2 * LARGE_PATH + LARGE_CWD + INTERPRETER + LARGE_ARGV + LONGEST_ARGUMENT
);
const _: () = assert!(size_of::<ControlRecord>() == 24 + CGROUP_NAME + CGROUP_PATH);

#[cfg(feature = "user")]
pub use decode::{DecodeError, Decoded, DecodedCode, DecodedExec, decode, decode_control};

#[cfg(feature = "user")]
mod decode {
    use super::*;
    use crate::{ABI_VERSION, codes::kind};

    /// A record whose lengths have all been checked against its bytes.
    #[expect(
        clippy::large_enum_variant,
        reason = "it lives on the stack for a moment; a box would be one more allocation a record"
    )]
    #[derive(Clone, Copy, Debug)]
    pub enum Decoded<'a> {
        Fork(ForkRecord),
        Exec(DecodedExec<'a>),
        Exit(ExitRecord),
        Tamper(TamperRecord),
        Code(DecodedCode<'a>),
    }

    /// A code record with its path, borrowed from the ring.
    #[derive(Clone, Copy, Debug)]
    pub struct DecodedCode<'a> {
        pub head: CodeHead,
        pub path: &'a [u8],
    }

    /// An exec with its variable parts, borrowed from the ring.
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

    /// Why bytes are not a record.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum DecodeError {
        /// Fewer bytes than the kind needs.
        Short { have: usize, need: usize },
        /// Written by programs of another ABI.
        Abi(u16),
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
                Self::Abi(abi) => write!(f, "record of ABI {abi}, this build reads {ABI_VERSION}"),
                Self::Kind(kind) => write!(f, "record of unknown kind {kind}"),
                Self::Class(class) => write!(f, "record of unknown size class {class}"),
                Self::Length { part, length, capacity } => {
                    write!(f, "a record's {part} claims {length} bytes of {capacity}")
                }
            }
        }
    }

    impl core::error::Error for DecodeError {}

    fn head<T: bytemuck::Pod>(bytes: &[u8]) -> Result<T, DecodeError> {
        bytes
            .get(..size_of::<T>())
            .map(bytemuck::pod_read_unaligned)
            .ok_or(DecodeError::Short { have: bytes.len(), need: size_of::<T>() })
    }

    fn part<'a>(
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
    fn behind_zeros(bytes: &[u8]) -> &[u8] {
        let start = bytes.iter().position(|byte| *byte != 0).unwrap_or(bytes.len());
        &bytes[start..]
    }

    /// Reads one record out of the ring's bytes.
    ///
    /// # Errors
    ///
    /// When the bytes are not a whole record of this ABI; see [`DecodeError`].
    pub fn decode(bytes: &[u8]) -> Result<Decoded<'_>, DecodeError> {
        let header: Header = head(bytes)?;
        if u32::from(header.abi) != ABI_VERSION {
            return Err(DecodeError::Abi(header.abi));
        }
        match header.kind {
            kind::FORK => head(bytes).map(Decoded::Fork),
            kind::EXIT => head(bytes).map(Decoded::Exit),
            kind::TAMPER => head(bytes).map(Decoded::Tamper),
            kind::EXEC => {
                let fixed: ExecHead = head(bytes)?;
                let (path, cwd, argv) = match fixed.exec.class {
                    0 => (SMALL_PATH, SMALL_CWD, SMALL_ARGV),
                    1 => (LARGE_PATH, LARGE_CWD, LARGE_ARGV),
                    other => return Err(DecodeError::Class(other)),
                };
                let at = size_of::<ExecHead>();
                Ok(Decoded::Exec(DecodedExec {
                    head: fixed,
                    path: part(bytes, "path", at, path, fixed.exec.path_length)?,
                    cwd: part(bytes, "working directory", at + path, cwd, fixed.exec.cwd_length)?,
                    script: part(bytes, "script", at + path + cwd, path, fixed.exec.script_length)?,
                    interpreter: behind_zeros(part(
                        bytes,
                        "interpreter",
                        at + 2 * path + cwd,
                        INTERPRETER,
                        INTERPRETER as u16,
                    )?),
                    argv: part(
                        bytes,
                        "arguments",
                        at + 2 * path + cwd + INTERPRETER,
                        argv,
                        fixed.exec.argv_length,
                    )?,
                }))
            }
            kind::CODE => {
                let fixed: CodeHead = head(bytes)?;
                let capacity = match fixed.code.class {
                    0 => SMALL_PATH,
                    1 => LARGE_PATH,
                    other => return Err(DecodeError::Class(other)),
                };
                let path = part(bytes, "path", size_of::<CodeHead>(), capacity, fixed.code.path_length)?;
                Ok(Decoded::Code(DecodedCode { head: fixed, path }))
            }
            other => Err(DecodeError::Kind(other)),
        }
    }

    /// Reads one control record.
    ///
    /// # Errors
    ///
    /// As [`decode`].
    pub fn decode_control(bytes: &[u8]) -> Result<(ControlRecord, &[u8]), DecodeError> {
        let record: ControlRecord = head(bytes)?;
        if u32::from(record.abi) != ABI_VERSION {
            return Err(DecodeError::Abi(record.abi));
        }
        let length = u16::try_from(record.name_length).unwrap_or(u16::MAX);
        let at = core::mem::offset_of!(ControlRecord, name);
        Ok((record, part(bytes, "name", at, CGROUP_NAME, length)?))
    }
}

#[cfg(all(test, feature = "user"))]
mod tests {
    use super::*;
    use crate::{ABI_VERSION, codes};

    /// A fork record written out by hand, so that a change of layout is seen even when writer and reader change
    /// together.
    #[test]
    fn the_bytes_of_a_fork_are_golden() {
        let mut bytes = Vec::new();
        bytes.extend(1_u16.to_le_bytes()); // kind
        bytes.extend(11_u16.to_le_bytes()); // abi
        bytes.extend(152_u32.to_le_bytes()); // size
        bytes.extend(0x1122_u64.to_le_bytes()); // slot
        bytes.extend(7_u64.to_le_bytes()); // sequence
        bytes.extend(0_u32.to_le_bytes()); // lane
        bytes.extend(1_u32.to_le_bytes()); // cpu
        bytes.extend(99_u64.to_le_bytes()); // time
        for word in [10_u32, 11, 3, 9] {
            bytes.extend(word.to_le_bytes()); // pid, tid, namespace pid, parent
        }
        bytes.extend(50_u64.to_le_bytes());
        bytes.extend(40_u64.to_le_bytes());
        for id in 100_u32..108 {
            bytes.extend(id.to_le_bytes());
        }
        bytes.extend(*b"sh\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
        bytes.extend(*b"runc\0\0\0\0\0\0\0\0\0\0\0\0");
        bytes.extend(30_u64.to_le_bytes()); // session: start, pid, kind
        bytes.extend(9_u32.to_le_bytes());
        bytes.extend([2, 0, 0, 0]);
        let Ok(Decoded::Fork(fork)) = decode(&bytes) else { panic!("{:?}", decode(&bytes)) };
        assert_eq!((fork.header.slot, fork.header.sequence, fork.header.time), (0x1122, 7, 99));
        assert_eq!((fork.process.pid, fork.process.tid, fork.process.parent_pid), (10, 11, 9));
        assert_eq!(&fork.process.parent_comm[..5], b"runc\0");
        assert_eq!((fork.process.uid, fork.process.euid, fork.process.fsgid), (100, 104, 107));
        assert_eq!(
            (fork.session.start, fork.session.pid, fork.session.kind),
            (30, 9, codes::session::ENTERED)
        );
        assert_eq!(ABI_VERSION, 11, "a new ABI version needs new golden bytes");
    }

    #[test]
    fn lengths_beyond_the_capacity_are_refused() {
        let mut bytes = vec![0_u8; size_of::<SmallExec>()];
        bytes[0] = codes::kind::EXEC as u8;
        bytes[2] = ABI_VERSION as u8;
        let path_length =
            core::mem::offset_of!(ExecHead, exec) + core::mem::offset_of!(ExecPart, path_length);
        bytes[path_length] = SMALL_PATH as u8 + 1;
        assert_eq!(
            decode(&bytes).err(),
            Some(DecodeError::Length { part: "path", length: SMALL_PATH + 1, capacity: SMALL_PATH })
        );
    }

    #[test]
    fn every_cut_of_a_record_is_an_error_and_never_a_panic() {
        let mut bytes = vec![0_u8; size_of::<SmallExec>()];
        bytes[0] = codes::kind::EXEC as u8;
        bytes[2] = ABI_VERSION as u8;
        for length in 0..size_of::<ExecHead>() {
            assert!(decode(&bytes[..length]).is_err(), "{length}");
        }
        assert!(decode(&bytes).is_ok());
    }
}
