//! Where the kernel calls in: each program with the prototype of its hook, and who is asked. One program for each hook and family: the
//! verifier has a budget for each. Of several the one that was attached last is called first (`bpf_trampoline_link_prog`), and the first that
//! refuses ends the hook: families whose order matters share a program. `agent/src/kernel/programs.rs` has them as a table.

mod bpf;
mod cgroups;
mod demand;
mod exec;
mod files;
mod memory;
mod mounts;
mod tasks;
