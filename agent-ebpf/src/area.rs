//! A path as text in the memory of a judgement: its end stands at the end of its area.

use aya_ebpf::helpers::generated::bpf_probe_read_kernel;
use core::hint::black_box;
use palisade_abi::{PATH_CAPACITY, hash::SipHasher};

use crate::{
    maps::setting,
    repeat::{AGAIN, DONE, repeat},
    scratch::{Area, Scratch, Turns},
};

/// Clears what an earlier path has left before the one that starts at `start`, as far as [`hash`] reads it.
#[inline(always)]
pub fn clear_front(area: *mut Area, start: u32) {
    let index = (black_box(start) as usize) & (PATH_CAPACITY - 8);
    // SAFETY: the index is a multiple of eight within the area, whose own alignment is eight (a map value). A path is little endian text.
    unsafe {
        let word = area.cast::<u8>().add(index).cast::<u64>();
        word.write_volatile(word.read_volatile() & (u64::MAX << (8 * (start & 7))));
    }
}

/// Clears what is before the path that starts at `start`, as far as the last `END` bytes go.
#[inline(always)]
pub fn clear_end_before<const END: usize>(area: *mut Area, start: u32) {
    let mut index = PATH_CAPACITY - END;
    while index < PATH_CAPACITY {
        if index + 8 <= start as usize {
            // SAFETY: as above.
            unsafe { area.cast::<u8>().add(index).cast::<u64>().write_volatile(0) };
        }
        index += 8;
    }
}

/// A byte of the path.
#[inline(always)]
pub fn byte(area: *mut Area, at: u32) -> u8 {
    let index = (black_box(at) as usize) & (PATH_CAPACITY - 1);
    // SAFETY: the index is within the area.
    unsafe { area.cast::<u8>().add(index).read_volatile() }
}

/// Copies the path that starts at `start` of `area` to `target`; returns its length.
#[inline(always)]
pub fn copy_path<const CAPACITY: usize>(area: *mut Area, start: u32, target: *mut [u8; CAPACITY]) -> usize {
    let length = PATH_CAPACITY as u32 - start;
    let size = black_box(length);
    if size == 0 || size > CAPACITY as u32 {
        return 0;
    }
    // SAFETY: `target` holds CAPACITY bytes; the helper checks what it reads, which is this task's own memory.
    let copied = unsafe {
        bpf_probe_read_kernel(target.cast(), size, area.cast::<u8>().wrapping_add(start as usize).cast())
    };
    if copied == 0 { size as usize } else { 0 }
}

/// The lookup name of the path that starts at `start` of `area`, which is the task's own; see [`palisade_abi::hash::hash_path`].
#[inline(always)]
pub fn hash(scratch: *mut Scratch, area: *mut Area, start: u32) -> [u64; 2] {
    let first = start & !7;
    // SAFETY: the memory belongs to this task until it is released.
    let turns = unsafe {
        let turns = &raw mut (*scratch).turns;
        (&raw mut (*turns).hasher).write(SipHasher::new([setting!(hash_key)[0], setting!(hash_key)[1]]));
        (&raw mut (*turns).at).write_volatile(first);
        turns
    };
    repeat(PATH_CAPACITY as u32 / 8, &mut Hash { turns, area }, hash_word);
    // SAFETY: as above.
    unsafe { (&raw const (*turns).hasher).read() }.finish(u64::from(PATH_CAPACITY as u32 - first))
}

/// What a hash is of.
struct Hash {
    turns: *mut Turns,
    area: *mut Area,
}

/// One word of a hash.
///
/// # Safety
///
/// `hash` must be of the current task's claimed memory.
#[inline(always)]
unsafe extern "C" fn hash_word(_turn: u64, hash: *mut Hash) -> i64 {
    // SAFETY: the caller's promise. The index is a multiple of eight within the area, whose own alignment is eight (a map value).
    unsafe {
        let turns = (*hash).turns;
        let at = (&raw const (*turns).at).read_volatile();
        if at >= PATH_CAPACITY as u32 {
            return DONE;
        }
        let index = (black_box(at) as usize) & (PATH_CAPACITY - 8);
        let mut hasher = (&raw const (*turns).hasher).read();
        hasher.word((*hash).area.cast::<u8>().add(index).cast::<u64>().read_volatile());
        (&raw mut (*turns).hasher).write(hasher);
        (&raw mut (*turns).at).write_volatile(at + 8);
    }
    AGAIN
}
