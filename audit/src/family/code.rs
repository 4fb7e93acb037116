//! Code that comes into a process by other means than an exec.

use palisade_abi::codes::{code_act, reason};
use palisade_profile::{explain, learn, text::word};
use palisade_proto::v1::Code;

use super::Says;
use crate::{
    common::{Common, code},
    line::Line,
    observe::Seen,
    refusal::Refused,
};

impl Says for Code {
    fn line(&self, of: Common<'_>) -> Line {
        let act = self.act.as_str();
        let what = match code(code_act::ALL, act) {
            Some(code_act::TRACE | code_act::BE_TRACED) => format!("{act} {}", self.target_pid),
            _ if self.protection.is_empty() => act.to_owned(),
            _ => format!("{act} {}", self.protection),
        };
        let file = if self.origin.is_empty() {
            String::new()
        } else {
            format!(" [{}] {}", word(&self.origin), word(&self.file))
        };
        let reason = of.decision().map_or("", |decision| &decision.reason);
        Line::judged(of, of.actor_executable(), format!("code: {what}{file}: {reason}"))
    }

    fn refused(&self, of: Common<'_>) -> Option<Refused<'_>> {
        let is_memory = !self.file.is_empty() || of.reason() == Some(reason::JIT);
        Some(Refused {
            act: if is_memory { explain::Act::Map } else { explain::Act::Trace },
            path: &self.file,
            origin: &self.origin,
            caller: "",
            rule_by_link: "",
            arguments: None,
            shown: format!("{} by {}", self.act, word(of.actor_executable())),
        })
    }

    fn observed(&self, of: Common<'_>) -> Vec<Seen<'_>> {
        let act = match of.reason() {
            Some(reason::JIT) => learn::Act::Needs("jit"),
            Some(reason::MEMORY) => learn::Act::Needs("memory"),
            Some(reason::TRACE) => learn::Act::Needs("trace"),
            // No field allows that.
            Some(reason::PROTECTED) => return Vec::new(),
            _ => learn::Act::Mapped,
        };
        vec![Seen { act, path: &self.file, origin: &self.origin }]
    }
}
