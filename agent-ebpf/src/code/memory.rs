//! Memory that becomes executable.

use palisade_abi::{
    codes::{code_act, code_flags, verdict},
    offsets::ABSENT,
    section,
};

use crate::{
    code::act::{GENERATED, how, palisade_refuses, refused},
    exec::pending::palisade_executes,
    kernel::{Address, KernelPtr},
    maps::{PROCESSES, ROOTS, offset, planted},
    origin::palisade_is_of_image,
    overlay,
    standing::{self, palisade_slot_under_profile},
    task,
};

// Of include/uapi/asm-generic/mman-common.h and include/uapi/linux/mman.h.
const PROT_WRITE: u64 = 2;
const PROT_EXEC: u64 = 4;
const MAP_TYPE: u64 = 0xf;
const MAP_SHARED: u64 = 1;
const MAP_SHARED_VALIDATE: u64 = 3;
/// Of include/uapi/linux/personality.h.
const READ_IMPLIES_EXEC: u32 = 0x0040_0000;
/// On x86-64; 32-bit calls have no such number that leads to a mapping.
const SYS_MMAP: u64 = 9;
/// `VM_SHARED` of include/linux/mm.h.
const VM_SHARED: u64 = 8;

/// Whether a mapping is refused. `file` may be null: then it is anonymous.
#[inline(always)]
pub fn mapped(file: Address, protection: u64, flags: u64) -> bool {
    if protection & PROT_EXEC == 0 || planted!(CODE_MAPPED_UNJUDGED) {
        return false;
    }
    let slot = palisade_slot_under_profile();
    if slot == 0 {
        return false;
    }
    let dentry = palisade_file_of(container_view(slot, KernelPtr(file)));
    let shared = matches!(flags & MAP_TYPE, MAP_SHARED | MAP_SHARED_VALIDATE);
    // What is written to a private mapping is not the file's.
    let generated = dentry == 0 || (protection & PROT_WRITE != 0 && !shared);
    refused(palisade_gains_code(slot, dentry, how(code_act::MAP, generated, protection)))
}

/// Whether giving the memory at `area` another protection is refused.
#[inline(always)]
pub fn protected(area: Address, protection: u64) -> bool {
    if protection & PROT_EXEC == 0 || planted!(CODE_PROTECT_UNJUDGED) {
        return false;
    }
    let slot = palisade_slot_under_profile();
    if slot == 0 {
        return false;
    }
    let area = KernelPtr(area);
    let dentry =
        area.follow(offset!(vma_file)).map_or(0, |file| palisade_file_of(container_view(slot, file)));
    let shared = area.read::<u64>(offset!(vma_flags)).is_some_and(|flags| flags & VM_SHARED != 0);
    // Pages of its own: something was written to the private mapping.
    let written = area.read::<u64>(offset!(vma_anonymous)) != Some(0);
    let generated = dentry == 0 || (!shared && (written || protection & PROT_WRITE != 0));
    refused(palisade_gains_code(slot, dentry, how(code_act::PROTECT, generated, protection)))
}

/// Whether memory is refused to a process that has asked for all of it to be executable (`READ_IMPLIES_EXEC`), by a call that no
/// other hook sees: `brk`, and `remap_file_pages` where that has none. `mmap` has one.
#[inline(always)]
pub fn implies_exec() -> bool {
    let personality = KernelPtr::current_task().read::<u32>(offset!(task_personality)).unwrap_or(0);
    if personality & READ_IMPLIES_EXEC == 0 {
        return false;
    }
    let call = task::registers().and_then(|registers| registers.read::<u64>(offset!(pt_regs_orig_ax)));
    if call == Some(SYS_MMAP) {
        return false;
    }
    let slot = palisade_slot_under_profile();
    slot != 0 && refused(palisade_gains_code(slot, 0, how(code_act::MAP, true, PROT_WRITE | PROT_EXEC)))
}

/// The same dentry, or 0 when it only stands for memory that processes share: `shmem_zero_setup` and `hugetlb_file_setup` give such
/// memory a file with one of these names, and a slash or a root without a name is no file's.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_file_of(dentry: u64) -> u64 {
    let file = KernelPtr(dentry);
    if file.follow(offset!(dentry_parent)) != Some(file) {
        return dentry;
    }
    let begin = file.follow(offset!(dentry_name)).and_then(|name| name.read::<[u8; 8]>(0));
    let length = file.read::<u32>(offset!(dentry_name_length));
    match (begin, length) {
        (Some(begin), Some(8)) if u64::from_le_bytes(begin) == u64::from_le_bytes(*b"dev/zero") => 0,
        (Some(begin), Some(13)) if u64::from_le_bytes(begin) == u64::from_le_bytes(*b"anon_hug") => 0,
        _ => dentry,
    }
}

/// The dentry of a mapped file as the container sees it. Of an overlay's file, kernels since 6.7 map the layer's, in a
/// `struct backing_file` that has both. What marks it as such is a bit that has had several places, so what would be the
/// overlay's dentry is asked whether it stands for this very inode.
#[inline(always)]
fn container_view(slot: u64, file: KernelPtr) -> u64 {
    let Some(dentry) = file.follow(offset!(file_dentry)) else { return 0 };
    if offset!(backing_file_user_dentry) == ABSENT {
        return dentry.0;
    }
    // SAFETY: the entry is written once, before any task of the slot executes its workload.
    let Some(root) = (unsafe { ROOTS.get(slot) }) else { return dentry.0 };
    let root = KernelPtr(root.superblock);
    if dentry.follow(offset!(dentry_superblock)) == Some(root) {
        return dentry.0;
    }
    let seen = file.follow(offset!(backing_file_user_dentry));
    let Some(seen) = seen.filter(|seen| seen.follow(offset!(dentry_superblock)) == Some(root)) else {
        return dentry.0;
    };
    let inode = file.follow(offset!(file_inode));
    if inode.is_some() && overlay::layer_inode(seen) == inode { seen.0 } else { dentry.0 }
}

/// Judges memory that becomes executable: of the file at `dentry`, if any. Returns 1 when that is refused.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_gains_code(slot: u64, dentry: u64, how: u64) -> u64 {
    let rules = standing::of(slot, section::EXEC);
    if !rules.restricts() {
        palisade_note_interpreter(slot, dentry);
        return 0;
    }
    let may_generate = how & GENERATED == 0 || rules.has(code_flags::JIT);
    let quick =
        dentry == 0 || (rules.has(code_flags::LIBRARIES_OF_IMAGE) && palisade_is_of_image(slot, dentry) != 0);
    if may_generate && quick {
        return 0;
    }
    palisade_refuses(slot, dentry, rules.0, how)
}

/// Notes that something which is not the image's was mapped executable for an exec that will wait for its container to be
/// identified. Its own file is judged then.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_note_interpreter(slot: u64, dentry: u64) -> u64 {
    let Some(entry) = PROCESSES.get_ptr_mut(task::current_pid()) else { return 0 };
    // SAFETY: the pointer comes from a map lookup; the entry belongs to this process.
    if unsafe { (&raw const (*entry).pending_verdict).read_volatile() } != verdict::HELD {
        return 0;
    }
    if palisade_executes(dentry) != 0 || palisade_is_of_image(slot, dentry) != 0 {
        return 0;
    }
    // SAFETY: as above.
    unsafe { (&raw mut (*entry).foreign_interpreter).write_volatile(1) };
    1
}
