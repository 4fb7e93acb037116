//! The arguments of an exec: from the new address space, or from the caller's memory where the call is refused.

use aya_ebpf::helpers::{bpf_probe_read_user_buf, bpf_probe_read_user_str_bytes};
use core::hint::black_box;
use palisade_abi::{
    PATH_CAPACITY,
    codes::{error, exec_flags},
    record::LONGEST_ARGUMENT,
};

use crate::{
    count, judging,
    kernel::read_user_word,
    maps::offset,
    repeat::{AGAIN, DONE, repeat},
    scratch::{Scratch, Turns, arguments},
    task::{self, SYS_EXECVE, SYS_EXECVEAT, SYS_EXECVEAT_32, SYS_EXECVEAT_X32},
};

/// Of include/uapi/linux/fcntl.h.
const AT_EXECVE_CHECK: u64 = 0x10000;
/// Most arguments of a refused exec that are read.
const MOST_ARGUMENTS: u32 = 64;

/// Whether the call does not execute anything, but asks whether it might (6.14 and later).
#[inline(always)]
pub fn only_asked() -> bool {
    let Some(registers) = task::registers() else { return false };
    let flags: Option<u64> = match registers.read::<u64>(offset!(pt_regs_orig_ax)) {
        Some(SYS_EXECVEAT | SYS_EXECVEAT_X32) => registers.read(offset!(pt_regs_r8)),
        // Also of a 64-bit program, by `int 0x80`.
        Some(SYS_EXECVEAT_32) => registers.read(offset!(pt_regs_di)),
        _ => None,
    };
    flags.is_some_and(|flags| flags & AT_EXECVE_CHECK != 0)
}

/// From the registers of the system call that is being refused.
#[inline(always)]
pub fn of_caller() -> (u32, u64, u64) {
    let Some(registers) = task::registers() else { return (arguments::UNAVAILABLE, 0, 0) };
    // The number of the call is also the check that these are the registers.
    let array = match registers.read::<u64>(offset!(pt_regs_orig_ax)) {
        Some(SYS_EXECVE) => registers.read::<u64>(offset!(pt_regs_si)),
        Some(SYS_EXECVEAT) => registers.read::<u64>(offset!(pt_regs_dx)),
        _ => None,
    };
    array.map_or((arguments::UNAVAILABLE, 0, 0), |array| (arguments::CALLER, array, 0))
}

/// Copies all arguments to where the working directory will stand. Returns how many bytes they are; more than [`PATH_CAPACITY`]
/// when they are more, or cannot be read.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_read_arguments(claim: u64) -> u64 {
    let Some(scratch) = judging::of(claim) else { return u64::MAX };
    let Some((begin, end)) = task::arguments_of_new_image() else { return u64::MAX };
    let length = black_box(end - begin);
    if length == 0 {
        return 0;
    }
    if length > PATH_CAPACITY as u64 {
        return u64::MAX;
    }
    // SAFETY: the memory belongs to this task until it is released; the area is longer, and the helper checks the user address.
    let read = unsafe {
        let area = (&raw mut (*scratch).cwd).cast::<u8>();
        bpf_probe_read_user_buf(begin as *const u8, core::slice::from_raw_parts_mut(area, length as usize))
    };
    if read.is_err() {
        count::error(error::ARGV_READ);
        return u64::MAX;
    }
    length
}

// The lengths that the copies below arrive at are noted in the scratch memory, not returned: the verifier knows
// nothing of a number that it reads from a map, and so does not follow every possible length through all that
// comes after.

/// Notes a length and adds flags.
#[inline(always)]
pub fn note(length: *mut u16, value: usize, judged: *mut Scratch, flags: u8) {
    // SAFETY: both point into memory that belongs to this task.
    unsafe {
        length.write_volatile(value as u16);
        let place = &raw mut (*judged).flags;
        place.write_volatile(place.read_volatile() | flags);
    }
}

/// Copies the run of strings at `start` to `target`.
#[inline(always)]
pub fn copy_run<const CAPACITY: usize>(judged: *mut Scratch, target: *mut [u8; CAPACITY]) {
    // SAFETY: the memory belongs to this task.
    let (start, length) = unsafe { ((*judged).arguments_at, (*judged).arguments_length) };
    let size = black_box(if length > CAPACITY as u64 { CAPACITY } else { length as usize });
    let mut copied = 0;
    let mut flags = exec_flags::ARGV_TRUNCATED;
    if size <= CAPACITY {
        // SAFETY: `target` holds CAPACITY bytes; the helper checks the user address.
        let read = unsafe {
            bpf_probe_read_user_buf(
                start as *const u8,
                core::slice::from_raw_parts_mut(target.cast::<u8>(), size),
            )
        };
        if read.is_ok() {
            copied = size;
            if length <= CAPACITY as u64 {
                flags = 0;
            }
        } else {
            count::error(error::ARGV_READ);
        }
    }
    // SAFETY: the place is in the task's own memory.
    note(unsafe { &raw mut (*judged).argv_length }, copied, judged, flags);
}

/// Copies the strings that the caller's array points to. `target` is followed by room for one more longest
/// argument.
#[inline(always)]
pub fn copy_strings<const CAPACITY: usize>(judged: *mut Scratch, target: *mut [u8; CAPACITY]) {
    // SAFETY: the memory belongs to this task.
    let (array, turns) = unsafe {
        let turns = &raw mut (*judged).turns;
        (&raw mut (*turns).at).write_volatile(0);
        (&raw mut (*turns).outcome).write_volatile(u32::from(exec_flags::ARGV_TRUNCATED));
        ((*judged).arguments_at, turns)
    };
    repeat(MOST_ARGUMENTS, &mut Strings { turns, array, target }, string::<CAPACITY>);
    // SAFETY: as above.
    let (at, flags) = unsafe {
        ((&raw const (*turns).at).read_volatile() as usize, (&raw const (*turns).outcome).read_volatile())
    };
    let used = if at > CAPACITY { CAPACITY } else { at };
    // SAFETY: the place is in the task's own memory.
    note(unsafe { &raw mut (*judged).argv_length }, used, judged, flags as u8);
}

/// Strings that are copied.
struct Strings<const CAPACITY: usize> {
    turns: *mut Turns,
    array: u64,
    target: *mut [u8; CAPACITY],
}

/// One string.
///
/// # Safety
///
/// `strings` must be of the current task's claimed memory, with a target that has room for a longest argument behind it.
#[inline(always)]
unsafe extern "C" fn string<const CAPACITY: usize>(index: u64, strings: *mut Strings<CAPACITY>) -> i64 {
    // SAFETY: the caller's promise.
    let (turns, array, target) = unsafe { ((*strings).turns, (*strings).array, (*strings).target) };
    let pointer = match read_user_word(array + index * 8) {
        Some(0) => {
            // SAFETY: as above.
            unsafe { (&raw mut (*turns).outcome).write_volatile(0) };
            return DONE;
        }
        Some(pointer) => pointer,
        None => {
            count::error(error::ARGV_READ);
            return DONE;
        }
    };
    // SAFETY: as above.
    let at = unsafe { (&raw const (*turns).at).read_volatile() };
    let place = black_box(at as usize);
    if place >= CAPACITY {
        return DONE;
    }
    // SAFETY: place < CAPACITY and room for a longest argument follows; the helper checks the user address
    // and writes at most the slice's length.
    let read = unsafe {
        bpf_probe_read_user_str_bytes(
            pointer as *const u8,
            core::slice::from_raw_parts_mut(target.cast::<u8>().add(place), LONGEST_ARGUMENT),
        )
    };
    let Ok(string) = read else {
        count::error(error::ARGV_READ);
        return DONE;
    };
    // The helper leaves out the zero byte that it wrote.
    // SAFETY: as above.
    unsafe { (&raw mut (*turns).at).write_volatile(at + string.len() as u32 + 1) };
    AGAIN
}
