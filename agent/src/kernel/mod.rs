//! The kernel's side as the rest of the agent sees it. The only module with aya, and the only one with `unsafe`.

#![expect(unsafe_code, reason = "system calls and kernel interfaces; each block says why it is sound")]

mod btf;
mod load;
mod maps;
mod pins;
mod probe;
mod programs;
mod ring;
mod roots;
mod sets;
mod volumes;

pub use btf::{BtfError, Layout};
pub use load::{Kernel, LoadError, Tier};
pub use maps::{Ledger, Maps, Policies, Sizes, State};
pub use pins::Pins;
pub use probe::{Features, features};
pub use ring::Ring;
pub use sets::{OldSet, agent_state, held_processes};
pub use volumes::{Mounted, Opened, Table, mount_of, mounted};
