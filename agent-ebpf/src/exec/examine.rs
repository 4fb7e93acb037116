//! The file that is executed, and who executes it: everything that a verdict depends on.

use palisade_abi::{
    codes::{error, reason, slot_flags, verdict},
    state::HOST_ROOT,
};

use crate::{
    context, count,
    exec::judge::palisade_judge,
    judging::{self, Claim},
    kernel::{Address, KernelPtr},
    maps::{PROCESSES, ROOTS, SLOT_POLICIES, offset, planted, setting},
    origin::palisade_classify,
    path::palisade_walk,
    processes, roots,
    scratch::{EXECUTABLE, Scratch},
    task,
};

/// `#!`, little endian.
const SCRIPT_MAGIC: u64 = 0x2123;
/// `\x7fELF`, little endian.
const ELF_MAGIC: u64 = 0x464c_457f;

/// Claims memory for the current task, with what is known of its process in it.
#[inline(always)]
pub fn claim() -> Option<Claim> {
    let claim = judging::claim()?;
    (palisade_recall_process(claim.number) == 0).then_some(claim)
}

/// Fills the memory of `claim` with what is known of its process. Returns 1 when it belongs to no slot any more.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_recall_process(claim: u64) -> u64 {
    let Some(scratch) = judging::of(claim) else { return 1 };
    let Some(entry) = PROCESSES.get_ptr(task::current_pid()) else {
        return palisade_recall_without_entry(claim);
    };
    // SAFETY: the memory belongs to this task until it is released; the entry is written by this process's own hooks or before it runs.
    unsafe { (&raw mut (*scratch).process).write(entry.read()) };
    0
}

/// The same for one that has no entry.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_recall_without_entry(claim: u64) -> u64 {
    let (Some(scratch), Some(process)) = (judging::of(claim), processes::current()) else { return 1 };
    // SAFETY: the memory belongs to this task until it is released.
    unsafe { (&raw mut (*scratch).process).write(process) };
    0
}

/// Walks, classifies and judges. Returns the verdict; all else is in the scratch memory.
#[inline(always)]
pub fn examine(claim: u64, scratch: *mut Scratch, bprm: Address) -> u8 {
    // SAFETY: the memory belongs to this task until it is released; what is known of the process was recalled into it.
    let process = unsafe { &(*scratch).process };
    // SAFETY: the memory belongs to this task until it is released.
    unsafe {
        // Read back from the map, the hook's typed pointer becomes a plain number, which global functions take.
        (&raw mut (*scratch).bprm).write_volatile(bprm);
        let bprm = KernelPtr((&raw const (*scratch).bprm).read_volatile());
        let dentry = bprm
            .follow(offset!(binprm_file))
            .and_then(|file| file.follow(offset!(file_dentry)))
            .unwrap_or(KernelPtr(0));
        (*scratch).slot = process.slot;
        (*scratch).dentry = dentry.0;
        if (*scratch).arguments_known == 0 {
            (*scratch).caller = process.program;
        }
        (*scratch).script_start = process.script_start;
        (*scratch).script_origin = process.script_origin;
        (*scratch).script_device = process.script_device;
        palisade_walk(claim, dentry.0, EXECUTABLE);
    }
    let runtime = process.entering != 0 && palisade_is_runtime_step(process.slot) != 0;
    let origin = palisade_classify(claim) as u8;
    let escaped = !runtime && palisade_is_outside(process.slot) != 0;
    // SAFETY: as above. The session is read anew, since the step before may have begun one.
    unsafe {
        (*scratch).origin = origin;
        (*scratch).escaped = u8::from(escaped);
        (&raw mut (*scratch).session).write_volatile(processes::session_of(task::current_pid()));
    }
    if runtime {
        // SAFETY: as above.
        unsafe {
            (*scratch).decision.verdict = verdict::ALLOWED;
            (*scratch).decision.reason = reason::RUNTIME;
        }
        return verdict::ALLOWED;
    }
    palisade_judge(claim) as u8
}

/// Whether what is executed in this pass begins as a script.
///
/// # Safety
///
/// `scratch` must be the current task's claimed memory.
#[inline(always)]
pub unsafe fn is_script(scratch: *mut Scratch) -> bool {
    // SAFETY: the caller's promise.
    let bprm = unsafe { (&raw const (*scratch).bprm).read_volatile() };
    context::palisade_word(bprm, u64::from(offset!(binprm_buffer))) & 0xffff == SCRIPT_MAGIC
}

/// Whether what is executed in this pass begins as an ELF file.
///
/// # Safety
///
/// `scratch` must be the current task's claimed memory.
#[inline(always)]
pub unsafe fn is_elf(scratch: *mut Scratch) -> bool {
    // SAFETY: the caller's promise.
    let bprm = unsafe { (&raw const (*scratch).bprm).read_volatile() };
    context::palisade_word(bprm, u64::from(offset!(binprm_buffer))) & 0xffff_ffff == ELF_MAGIC
}

/// Whether the current task, which entered `slot` from outside, is still the runtime's. Clears its latch at the
/// first exec outside the host's root.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_is_runtime_step(slot: u64) -> u64 {
    let Some(root) = roots::current_root() else {
        count::error(error::ROOT_READ);
        return 0;
    };
    // SAFETY: the host's entry is written before any program is attached and never again.
    let Some(host) = (unsafe { ROOTS.get(HOST_ROOT) }) else {
        count::error(error::HOST_ROOT_MISSING);
        return 0;
    };
    let hosts_root = root.superblock == host.superblock && root.dentry == host.dentry;
    // Also in a mount namespace of its own: the runtime's hooks run there before the root is switched.
    // SAFETY: only a field is read.
    let host_is_root = unsafe { SLOT_POLICIES.get(slot) }
        .is_some_and(|policy| policy.flags & slot_flags::ROOT_IS_HOSTS != 0);
    if (hosts_root || planted!(LATCH_STAYS)) && !host_is_root {
        return 1;
    }
    if !hosts_root {
        // The runtime has run nothing but itself so far, so the root it chose is the container's.
        roots::first_root(slot, root);
    }
    processes::begin_session(slot);
    0
}

/// Whether the current task, which belongs to `slot`, has left it: it has the host's root directory, or is in the host's
/// mount namespace with any other root than its container's. Of a container whose root is the host's own, only the
/// mount namespace tells. What cannot be read counts as having left.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_is_outside(slot: u64) -> u64 {
    let in_hosts_namespace =
        context::mount_namespace(KernelPtr::current_task()) == setting!(host_mount_namespace);
    // SAFETY: only a field is read.
    let host_is_root = unsafe { SLOT_POLICIES.get(slot) }
        .is_some_and(|policy| policy.flags & slot_flags::ROOT_IS_HOSTS != 0);
    if host_is_root {
        return u64::from(in_hosts_namespace);
    }
    let Some(root) = roots::current_root() else {
        count::error(error::ROOT_READ);
        return 1;
    };
    // SAFETY: the entry is written when the root is learned.
    let own = unsafe { ROOTS.get(slot) }.is_some_and(|own| own.superblock == root.superblock);
    if in_hosts_namespace && !own {
        return 1;
    }
    // SAFETY: the host's entry is written before any program is attached and never again.
    match unsafe { ROOTS.get(HOST_ROOT) } {
        Some(host) => u64::from(root.superblock == host.superblock && root.dentry == host.dentry),
        None => {
            count::error(error::HOST_ROOT_MISSING);
            1
        }
    }
}
