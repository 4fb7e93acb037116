//! Cgroups come and go, and tasks enter them.
//!
//! A cgroup is a container's when its name carries the 64 hexadecimal digits that containerd, CRI-O, Docker and
//! Podman use, with whatever prefix and suffix the cgroup driver adds. The slot exists from that moment, so the
//! `unidentified` policy holds before any task is in it.

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_NOEXIST},
    helpers::{bpf_ktime_get_boot_ns, bpf_probe_read_kernel_str_bytes, generated::bpf_probe_read_kernel_str},
};
use palisade_abi::{
    RECORDS_VERSION,
    codes::{control, error},
    ledger::Slot,
    record::{CGROUP_NAME, CGROUP_PATH, ControlRecord},
};

use crate::{
    context, count,
    kernel::{Address, KernelPtr},
    maps::{CGROUPS, CONTROL, NAMES, PROCESSES, SLOTS, offset},
    processes,
    slots::{id_of, palisade_slot_of_cgroup},
    task,
};

/// Hexadecimal digits of a container id; a power of two, and more than half of the longest name.
const ID_DIGITS: u32 = 64;

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
pub fn made(cgroup: Address, path: Address) -> Option<u64> {
    let cgroup = KernelPtr(cgroup);
    if !is_unified(cgroup) {
        return None;
    }
    let Some(cgroup_id) = id_of(cgroup) else {
        count::error(error::CGROUP_READ);
        return None;
    };
    if palisade_slot_of_cgroup(cgroup.0) != 0 {
        return None;
    }
    processes::palisade_catch_up(KernelPtr::current_task().0);
    // SAFETY: only presence matters.
    let by_container = unsafe { PROCESSES.get(task::current_pid()) }.is_some();
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
pub fn removed(cgroup: Address) {
    let cgroup = KernelPtr(cgroup);
    if !is_unified(cgroup) {
        return;
    }
    let Some(cgroup_id) = id_of(cgroup) else {
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
        let from_outside = unsafe { PROCESSES.get(task::current_pid()) }.is_none();
        let leader = context::palisade_pointer(task.0, u64::from(offset!(task_group_leader)));
        processes::adopt(pid, leader, slot, u8::from(from_outside));
    }
}
