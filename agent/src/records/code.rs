//! Code that comes into a process by other means than an exec.

use palisade_abi::{
    codes::{self, code_record_flags, exec_flags},
    record::{CodePart, DecodedCode},
};
use palisade_proto::v1;

use super::{
    Body, Decision, Event, File, Made, Source, name,
    process::{describe, key},
};
use crate::processes::Processes;

/// Code that came into a process, or was refused to, or an act on a file that allowed code is in.
#[derive(Clone, Debug)]
pub struct Code {
    /// Code of [`palisade_abi::codes::code_act`].
    pub act: u8,
    file: Option<File>,
    part: CodePart,
}

impl Code {
    pub(super) fn size(&self) -> usize {
        self.file.as_ref().map_or(0, |file| file.path.len()) + size_of::<Self>()
    }

    pub(super) fn encode(self) -> v1::Code {
        let Self { act, file, part } = self;
        let file = file.map(|file| (file.path_text(), file.origin_text(), file.device_text()));
        let (file, origin, device) = file.unwrap_or_default();
        v1::Code {
            act: name(codes::code_act::name(act)),
            file,
            origin,
            path_truncated: part.flags & exec_flags::PATH_TRUNCATED != 0,
            inode: part.inode,
            device,
            protection: protection(part.protection),
            target_pid: part.target,
            executing: is_executing(&part),
        }
    }
}

pub(super) fn make(
    source: &Source,
    processes: &Processes,
    revision_name: impl Fn(u32) -> String,
    record: &DecodedCode<'_>,
) -> Made {
    let head = &record.head;
    let part = head.code;
    let in_file = !record.path.is_empty() || part.origin != codes::origin::UNKNOWN;
    let file = in_file.then(|| File { path: record.path.to_vec(), origin: part.origin, device: part.device });
    // What it executed before would mislead.
    let executable =
        if is_executing(&part) { String::new() } else { processes.executable(key(&head.process)) };
    Made {
        header: head.header,
        session: head.session,
        process: key(&head.process),
        body: Body {
            actor: Some(describe(source, processes, &head.process, executable)),
            decision: Some(Decision::new(&head.decision, revision_name)),
            event: Event::Code(Code { act: part.act, file, part }),
        },
        held: None,
    }
}

fn is_executing(part: &CodePart) -> bool {
    part.flags & code_record_flags::EXECUTING != 0
}

/// The protection of memory, as procfs writes it; empty for none.
fn protection(bits: u32) -> String {
    // `PROT_READ`, `PROT_WRITE` and `PROT_EXEC` of mmap(2).
    let letters = [(1, 'r'), (2, 'w'), (4, 'x')];
    if bits & 7 == 0 {
        return String::new();
    }
    letters.into_iter().map(|(bit, letter)| if bits & bit != 0 { letter } else { '-' }).collect()
}
