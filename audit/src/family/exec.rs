//! What is executed.

use palisade_abi::codes::reason;
use palisade_profile::{
    explain, learn,
    text::{CUT, word, words},
};
use palisade_proto::v1::ProcessExec;

use super::Says;
use crate::{
    common::{Common, Verdict},
    line::Line,
    observe::Seen,
    refusal::Refused,
};

impl Says for ProcessExec {
    fn executable(&self) -> Option<&str> {
        Some(&self.executable)
    }

    fn line(&self, of: Common<'_>) -> Line {
        let mut detail = words(&self.arguments);
        if of.verdict() != Some(Verdict::Allowed) {
            detail = format!("{}: {detail}", of.decision().map_or("", |decision| &decision.reason));
        }
        detail = format!("[{}] {detail}", word(&self.origin));
        if self.elevated {
            detail = format!("ELEVATED {detail}");
        }
        if self.escaped {
            detail = format!("ESCAPED {detail}");
        }
        if !self.script.is_empty() {
            detail = format!("script {} {detail}", word(&self.script));
        }
        if self.arguments_truncated {
            detail = format!("{detail} {CUT}");
        }
        Line::judged(of, &self.executable, detail)
    }

    fn refused(&self, of: Common<'_>) -> Option<Refused<'_>> {
        let reason = of.reason();
        let of_arguments = reason == Some(reason::ARGUMENTS);
        let of_interpreter = reason == Some(reason::INTERPRETER) && !self.interpreter.is_empty();
        let (path, origin) = if self.verdict_of_script {
            (&self.script, &self.script_origin)
        } else if of_interpreter {
            (&self.interpreter, &self.interpreter_origin)
        } else {
            (&self.executable, &self.origin)
        };
        let all = !self.verdict_of_script && !self.arguments_truncated;
        Some(Refused {
            act: explain::Act::Execute,
            path,
            origin,
            caller: if of_arguments || reason == Some(reason::PARENT) { &self.caller } else { "" },
            rule_by_link: &self.rule_by_link,
            arguments: (of_arguments && all).then_some(&*self.arguments),
            shown: words(&self.arguments),
        })
    }

    /// The script and its interpreter are both needed.
    fn observed(&self, _of: Common<'_>) -> Vec<Seen<'_>> {
        [(&self.executable, &self.origin), (&self.script, &self.script_origin)]
            .into_iter()
            .filter(|(path, _)| !path.is_empty())
            .map(|(path, origin)| Seen { act: learn::Act::Executed, path, origin })
            .collect()
    }
}
