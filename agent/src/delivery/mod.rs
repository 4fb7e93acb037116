//! From the agent to the collector: a bounded queue, and a stream that empties it.

mod link;
mod queue;
pub mod refused;
mod stream;

pub use link::Link;
pub use queue::{Credit, Queue};
pub use stream::deliver;
