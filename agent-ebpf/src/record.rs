//! Numbering records and putting them into the ring.
//!
//! A record takes its number before it asks for room: what finds none leaves a hole that the loss counter of
//! its slot explains.

use aya_ebpf::{
    bindings::{BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP},
    helpers::{bpf_get_smp_processor_id, bpf_ktime_get_boot_ns, generated::bpf_ringbuf_query},
    maps::ring_buf::RingBufEntry,
};
use palisade_abi::{ABI_VERSION, codes::error, record::Header};

use crate::{
    count,
    maps::{ACTIVE_EPOCH, RECORDS, SLOTS, setting},
};

/// The program that makes a record: its own lane where numbers are kept per CPU.
#[derive(Clone, Copy)]
#[repr(u32)]
pub enum Lane {
    Fork = 0,
    Exec = 1,
    Exit = 2,
    Check = 3,
    Tamper = 4,
}

/// Unread bytes above which the reader is woken even for telemetry.
const WAKE_ABOVE: u64 = 1 << 20;
const BPF_RB_AVAIL_DATA: u64 = 0;

/// The next number of `slot`, and the lane it counts in.
#[cfg(feature = "fetch-add")]
#[inline(always)]
fn number(slot: u64, _lane: Lane) -> Option<(u64, u32)> {
    let entry = SLOTS.get_ptr_mut(slot)?;
    // SAFETY: the pointer comes from a map lookup; all writers use this same instruction.
    let before = unsafe {
        core::intrinsics::atomic_xadd::<u64, u64, { core::intrinsics::AtomicOrdering::SeqCst }>(
            &raw mut (*entry).sequence,
            1,
        )
    };
    Some((before + 1, 0))
}

/// The next number of `slot`, and the lane it counts in.
///
/// Sound where programs of different tasks cannot preempt each other on one CPU, which holds for the kernels
/// without fetch-add; the kinds of program nest, so each has a lane.
#[cfg(not(feature = "fetch-add"))]
#[inline(always)]
fn number(slot: u64, lane: Lane) -> Option<(u64, u32)> {
    let lanes = crate::maps::SLOT_LANES.get_ptr_mut(slot)?;
    // SAFETY: the pointer comes from a map lookup, the index is within it.
    let number = unsafe {
        let counter = &raw mut (*lanes)[lane as usize];
        *counter += 1;
        *counter
    };
    // SAFETY: the helper has no preconditions.
    let cpu = unsafe { bpf_get_smp_processor_id() };
    Some((number, ((cpu << 4) | lane as u32) + 1))
}

/// Whether this set makes the records, and gates containers that nobody has identified. While one set takes over from another
/// both refuse what their profiles do not allow, and one does the rest.
#[inline(always)]
pub fn is_active() -> bool {
    ACTIVE_EPOCH.get(0).is_some_and(|active| *active == setting!(epoch))
}

/// Numbers a record of `slot` and reserves room for it. `None` is counted, unless another set records.
#[inline(always)]
pub fn reserve<T: 'static>(slot: u64, kind: u16, lane: Lane) -> Option<(RingBufEntry<T>, Header)> {
    if !is_active() {
        return None;
    }
    let Some((sequence, lane)) = number(slot, lane) else {
        count::error(error::SEQUENCE_MISSED);
        return None;
    };
    let Some(entry) = RECORDS.reserve::<T>(0) else {
        count::error(error::RECORD_RING_FULL);
        count_lost(slot);
        return None;
    };
    let header = Header {
        kind,
        abi: ABI_VERSION as u16,
        size: size_of::<T>() as u32,
        slot,
        sequence,
        lane,
        // SAFETY: the helpers have no preconditions.
        cpu: unsafe { bpf_get_smp_processor_id() },
        // SAFETY: as above.
        time: unsafe { bpf_ktime_get_boot_ns() },
    };
    Some((entry, header))
}

#[inline(always)]
fn count_lost(slot: u64) {
    if let Some(slot) = SLOTS.get_ptr_mut(slot) {
        // SAFETY: the pointer comes from a map lookup.
        count::add(unsafe { &raw mut (*slot).lost }, 1);
    }
}

/// Numbers a record that cannot be made, so that it is missed and counted.
#[inline(always)]
pub fn lose(slot: u64, lane: Lane) {
    if number(slot, lane).is_some() {
        count_lost(slot);
    } else {
        count::error(error::SEQUENCE_MISSED);
    }
}

/// Hands a record over. Telemetry waits for the reader's next round, so that a busy container does not cost a
/// wake-up per exec; what is `urgent` wakes it.
#[inline(always)]
pub fn submit<T: 'static>(entry: RingBufEntry<T>, urgent: bool) {
    let wake = urgent
        // SAFETY: the map is a ring buffer.
        || unsafe { bpf_ringbuf_query((&raw const RECORDS).cast_mut().cast(), BPF_RB_AVAIL_DATA) } > WAKE_ABOVE;
    entry.submit(u64::from(if wake { BPF_RB_FORCE_WAKEUP } else { BPF_RB_NO_WAKEUP }));
}
