//! Whether there is a collector, and what is wrong if not: for whoever asks the agent how it is.

use std::sync::{Mutex, MutexGuard, PoisonError};

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
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
        *self.locked() = State { collector: Some(collector), problem: String::new() };
    }

    /// The collector takes nothing, for now.
    pub(super) fn is_stuck(&self, problem: &str) {
        problem.clone_into(&mut self.locked().problem);
    }

    pub(super) fn is_down(&self, problem: String) {
        *self.locked() = State { collector: None, problem };
    }
}
