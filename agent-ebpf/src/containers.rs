//! Containers as the kernel sees them: cgroups that come and go, and tasks that enter them.
//!
//! A cgroup is a container's when its name carries the 64 hexadecimal digits that containerd, CRI-O, Docker and
//! Podman use, with whatever prefix and suffix the cgroup driver adds. The slot exists from that moment, so the
//! `unidentified` policy holds before any task is in it. A cgroup made below belongs to the same slot.

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_NOEXIST},
    helpers::{bpf_ktime_get_boot_ns, bpf_probe_read_kernel_str_bytes, generated::bpf_probe_read_kernel_str},
};
use palisade_abi::{
    RECORDS_VERSION,
    codes::{control, error, slot_flags},
    ledger::Slot,
    record::{CGROUP_NAME, CGROUP_PATH, ControlRecord},
    state::{HOST_ROOT, RootIdentity},
};

use crate::{
    context, count,
    kernel::KernelPtr,
    layers,
    maps::{CGROUPS, CONTROL, NAMES, PROCESSES, ROOT_SLOTS, ROOTS, SLOT_POLICIES, SLOTS, offset},
    origin,
    processes::{self, Address, slot_of_cgroup},
};

/// Hexadecimal digits of a container id; a power of two, and more than half of the longest name.
const ID_DIGITS: u32 = 64;

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
        let Some(cgroup_id) = id(current) else {
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

#[inline(always)]
fn id(cgroup: KernelPtr) -> Option<u64> {
    cgroup.follow(offset!(cgroup_kn))?.read(offset!(kernfs_id))
}

/// Whether `cgroup` is in the unified hierarchy, whose number is 0.
#[inline(always)]
fn is_unified(cgroup: KernelPtr) -> bool {
    cgroup.follow(offset!(cgroup_root)).and_then(|root| root.read::<u32>(offset!(cgroup_root_hierarchy)))
        == Some(0)
}

/// 1 for a lower-case hexadecimal digit, else 0.
static IS_DIGIT: [u8; 256] = {
    let mut table = [0; 256];
    let mut index = 0;
    while index < 16 {
        table[b"0123456789abcdef"[index] as usize] = 1;
        index += 1;
    }
    table
};

/// Without a branch in the loop: the verifier would follow every combination of outcomes.
#[inline(always)]
fn carries_container_id(name: &[u8; CGROUP_NAME]) -> bool {
    let mut run = 0_u32;
    let mut found = 0_u32;
    let mut at = 0;
    while at < CGROUP_NAME {
        // A run ends with the first other byte, where the product is zero.
        run = core::hint::black_box(run + 1) * u32::from(IS_DIGIT[name[at] as usize]);
        found |= run & ID_DIGITS;
        at += 1;
    }
    found != 0
}

/// Whether the cgroup is that of a monitor on the host, which is named after its container: `libpod-conmon-…` and
/// `crio-conmon-…`.
#[inline(always)]
fn is_monitors(name: &[u8; CGROUP_NAME]) -> bool {
    name[7..14] == *b"conmon-" || name[5..12] == *b"conmon-"
}

#[inline(always)]
fn tell(kind: u16, slot: u64, name: &[u8; CGROUP_NAME], name_length: u32, path: Address) {
    let Some(mut entry) = CONTROL.reserve::<ControlRecord>(0) else {
        count::error(error::CONTROL_RING_FULL);
        return;
    };
    // SAFETY: the helper has no preconditions.
    let time = unsafe { bpf_ktime_get_boot_ns() };
    let place = entry.as_mut_ptr();
    // SAFETY: the place is a whole reserved record; the helper checks the address and writes at most the array's length.
    unsafe {
        (&raw mut (*place).kind).write(kind);
        (&raw mut (*place).version).write(RECORDS_VERSION);
        (&raw mut (*place).name_length).write(name_length);
        (&raw mut (*place).slot).write(slot);
        (&raw mut (*place).time).write(time);
        (&raw mut (*place).name).write(*name);
        let target = &raw mut (*place).path;
        let read = bpf_probe_read_kernel_str(target.cast(), CGROUP_PATH as u32, path as *const _);
        // What was cut fills the whole place.
        if read <= 0 || read >= CGROUP_PATH as i64 {
            (*target)[0] = 0;
        }
    }
    entry.submit(0);
}

/// Makes a slot when the new cgroup, at `path` in its hierarchy, is a container's; returns it.
#[inline(always)]
pub fn cgroup_made(cgroup: Address, path: Address) -> Option<u64> {
    let cgroup = KernelPtr(cgroup);
    if !is_unified(cgroup) {
        return None;
    }
    let Some(cgroup_id) = id(cgroup) else {
        count::error(error::CGROUP_READ);
        return None;
    };
    if palisade_slot_of_cgroup(cgroup.0) != 0 {
        return None;
    }
    processes::palisade_catch_up(KernelPtr::current_task().0);
    // SAFETY: only presence matters.
    let by_container = unsafe { PROCESSES.get(processes::current_pid()) }.is_some();
    let mut name = [0_u8; CGROUP_NAME];
    let Some(place) = cgroup.follow(offset!(cgroup_kn)).and_then(|kn| kn.follow(offset!(kernfs_name))) else {
        count::error(error::CGROUP_READ);
        return None;
    };
    // SAFETY: the helper checks the address and writes at most the array's length.
    let Ok(read) = (unsafe { bpf_probe_read_kernel_str_bytes(place.0 as *const u8, &mut name) }) else {
        count::error(error::CGROUP_READ);
        return None;
    };
    let name_length = read.len() as u32;
    if !carries_container_id(&name) || is_monitors(&name) {
        return None;
    }
    if by_container {
        // A runtime is outside of its containers; one inside makes its own below. So this is a name that a container has chosen: it
        // gets no slot, and cannot take over another container's. Who made it stays in his.
        count::error(error::CGROUP_FORGED);
        return None;
    }
    let slot = Slot {
        sequence: 0,
        lost: 0,
        // SAFETY: the helper has no preconditions.
        created: unsafe { bpf_ktime_get_boot_ns() },
        first_exec: 0,
        ended: 0,
        workload_pid: 0,
        entries_lost: 0,
        reserved: 0,
    };
    if SLOTS.insert(cgroup_id, slot, u64::from(BPF_NOEXIST)).is_err() {
        count::error(error::SLOT_MAP_FULL);
    }
    #[cfg(not(feature = "fetch-add"))]
    if crate::maps::SLOT_LANES
        .insert(cgroup_id, [0_u64; palisade_abi::ledger::LANES], u64::from(BPF_NOEXIST))
        .is_err()
    {
        count::error(error::SLOT_MAP_FULL);
    }
    if NAMES.insert(cgroup_id, name, u64::from(BPF_ANY)).is_err() {
        count::error(error::SLOT_MAP_FULL);
    }
    if CGROUPS.insert(cgroup_id, cgroup_id, u64::from(BPF_ANY)).is_err() {
        count::error(error::CGROUP_MAP_FULL);
    }
    tell(control::CONTAINER_CREATED, cgroup_id, &name, name_length, path);
    Some(cgroup_id)
}

#[inline(always)]
pub fn cgroup_removed(cgroup: Address) {
    let cgroup = KernelPtr(cgroup);
    if !is_unified(cgroup) {
        return;
    }
    let Some(cgroup_id) = id(cgroup) else {
        count::error(error::CGROUP_READ);
        return;
    };
    if CGROUPS.remove(cgroup_id).is_err() {
        return;
    }
    if let Some(slot) = SLOTS.get_ptr_mut(cgroup_id) {
        // SAFETY: the pointer comes from a map lookup; the only writer of this field.
        unsafe { (&raw mut (*slot).ended).write_volatile(1) };
        tell(control::CONTAINER_REMOVED, cgroup_id, &[0; CGROUP_NAME], 0, 0);
    }
}

/// A task that belongs to no slot and enters a container's cgroup is the runtime's, until it executes the
/// workload. One that belongs to a slot keeps it, wherever it moves.
#[inline(always)]
pub fn task_attached(cgroup: Address, task: Address) {
    let (cgroup, task) = (KernelPtr(cgroup), KernelPtr(task));
    if !is_unified(cgroup) {
        return;
    }
    // Wherever it goes.
    processes::palisade_catch_up(task.0);
    let slot = palisade_slot_of_cgroup(cgroup.0);
    if slot == 0 {
        return;
    }
    let Some(pid) = task.read::<u32>(offset!(task_tgid)) else {
        count::error(error::TASK_READ);
        return;
    };
    processes::palisade_catch_up(KernelPtr::current_task().0);
    // SAFETY: only presence matters.
    if unsafe { PROCESSES.get(pid) }.is_none() {
        // One that is moved by a process of a container comes from inside, whatever became of its entry.
        // SAFETY: as above.
        let from_outside = unsafe { PROCESSES.get(processes::current_pid()) }.is_none();
        let leader = context::palisade_pointer(task.0, u64::from(offset!(task_group_leader)));
        processes::adopt(pid, leader, slot, u8::from(from_outside));
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

/// Stores the current task's root directory as that of `slot`, at `now` in seconds since the Unix epoch. Returns whether it could.
#[inline(always)]
pub fn learn_root(slot: u64, now: u64) -> bool {
    let Some(root) = origin::current_root() else {
        count::error(error::ROOT_READ);
        return false;
    };
    layers::palisade_learn_layers(root.superblock, now);
    store_root(slot, root, u64::from(BPF_ANY))
}

/// Stores `root` as that of `slot` unless one is known.
#[inline(always)]
pub fn first_root(slot: u64, root: RootIdentity) {
    // SAFETY: only presence matters.
    if unsafe { ROOTS.get(slot) }.is_none() {
        // Its own folder was made after the layers, and before anything of the container ran.
        layers::palisade_learn_layers(root.superblock, origin::palisade_changed(root.dentry));
        store_root(slot, root, u64::from(BPF_NOEXIST));
    }
}

#[inline(always)]
fn store_root(slot: u64, root: RootIdentity, flags: u64) -> bool {
    if slot != HOST_ROOT {
        // SAFETY: the host's entry is written before any program is attached and never again.
        let Some(host) = (unsafe { ROOTS.get(HOST_ROOT) }) else {
            count::error(error::HOST_ROOT_MISSING);
            return false;
        };
        // What was mounted from a user namespace may hold anything, and the host's own file system is no image.
        if root.user_namespace != host.user_namespace || root.superblock == host.superblock {
            count::error(error::ROOT_REFUSED);
            return false;
        }
    }
    let stored = ROOTS.insert(slot, root, flags).is_ok()
        && (slot == HOST_ROOT || ROOT_SLOTS.insert(root.superblock, slot, u64::from(BPF_ANY)).is_ok());
    if !stored {
        count::error(error::ROOT_MAP_FULL);
    }
    stored
}

/// The slot whose root filesystem the current task's root directory is on. `None` when there is none, or its
/// container has ended: the superblock's address may by then be another's.
#[inline(always)]
pub fn slot_of_root() -> Option<u64> {
    slot_of(origin::current_root()?, false)
}

/// The slot on whose root filesystem the file at `dentry` is.
#[inline(always)]
pub fn slot_of_file(dentry: KernelPtr) -> Option<u64> {
    slot_of(origin::identity(dentry)?, true)
}

#[inline(always)]
fn slot_of(root: RootIdentity, any_file: bool) -> Option<u64> {
    // SAFETY: one word, written when the root is learned.
    let slot = *unsafe { ROOT_SLOTS.get(root.superblock) }?;
    // SAFETY: as above.
    let known = unsafe { ROOTS.get(slot) }?;
    // SAFETY: only a field is read.
    let ended = unsafe { SLOTS.get(slot) }?.ended;
    let same =
        known.superblock == root.superblock && known.device == root.device && known.magic == root.magic;
    // Other filesystems than overlays may be shared by containers; then only the very directory tells.
    let own = root.magic == origin::OVERLAYFS || (!any_file && known.dentry == root.dentry);
    (same && own && ended == 0).then_some(slot)
}
