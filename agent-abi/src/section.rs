//! The families of rules in a profile, each a section of it: the index of a family is the same in every layer.

/// What is executed, and other code that comes into processes.
pub const EXEC: usize = 0;
/// What is read, written, created and removed.
pub const FILES: usize = 1;
/// Whom processes talk to.
pub const NETWORK: usize = 2;
/// What the kernel lets a process do beyond that.
pub const PRIVILEGES: usize = 3;

/// How many there are.
pub const COUNT: usize = 4;
