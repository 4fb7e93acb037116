//! Keys and values of the maps that agent and kernel share, and the settings frozen at load time.
//!
//! A *slot* is named by the id of the container's cgroup: the kernel gives every cgroup of a boot a different
//! one, so a slot needs no allocator and is never mistaken for another.

#![cfg_attr(feature = "user", expect(unsafe_code, reason = "plain old data for aya's maps"))]

/// Settings in frozen read-only memory: the verifier treats them as constants.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Settings {
    /// Key of the path hash, random per load.
    pub hash_key: [u64; 2],
    /// The set that these programs belong to; see [`SetMeta`].
    pub epoch: u64,
    /// 1 when the helper `bpf_task_pt_regs` exists (kernel 5.15).
    pub have_task_pt_regs: u32,
    /// Distance from a task's stack to its saved registers where that helper is missing; 0 when unknown.
    pub pt_regs_at: u32,
    /// Inode number of the host's mount namespace.
    pub host_mount_namespace: u32,
    /// 1 when the helper `bpf_loop` exists (kernel 5.17).
    pub have_loop: u32,
    /// 1 when the kernel may skip a program on a tracepoint (since 7.0).
    pub skips_tracepoints: u32,
    /// How many arguments `dequeue_signal` has: 3 or 4; 0 when that is not known.
    pub dequeue_arguments: u32,
}

/// What a set of programs and maps is, for the agent that finds it pinned; the one entry of `META`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct SetMeta {
    /// [`crate::ABI_VERSION`] of the set. First in every version.
    pub abi: u32,
    /// [`crate::codes::set_state`].
    pub state: u32,
    /// Names the set on this boot, in its records and in `ACTIVE_EPOCH`: the time it was made, nanoseconds since the Unix
    /// epoch.
    pub epoch: u64,
    /// The same moment in nanoseconds since boot: what is recorded by this set has times on one scale, whichever agent reads
    /// it and whoever sets the clock.
    pub epoch_since_boot: u64,
    /// Key of the path hash.
    pub hash_key: [u64; 2],
    /// [`LEDGER_VERSION`] of the set.
    pub ledger: u32,
    pub reserved: u32,
}

/// Version of what says how many records a set has made and what became of them: [`SetMeta`], [`Account`], [`Slot`], [`LANES`]
/// and the names of slots. An agent counts the records of a set whose [`crate::ABI_VERSION`] it cannot read, as long as this
/// is its own; so these types change only for a reason that is worth losing that.
pub const LEDGER_VERSION: u32 = 2;

/// What became of a slot's records that the kernel numbered: written by the agent, so that the next one knows what this
/// one took with it when it was killed.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Account {
    /// Records that were written to the spool, and those that gap records in it count.
    pub spooled: u64,
    /// Of them what a collector has acknowledged.
    pub delivered: u64,
    /// What a collector has acknowledged without it having been in the spool.
    pub from_memory: u64,
    /// Records that the kernel numbered, once the slot is gone; 0 before.
    pub made: u64,
}

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

/// A file of an image that may start while its container is not identified: the pause program, the agent itself. Image
/// files of one file system have different inodes, so nobody can bring his own.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct AdmittedKey {
    pub path_hash: [u64; 2],
    pub inode: u64,
}

/// What the kernel keeps about a container.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Slot {
    /// Last number given to a record of this slot, where the kernel has an atomic fetch-add.
    pub sequence: u64,
    /// Records that were numbered and could not be made, for want of room in the ring or of memory.
    pub lost: u64,
    /// Boot time of the cgroup's creation, nanoseconds.
    pub created: u64,
    /// Boot time of the workload's first exec, nanoseconds; 0 before.
    pub first_exec: u64,
    /// 1 once the cgroup is gone; the agent then removes the entry.
    pub ended: u32,
    /// Process id of the entrypoint: the first process that executed anything in the container's root. 0 before.
    pub workload_pid: u32,
    /// 1 once a process of this slot found no room in `PROCESSES`: from then on one without an entry may be anybody.
    pub entries_lost: u32,
    pub reserved: u32,
}

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

/// Which revision a slot is under. Written by the agent alone; one write switches everything.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct SlotPolicy {
    /// The slot itself. An update moves an entry to other memory, and the old one may be given to another slot while a
    /// decision looks at it; this tells.
    pub slot: u64,
    /// Key into `REVISIONS`; 0 means that no profile names the container.
    pub revision: u32,
    /// [`crate::codes::slot_flags`].
    pub flags: u32,
    /// Boot time since when the slot is under this revision, nanoseconds.
    pub since: u64,
}

/// The head of a policy image in the kernel.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Revision {
    /// [`crate::codes::mode`].
    pub mode: u32,
    /// 1 when the profile has an `exec` section; without one exec is not restricted.
    pub restricts_exec: u32,
    /// The first chunk of its automata in `GLOBS`: first the one for globs, then those for arguments.
    pub automata_base: u32,
    /// Their chunks.
    pub automata_chunks: u32,
    /// The chunks of the one for globs; 0 when the revision has none.
    pub glob_chunks: u32,
    pub reserved: u32,
    /// Words of one of its states.
    pub glob_width: u32,
    /// [`crate::codes::code_flags`].
    pub code: u32,
    /// The revision's name: its 12 hexadecimal digits as a number. The kernel does not read it.
    pub name: u64,
}

/// An exact path of a revision.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct RuleKey {
    pub path_hash: [u64; 2],
    pub revision: u32,
    /// For whom: the [`RuleValue::parent`] of the program that calls exec; 0 for what holds whoever does.
    pub parent: u32,
}

/// What an exact path allows.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct RuleValue {
    /// Mask of [`grant`]s and [`library_grant`]s: whatever the arguments are.
    pub grants: u32,
    /// Such a mask: with some arguments.
    pub with_arguments: u32,
    /// The first chunk in `GLOBS` of the automaton that reads the arguments, and the words of one of its states; 0 without one.
    pub arguments_base: u32,
    pub arguments_width: u32,
    /// Such a mask: under any condition, also where others execute it. Only in entries for anybody.
    pub any: u32,
    /// The number of this path as a parent; 0 when it is none. Only in entries for anybody.
    pub parent: u32,
}

/// The bit of a rule that allows processes of a session ([`crate::codes::session`]) to execute bytes of an origin
/// ([`crate::codes::origin`]): a byte for each session, a bit of it for each origin. No bit for what is neither.
#[inline(always)]
#[must_use]
pub const fn grant(origin: u8, session: u8) -> u32 {
    if origin > 7 || session > 2 { 0 } else { 1 << (origin as u32 | (session as u32) << 3) }
}

/// The bits that allow anybody to execute bytes of an origin.
#[inline(always)]
#[must_use]
pub const fn grant_to_any(origin: u8) -> u32 {
    if origin > 7 { 0 } else { 0x0001_0101 << origin }
}

/// The bit that allows anybody to map bytes of an origin executable, without executing them: the fourth byte.
#[inline(always)]
#[must_use]
pub const fn library_grant(origin: u8) -> u32 {
    if origin > 7 { 0 } else { 0x0100_0000 << origin }
}

/// All bits of [`grant`].
pub const EXEC_GRANTS: u32 = 0x00ff_ffff;

/// A piece of a glob automaton, which is a sequence of words:
///
/// - for each byte, the column of its class ([`GLOB_BYTES`] words);
/// - for each state, the mask of [`grant`]s for a path that ends there, low half first ([`GLOB_GRANTS`] words),
///   and the next state by class; [`GLOB_DEAD`] when nothing can match any more.
///
/// A column counts from the state's first word. A step is two loads, and a state takes as many words as its patterns have
/// different bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct GlobChunk {
    pub words: [u16; GLOB_CHUNK],
}

/// Words of a chunk.
pub const GLOB_CHUNK: usize = 32;

/// Words that map bytes to columns.
pub const GLOB_BYTES: usize = 256;

/// Words before a state's transitions.
pub const GLOB_GRANTS: usize = 2;

/// The transition that leads nowhere.
pub const GLOB_DEAD: u16 = u16::MAX;

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

/// A name in the image of a slot that leads through symbolic links.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct LinkKey {
    pub slot: u64,
    /// Hash of the name.
    pub name: [u64; 2],
}

/// Where it leads: the hash of the path of the file.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct LinkTarget {
    pub path: [u64; 2],
}

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

/// The root of a mount in a container: the inode itself, which the mount keeps alive. Its number would not do: on some
/// filesystems one superblock has a number twice.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct VolumeKey {
    pub slot: u64,
    pub inode: u64,
}

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

/// Bytes of a volume's name and of the path at which it is mounted, marks included. What does not fit has no name.
pub const VOLUME_NAME_CAPACITY: usize = if cfg!(feature = "another-abi") { 248 } else { 256 };

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

/// Number of counters that a slot has per processor, where there is no atomic fetch-add: one for each kind of program that
/// makes records.
pub const LANES: usize = 5;

/// Tasks that can judge at the same time.
pub const SCRATCH_ENTRIES: u32 = 512;

/// The slot of the agent's self-probe; no cgroup has this id.
pub const PROBE_SLOT: u64 = u64::MAX - 1;

/// Key of the host's own root in `ROOTS`; no cgroup has this id.
pub const HOST_ROOT: u64 = 0;

macro_rules! sizes {
    ($($type:ty = $size:expr),* $(,)?) => {
        $(const _: () = assert!(size_of::<$type>() == $size);)*
        /// Sizes of all shared map types, for the check of an existing map's layout.
        pub const SIZES: &[(&str, usize)] = &[$((stringify!($type), $size)),*];
    };
}

sizes! {
    Settings = 48,
    SetMeta = 48,
    Account = 32,
    AgentState = 48,
    AdmittedKey = 24,
    Slot = 48,
    SlotPolicy = 24,
    Revision = 40,
    RuleKey = 24,
    RuleValue = 24,
    GlobChunk = 64,
    Process = 88,
    OpenedInterpreter = 40 + crate::record::INTERPRETER,
    RootIdentity = 40,
    LinkKey = 24,
    LinkTarget = 16,
    LayerKey = 16,
    VolumeKey = 16,
    Volume = 24,
    VolumeName = VOLUME_NAME_CAPACITY + 8,
}

#[cfg(feature = "user")]
mod user {
    use super::{
        Account, AdmittedKey, AgentState, GlobChunk, LayerKey, LinkKey, LinkTarget, OpenedInterpreter,
        Process, Revision, RootIdentity, RuleKey, RuleValue, SetMeta, Settings, Slot, SlotPolicy, Volume,
        VolumeKey, VolumeName,
    };

    macro_rules! pod {
        ($($type:ty),*) => {
            $(
                // SAFETY: the type is bytemuck::Pod, which is the stronger promise: any bit pattern is valid and
                // there is no padding.
                unsafe impl aya::Pod for $type {}
            )*
        };
    }
    pod!(
        Account,
        AdmittedKey,
        AgentState,
        GlobChunk,
        LayerKey,
        LinkKey,
        LinkTarget,
        OpenedInterpreter,
        Process,
        Revision,
        RootIdentity,
        RuleKey,
        RuleValue,
        SetMeta,
        Settings,
        Slot,
        SlotPolicy,
        Volume,
        VolumeKey,
        VolumeName
    );
}
