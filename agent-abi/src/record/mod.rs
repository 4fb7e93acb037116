//! Records as they lie in the ring. A change raises [`crate::RECORDS_VERSION`].
//!
//! Every record starts with a [`Header`], and says who acted ([`ProcessPart`], [`SessionPart`]). A family of events has a file.

use crate::PATH_CAPACITY;

#[cfg(feature = "user")]
mod bytes;
pub mod code;
pub mod control;
#[cfg(feature = "user")]
mod decode;
pub mod exec;
pub mod process;
mod tamper;

pub use code::{CodeHead, CodePart, CodeRecord};
pub use control::{CGROUP_NAME, CGROUP_PATH, ControlRecord};
pub use exec::{
    ExecHead, ExecPart, ExecRecord, INTERPRETER, LARGE_ARGV, LARGE_CWD, LONGEST_ARGUMENT, LargeExec,
    SMALL_ARGV, SMALL_CWD, SmallExec,
};
pub use process::{ExitRecord, ForkRecord};
pub use tamper::TamperRecord;
#[cfg(feature = "user")]
pub use {
    bytes::DecodeError,
    code::DecodedCode,
    control::decode_control,
    decode::{Decoded, decode},
    exec::DecodedExec,
};

/// The head of every record: its kind and its identity.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Header {
    /// [`crate::codes::kind`].
    pub kind: u16,
    /// [`crate::RECORDS_VERSION`].
    pub version: u16,
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
layout!(Header, 40);

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
layout!(ProcessPart, 96);

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
layout!(SessionPart, 16);

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
layout!(ContextPart, 96);

/// What was decided, and what that rests on.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct DecisionPart {
    /// [`crate::codes::verdict`].
    pub verdict: u8,
    /// [`crate::codes::action`].
    pub action: u8,
    /// [`crate::codes::reason`]; 0 where the event has no rules.
    pub reason: u8,
    /// [`crate::codes::mode`]; 0 when no revision was consulted.
    pub mode: u8,
    /// The revision that decided; 0 when none was consulted.
    pub revision: u32,
}
layout!(DecisionPart, 8);

/// Bytes for a path in the small class, and in the large one; powers of two.
pub const SMALL_PATH: usize = 128;
pub const LARGE_PATH: usize = PATH_CAPACITY;

#[cfg(all(test, feature = "user"))]
mod tests {
    use super::*;
    use crate::{RECORDS_VERSION, codes};

    /// A fork record written out by hand, so that a change of layout is seen even when writer and reader change
    /// together.
    #[test]
    fn the_bytes_of_a_fork_are_golden() {
        let mut bytes = Vec::new();
        bytes.extend(0x0101_u16.to_le_bytes()); // kind
        bytes.extend(12_u16.to_le_bytes()); // version
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
        assert_eq!(RECORDS_VERSION, 12, "a new version needs new golden bytes");
    }

    #[test]
    fn lengths_beyond_the_capacity_are_refused() {
        let mut bytes = vec![0_u8; size_of::<SmallExec>()];
        bytes[..2].copy_from_slice(&codes::kind::EXEC.to_le_bytes());
        bytes[2..4].copy_from_slice(&RECORDS_VERSION.to_le_bytes());
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
        bytes[..2].copy_from_slice(&codes::kind::EXEC.to_le_bytes());
        bytes[2..4].copy_from_slice(&RECORDS_VERSION.to_le_bytes());
        for length in 0..size_of::<ExecHead>() {
            assert!(decode(&bytes[..length]).is_err(), "{length}");
        }
        assert!(decode(&bytes).is_ok());
    }
}
