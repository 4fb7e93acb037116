//! What the kernel knows of containers and their processes: what an upgrade copies. A change raises [`crate::STATE_VERSION`].

/// What the kernel knows of the agent; the one entry of `AGENT`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct AgentState {
    /// Boot time until which the agent counts as present, nanoseconds. It renews this as long as it works.
    pub lease_until: u64,
    /// [`crate::codes::mode`] for containers that are not identified yet.
    pub unidentified: u32,
    /// [`crate::codes::mode`], `AUDIT` or `ENFORCE`, for those that start while the agent does not renew its lease.
    pub when_agent_absent: u32,
    /// The agent's process id.
    pub pid: u32,
    /// 1 while the agent claims nothing, since its self-probe failed. The kernel does not read it.
    pub failing: u32,
    /// [`crate::codes::mode`], `AUDIT` or `ENFORCE`: what is done about containers that tamper with the agent.
    pub self_protection: u32,
    /// 1 since its process ended; written by the kernel.
    pub gone: u32,
    /// The folder of all pins: device number in the kernel's encoding, and inode; 0 when nothing is to be protected there.
    pub pins_device: u32,
    /// The process id of the agent's parent: in a container, the runtime's process that the container hangs on.
    pub parent: u32,
    pub pins_inode: u64,
}
layout!(AgentState, 48);

/// A file of an image that may start while its container is not identified: the pause program, the agent itself. Image
/// files of one file system have different inodes, so nobody can bring his own.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct AdmittedKey {
    pub path_hash: [u64; 2],
    pub inode: u64,
}
layout!(AdmittedKey, 24);

/// How much of the ring a slot has. What was made before `mark` may still be there as long as the reader has not come to it; what was
/// made before the mark before that is not, and nothing is once the reader has come to `last`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct RingShare {
    /// The end of the slot's last record: a place in the ring, in bytes ever written to it.
    pub last: u64,
    /// Another such place.
    pub mark: u64,
    /// Bytes made between the mark before and this one.
    pub before: u64,
    /// Bytes made since this one.
    pub since: u64,
}
layout!(RingShare, 32);

/// What the kernel knows about a process that belongs to a slot.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Process {
    pub slot: u64,
    /// The hash of the path of what it executes, as long as that is an unmodified file of the image; 0 else.
    pub program: [u64; 2],
    /// The same of what executed that, from the exec's point of no return until it is judged again.
    pub caller: [u64; 2],
    /// The root of its session, by start (boot time, nanoseconds) and process id; 0 when unknown.
    pub session_start: u64,
    pub session_pid: u32,
    /// [`crate::codes::session`].
    pub session_kind: u8,
    /// The one-way latch: 1 while the runtime prepares the process, cleared for ever at its first exec in the
    /// container's root filesystem.
    pub entering: u8,
    /// Worst verdict of the binary format passes of the exec in progress; 0 when none.
    pub pending_verdict: u8,
    /// The reason that belongs to it.
    pub pending_reason: u8,
    /// Passes of the binary format loop of the exec in progress.
    pub passes: u8,
    /// [`crate::codes::origin`] of the script in `SCRIPTS`.
    pub script_origin: u8,
    /// Where the script's path starts in `SCRIPTS`; the path's capacity when there is none.
    pub script_start: u16,
    /// 1 while it is stopped because its container is not identified.
    pub held: u8,
    /// 1 when something that is not the image's was mapped executable for the exec in progress, whose container is not
    /// identified.
    pub foreign_interpreter: u8,
    /// 1 once code of its own making was recorded of the program that it executes, where that is only audited: one
    /// record says it for all.
    pub jit_noted: u8,
    /// 1 when the program of the exec in progress will have rights that its caller has not.
    pub elevates: u8,
    /// Device of the script in `SCRIPTS`.
    pub script_device: u32,
    /// 1 between an exec's point of no return and its second judgement, where there is a hook at the former.
    pub committed: u8,
    /// 1 from a pass on an ELF file until the kernel opens the interpreter that it names, if it names one.
    pub expects_interpreter: u8,
    /// 1 when the exec in progress has one, which is then in `INTERPRETERS`.
    pub has_interpreter: u8,
    pub reserved_too: u8,
    /// The `struct linux_binprm` of the exec in progress, for the steps that are not given it.
    pub bprm: u64,
    /// The `struct task_struct` of its thread group's leader; 0 when it came in otherwise than by a fork and has executed nothing yet.
    pub leader: u64,
}
layout!(Process, 88);

/// The interpreter of the exec in progress of a process.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct OpenedInterpreter {
    /// Hash of its path, and of the name by which the file asks for it; 0 for one that is too long to be compared.
    pub path: [u64; 2],
    pub name: [u64; 2],
    /// [`crate::codes::origin`].
    pub origin: u64,
    /// The end of its path, right-aligned, zero in front.
    pub shown: [u8; crate::record::INTERPRETER],
}
layout!(OpenedInterpreter, 40 + crate::record::INTERPRETER);

impl Process {
    /// A process of `slot` that executes nothing at the moment.
    #[inline(always)]
    #[must_use]
    pub const fn new(slot: u64, entering: u8) -> Self {
        Self {
            slot,
            program: [0; 2],
            caller: [0; 2],
            session_start: 0,
            session_pid: 0,
            session_kind: crate::codes::session::UNKNOWN,
            entering,
            pending_verdict: 0,
            pending_reason: 0,
            passes: 0,
            script_origin: 0,
            script_start: crate::PATH_CAPACITY as u16,
            held: 0,
            foreign_interpreter: 0,
            jit_noted: 0,
            elevates: 0,
            script_device: 0,
            committed: 0,
            expects_interpreter: 0,
            has_interpreter: 0,
            reserved_too: 0,
            bprm: 0,
            leader: 0,
        }
    }
}

/// Identity of a root filesystem: the superblock itself, since device numbers are reused at once.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct RootIdentity {
    pub superblock: u64,
    /// The dentry that is `/`.
    pub dentry: u64,
    /// The user namespace that owns the superblock.
    pub user_namespace: u64,
    pub magic: u64,
    /// Device number in the kernel's encoding (`major << 20 | minor`).
    pub device: u32,
    pub reserved: u32,
}
layout!(RootIdentity, 40);

/// A name in the image of a slot that leads through symbolic links.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct LinkKey {
    pub slot: u64,
    /// Hash of the name.
    pub name: [u64; 2],
}
layout!(LinkKey, 24);

/// Where it leads: the hash of the path of the file.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct LinkTarget {
    pub path: [u64; 2],
}
layout!(LinkTarget, 16);

/// The root folder of a layer of images. Its value in `LAYERS` is when it was seen first, in seconds since the Unix epoch by the clock
/// of file systems: what was changed later there is not the image's any more. An inode of 0 stands for any layer on the device.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct LayerKey {
    /// Of the host's file system on which it is.
    pub device: u32,
    /// Inode numbers are used again.
    pub generation: u32,
    pub inode: u64,
}
layout!(LayerKey, 16);

/// The root of a mount in a container: the inode itself, which the mount keeps alive. Its number would not do: on some
/// filesystems one superblock has a number twice.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct VolumeKey {
    pub slot: u64,
    pub inode: u64,
}
layout!(VolumeKey, 16);

/// A mount in a container.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Volume {
    /// Superblock and inode number, should a container have unmounted it and the inode be another's.
    pub superblock: u64,
    pub inode_number: u64,
    /// Index into `VOLUME_NAMES`.
    pub name: u32,
    /// [`crate::codes::volume_flags`].
    pub flags: u32,
}
layout!(Volume, 24);

/// Bytes of a volume's name and of the path at which it is mounted, marks included. What does not fit has no name.
pub const VOLUME_NAME_CAPACITY: usize = if cfg!(feature = "another-state") { 248 } else { 256 };

/// What stands before the path within a volume: right-aligned, zero in front; see [`crate::volume`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct VolumeName {
    pub text: [u8; VOLUME_NAME_CAPACITY],
    /// Bytes used of the text.
    pub length: u32,
    /// Bytes of them that are the name with its marks; the mount point follows.
    pub mark: u32,
}
layout!(VolumeName, VOLUME_NAME_CAPACITY + 8);

/// The slot of the agent's self-probe; no cgroup has this id.
pub const PROBE_SLOT: u64 = u64::MAX - 1;

/// Key of the host's own root in `ROOTS`; no cgroup has this id.
pub const HOST_ROOT: u64 = 0;
