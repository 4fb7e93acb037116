//! The streams that are open: one for each run of an agent, and few for each node.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::oneshot;

use crate::store::StreamName;

/// Runs of a node's agent that may stream at a time: one that ends, and one that has taken over.
const MOST_OF_NODE: usize = 4;

#[derive(Default)]
struct Open {
    last: u64,
    streams: HashMap<StreamName, (u64, oneshot::Sender<()>)>,
}

/// All of them.
#[derive(Clone, Default)]
pub struct Streams(Arc<Mutex<Open>>);

/// One of them, until it is dropped.
pub struct Place {
    streams: Streams,
    name: StreamName,
    number: u64,
    over: oneshot::Receiver<()>,
}

impl Streams {
    fn open_ones(&self) -> MutexGuard<'_, Open> {
        // Every change is complete before anything can panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens the stream of one run of an agent. One of the same run that is open is over: its connection may have died without
    /// a word.
    ///
    /// # Errors
    ///
    /// When too many runs of this node's agent stream.
    pub fn open(&self, name: &StreamName) -> Result<Place, String> {
        let mut open = self.open_ones();
        let others = open.streams.keys().filter(|other| other.0 == name.0 && *other != name).count();
        if others >= MOST_OF_NODE {
            return Err(format!("{others} other runs of the agent of node {} stream already", name.0));
        }
        open.last += 1;
        let number = open.last;
        let (take_over, over) = oneshot::channel();
        // Dropping the sender before tells its place.
        open.streams.insert(name.clone(), (number, take_over));
        Ok(Place { streams: self.clone(), name: name.clone(), number, over })
    }
}

impl Place {
    /// Waits until a newer stream of the same run is open.
    pub async fn taken_over(&mut self) {
        let _sender_dropped = (&mut self.over).await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.streams.open_ones();
        if open.streams.get(&self.name).is_some_and(|(number, _)| *number == self.number) {
            open.streams.remove(&self.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(node: &str, epoch: u64) -> StreamName {
        (node.to_owned(), "boot".to_owned(), epoch)
    }

    #[tokio::test]
    async fn a_newer_stream_takes_over_and_its_end_is_its_own() {
        let streams = Streams::default();
        let mut old = streams.open(&name("a", 1)).unwrap();
        let new = streams.open(&name("a", 1)).unwrap();
        old.taken_over().await;
        drop(old);
        assert_eq!(streams.open_ones().streams.len(), 1);
        drop(new);
        assert!(streams.open_ones().streams.is_empty());
    }

    #[test]
    fn a_node_has_few_and_takes_none_from_another() {
        let streams = Streams::default();
        let open: Vec<Place> = (0..4).map(|epoch| streams.open(&name("a", epoch)).unwrap()).collect();
        assert!(streams.open(&name("a", 9)).is_err());
        assert!(streams.open(&name("a", 3)).is_ok(), "the same run again");
        assert!(streams.open(&name("b", 9)).is_ok());
        drop(open);
        assert!(streams.open(&name("a", 9)).is_ok());
    }
}
