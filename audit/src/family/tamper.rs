//! What a container tries on the agent.

use palisade_abi::codes::tampering;
use palisade_proto::v1::Tampering;

use super::Says;
use crate::{
    common::{Common, code},
    line::Line,
};

impl Says for Tampering {
    fn line(&self, of: Common<'_>) -> Line {
        let pid = of.actor().map_or(0, |actor| actor.pid);
        let act = self.act.as_str();
        let what = match code(tampering::ALL, act) {
            Some(tampering::SIGNAL) => format!("signal {} to the agent", self.signal),
            Some(tampering::LIMIT) => format!("limit {} of the agent", self.resource),
            Some(tampering::OPEN_MAP | tampering::OPEN_PROGRAM) => format!("{act} {}", self.object),
            Some(tampering::REMOVE_PIN | tampering::UNMOUNT) => act.to_owned(),
            _ => format!("{act} the agent"),
        };
        Line::judged(of, of.actor_executable(), format!("TAMPERING by pid {pid}: {what}"))
    }
}
