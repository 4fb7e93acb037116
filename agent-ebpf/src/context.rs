//! Who is acting: the parts of a record that describe a process.

use aya_ebpf::helpers::{bpf_get_current_cgroup_id, generated::bpf_probe_read_kernel};
use palisade_abi::{
    codes::error,
    offsets::ABSENT,
    record::{ContextPart, ProcessPart},
};

use crate::{count, kernel::KernelPtr, maps::offset};

/// Size of the kernel's `struct upid`: an int and a pointer.
const UPID: u32 = 16;

// The readers below are global functions: the verifier checks each once, and their callers see a plain number
// instead of every combination of reads that may fail.

/// Boot time at which the process of the task at `task` started; 0 when unknown.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_start_time(task: u64) -> u64 {
    let leader = KernelPtr(task).follow(offset!(task_group_leader));
    match leader.and_then(|leader| leader.read(offset!(task_start_time))) {
        Some(time) => time,
        None => {
            if task != 0 {
                count::error(error::TASK_READ);
            }
            0
        }
    }
}

/// The process id of the task at `task` in its innermost pid namespace; 0 when unknown.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_namespace_pid(task: u64) -> u64 {
    let Some(leader) = KernelPtr(task).follow(offset!(task_group_leader)) else { return 0 };
    let Some(pid) = leader.follow(offset!(task_thread_pid)) else { return 0 };
    let Some(level) = pid.read::<u32>(offset!(pid_level)) else { return 0 };
    let numbers = offset!(pid_numbers);
    if numbers == ABSENT || level > 32 {
        return 0;
    }
    u64::from(pid.read::<u32>(numbers + level * UPID).unwrap_or(0))
}

/// Inode number of the namespace that the structure at `holder` points to at `member`; 0 when unknown.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_namespace(holder: u64, member: u64, number: u64) -> u64 {
    match KernelPtr(holder).follow(member as u32) {
        Some(namespace) => u64::from(namespace.read::<u32>(number as u32).unwrap_or(0)),
        None => 0,
    }
}

/// A 32-bit field of the structure at `holder`; 0 when it cannot be read.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_word(holder: u64, member: u64) -> u64 {
    u64::from(KernelPtr(holder).read::<u32>(member as u32).unwrap_or(0))
}

/// A pointer in the structure at `holder`; 0 when it cannot be read.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_pointer(holder: u64, member: u64) -> u64 {
    KernelPtr(holder).read::<u64>(member as u32).unwrap_or(0)
}

#[inline(always)]
fn word(holder: u64, member: u32) -> u32 {
    palisade_word(holder, u64::from(member)) as u32
}

#[inline(always)]
fn pointer(holder: u64, member: u32) -> u64 {
    palisade_pointer(holder, u64::from(member))
}

#[inline(always)]
fn namespace(holder: u64, member: u32, number: u32) -> u32 {
    palisade_namespace(holder, u64::from(member), u64::from(number)) as u32
}

/// Describes the process of `task` into `part`.
///
/// # Safety
///
/// `part` must point to writable memory of that type, as a reserved record does.
#[inline(always)]
pub unsafe fn describe(task: KernelPtr, part: *mut ProcessPart) {
    let task = task.0;
    let parent = pointer(task, offset!(task_real_parent));
    // SAFETY: the caller's promise.
    unsafe {
        (&raw mut (*part).pid).write(word(task, offset!(task_tgid)));
        (&raw mut (*part).tid).write(word(task, offset!(task_pid)));
        (&raw mut (*part).namespace_pid).write(palisade_namespace_pid(task) as u32);
        (&raw mut (*part).parent_pid).write(word(parent, offset!(task_tgid)));
        (&raw mut (*part).start_time).write(palisade_start_time(task));
        (&raw mut (*part).parent_start_time).write(palisade_start_time(parent));
        // The eight ids lie together in `struct cred`; the agent checks that at load time.
        let cred = pointer(task, offset!(task_cred));
        copy(&raw mut (*part).uid, 8 * 4, cred, offset!(cred_uid));
        copy(&raw mut (*part).comm, 16, task, offset!(task_comm));
        copy(&raw mut (*part).parent_comm, 16, parent, offset!(task_comm));
    }
}

/// Copies `size` bytes at `offset` of the structure at `holder` to `target`; zeros when that fails, as the helper
/// does it.
///
/// # Safety
///
/// `target` must have `size` writable bytes.
#[inline(always)]
unsafe fn copy<T>(target: *mut T, size: u32, holder: u64, offset: u32) {
    // SAFETY: the caller's promise; the helper checks what it reads.
    let _zeroed_on_failure =
        unsafe { bpf_probe_read_kernel(target.cast(), size, (holder + u64::from(offset)) as *const _) };
}

/// The inode number of a task's mount namespace.
#[inline(always)]
pub fn mount_namespace(task: KernelPtr) -> u32 {
    let nsproxy = pointer(task.0, offset!(task_nsproxy));
    namespace(nsproxy, offset!(nsproxy_mnt), offset!(mnt_namespace_inum))
}

/// Describes the current task's surroundings into `part`.
///
/// # Safety
///
/// As [`describe`].
#[inline(always)]
pub unsafe fn describe_context(task: KernelPtr, part: *mut ContextPart) {
    let task = task.0;
    let cred = pointer(task, offset!(task_cred));
    let nsproxy = pointer(task, offset!(task_nsproxy));
    let signal = pointer(task, offset!(task_signal));
    let tty = if offset!(signal_tty) == ABSENT || offset!(tty_name) == ABSENT {
        0
    } else {
        pointer(signal, offset!(signal_tty))
    };
    // SAFETY: the caller's promise.
    unsafe {
        (&raw mut (*part).cgroup).write(bpf_get_current_cgroup_id());
        // Five sets of 64 bits lie together: inheritable, permitted, effective, bounding, ambient.
        copy(&raw mut (*part).capabilities_inheritable, 5 * 8, cred, offset!(cred_cap_inheritable));
        (&raw mut (*part).mount_namespace).write(namespace(
            nsproxy,
            offset!(nsproxy_mnt),
            offset!(mnt_namespace_inum),
        ));
        (&raw mut (*part).pid_namespace).write(namespace(
            nsproxy,
            offset!(nsproxy_pid),
            offset!(pid_namespace_inum),
        ));
        (&raw mut (*part).network_namespace).write(namespace(
            nsproxy,
            offset!(nsproxy_net),
            offset!(net_inum),
        ));
        (&raw mut (*part).uts_namespace).write(namespace(
            nsproxy,
            offset!(nsproxy_uts),
            offset!(uts_namespace_inum),
        ));
        (&raw mut (*part).ipc_namespace).write(namespace(
            nsproxy,
            offset!(nsproxy_ipc),
            offset!(ipc_namespace_inum),
        ));
        (&raw mut (*part).cgroup_namespace).write(namespace(
            nsproxy,
            offset!(nsproxy_cgroup),
            offset!(cgroup_namespace_inum),
        ));
        (&raw mut (*part).user_namespace).write(namespace(
            cred,
            offset!(cred_user_ns),
            offset!(user_namespace_inum),
        ));
        (&raw mut (*part).reserved).write(0);
        copy(&raw mut (*part).tty, 16, tty, offset!(tty_name));
    }
}
