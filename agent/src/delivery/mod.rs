//! From the agent to the collector: a bounded queue, and a stream that empties it.

mod queue;
mod stream;

pub use queue::{Credit, Queue};
pub use stream::deliver;
