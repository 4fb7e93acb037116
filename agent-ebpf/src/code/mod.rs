//! Code that comes into a process other than by an exec: memory that becomes executable, and the memory of a process that
//! another one may write to. And the files that allowed code is in.
//!
//! An ELF interpreter, a shared library and whatever a loader loads are files that are mapped executable, so this is where
//! `ld.so ./file`, `LD_PRELOAD` and `dlopen` are judged. The common case, an unmodified file of the image under a profile that
//! lists no libraries, is decided without a path.

pub mod act;
pub mod executables;
pub mod judge;
pub mod layers;
pub mod memory;
pub mod report;
pub mod tracing;
