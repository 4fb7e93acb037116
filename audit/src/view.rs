//! A record as its readers look at it, whatever kind it is.

use palisade_proto::v1::{Container, Coverage, Decision, Process, Record, record::Event};

use crate::{
    common::{Common, Verdict},
    family::Says,
    kind::{self, Kind},
    line::Line,
    observe::{self, Observation},
    refusal::{self, Refusal},
};

/// A record and what its event has to say.
#[derive(Clone, Copy)]
pub struct View<'a> {
    common: Common<'a>,
    /// Absent for a kind that this build does not know.
    said: Option<(Kind, &'a dyn Says)>,
}

impl<'a> View<'a> {
    #[must_use]
    pub fn new(record: &'a Record) -> Self {
        Self { common: Common(record), said: record.event.as_ref().map(kind::of) }
    }

    /// `None` for a kind that this build does not know.
    #[must_use]
    pub fn kind(&self) -> Option<Kind> {
        self.said.map(|(kind, _)| kind)
    }

    fn said(&self) -> Option<&'a dyn Says> {
        self.said.map(|(_, says)| says)
    }

    #[must_use]
    pub fn container(&self) -> Option<&'a Container> {
        self.common.container()
    }

    /// The process that acted.
    #[must_use]
    pub fn actor(&self) -> Option<&'a Process> {
        self.common.actor()
    }

    /// What the acting process executes.
    #[must_use]
    pub fn actor_executable(&self) -> &'a str {
        self.common.actor_executable()
    }

    /// The subject: the program that the record is about. Of an exec what was executed, of a session what it was
    /// entered with, of all else that a process does what that process executes.
    #[must_use]
    pub fn executable(&self) -> &'a str {
        self.said().and_then(Says::executable).unwrap_or_else(|| self.actor_executable())
    }

    /// Kind and id of the session that it is of, or about.
    #[must_use]
    pub fn session(&self) -> Option<(&'a str, &'a str)> {
        self.said().and_then(Says::session).or_else(|| self.common.session())
    }

    #[must_use]
    pub fn decision(&self) -> Option<&'a Decision> {
        self.common.decision()
    }

    /// `None` where nothing had to be decided, and for a verdict that this build does not know.
    #[must_use]
    pub fn verdict(&self) -> Option<Verdict> {
        self.common.verdict()
    }

    /// The record in words.
    #[must_use]
    pub fn line(&self) -> Line {
        self.said().map_or_else(Line::unknown, |says| says.line(self.common))
    }

    /// What it says of a refusal by a profile, or of what would be one.
    #[must_use]
    pub fn refusal(&self) -> Option<Refusal> {
        refusal::of(self.common, self.said()?.refused(self.common)?)
    }

    /// What was executed in an identified container, the script and its interpreter, and code that came by other
    /// means; what was refused or is the runtime's own is left out.
    #[must_use]
    pub fn observations(&self) -> Vec<Observation> {
        self.said().map_or_else(Vec::new, |says| observe::of(self.common, says.observed(self.common)))
    }

    /// What holds for its container, where it is about that.
    #[must_use]
    pub fn coverage(&self) -> Option<&'a Coverage> {
        match &self.common.0.event {
            Some(Event::Coverage(coverage)) => Some(coverage),
            _ => None,
        }
    }

    /// Whether it says that its container has ended.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.coverage().is_some_and(|coverage| coverage.change == "ended")
    }
}

#[cfg(test)]
mod tests {
    use palisade_proto::record_from_json;
    use proptest::prelude::*;
    use prost::Message as _;
    use serde_json::json;

    use super::*;

    #[test]
    fn a_verdict_that_this_build_does_not_know_is_none() {
        let of = |verdict: &str| {
            let record = record_from_json(&json!({"decision": {"verdict": verdict}}).to_string()).unwrap();
            View::new(&record).verdict()
        };
        for verdict in Verdict::ALL {
            assert_eq!(of(verdict.name()), Some(verdict));
        }
        for other in ["", "held", "deferred"] {
            assert_eq!(of(other), None, "{other}");
        }
    }

    #[test]
    fn a_session_is_of_itself_and_all_else_of_that_in_which_it_was_done() {
        let of = |record: serde_json::Value| {
            let record = record_from_json(&record.to_string()).unwrap();
            View::new(&record).session().map(|(kind, id)| (kind.to_owned(), id.to_owned()))
        };
        let expected = |kind: &str, id: &str| Some((kind.to_owned(), id.to_owned()));
        assert_eq!(of(json!({"session": {"kind": "admin", "id": "b-7-1"}})), expected("admin", "b-7-1"));
        assert_eq!(
            of(json!({"session_of": {"kind": "probe", "id": "b-8-1"}, "exec": {}})),
            expected("probe", "b-8-1")
        );
        assert_eq!(of(json!({"gap": {}})), None);
    }

    proptest! {
        /// A record comes from a node that may have been taken over.
        #[test]
        fn no_record_makes_its_readers_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), event in 16..30_u32) {
            // An event of some kind around the bytes.
            let mut whole = Vec::new();
            prost::encoding::encode_key(event, prost::encoding::WireType::LengthDelimited, &mut whole);
            prost::encoding::encode_varint(bytes.len() as u64, &mut whole);
            whole.extend(&bytes);
            for bytes in [&whole, &bytes] {
                if let Ok(record) = Record::decode(bytes.as_slice()) {
                    let view = View::new(&record);
                    let _ = (view.line(), view.refusal(), view.observations(), view.session(), view.executable());
                }
            }
        }
    }
}
