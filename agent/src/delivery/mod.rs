//! From the agent to the collector: what waits is in a spool on the node's disk, and a stream empties it.

mod aged;
mod keeper;
mod link;
mod queue;
pub mod refused;
mod row;
mod spool;
mod stream;
#[cfg(test)]
mod tests;

pub use link::Link;
pub use queue::{Full, Limits, News, Queue, Tally};
pub use row::Credit;
pub use spool::Run;
pub use stream::deliver;
