//! What a container tries on the agent.

use palisade_abi::{codes, record::TamperRecord};
use palisade_proto::v1;

use super::{
    Body, Decision, Event, Made, Source, name,
    process::{describe, key},
};
use crate::processes::Processes;

/// An act on the agent, its kernel objects or their pins.
#[derive(Clone, Copy, Debug)]
pub struct Tamper {
    /// Code of [`palisade_abi::codes::tampering`].
    pub act: u8,
    target: u32,
    detail: u32,
}

impl Tamper {
    pub(super) fn encode(self) -> v1::Tampering {
        let Self { act, target, detail } = self;
        let is_object = matches!(act, codes::tampering::OPEN_MAP | codes::tampering::OPEN_PROGRAM);
        v1::Tampering {
            act: name(codes::tampering::name(act)),
            agent_pid: if is_object { 0 } else { target },
            object: if is_object { target } else { 0 },
            signal: if act == codes::tampering::SIGNAL { detail } else { 0 },
            resource: if act == codes::tampering::LIMIT { detail } else { 0 },
        }
    }
}

pub(super) fn make(
    source: &Source,
    processes: &Processes,
    revision_name: impl Fn(u32) -> String,
    record: &TamperRecord,
) -> Made {
    let TamperRecord { header, process, session, decision, act, target, detail, .. } = *record;
    let executable = processes.executable(key(&process));
    Made {
        header,
        session,
        process: key(&process),
        body: Body {
            actor: Some(describe(source, processes, &process, executable)),
            decision: Some(Decision::new(&decision, revision_name)),
            event: Event::Tamper(Tamper { act, target, detail }),
        },
        held: None,
    }
}
