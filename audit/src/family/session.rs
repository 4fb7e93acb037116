//! Sessions that begin, get their name and end.

use palisade_profile::text::{word, words};
use palisade_proto::v1::Session;

use super::{Says, process::how};
use crate::{common::Common, line::Line};

impl Says for Session {
    fn executable(&self) -> Option<&str> {
        Some(&self.executable)
    }

    fn session(&self) -> Option<(&str, &str)> {
        Some((&self.kind, &self.id))
    }

    fn line(&self, _of: Common<'_>) -> Line {
        let what = if self.change == "end" {
            let how = how(self.status, self.signal);
            format!("{} execs, {} not allowed, {how}", self.execs, self.not_allowed)
        } else {
            let terminal = if self.terminal.is_empty() {
                String::new()
            } else {
                format!(" on {}", word(&self.terminal))
            };
            format!("by {}{terminal}: {}", word(&self.entered_by_comm), words(&self.arguments))
        };
        Line::new(
            format!("session {}", self.change),
            &self.executable,
            format!("{} {} {what}", self.kind, self.id),
        )
    }
}
