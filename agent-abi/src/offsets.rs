//! Places of kernel fields, which differ from kernel to kernel and are resolved from BTF at load time.
//!
//! Each has a distinct non-zero poison value until it is overridden: with equal initialisers the compiler may
//! merge an offset's storage with another constant, and the override then changes both. A field that the kernel
//! lacks is [`ABSENT`], which the verifier sees as a constant and prunes the code that would need it.

/// The value of an offset whose field the kernel does not have.
pub const ABSENT: u32 = u32::MAX;

/// Bytes that the programs read of a dentry at once, from the eight that its counter is in: its parent, its name and its inode must be among them.
pub const DENTRY_BYTES: u32 = 56;

/// A kernel field: where to find it in BTF and what it must look like there.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// Name in [`KernelOffsets`].
    pub name: &'static str,
    pub structure: &'static str,
    /// Members from the outside in, separated by dots. Empty for the structure itself: then its size is meant, not a place.
    pub member: &'static str,
    /// Size that the member must have, in bytes; 0 when any will do.
    pub size: u32,
    /// Whether the programs are of no use without it.
    pub required: bool,
}

macro_rules! offsets {
    ($($name:ident = $structure:literal $member:literal $size:literal $need:ident;)*) => {
        /// Byte offsets, each within the structure that its name starts with.
        #[repr(C)]
        #[derive(Clone, Copy, Debug)]
        #[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
        pub struct KernelOffsets { $(pub $name: u32,)* }

        /// What to look up, in the order of the struct's fields.
        pub const FIELDS: &[Field] = &[$(Field {
            name: stringify!($name), structure: $structure, member: $member, size: $size, required: offsets!(@$need),
        }),*];

        impl KernelOffsets {
            /// The initial values: distinct, non-zero, and recognisably wrong.
            #[must_use]
            pub const fn poison() -> Self {
                let mut next = 0x7a00_0001_u32;
                $(let $name = next; next = next.wrapping_add(0x0001_0003);)*
                let _ = next;
                Self { $($name),* }
            }
        }

        const _: () = assert!(size_of::<KernelOffsets>() == FIELDS.len() * 4);
    };
    (@required) => { true };
    (@optional) => { false };
}

impl KernelOffsets {
    /// Whether a dentry's parent, name and inode are behind its counter, within [`DENTRY_BYTES`].
    #[must_use]
    pub fn dentry_is_together(&self) -> bool {
        let begin = self.dentry_sequence & !7;
        let holds = |offset: u32, size: u32| offset >= begin + 4 && offset - begin + size <= DENTRY_BYTES;
        holds(self.dentry_parent, 8)
            && holds(self.dentry_name, 8)
            && holds(self.dentry_name_length, 4)
            && holds(self.dentry_inode, 8)
    }
}

offsets! {
    task_tgid = "task_struct" "tgid" 4 required;
    task_pid = "task_struct" "pid" 4 required;
    task_real_parent = "task_struct" "real_parent" 8 required;
    task_group_leader = "task_struct" "group_leader" 8 required;
    task_start_time = "task_struct" "start_boottime" 8 required;
    task_mm = "task_struct" "mm" 8 required;
    task_fs = "task_struct" "fs" 8 required;
    task_cred = "task_struct" "cred" 8 required;
    task_nsproxy = "task_struct" "nsproxy" 8 required;
    task_cgroups = "task_struct" "cgroups" 8 required;
    task_signal = "task_struct" "signal" 8 required;
    task_comm = "task_struct" "comm" 16 required;
    task_exit_code = "task_struct" "exit_code" 4 required;
    task_thread_pid = "task_struct" "thread_pid" 8 required;
    task_personality = "task_struct" "personality" 4 required;
    task_ptrace = "task_struct" "ptrace" 4 required;
    task_files = "task_struct" "files" 8 required;
    files_table = "files_struct" "fdt" 8 required;
    table_files = "fdtable" "fd" 8 required;
    task_stack = "task_struct" "stack" 8 optional;
    signal_live = "signal_struct" "live" 4 required;
    signal_tty = "signal_struct" "tty" 8 optional;
    tty_name = "tty_struct" "name" 64 optional;
    cred_uid = "cred" "uid" 4 required;
    cred_fsgid = "cred" "fsgid" 4 required;
    cred_cap_inheritable = "cred" "cap_inheritable" 8 required;
    cred_cap_ambient = "cred" "cap_ambient" 8 required;
    cred_user_ns = "cred" "user_ns" 8 required;
    nsproxy_uts = "nsproxy" "uts_ns" 8 optional;
    nsproxy_ipc = "nsproxy" "ipc_ns" 8 optional;
    nsproxy_mnt = "nsproxy" "mnt_ns" 8 required;
    nsproxy_pid = "nsproxy" "pid_ns_for_children" 8 optional;
    nsproxy_net = "nsproxy" "net_ns" 8 optional;
    nsproxy_cgroup = "nsproxy" "cgroup_ns" 8 optional;
    uts_namespace_inum = "uts_namespace" "ns.inum" 4 optional;
    ipc_namespace_inum = "ipc_namespace" "ns.inum" 4 optional;
    mnt_namespace_inum = "mnt_namespace" "ns.inum" 4 required;
    pid_namespace_inum = "pid_namespace" "ns.inum" 4 optional;
    net_inum = "net" "ns.inum" 4 optional;
    cgroup_namespace_inum = "cgroup_namespace" "ns.inum" 4 optional;
    user_namespace_inum = "user_namespace" "ns.inum" 4 optional;
    pid_level = "pid" "level" 4 optional;
    pid_numbers = "pid" "numbers" 0 optional;
    mm_arg_start = "mm_struct" "arg_start" 8 required;
    mm_arg_end = "mm_struct" "arg_end" 8 required;
    mm_exe_file = "mm_struct" "exe_file" 8 required;
    vma_file = "vm_area_struct" "vm_file" 8 required;
    vma_flags = "vm_area_struct" "vm_flags" 8 required;
    vma_anonymous = "vm_area_struct" "anon_vma" 8 required;
    task_nameidata = "task_struct" "nameidata" 8 optional;
    nameidata_name = "nameidata" "name" 8 optional;
    filename_name = "filename" "name" 8 optional;
    filename_user = "filename" "uptr" 8 optional;
    signal_exec_mutex = "signal_struct" "cred_guard_mutex" 0 optional;
    mutex_owner = "mutex" "owner" 8 optional;
    task_flags = "task_struct" "flags" 4 required;
    file_open_mode = "file" "f_mode" 4 required;
    file_flags = "file" "f_flags" 4 required;
    file_inode = "file" "f_inode" 8 required;
    backing_file_user_dentry = "backing_file" "user_path.dentry" 8 optional;
    path_dentry = "path" "dentry" 8 required;
    fs_root_dentry = "fs_struct" "root.dentry" 8 required;
    fs_pwd_dentry = "fs_struct" "pwd.dentry" 8 required;
    dentry_parent = "dentry" "d_parent" 8 required;
    dentry_sequence = "dentry" "d_seq.seqcount.sequence" 4 required;
    dentry_name = "dentry" "d_name.name" 8 required;
    dentry_name_length = "dentry" "d_name.len" 4 required;
    dentry_private = "dentry" "d_fsdata" 8 required;
    dentry_inode = "dentry" "d_inode" 8 required;
    dentry_superblock = "dentry" "d_sb" 8 required;
    vfsmount_superblock = "vfsmount" "mnt_sb" 8 required;
    vfsmount_root = "vfsmount" "mnt_root" 8 required;
    map_id = "bpf_map" "id" 4 required;
    program_aux = "bpf_prog" "aux" 8 required;
    program_aux_id = "bpf_prog_aux" "id" 4 required;
    superblock_private = "super_block" "s_fs_info" 8 required;
    superblock_root = "super_block" "s_root" 8 required;
    superblock_device = "super_block" "s_dev" 4 required;
    superblock_magic = "super_block" "s_magic" 8 required;
    superblock_user_ns = "super_block" "s_user_ns" 8 required;
    inode_number = "inode" "i_ino" 8 required;
    inode_generation = "inode" "i_generation" 4 required;
    inode_mode = "inode" "i_mode" 2 required;
    inode_changed = "inode" "i_ctime_sec" 8 optional;
    inode_changed_before_6_11 = "inode" "__i_ctime.tv_sec" 8 optional;
    inode_changed_before_6_6 = "inode" "i_ctime.tv_sec" 8 optional;
    file_dentry = "file" "f_path.dentry" 8 required;
    binprm_cred = "linux_binprm" "cred" 8 required;
    cred_euid = "cred" "euid" 4 required;
    cred_egid = "cred" "egid" 4 required;
    cred_cap_permitted = "cred" "cap_permitted" 8 required;
    binprm_file = "linux_binprm" "file" 8 required;
    binprm_argc = "linux_binprm" "argc" 4 required;
    binprm_filename = "linux_binprm" "filename" 8 required;
    binprm_buffer = "linux_binprm" "buf" 256 required;
    binprm_interp = "linux_binprm" "interp" 8 required;
    cgroup_kn = "cgroup" "kn" 8 required;
    cgroup_root = "cgroup" "root" 8 required;
    cgroup_parent_css = "cgroup" "self.parent" 8 required;
    css_cgroup = "cgroup_subsys_state" "cgroup" 8 required;
    cgroup_root_hierarchy = "cgroup_root" "hierarchy_id" 4 required;
    kernfs_name = "kernfs_node" "name" 8 required;
    kernfs_id = "kernfs_node" "id" 8 required;
    css_set_default_cgroup = "css_set" "dfl_cgrp" 8 required;
    pt_regs_di = "pt_regs" "di" 8 optional;
    pt_regs_si = "pt_regs" "si" 8 optional;
    pt_regs_dx = "pt_regs" "dx" 8 optional;
    pt_regs_r8 = "pt_regs" "r8" 8 optional;
    pt_regs_orig_ax = "pt_regs" "orig_ax" 8 optional;
    ovl_inode_vfs = "ovl_inode" "vfs_inode" 0 optional;
    ovl_inode_upper = "ovl_inode" "__upperdentry" 8 optional;
    ovl_inode_redirect = "ovl_inode" "redirect" 8 optional;
    ovl_inode_entry = "ovl_inode" "oe" 8 optional;
    ovl_entry_lowers = "ovl_entry" "__lowerstack" 0 optional;
    ovl_entry_lowers_before_6_5 = "ovl_entry" "lowerstack" 0 optional;
    ovl_path_layer = "ovl_path" "layer" 8 optional;
    ovl_path_dentry = "ovl_path" "dentry" 8 optional;
    ovl_layer_mount = "ovl_layer" "mnt" 8 optional;
    ovl_layer_size = "ovl_layer" "" 0 optional;
    ovl_fs_layers = "ovl_fs" "layers" 8 optional;
    ovl_fs_layer_count = "ovl_fs" "numlayer" 4 optional;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn poison_values_differ_and_are_never_zero_or_absent() {
        let mut next = 0x7a00_0001_u32;
        let mut seen = std::collections::BTreeSet::new();
        for _ in FIELDS {
            assert!(next != 0 && next != ABSENT && seen.insert(next));
            next = next.wrapping_add(0x0001_0003);
        }
    }

    #[test]
    fn a_dentry_is_read_at_once_where_its_fields_are_behind_its_counter() {
        let with =
            |dentry_sequence, dentry_parent, dentry_name_length, dentry_name, dentry_inode| KernelOffsets {
                dentry_sequence,
                dentry_parent,
                dentry_name_length,
                dentry_name,
                dentry_inode,
                ..KernelOffsets::poison()
            };
        // Of 5.10 to 7.2.
        assert!(with(4, 24, 36, 40, 48).dentry_is_together());
        assert!(with(8, 16, 48, 48, 56).dentry_is_together());
        assert!(!with(24, 16, 36, 40, 48).dentry_is_together());
        assert!(!with(4, 0, 36, 40, 48).dentry_is_together());
        assert!(!with(4, 24, 36, 52, 40).dentry_is_together());
        assert!(!with(4, 24, 56, 40, 48).dentry_is_together());
        assert!(!with(4, 24, 36, 40, 56).dentry_is_together());
    }
}
