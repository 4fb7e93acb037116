//! What is particular to the kinds of events, a file for each family.

mod code;
mod delivery;
mod exec;
mod node;
mod process;
mod session;
mod tamper;

use crate::{common::Common, line::Line, observe::Seen, refusal::Refused};

/// What an event says beyond what all records say in the same way.
pub(crate) trait Says {
    /// A line of it in words.
    fn line(&self, of: Common<'_>) -> Line;

    /// The program that it is about, where that is not the acting one.
    fn executable(&self) -> Option<&str> {
        None
    }

    /// Kind and id of the session that it is about.
    fn session(&self) -> Option<(&str, &str)> {
        None
    }

    /// What was refused, or would be: of what a profile may allow.
    fn refused(&self, _of: Common<'_>) -> Option<Refused<'_>> {
        None
    }

    /// What a profile that is drafted from it has to allow.
    fn observed(&self, _of: Common<'_>) -> Vec<Seen<'_>> {
        Vec::new()
    }
}
