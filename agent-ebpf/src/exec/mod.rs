//! Execution: the decision at `bprm_check_security`, and what was executed at `sched_process_exec`.
//!
//! The check runs once per pass of the binary format loop: a script first, then its interpreter. Where LSM
//! programs cannot be loaded, the tracepoint is the first and only place, and a denial there kills the process
//! before its first instruction. Where both run, the tracepoint judges again: should a kernel have skipped the
//! check, the process still dies.

pub mod arguments;
pub mod check;
pub mod examine;
pub mod executed;
pub mod interpreter;
pub mod judge;
pub mod pending;
pub mod report;
pub mod signals;
