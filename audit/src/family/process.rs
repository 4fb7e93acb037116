//! Processes that begin and end.

use palisade_proto::v1::{ProcessExit, ProcessFork};

use super::Says;
use crate::{common::Common, line::Line};

impl Says for ProcessFork {
    fn line(&self, of: Common<'_>) -> Line {
        let (pid, parent) = of.actor().map_or((0, 0), |actor| (actor.pid, actor.parent_pid));
        Line::new("fork", of.actor_executable(), format!("pid {pid} of {parent}"))
    }
}

impl Says for ProcessExit {
    fn line(&self, of: Common<'_>) -> Line {
        let pid = of.actor().map_or(0, |actor| actor.pid);
        Line::new("exit", of.actor_executable(), format!("pid {pid} {}", how(self.status, self.signal)))
    }
}

/// How a process ended.
pub(super) fn how(status: u32, signal: u32) -> String {
    if signal == 0 { format!("status {status}") } else { format!("signal {signal}") }
}
