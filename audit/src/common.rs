//! What all records say in the same way: whose they are, who acted and what was decided.

use palisade_abi::codes;
use palisade_proto::v1::{Container, Decision, Process, Record};

/// What was decided about an act.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    Allowed,
    /// It would have been denied.
    Audited,
    Denied,
}

impl Verdict {
    pub const ALL: [Self; 3] = [Self::Allowed, Self::Audited, Self::Denied];

    /// As records and queries name it.
    #[must_use]
    pub fn name(self) -> &'static str {
        codes::verdict::name(self.code()).unwrap_or_default()
    }

    fn code(self) -> u8 {
        match self {
            Self::Allowed => codes::verdict::ALLOWED,
            Self::Audited => codes::verdict::AUDITED,
            Self::Denied => codes::verdict::DENIED,
        }
    }
}

/// A record without its event.
#[derive(Clone, Copy)]
pub(crate) struct Common<'a>(pub &'a Record);

impl<'a> Common<'a> {
    pub fn container(self) -> Option<&'a Container> {
        self.0.container.as_ref()
    }

    pub fn actor(self) -> Option<&'a Process> {
        self.0.actor.as_ref()
    }

    pub fn actor_executable(self) -> &'a str {
        self.actor().map_or("", |actor| &actor.executable)
    }

    /// Kind and id of the session that it is of.
    pub fn session(self) -> Option<(&'a str, &'a str)> {
        self.0.session_of.as_ref().map(|session| (&*session.kind, &*session.id))
    }

    pub fn decision(self) -> Option<&'a Decision> {
        self.0.decision.as_ref()
    }

    /// `None` where nothing had to be decided, and for a verdict that this build does not know.
    pub fn verdict(self) -> Option<Verdict> {
        let found = &self.decision()?.verdict;
        Verdict::ALL.into_iter().find(|verdict| verdict.name() == found)
    }

    /// Code of [`codes::reason`], where this build knows the reason.
    pub fn reason(self) -> Option<u8> {
        code(codes::reason::ALL, &self.decision()?.reason)
    }
}

/// The code that a text of a record is the name of.
pub(crate) fn code<T: Copy>(all: &[(T, &str)], text: &str) -> Option<T> {
    all.iter().find(|(_, name)| *name == text).map(|(code, _)| *code)
}
