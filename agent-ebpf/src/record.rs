//! Numbering records and putting them into the ring.
//!
//! A record takes its number before it asks for room: what finds none leaves a hole that the loss counter of
//! its slot explains.

use core::hint::black_box;

use aya_ebpf::{
    bindings::{BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP},
    helpers::{bpf_get_smp_processor_id, bpf_ktime_get_boot_ns, generated::bpf_ringbuf_query},
    maps::ring_buf::RingBufEntry,
};
use palisade_abi::{RECORDS_VERSION, codes::error, record::Header, state::RingShare};

use crate::{
    count,
    maps::{ACTIVE_EPOCH, RECORDS, RING_SHARES, SLOTS, planted, setting},
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

/// Unread bytes above which the reader is woken even for telemetry, and the same as a share of the ring, as a divisor.
const WAKE_ABOVE: u64 = 1 << 20;
const WAKE_SHARE: u64 = 8;
/// Bytes before a record in the ring; each begins at a multiple of it (`BPF_RINGBUF_HDR_SZ`).
const RING_HEAD: u64 = 8;

// Of include/uapi/linux/bpf.h.
const BPF_RB_AVAIL_DATA: u64 = 0;
const BPF_RB_RING_SIZE: u64 = 1;
const BPF_RB_CONS_POS: u64 = 2;
const BPF_RB_PROD_POS: u64 = 3;

/// One of the numbers above, of the ring for records.
#[inline(always)]
fn of_ring(what: u64) -> u64 {
    // SAFETY: the map is a ring buffer.
    unsafe { bpf_ringbuf_query((&raw const RECORDS).cast_mut().cast(), what) }
}

/// Whether a slot may put `size` bytes more into the ring, and counts them if so.
///
/// It may have as much as is left for all others, so one that floods the ring comes to half of it at most, two come to a third each,
/// and room is left for the next (a dynamic threshold, as switches share their buffers: Choudhury and Hahne, 1998). What is
/// `urgent` may be twice that. What a slot has there is never taken for less than it is, but for programs on other processors in
/// the same moment; while the reader is behind, for up to twice as much.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_take_share(slot: u64, size: u64, urgent: u64) -> u64 {
    if planted!(RING_UNSHARED) {
        return black_box(slot ^ size ^ urgent) | 1;
    }
    let (read, written) = (of_ring(BPF_RB_CONS_POS), of_ring(BPF_RB_PROD_POS));
    let free = of_ring(BPF_RB_RING_SIZE).saturating_sub(written.wrapping_sub(read));
    let size = (size + RING_HEAD).next_multiple_of(RING_HEAD);
    let last = written + size;
    let Some(share) = RING_SHARES.get_ptr_mut(slot) else {
        let first = RingShare { last, mark: written, before: 0, since: size };
        // Full of other slots' entries that are in use at this moment: then this one has none yet.
        let _begins_anew = RING_SHARES.insert(slot, first, 0);
        return 1;
    };
    // SAFETY: the pointer comes from a map lookup.
    unsafe {
        let (mark, mut before, mut since) = ((*share).mark, (*share).before, (*share).since);
        if read >= mark {
            (before, since) = (if read >= (*share).last { 0 } else { since }, 0);
            (*share).mark = written;
            (*share).before = before;
            (*share).since = 0;
        }
        if before + since + size > free << urgent {
            return 0;
        }
        (*share).last = last;
        count::add(&raw mut (*share).since, size);
    }
    1
}

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
pub fn reserve<T: 'static>(
    slot: u64,
    kind: u16,
    lane: Lane,
    urgent: bool,
) -> Option<(RingBufEntry<T>, Header)> {
    if !is_active() {
        return None;
    }
    let Some((sequence, lane)) = number(slot, lane) else {
        count::error(error::SEQUENCE_MISSED);
        return None;
    };
    if palisade_take_share(slot, size_of::<T>() as u64, u64::from(urgent)) == 0 {
        count::error(error::RECORD_SHARE_USED);
        count_lost(slot);
        return None;
    }
    let Some(entry) = RECORDS.reserve::<T>(0) else {
        count::error(error::RECORD_RING_FULL);
        count_lost(slot);
        return None;
    };
    let header = Header {
        kind,
        version: RECORDS_VERSION,
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
    let wake = urgent || of_ring(BPF_RB_AVAIL_DATA) > WAKE_ABOVE.min(of_ring(BPF_RB_RING_SIZE) / WAKE_SHARE);
    entry.submit(u64::from(if wake { BPF_RB_FORCE_WAKEUP } else { BPF_RB_NO_WAKEUP }));
}
