//! Files, and the folders that they are in. All hooks are older than BPF LSM (5.7).

use aya_ebpf::{macros::lsm, programs::LsmContext};
use palisade_abi::codes::code_act;

use crate::{
    code::{executables::spoils, layers, tracing::opens_memory},
    exec::interpreter,
    tamper,
};

/// `int security_file_open(struct file *file)`
#[lsm(hook = "file_open")]
pub fn file_open(ctx: LsmContext) -> i32 {
    let refused = opens_memory(ctx.arg(0)) || interpreter::opens(ctx.arg(0)) || layers::opens(ctx.arg(0));
    if refused { -1 } else { 0 }
}

/// `int security_inode_unlink(struct inode *dir, struct dentry *dentry)`
#[lsm(hook = "inode_unlink")]
pub fn inode_unlink_tamper(ctx: LsmContext) -> i32 {
    if tamper::on_pin(ctx.arg(1)) { -1 } else { 0 }
}

/// As above.
#[lsm(hook = "inode_unlink")]
pub fn inode_unlink_code(ctx: LsmContext) -> i32 {
    if spoils(code_act::REMOVE, ctx.arg(1)) { -1 } else { 0 }
}

/// `int security_inode_rmdir(struct inode *dir, struct dentry *dentry)`
#[lsm(hook = "inode_rmdir")]
pub fn inode_rmdir(ctx: LsmContext) -> i32 {
    if tamper::on_pin(ctx.arg(1)) { -1 } else { 0 }
}

/// `int security_inode_rename(struct inode *old_dir, struct dentry *old_dentry, struct inode *new_dir, struct dentry
/// *new_dentry, unsigned int flags)`: for an exchange the kernel asks both ways. What is in the new place goes.
#[lsm(hook = "inode_rename")]
pub fn inode_rename_tamper(ctx: LsmContext) -> i32 {
    if tamper::on_pin(ctx.arg(1)) || tamper::on_pin(ctx.arg(3)) { -1 } else { 0 }
}

/// As above.
#[lsm(hook = "inode_rename")]
pub fn inode_rename_code(ctx: LsmContext) -> i32 {
    let refused = spoils(code_act::RENAME, ctx.arg(1)) || spoils(code_act::RENAME, ctx.arg(3));
    if refused { -1 } else { 0 }
}

/// `int security_inode_copy_up(struct dentry *src, struct cred **new)`: what overlayfs copies before it is written to, linked, or
/// its attributes change.
#[lsm(hook = "inode_copy_up")]
pub fn inode_copy_up(ctx: LsmContext) -> i32 {
    if spoils(code_act::CHANGE, ctx.arg(0)) { -1 } else { 0 }
}
