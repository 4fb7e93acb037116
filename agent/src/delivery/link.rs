//! Whether there is a collector, and what is wrong if not: for whoever asks the agent how it is.

use std::sync::{Mutex, MutexGuard, PoisonError};

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// Bytes of batches that were sent, as they travel, and how many batches.
    pub sent_bytes: u64,
    pub sent_batches: u64,
    /// The one that records go to.
    pub collector: Option<String>,
    /// Why there is none, or why it takes nothing; empty otherwise.
    pub problem: String,
}

/// Written by the stream, read by the agent.
#[derive(Debug, Default)]
pub struct Link(Mutex<State>);

impl Link {
    fn locked(&self) -> MutexGuard<'_, State> {
        // Every change is complete before anything can panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn state(&self) -> State {
        self.locked().clone()
    }

    pub(super) fn is_up(&self, collector: String) {
        let mut state = self.locked();
        state.collector = Some(collector);
        state.problem.clear();
    }

    /// The collector takes nothing, for now.
    pub(super) fn is_stuck(&self, problem: &str) {
        problem.clone_into(&mut self.locked().problem);
    }

    pub(super) fn is_down(&self, problem: String) {
        let mut state = self.locked();
        state.collector = None;
        state.problem = problem;
    }

    pub(super) fn has_sent(&self, bytes: usize) {
        let mut state = self.locked();
        state.sent_bytes += bytes as u64;
        state.sent_batches += 1;
    }
}
