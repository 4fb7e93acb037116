//! Slots: the container that a cgroup belongs to, or a task by its cgroup. A cgroup made below a container's belongs to the same slot.

use palisade_abi::codes::{error, slot_flags};

use crate::{
    context, count,
    kernel::KernelPtr,
    maps::{CGROUPS, PROCESSES, SLOT_POLICIES, SLOTS, offset},
};

/// Deepest nesting of cgroups that is followed.
const CGROUP_DEPTH: u32 = 64;

/// The slot of cgroups nested deeper than that. Every exec in it is refused.
pub const TOO_DEEP: u64 = u64::MAX;

/// The slot that the cgroup at `cgroup` belongs to: that of the nearest container above it. 0 when there is none.
///
/// Nested cgroups are not stored: a container can make as many as it likes, and must not fill a map with them.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_slot_of_cgroup(cgroup: u64) -> u64 {
    let mut current = KernelPtr(cgroup);
    let mut depth = 0;
    while depth < CGROUP_DEPTH {
        let Some(cgroup_id) = id_of(current) else {
            count::error(error::CGROUP_READ);
            return 0;
        };
        if let Some(slot) = slot_of_cgroup(cgroup_id) {
            return slot;
        }
        let Some(css) = current.follow(offset!(cgroup_parent_css)) else { return 0 };
        let Some(parent) = css.follow(offset!(css_cgroup)) else { return 0 };
        current = parent;
        depth += 1;
    }
    count::error(error::CGROUP_DEEP);
    TOO_DEEP
}

/// The slot of the cgroup with id `cgroup`, if it is a container's.
#[inline(always)]
fn slot_of_cgroup(cgroup: u64) -> Option<u64> {
    // SAFETY: one word, written once when the cgroup is made.
    unsafe { CGROUPS.get(cgroup) }.copied()
}

#[inline(always)]
/// The id of a cgroup.
pub fn id_of(cgroup: KernelPtr) -> Option<u64> {
    cgroup.follow(offset!(cgroup_kn))?.read(offset!(kernfs_id))
}

/// The slot of the current task's cgroup.
#[inline(always)]
pub fn current_slot() -> Option<u64> {
    slot_of_task(KernelPtr::current_task())
}

/// The slot of the cgroup that `task` is in.
#[inline(always)]
pub fn slot_of_task(task: KernelPtr) -> Option<u64> {
    let cgroup = task.follow(offset!(task_cgroups))?.follow(offset!(css_set_default_cgroup))?;
    match palisade_slot_of_cgroup(cgroup.0) {
        0 => None,
        slot => Some(slot),
    }
}

/// Whether every process of `slot` has an entry: it was told of all that began there, and none ever found no room.
#[inline(always)]
pub fn knows_all_members(slot: u64) -> bool {
    // SAFETY: only fields are read.
    let Some((lost, made_by_kernel)) =
        unsafe { SLOTS.get(slot) }.map(|slot| (slot.entries_lost, slot.created != 0))
    else {
        return false;
    };
    // SAFETY: only a field is read.
    let known = made_by_kernel
        || unsafe { SLOT_POLICIES.get(slot) }
            .is_some_and(|policy| policy.flags & slot_flags::MEMBERS_KNOWN != 0);
    lost == 0 && known
}

/// Whether the current process, which is in the cgroup of `slot` and has no entry, is only just coming in from outside:
/// a task is in its new cgroup a moment before `cgroup_attach_task` is told, and may execute something in that moment.
///
/// Every process from inside has an entry where all members are known, unless its fork was skipped; so one without is new if its parent
/// is outside.
#[inline(always)]
pub fn is_arriving() -> bool {
    let parent = context::palisade_pointer(KernelPtr::current_task().0, u64::from(offset!(task_real_parent)));
    let parent_pid = context::palisade_word(parent, u64::from(offset!(task_tgid))) as u32;
    // SAFETY: only presence matters.
    if parent_pid == 0 || unsafe { PROCESSES.get(parent_pid) }.is_some() {
        return false;
    }
    slot_of_task(KernelPtr(parent)).is_none()
}
