//! From the kernel's bytes to the record that travels. Each family of events has a file.
//!
//! What the kernel says by a number stays that number until a record is encoded: whatever is decided on the way
//! looks at codes, and only readers look at texts.

mod code;
mod exec;
mod process;
mod source;
mod tamper;

use palisade_abi::{
    codes,
    record::{DecisionPart, Decoded, Header, SessionPart},
    volume,
};
use palisade_proto::v1;
use prost::Message as _;

pub use self::{
    code::Code,
    exec::{Exec, Held, Interpreter},
    source::{Source, now_since_boot},
    tamper::Tamper,
};
use crate::processes::{ProcessKey, Processes};

/// A decoded record: which it is, and what it says.
pub struct Made {
    pub header: Header,
    pub session: SessionPart,
    pub process: ProcessKey,
    pub body: Body,
    /// For what is stopped until its container is identified: what the verdict will depend on.
    pub held: Option<Held>,
}

/// What a record says, apart from which it is and whose container it is of.
pub struct Body {
    pub actor: Option<v1::Process>,
    pub decision: Option<Decision>,
    pub event: Event,
}

/// What has happened.
pub enum Event {
    Fork,
    Exit(v1::ProcessExit),
    Exec(Box<Exec>),
    Code(Code),
    Tamper(Tamper),
    /// What the agent says of its own accord.
    Own(Box<v1::record::Event>),
}

impl From<v1::record::Event> for Body {
    fn from(event: v1::record::Event) -> Self {
        Self { actor: None, decision: None, event: Event::Own(Box::new(event)) }
    }
}

impl Body {
    /// Whether it reports anything but an allowed act.
    pub fn is_urgent(&self) -> bool {
        self.decision.as_ref().is_some_and(|decision| !decision.is_allowed())
    }

    /// Whether it is about what the runtime executes while it prepares a container.
    pub fn is_runtime_step(&self) -> bool {
        self.decision.as_ref().is_some_and(|decision| decision.reason == codes::reason::RUNTIME)
    }

    /// What was executed, of an exec.
    pub fn exec_mut(&mut self) -> Option<&mut Exec> {
        match &mut self.event {
            Event::Exec(exec) => Some(exec),
            _ => None,
        }
    }

    /// About how many bytes it takes.
    pub fn size(&self) -> usize {
        let event = match &self.event {
            Event::Fork => 0,
            Event::Exit(exit) => exit.encoded_len(),
            Event::Exec(exec) => exec.size(),
            Event::Code(code) => code.size(),
            Event::Tamper(_) => size_of::<Tamper>(),
            Event::Own(event) => event.encoded_len(),
        };
        event + self.actor.as_ref().map_or(0, v1::Process::encoded_len)
    }

    /// As it travels.
    fn encode(self) -> (Option<v1::Process>, Option<v1::Decision>, v1::record::Event) {
        let event = match self.event {
            Event::Fork => v1::record::Event::Fork(v1::ProcessFork {}),
            Event::Exit(exit) => v1::record::Event::Exit(exit),
            Event::Exec(exec) => v1::record::Event::Exec(exec.encode()),
            Event::Code(code) => v1::record::Event::Code(code.encode()),
            Event::Tamper(tamper) => v1::record::Event::Tampering(tamper.encode()),
            Event::Own(event) => *event,
        };
        (self.actor, self.decision.map(Decision::encode), event)
    }
}

/// What was decided about an act, in codes of [`palisade_abi::codes`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decision {
    pub verdict: u8,
    pub action: u8,
    /// 0 where no rule is about such acts.
    pub reason: u8,
    /// 0 when no revision was consulted.
    pub mode: u8,
    /// The name of the revision.
    pub revision: String,
}

impl Decision {
    fn new(part: &DecisionPart, revision_name: impl Fn(u32) -> String) -> Self {
        let DecisionPart { verdict, action, reason, mode, revision } = *part;
        Self { verdict, action, reason, mode, revision: revision_name(revision) }
    }

    pub fn is_allowed(&self) -> bool {
        self.verdict == codes::verdict::ALLOWED
    }

    fn encode(self) -> v1::Decision {
        let Self { verdict, action, reason, mode, revision } = self;
        v1::Decision {
            verdict: name(codes::verdict::name(verdict)),
            action: name(codes::action::name(action)),
            reason: if reason == 0 { String::new() } else { name(codes::reason::name(reason)) },
            mode: codes::mode::name(mode).unwrap_or_default().to_owned(),
            revision,
        }
    }
}

/// A file as the kernel names it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct File {
    /// On a volume a text of [`volume`].
    pub path: Vec<u8>,
    /// Code of [`codes::origin`].
    pub origin: u8,
    pub device: u32,
}

impl File {
    /// Its path as it is recorded: on a volume the one in the container.
    pub fn path_text(&self) -> String {
        self.split().map_or_else(|| text(&self.path), |(_, path)| text(path))
    }

    fn origin_text(&self) -> String {
        let kind = name(codes::origin::name(self.origin));
        self.split().map_or(kind.clone(), |(volume, _)| format!("{kind}:{}", text(volume)))
    }

    /// Name of the volume that it is on, and the path there.
    fn split(&self) -> Option<(&[u8], &[u8])> {
        volume::split(&self.path).filter(|_| self.origin == codes::origin::VOLUME)
    }

    /// Major and minor number, as procfs writes them.
    pub fn device_text(&self) -> String {
        format!("{}:{}", self.device >> 20, self.device & 0xf_ffff)
    }
}

/// Turns a decoded record into one that can travel, and keeps the process table up to date with it. `slot_of` is
/// the kernel's word on whose a process is.
pub fn make(
    source: &Source,
    processes: &mut Processes,
    revision_name: impl Fn(u32) -> String,
    slot_of: impl Fn(u32) -> Option<u64>,
    decoded: Decoded<'_>,
) -> Made {
    match decoded {
        Decoded::Fork(record) => process::fork(source, processes, &record),
        Decoded::Exit(record) => process::exit(source, processes, &record),
        Decoded::Exec(record) => exec::make(source, processes, revision_name, slot_of, &record),
        Decoded::Code(record) => code::make(source, processes, revision_name, &record),
        Decoded::Tamper(record) => tamper::make(source, processes, revision_name, &record),
    }
}

/// The name of a code, which an older build may not know.
fn name(found: Option<&str>) -> String {
    found.unwrap_or("unknown").to_owned()
}

fn until_zero(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// Text that a container controls: bytes that are not UTF-8 become `\xNN`, so that nothing is lost.
fn text(bytes: &[u8]) -> String {
    if let Ok(text) = std::str::from_utf8(bytes) {
        return text.to_owned();
    }
    let mut out = String::with_capacity(bytes.len() + 8);
    for chunk in bytes.utf8_chunks() {
        out.push_str(chunk.valid());
        for byte in chunk.invalid() {
            out.push_str(&format!("\\x{byte:02x}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_that_are_not_text_stay_readable() {
        assert_eq!(text(b"/tmp/\xff\xfea"), "/tmp/\\xff\\xfea");
    }

    #[test]
    fn a_file_on_a_volume_is_told_by_both_names() {
        let file = |path: &[u8], origin| File { path: path.to_vec(), origin, device: 8 << 20 | 1 };
        let told = |file: File| (file.path_text(), file.origin_text(), file.device_text());
        let expected = |path: &str, origin: &str| (path.to_owned(), origin.to_owned(), "8:1".to_owned());
        assert_eq!(
            told(file(b":shared:/tools/x", codes::origin::VOLUME)),
            expected("/tools/x", "volume:shared")
        );
        // Only the kernel may name a volume, and a path may begin with anything.
        assert_eq!(
            told(file(b":shared:/tools/x", codes::origin::IMAGE)),
            expected(":shared:/tools/x", "image")
        );
        assert_eq!(told(file(b"/x", 200)), expected("/x", "unknown"));
    }

    #[test]
    fn what_has_no_rules_has_no_reason() {
        let encoded = |reason| Decision { reason, ..Decision::default() }.encode().reason;
        assert_eq!(encoded(0), "");
        assert_eq!(encoded(codes::reason::NO_RULE), "no-rule");
        assert_eq!(encoded(255), "unknown");
    }
}
