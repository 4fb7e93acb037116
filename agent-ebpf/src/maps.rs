//! The maps, and the two structures that are frozen before the programs load.
//!
//! Sizes here are defaults; the agent sets them from its configuration. All hashes that hooks insert into are preallocated: an insert
//! in a hook must not depend on the allocator.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    macros::map,
    maps::{Array, HashMap, LruHashMap, RingBuf, Stack},
};
use palisade_abi::{
    codes,
    ledger::{Account, SetMeta, Slot},
    offsets::KernelOffsets,
    policy::exec::{RuleKey, RuleValue},
    policy::{GlobChunk, Revision, SlotPolicy},
    record::CGROUP_NAME,
    settings::{SCRATCH_ENTRIES, Settings},
    state::{
        AdmittedKey, AgentState, LayerKey, LinkKey, LinkTarget, OpenedInterpreter, Process, RingShare,
        RootIdentity, Volume, VolumeKey, VolumeName,
    },
};

use crate::scratch::Scratch;

/// Telemetry and verdicts, numbered per slot.
#[map]
pub static RECORDS: RingBuf = RingBuf::with_byte_size(4 << 20, 0);

/// What the agent must act on; apart from `RECORDS`, so that no flood there delays it.
#[map]
pub static CONTROL: RingBuf = RingBuf::with_byte_size(256 << 10, 0);

/// Cgroup id to slot: the container's own cgroup and those made below it.
#[map]
pub static CGROUPS: HashMap<u64, u64> = HashMap::with_max_entries(4096, 0);

#[map]
pub static SLOTS: HashMap<u64, Slot> = HashMap::with_max_entries(2048, 0);

#[map]
pub static SLOT_POLICIES: HashMap<u64, SlotPolicy> = HashMap::with_max_entries(2048, 0);

#[map]
pub static REVISIONS: HashMap<u32, Revision> = HashMap::with_max_entries(2048, 0);

#[map]
pub static RULES: HashMap<RuleKey, RuleValue> = HashMap::with_max_entries(32768, 0);

#[map]
pub static GLOBS: Array<GlobChunk> = Array::with_max_entries(16384, 0);

/// Processes of containers by tgid.
#[map]
pub static PROCESSES: HashMap<u32, Process> = HashMap::with_max_entries(32768, 0);

/// Root filesystems by slot; the host's under `HOST_ROOT`.
#[map]
pub static ROOTS: HashMap<u64, RootIdentity> = HashMap::with_max_entries(2048, 0);

/// Slots by the superblock of their root filesystem: whose container a process of no slot has entered.
#[map]
pub static ROOT_SLOTS: HashMap<u64, u64> = HashMap::with_max_entries(2048, 0);

/// Mounts of containers, by the inode that is their root.
#[map]
pub static VOLUMES: HashMap<VolumeKey, Volume> = HashMap::with_max_entries(8192, 0);

#[map]
pub static VOLUME_NAMES: Array<VolumeName> = Array::with_max_entries(1024, 0);

/// Names of the cgroups of slots, zero padded: what an agent that comes later knows a container by.
#[map]
pub static NAMES: HashMap<u64, [u8; CGROUP_NAME]> = HashMap::with_max_entries(2048, 0);

/// For the agent's own bookkeeping; no program reads it.
#[map]
pub static ACCOUNTS: HashMap<u64, Account> = HashMap::with_max_entries(2048, BPF_F_NO_PREALLOC);

/// For the agent that finds the set; no program reads it.
#[map]
pub static META: Array<SetMeta> = Array::with_max_entries(1, 0);

/// The one map that all sets share, whatever their version: which of them makes records. All of them refuse.
#[map]
pub static ACTIVE_EPOCH: Array<u64> = Array::with_max_entries(1, 0);

/// The agent's lease, settings and process id.
#[map]
pub static AGENT: Array<AgentState> = Array::with_max_entries(1, 0);

/// What may start while its container is not identified.
#[map]
pub static ADMITTED: HashMap<AdmittedKey, u32> = HashMap::with_max_entries(64, 0);

/// The agent's own maps and programs, which containers may not open: the act ([`codes::tampering`]) in the upper half, the id
/// in the lower.
#[map]
pub static PROTECTED: HashMap<u64, u32> = HashMap::with_max_entries(256, 0);

/// Children that a process of a container makes, by their `struct task_struct`, until the program that is told of forks has taken them:
/// what they are to be. Where it was skipped, they are found here.
#[map]
pub static FORKING: HashMap<u64, Process> = HashMap::with_max_entries(4096, 0);

/// Memory for tasks that judge.
#[map]
pub static SCRATCH: Array<Scratch> = Array::with_max_entries(SCRATCH_ENTRIES, 0);

/// The indexes of `SCRATCH` that no task has. The agent fills it before anything is attached.
#[map]
pub static FREE_SCRATCH: Stack<u32> = Stack::with_max_entries(SCRATCH_ENTRIES, 0);

/// Canonical paths of scripts whose interpreter is being executed, by tgid; right-aligned, each begins where its process's entry says. Those
/// of execs that failed give way to new ones.
#[map]
pub static SCRIPTS: LruHashMap<u32, [u8; palisade_abi::PATH_CAPACITY]> = LruHashMap::with_max_entries(512, 0);

/// Interpreters of execs in progress, by tgid. Those of execs that failed give way to new ones.
#[map]
pub static INTERPRETERS: LruHashMap<u32, OpenedInterpreter> = LruHashMap::with_max_entries(512, 0);

/// Names in images that lead through symbolic links: those by which programs ask for their interpreters. Only LSM programs look at them,
/// and few containers have any, so the kernel makes room for each as it comes.
#[map]
pub static LINKS: HashMap<LinkKey, LinkTarget> = HashMap::with_max_entries(8192, BPF_F_NO_PREALLOC);

/// Layers of images. The one that is longest unused gives way.
#[map]
pub static LAYERS: LruHashMap<LayerKey, u64> = LruHashMap::with_max_entries(4096, 0);

/// How much of `RECORDS` each slot has. The entry that is longest unused gives way; its slot begins anew.
#[map]
pub static RING_SHARES: LruHashMap<u64, RingShare> = LruHashMap::with_max_entries(2048, 0);

/// Counters of [`codes::error`].
#[map]
pub static ERRORS: Array<u64> = Array::with_max_entries(codes::ERROR_SITES, 0);

/// Last sequence number per lane, where there is no atomic fetch-add.
#[cfg(not(feature = "fetch-add"))]
#[map]
pub static SLOT_LANES: aya_ebpf::maps::PerCpuHashMap<u64, [u64; palisade_abi::ledger::LANES]> =
    aya_ebpf::maps::PerCpuHashMap::with_max_entries(2048, 0);

/// Overridden at load time.
#[unsafe(no_mangle)]
pub static OFFSETS: KernelOffsets = KernelOffsets::poison();

/// Overridden at load time. The initial values are as distinct as poison is.
#[unsafe(no_mangle)]
pub static SETTINGS: Settings = Settings {
    hash_key: [0x5061_6c69_7361_6465, 0x6861_7368_206b_6579],
    epoch: 0x7b00_0001_7b00_0002,
    have_task_pt_regs: 0x7b00_0003,
    pt_regs_at: 0x7b00_0004,
    host_mount_namespace: 0x7b00_0005,
    have_loop: 0x7b00_0006,
    skips_tracepoints: 0x7b00_0009,
    dequeue_arguments: 0x7b00_000a,
};

/// Reads one offset.
macro_rules! offset {
    ($name:ident) => {
        $crate::maps::frozen(&$crate::maps::OFFSETS.$name)
    };
}
pub(crate) use offset;

/// Reads one setting.
macro_rules! setting {
    ($name:ident) => {
        $crate::maps::frozen(&$crate::maps::SETTINGS.$name)
    };
}
pub(crate) use setting;

/// Which bug is planted at the moment; 0 for none.
#[cfg(feature = "planted")]
#[map]
pub static BUG: Array<u32> = Array::with_max_entries(1, 0);

/// The bug that is planted at the moment ([`codes::bug`]); in a build that is shipped there is none.
#[inline(always)]
pub fn planted_bug() -> u32 {
    #[cfg(feature = "planted")]
    return BUG.get(0).copied().unwrap_or(0);
    #[cfg(not(feature = "planted"))]
    0
}

/// Whether a bug is planted.
macro_rules! planted {
    ($bug:ident) => {
        cfg!(feature = "planted") && $crate::maps::planted_bug() == palisade_abi::codes::bug::$bug
    };
}
pub(crate) use planted;

/// Reads a constant that is overridden at load time. Volatile, so that the compiler does not use the initial value.
#[inline(always)]
pub fn frozen<T: Copy>(constant: &'static T) -> T {
    // SAFETY: a reference is valid and aligned.
    unsafe { core::ptr::read_volatile(constant) }
}
