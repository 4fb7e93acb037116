//! What says how many records a set has made, and what became of them.
//!
//! It changes only for a reason that is worth losing the count of a set of another version: [`crate::LEDGER_VERSION`].

use crate::Versions;

/// What a set of programs and maps is, for the agent that finds it pinned; the one entry of `META`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct SetMeta {
    /// First in every version.
    pub versions: Versions,
    /// Names the set on this boot, in its records and in `ACTIVE_EPOCH`: the time it was made, nanoseconds since the Unix
    /// epoch.
    pub epoch: u64,
    /// The same moment in nanoseconds since boot: what is recorded by this set has times on one scale, whichever agent reads
    /// it and whoever sets the clock.
    pub epoch_since_boot: u64,
    /// Key of the path hash.
    pub hash_key: [u64; 2],
    /// [`crate::codes::set_state`].
    pub state: u32,
    pub reserved: u32,
}
layout!(SetMeta, 48);

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
layout!(Account, 32);

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
layout!(Slot, 48);

/// Number of counters that a slot has per processor, where there is no atomic fetch-add: one for each kind of program that
/// makes records, and some for kinds to come. A lane's number has room for 16, but each takes 8 bytes of every slot and processor.
pub const LANES: usize = 8;
