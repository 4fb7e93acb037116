//! The record of an act: in the small form when its path fits, else in the large one.

use palisade_abi::{
    PATH_CAPACITY,
    codes::{code_record_flags, exec_flags, kind, reason, verdict},
    record::{CodePart, CodeRecord, LARGE_PATH, SMALL_PATH},
};

use crate::{
    area::copy_path,
    context,
    exec::pending::palisade_pending_verdict,
    judging,
    kernel::KernelPtr,
    maps::offset,
    record::{self, Lane},
};

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_report_code(claim: u64) -> u64 {
    let Some(scratch) = judging::of(claim) else { return 1 };
    if !record::is_active() {
        // SAFETY: the memory belongs to this task until it is released.
        unsafe {
            // As for an exec: the set that records is not asked any more.
            if (*scratch).decision.verdict == verdict::DENIED {
                record::lose((*scratch).slot, Lane::Check);
            }
        }
        return 1;
    }
    // SAFETY: as above.
    let length = PATH_CAPACITY as u32 - unsafe { (*scratch).executable.start };
    if length <= SMALL_PATH as u32 {
        palisade_write_small_code(claim)
    } else {
        palisade_write_large_code(claim)
    }
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_write_small_code(claim: u64) -> u64 {
    u64::from(!write::<SMALL_PATH>(claim, 0))
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_write_large_code(claim: u64) -> u64 {
    u64::from(!write::<LARGE_PATH>(claim, 1))
}

#[inline(always)]
fn write<const PATH: usize>(claim: u64, class: u16) -> bool {
    let Some(scratch) = judging::of(claim) else { return false };
    // SAFETY: the memory belongs to this task until it is released.
    let slot = unsafe { (*scratch).slot };
    let Some((mut entry, header)) = record::reserve::<CodeRecord<PATH>>(slot, kind::CODE, Lane::Check, true)
    else {
        return false;
    };
    let place = entry.as_mut_ptr();
    // SAFETY: the place is a whole reserved record; the scratch memory belongs to this task.
    unsafe {
        (&raw mut (*place).head.header).write(header);
        let length = copy_path(&raw mut (*scratch).path, (*scratch).executable.start, &raw mut (*place).path);
        (&raw mut (*scratch).path_length).write_volatile(length as u16);
        context::describe(KernelPtr::current_task(), &raw mut (*place).head.process);
        (&raw mut (*place).head.session).write((&raw const (*scratch).session).read_volatile());
        (&raw mut (*place).head.decision).write((&raw const (*scratch).decision).read());
        let code: *mut CodePart = &raw mut (*place).head.code;
        let failure = (*scratch).executable.failure as u8;
        let cut = matches!(failure, reason::PATH_TOO_LONG | reason::PATH_TOO_DEEP);
        let dentry = (*scratch).dentry;
        let inode = context::palisade_pointer(dentry, u64::from(offset!(dentry_inode)));
        let superblock = (*scratch).executable.superblock;
        (&raw mut (*code).origin).write((*scratch).origin);
        (&raw mut (*code).act).write((*scratch).act);
        let executing = u8::from(palisade_pending_verdict() != 0) * code_record_flags::EXECUTING;
        let cut = u8::from(cut) * exec_flags::PATH_TRUNCATED;
        (&raw mut (*code).flags).write(cut | executing);
        (&raw mut (*code).reserved).write(0);
        (&raw mut (*code).protection).write((*scratch).protection);
        (&raw mut (*code).inode).write(context::palisade_pointer(inode, u64::from(offset!(inode_number))));
        let device = context::palisade_word(superblock, u64::from(offset!(superblock_device)));
        (&raw mut (*code).device).write(device as u32);
        (&raw mut (*code).target).write((*scratch).target);
        (&raw mut (*code).path_length).write((&raw const (*scratch).path_length).read_volatile());
        (&raw mut (*code).class).write(class);
        (&raw mut (*code).reserved_too).write(0);
        record::submit(entry, true);
    }
    true
}
