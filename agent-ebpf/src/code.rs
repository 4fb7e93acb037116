//! Code that comes into a process other than by an exec: memory that becomes executable, and the memory of a process that
//! another one may write to. And the files that allowed code is in.
//!
//! An ELF interpreter, a shared library and whatever a loader loads are files that are mapped executable, so this is where
//! `ld.so ./file`, `LD_PRELOAD` and `dlopen` are judged. The common case, an unmodified file of the image under a profile that
//! lists no libraries, is decided without a path.

use palisade_abi::{
    PATH_CAPACITY,
    codes::{action, code_act, code_flags, code_record_flags, exec_flags, kind, mode, reason, verdict},
    offsets::ABSENT,
    record::{CodePart, CodeRecord, LARGE_PATH, SMALL_PATH},
    state::HOST_ROOT,
};

use crate::{
    context,
    exec::{self, copy_path},
    judge::{palisade_code_rules, palisade_is_allowed_executable, palisade_judge_mapped, rules_mode},
    kernel::{KernelPtr, plain},
    maps::{PROCESSES, ROOTS, offset, planted},
    origin::{self, palisade_classify, palisade_is_of_image},
    path::palisade_walk,
    processes::{self, Address},
    record::{self, Lane},
    scratch::{self, EXECUTABLE},
    tamper::palisade_slot_of_process,
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
/// Of include/linux/fs.h: the file was opened to write.
pub const FMODE_WRITE: u32 = 1 << 1;
/// Of include/uapi/linux/stat.h: anybody may execute it.
const ANY_EXECUTE: u64 = 0o111;
/// `PROC_SUPER_MAGIC` of include/uapi/linux/magic.h.
const PROCFS: u64 = 0x9fa0;
/// The name `mem`, little endian, with the zero that ends it.
const MEM: u32 = 0x006d_656d;

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

/// What a step answered. Laundered: the compiler knows that it is 0 or 1 and would compute a hook's return value from it, which
/// the verifier, who does not know, refuses.
#[inline(always)]
pub fn refused(answer: u64) -> bool {
    core::hint::black_box(answer) != 0
}

/// How the steps below hand an act to each other.
#[inline(always)]
fn how(act: u8, generated: bool, protection: u64) -> u64 {
    u64::from(act) | u64::from(generated) << 8 | (protection & 0xffff) << 16
}

/// Whether memory is refused to a process that has asked for all of it to be executable (`READ_IMPLIES_EXEC`), by a call that no
/// other hook sees: `brk`, and `remap_file_pages` where that has none. `mmap` has one.
#[inline(always)]
pub fn implies_exec() -> bool {
    let personality = KernelPtr::current_task().read::<u32>(offset!(task_personality)).unwrap_or(0);
    if personality & READ_IMPLIES_EXEC == 0 {
        return false;
    }
    let call = exec::registers().and_then(|registers| registers.read::<u64>(offset!(pt_regs_orig_ax)));
    if call == Some(SYS_MMAP) {
        return false;
    }
    let slot = palisade_slot_under_profile();
    slot != 0 && refused(palisade_gains_code(slot, 0, how(code_act::MAP, true, PROT_WRITE | PROT_EXEC)))
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
    if inode.is_some() && origin::layer_inode(seen) == inode { seen.0 } else { dentry.0 }
}

/// Whether the current process may not attach to `task`.
#[inline(always)]
pub fn traces(task: Address) -> bool {
    processes::palisade_catch_up(plain(task));
    let Some(pid) = KernelPtr(task).read::<u32>(offset!(task_tgid)) else { return false };
    refused(palisade_traces(code_act::TRACE.into(), u64::from(pid)))
}

/// Whether the current process may not be traced by `tracer`.
#[inline(always)]
pub fn be_traced(tracer: Address) -> bool {
    processes::palisade_catch_up(plain(tracer));
    let Some(pid) = KernelPtr(tracer).read::<u32>(offset!(task_tgid)) else { return false };
    refused(palisade_traces(code_act::BE_TRACED.into(), u64::from(pid)))
}

/// Whether opening `file` is refused: it is the memory of a process, and it would be written to. A process needs no right to
/// trace for its own, and can change code there that it has mapped read-only.
#[inline(always)]
pub fn opens_memory(file: Address) -> bool {
    let file = KernelPtr(file);
    let Some(dentry) = file.follow(offset!(file_dentry)) else { return false };
    let Some(superblock) = dentry.follow(offset!(dentry_superblock)) else { return false };
    if superblock.read::<u64>(offset!(superblock_magic)) != Some(PROCFS) {
        return false;
    }
    let writes = file.read::<u32>(offset!(file_open_mode)).unwrap_or(0) & FMODE_WRITE != 0;
    let is_memory = dentry.read::<u32>(offset!(dentry_name_length)) == Some(3)
        && dentry.follow(offset!(dentry_name)).and_then(|name| name.read::<u32>(0)) == Some(MEM);
    writes && is_memory && refused(palisade_traces(code_act::OPEN_MEMORY.into(), 0))
}

/// Whether an act on the file at `dentry` is refused, since it would take an allowed executable from the workload.
#[inline(always)]
pub fn spoils(act: u8, dentry: Address) -> bool {
    refused(palisade_spoils(act.into(), plain(dentry)))
}

/// Whether mounting something at `path` is refused: it would hide an allowed executable.
#[inline(always)]
pub fn mounts_over(path: Address) -> bool {
    KernelPtr(path)
        .follow(offset!(path_dentry))
        .is_some_and(|dentry| refused(palisade_spoils(code_act::MOUNT_OVER.into(), dentry.0)))
}

/// Judges an act on the file at `dentry`. Returns 1 when it is refused. Only what is executable and the image's is looked at:
/// anything else is no loss, or is one already.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_spoils(act: u64, dentry: u64) -> u64 {
    let inode = context::palisade_pointer(dentry, u64::from(offset!(dentry_inode)));
    let mode = context::palisade_word(inode, u64::from(offset!(inode_mode))) & 0xffff;
    if mode & origin::S_IFMT != origin::S_IFREG || mode & ANY_EXECUTE == 0 {
        return 0;
    }
    let slot = palisade_slot_under_profile();
    if slot == 0 || palisade_is_of_image(slot, dentry) == 0 {
        return 0;
    }
    let rules = palisade_code_rules(slot);
    if rules == 0 {
        return 0;
    }
    palisade_refuses(slot, dentry, rules, act)
}

/// The slot whose profile the current process is under; 0 for none, and while it is the runtime's.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_slot_under_profile() -> u64 {
    let Some(process) = processes::current() else { return 0 };
    if process.entering != 0 && has_hosts_root() {
        return 0;
    }
    process.slot
}

/// Whether the current task's root directory is the host's.
#[inline(always)]
fn has_hosts_root() -> bool {
    let Some(root) = origin::current_root() else { return false };
    // SAFETY: the host's entry is written before any program is attached and never again.
    unsafe { ROOTS.get(HOST_ROOT) }
        .is_some_and(|host| host.superblock == root.superblock && host.dentry == root.dentry)
}

/// 1 in the second byte of [`how`].
const GENERATED: u64 = 1 << 8;

/// Judges memory that becomes executable: of the file at `dentry`, if any. Returns 1 when that is refused.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_gains_code(slot: u64, dentry: u64, how: u64) -> u64 {
    let rules = palisade_code_rules(slot);
    if rules == 0 {
        palisade_note_interpreter(slot, dentry);
        return 0;
    }
    let may_generate = how & GENERATED == 0 || rules & u64::from(code_flags::JIT) != 0;
    let quick = dentry == 0
        || (rules & u64::from(code_flags::LIBRARIES_OF_IMAGE) != 0
            && palisade_is_of_image(slot, dentry) != 0);
    if may_generate && quick {
        return 0;
    }
    palisade_refuses(slot, dentry, rules, how)
}

/// Judges an act on a running process, by the profiles of both: where containers see each other's processes, neither the one
/// that may trace nor the one that may be traced speaks for the other. Returns 1 when it is refused.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_traces(act: u64, target: u64) -> u64 {
    if target == u64::from(processes::current_pid()) {
        return 0;
    }
    // Both arguments are used, or the compiler would not pass them, which the verifier refuses.
    if planted!(CODE_TRACE_ALLOWED) && core::hint::black_box(act | target) != 0 {
        return 0;
    }
    let slot = palisade_slot_under_profile();
    if slot == 0 {
        return 0;
    }
    let how = act | target << 32;
    let own = palisade_forbids_tracing(slot);
    if own != 0 && rules_mode(own) != mode::AUDIT {
        return palisade_refuses(slot, 0, own, how);
    }
    let others = match palisade_slot_of_process(target) {
        0 => 0,
        other if other == slot => 0,
        other => palisade_forbids_tracing(other),
    };
    match (own, others) {
        (0, 0) => 0,
        (own, 0) => palisade_refuses(slot, 0, own, how),
        (_, others) => palisade_refuses(slot, 0, others, how),
    }
}

/// The rules of `slot`, if they do not allow tracing.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_forbids_tracing(slot: u64) -> u64 {
    let rules = palisade_code_rules(slot);
    if rules & u64::from(code_flags::TRACE) != 0 { 0 } else { rules }
}

/// Notes that something which is not the image's was mapped executable for an exec that will wait for its container to be
/// identified. Its own file is judged then.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_note_interpreter(slot: u64, dentry: u64) -> u64 {
    let Some(entry) = PROCESSES.get_ptr_mut(processes::current_pid()) else { return 0 };
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

/// Whether the file at `dentry` is the one that is being executed: its own mapping follows the verdict on the exec.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_executes(dentry: u64) -> u64 {
    let own = KernelPtr::current_task()
        .follow(offset!(task_mm))
        .and_then(|mm| mm.follow(offset!(mm_exe_file)))
        .and_then(|file| file.follow(offset!(file_dentry)));
    u64::from(palisade_pending_verdict() != 0 && own == Some(KernelPtr(dentry)))
}

/// The verdict on the exec that the current process is in; 0 when it is in none. The call is looked at, too: an exec may fail
/// where no hook tells, and what it left would pass for one that goes on.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_pending_verdict() -> u64 {
    if !exec::is_called() {
        return 0;
    }
    let Some(entry) = PROCESSES.get_ptr_mut(processes::current_pid()) else { return 0 };
    // SAFETY: the pointer comes from a map lookup; the entry belongs to this process.
    u64::from(unsafe { (&raw const (*entry).pending_verdict).read_volatile() })
}

/// Judges and records what was not allowed at once. `how` is the act, 1 in the second byte for generated code, the protection
/// in the upper half of the lower word, and the other process in the upper word.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_refuses(slot: u64, dentry: u64, rules: u64, how: u64) -> u64 {
    let denies = u64::from(rules_mode(rules) != mode::AUDIT);
    let Some((claim, scratch)) = scratch::claim() else {
        if denies != 0 {
            record::lose(slot, Lane::Check);
        }
        return denies;
    };
    let act = how as u8;
    let is_memory = act == code_act::MAP || act == code_act::PROTECT;
    let traces = !is_memory && act < code_act::CHANGE;
    // SAFETY: the memory belongs to this task until it is released.
    unsafe {
        (*scratch).slot = slot;
        (*scratch).dentry = dentry;
        (*scratch).act = act;
        (*scratch).protection = (how >> 16) as u32 & 0xffff;
        (*scratch).target = (how >> 32) as u32;
        (*scratch).decision.revision = (rules >> 32) as u32;
        (*scratch).decision.mode = rules_mode(rules);
        (&raw mut (*scratch).session).write(processes::session_of(processes::current_pid()));
        (*scratch).caller = processes::program_of(processes::current_pid());
    }
    let mut reason = if traces { u64::from(reason::TRACE) } else { 0 };
    if !traces && dentry != 0 {
        palisade_walk(claim, dentry, EXECUTABLE);
        let origin = palisade_classify(claim) as u8;
        // SAFETY: as above.
        unsafe { (*scratch).origin = origin };
        reason = if is_memory {
            // The program itself was judged as an exec already.
            if palisade_executes(dentry) != 0 { 0 } else { palisade_judge_mapped(claim, rules) }
        } else if act == code_act::OPEN_LAYER {
            reason::LAYER.into()
        } else if !planted!(CODE_EXECUTABLES_UNPROTECTED) && palisade_is_allowed_executable(claim, rules) != 0
        {
            reason::PROTECTED.into()
        } else {
            0
        };
    }
    if is_memory
        && reason == 0
        && how & GENERATED != 0
        && !planted!(CODE_JIT_ALLOWED)
        && rules & u64::from(code_flags::JIT) == 0
    {
        reason = reason::JIT.into();
    }
    let mut refused = 0;
    if reason != 0 {
        refused = denies;
        // SAFETY: as above.
        unsafe {
            (*scratch).decision.reason = reason as u8;
            (*scratch).decision.verdict = if denies != 0 { verdict::DENIED } else { verdict::AUDITED };
            (*scratch).decision.action = if denies != 0 { action::REFUSED } else { action::NONE };
        }
        if denies != 0 || reason != u64::from(reason::JIT) || first_of_program() {
            palisade_report_code(claim);
        }
    }
    scratch::release(claim);
    refused
}

/// Whether code of its own making is recorded of this program for the first time.
#[inline(always)]
fn first_of_program() -> bool {
    let Some(entry) = PROCESSES.get_ptr_mut(processes::current_pid()) else { return true };
    // SAFETY: the pointer comes from a map lookup. Two threads may both be first: then there are two records.
    unsafe {
        let noted = &raw mut (*entry).jit_noted;
        let first = noted.read_volatile() == 0;
        noted.write_volatile(1);
        first
    }
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_report_code(claim: u64) -> u64 {
    let Some(scratch) = scratch::of(claim) else { return 1 };
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
    let Some(scratch) = scratch::of(claim) else { return false };
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
