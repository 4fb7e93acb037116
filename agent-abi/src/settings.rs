//! What is frozen when the programs are loaded.

/// Settings in frozen read-only memory: the verifier treats them as constants.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Settings {
    /// Key of the path hash, random per load.
    pub hash_key: [u64; 2],
    /// The set that these programs belong to; see [`SetMeta`].
    pub epoch: u64,
    /// 1 when the helper `bpf_task_pt_regs` exists (kernel 5.15).
    pub have_task_pt_regs: u32,
    /// Distance from a task's stack to its saved registers where that helper is missing; 0 when unknown.
    pub pt_regs_at: u32,
    /// Inode number of the host's mount namespace.
    pub host_mount_namespace: u32,
    /// 1 when the helper `bpf_loop` exists (kernel 5.17).
    pub have_loop: u32,
    /// 1 when the kernel may skip a program on a tracepoint (since 7.0).
    pub skips_tracepoints: u32,
    /// How many arguments `dequeue_signal` has: 3 or 4; 0 when that is not known.
    pub dequeue_arguments: u32,
}
layout!(Settings, 48);

/// Tasks that can judge at the same time.
pub const SCRATCH_ENTRIES: u32 = 512;
