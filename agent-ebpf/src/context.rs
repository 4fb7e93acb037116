//! Who is acting: the parts of a record that describe a process.

use aya_ebpf::helpers::bpf_get_current_cgroup_id;
use palisade_abi::{
    codes::error,
    record::{ContextPart, ProcessPart},
};

use crate::{count, kernel::KernelPtr, maps::offset};

/// Size of the kernel's `struct upid`: an int and a pointer.
const UPID: u32 = 16;

/// Boot time at which the process of `task` started.
#[inline(always)]
pub fn start_time(task: KernelPtr) -> u64 {
    task.follow(offset!(task_group_leader))
        .and_then(|leader| leader.read(offset!(task_start_time)))
        .unwrap_or_else(|| {
            count::error(error::TASK_READ);
            0
        })
}

#[inline(always)]
fn namespace_pid(task: KernelPtr) -> Option<u32> {
    let leader = task.follow(offset!(task_group_leader))?;
    let pid = leader.follow(offset!(task_thread_pid))?;
    let level: u32 = pid.read(offset!(pid_level))?;
    let numbers = offset!(pid_numbers);
    if numbers == palisade_abi::offsets::ABSENT || level > 32 {
        return None;
    }
    pid.read(numbers + level * UPID)
}

/// Describes the process of `task` into `part`.
///
/// # Safety
///
/// `part` must point to writable memory of that type, as a reserved record does.
#[inline(always)]
pub unsafe fn describe(task: KernelPtr, part: *mut ProcessPart) {
    // The eight ids lie together in `struct cred`; the agent checks that at load time.
    let ids: [u32; 8] =
        task.follow(offset!(task_cred)).and_then(|cred| cred.read(offset!(cred_uid))).unwrap_or([u32::MAX; 8]);
    let parent = task.follow(offset!(task_real_parent));
    let value = ProcessPart {
        pid: task.read(offset!(task_tgid)).unwrap_or(0),
        tid: task.read(offset!(task_pid)).unwrap_or(0),
        namespace_pid: namespace_pid(task).unwrap_or(0),
        parent_pid: parent.and_then(|parent| parent.read(offset!(task_tgid))).unwrap_or(0),
        start_time: start_time(task),
        parent_start_time: parent.map_or(0, start_time),
        uid: ids[0],
        gid: ids[1],
        suid: ids[2],
        sgid: ids[3],
        euid: ids[4],
        egid: ids[5],
        fsuid: ids[6],
        fsgid: ids[7],
        comm: task.read(offset!(task_comm)).unwrap_or([0; 16]),
    };
    // SAFETY: the caller's promise.
    unsafe { part.write(value) };
}

/// Inode number of the namespace that `nsproxy` holds at `member`.
#[inline(always)]
fn namespace(nsproxy: KernelPtr, member: u32, inum: u32) -> u32 {
    nsproxy.follow(member).and_then(|namespace| namespace.read(inum)).unwrap_or(0)
}

/// The inode number of the current task's mount namespace.
#[inline(always)]
pub fn mount_namespace(task: KernelPtr) -> Option<u32> {
    task.follow(offset!(task_nsproxy))?.follow(offset!(nsproxy_mnt))?.read(offset!(mnt_namespace_inum))
}

/// Describes the current task's surroundings into `part`.
///
/// # Safety
///
/// As [`describe`].
#[inline(always)]
pub unsafe fn describe_context(task: KernelPtr, part: *mut ContextPart) {
    let cred = task.follow(offset!(task_cred)).unwrap_or(KernelPtr(0));
    // Five sets of 64 bits lie together: inheritable, permitted, effective, bounding, ambient.
    let capabilities: [u64; 5] = cred.read(offset!(cred_cap_inheritable)).unwrap_or([0; 5]);
    let nsproxy = task.follow(offset!(task_nsproxy)).unwrap_or(KernelPtr(0));
    let value = ContextPart {
        // SAFETY: the helper has no preconditions.
        cgroup: unsafe { bpf_get_current_cgroup_id() },
        capabilities_inheritable: capabilities[0],
        capabilities_permitted: capabilities[1],
        capabilities_effective: capabilities[2],
        capabilities_bounding: capabilities[3],
        capabilities_ambient: capabilities[4],
        mount_namespace: namespace(nsproxy, offset!(nsproxy_mnt), offset!(mnt_namespace_inum)),
        pid_namespace: namespace(nsproxy, offset!(nsproxy_pid), offset!(pid_namespace_inum)),
        network_namespace: namespace(nsproxy, offset!(nsproxy_net), offset!(net_inum)),
        uts_namespace: namespace(nsproxy, offset!(nsproxy_uts), offset!(uts_namespace_inum)),
        ipc_namespace: namespace(nsproxy, offset!(nsproxy_ipc), offset!(ipc_namespace_inum)),
        cgroup_namespace: namespace(nsproxy, offset!(nsproxy_cgroup), offset!(cgroup_namespace_inum)),
        user_namespace: namespace(cred, offset!(cred_user_ns), offset!(user_namespace_inum)),
        reserved: 0,
        tty: task
            .follow(offset!(task_signal))
            .and_then(|signal| signal.follow(offset!(signal_tty)))
            .and_then(|tty| tty.read(offset!(tty_name)))
            .unwrap_or([0; 16]),
    };
    // SAFETY: the caller's promise.
    unsafe { part.write(value) };
}
