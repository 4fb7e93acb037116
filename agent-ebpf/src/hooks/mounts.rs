//! Mounts. All hooks are older than BPF LSM (5.7).

use aya_ebpf::{macros::lsm, programs::LsmContext};

use crate::{code::executables::mounts_over, tamper};

/// `int security_sb_mount(const char *dev_name, const struct path *path, const char *type, unsigned long flags, void *data)`
#[lsm(hook = "sb_mount")]
pub fn sb_mount(ctx: LsmContext) -> i32 {
    if mounts_over(ctx.arg(1)) { -1 } else { 0 }
}

/// `int security_move_mount(const struct path *from_path, const struct path *to_path)`
#[lsm(hook = "move_mount")]
pub fn move_mount(ctx: LsmContext) -> i32 {
    if mounts_over(ctx.arg(1)) { -1 } else { 0 }
}

/// `int security_sb_umount(struct vfsmount *mnt, int flags)`
#[lsm(hook = "sb_umount")]
pub fn sb_umount(ctx: LsmContext) -> i32 {
    if tamper::on_mount(ctx.arg(0)) { -1 } else { 0 }
}
