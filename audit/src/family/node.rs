//! What the agent says of its containers and of itself.

use palisade_proto::v1::{Coverage, NodeState};

use super::Says;
use crate::{common::Common, line::Line};

impl Says for Coverage {
    fn line(&self, of: Common<'_>) -> Line {
        let mode = of.container().map_or("", |container| &container.mode);
        let profiles = match of.container() {
            Some(container) if !container.profiles.is_empty() => {
                format!("{} revision {}", container.profiles.join(", "), container.revision)
            }
            _ => "no profile".to_owned(),
        };
        Line::new(&*self.change, "", format!("{mode} by {profiles}, {} tier", self.tier))
    }
}

impl Says for NodeState {
    fn line(&self, _of: Common<'_>) -> Line {
        Line::new(format!("claim {}", self.claim), &self.tier, self.failures.join("; "))
    }
}
