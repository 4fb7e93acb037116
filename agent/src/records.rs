//! From the kernel's bytes to the record that travels.

use std::time::{SystemTime, UNIX_EPOCH};

use bytes::{BufMut as _, Bytes, BytesMut};
use palisade_abi::{
    codes::{self, exec_flags},
    hash::hash_path,
    ledger::SetMeta,
    record::{
        Decoded, DecodedCode, DecodedExec, ExitRecord, ForkRecord, Header, ProcessPart, SessionPart,
        TamperRecord,
    },
    volume,
};
use palisade_profile::exec::condition::MOST_ARGUMENT_BYTES;
use palisade_proto::v1::{self, record::Event};
use prost::Message as _;
use rustix::time::{ClockId, clock_gettime};

use crate::processes::{ProcessKey, Processes};

/// Who makes the records.
pub struct Source {
    pub node: String,
    pub boot: String,
    /// Start of this run, nanoseconds since the Unix epoch.
    pub started: u64,
    /// The fields that all records share, encoded once.
    head: Bytes,
    /// Key of the path hash.
    hash_key: [u64; 2],
    /// What to add to a time since boot to get the time since the Unix epoch. Fixed for a set of programs, so that the
    /// order of records does not depend on somebody setting the clock, nor on the agent's restarts.
    boot_offset: u64,
}

impl Source {
    /// `set` is the set of programs that numbers the records.
    pub fn new(node: String, boot: String, set: &SetMeta) -> Self {
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64);
        let head =
            v1::Record { node: node.clone(), boot: boot.clone(), epoch: set.epoch, ..Default::default() };
        let head = head.encode_to_vec().into();
        let hash_key = set.hash_key;
        Self {
            node,
            boot,
            started: wall,
            head,
            hash_key,
            boot_offset: set.epoch.saturating_sub(set.epoch_since_boot),
        }
    }

    /// Nanoseconds since the Unix epoch of a kernel time; 0 stays 0.
    pub fn wall(&self, since_boot: u64) -> u64 {
        if since_boot == 0 { 0 } else { since_boot.saturating_add(self.boot_offset) }
    }

    /// The hash by which the kernel knows a path.
    pub fn hash(&self, path: &[u8]) -> [u64; 2] {
        hash_path(self.hash_key, path)
    }

    /// The present, on the scale of the records.
    pub fn now(&self) -> u64 {
        self.wall(now_since_boot())
    }

    /// Encodes a record with its container block, which is encoded already. Records that the agent makes have no
    /// header and are of no session.
    pub fn encode(
        &self,
        slot: u64,
        header: Option<&Header>,
        session: Option<v1::SessionReference>,
        container: &Bytes,
        event: Event,
    ) -> Bytes {
        let record = v1::Record {
            slot,
            lane: header.map_or(0, |header| header.lane),
            sequence: header.map_or(0, |header| header.sequence),
            time: header.map_or_else(|| self.now(), |header| self.wall(header.time)),
            event: Some(event),
            session_of: session,
            // The rest stands in the two blocks that are encoded already; the parts of a message may be in any order.
            ..Default::default()
        };
        let mut out = BytesMut::with_capacity(self.head.len() + container.len() + ROOM);
        out.put_slice(&self.head);
        // A BytesMut grows, so encoding into it cannot fail.
        let _ = record.encode(&mut out);
        prost::encoding::encode_key(CONTAINER_FIELD, prost::encoding::WireType::LengthDelimited, &mut out);
        prost::encoding::encode_varint(container.len() as u64, &mut out);
        out.put_slice(container);
        out.freeze()
    }
}

/// Room for the part of a record that is encoded anew; most need less.
const ROOM: usize = 512;

/// Number of `Record.container`.
const CONTAINER_FIELD: u32 = 8;

/// Nanoseconds since boot, suspend included.
pub fn now_since_boot() -> u64 {
    let time = clock_gettime(ClockId::Boottime);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// A decoded record's event, its header and session, and whether it reports anything but an allowed act.
pub struct Made {
    pub header: Header,
    pub session: SessionPart,
    pub process: ProcessKey,
    pub event: Event,
    pub urgent: bool,
    /// For what is stopped until its container is identified: what the verdict will depend on.
    pub held: Option<Held>,
}

/// An execution that waits for its verdict.
pub struct Held {
    pub path: Vec<u8>,
    pub origin: u8,
    /// Code of [`palisade_abi::codes::session`].
    pub session: u8,
    /// Why the path is not known; 0 when it is.
    pub failure: u8,
    /// The script that led to it, and its origin.
    pub script: Option<(Vec<u8>, u8)>,
    pub escaped: bool,
    /// Whether it has an interpreter that is not the image's.
    pub foreign_interpreter: bool,
    /// The program that loads it; `None` without one, or where the kernel does not tell.
    pub interpreter: Option<Interpreter>,
    pub elevated: bool,
    /// Hash of the path of what executed it, as the kernel has it; 0 when that is not the image's.
    pub caller: [u64; 2],
    /// The arguments, each ended by a zero byte; `None` when they are too many to be compared.
    pub arguments: Option<Vec<u8>>,
}

/// The program that loads another one.
pub struct Interpreter {
    /// Of a path longer than [`palisade_abi::record::INTERPRETER`] the end.
    pub path: Vec<u8>,
    pub origin: u8,
    /// The hash of the path, and of the name by which it was asked for.
    pub path_hash: [u64; 2],
    pub name_hash: [u64; 2],
}

/// Turns a decoded record into an event, and keeps the process table up to date with it. `slot_of` is the kernel's
/// word on whose a process is.
pub fn make(
    source: &Source,
    processes: &mut Processes,
    revision_name: impl Fn(u32) -> String,
    slot_of: impl Fn(u32) -> Option<u64>,
    decoded: Decoded<'_>,
) -> Made {
    match decoded {
        Decoded::Fork(ForkRecord { header, process, session }) => {
            processes.forked(header.slot, parent_key(&process), key(&process));
            let event = Event::Fork(v1::ProcessFork { process: Some(describe(source, processes, &process)) });
            Made { header, session, process: key(&process), event, urgent: false, held: None }
        }
        Decoded::Exit(ExitRecord { header, process, session, exit_code, reserved: _ }) => {
            let described = describe(source, processes, &process);
            let executable = processes.exited(key(&process));
            let event = Event::Exit(v1::ProcessExit {
                process: Some(described),
                status: exit_code >> 8 & 0xff,
                signal: exit_code & 0x7f,
                core_dumped: exit_code & 0x80 != 0,
                executable,
            });
            Made { header, session, process: key(&process), event, urgent: false, held: None }
        }
        Decoded::Tamper(record) => {
            let TamperRecord { header, process, session, .. } = record;
            let event = Event::Tampering(v1::Tampering {
                executable: processes.executable(key(&process)),
                process: Some(describe(source, processes, &process)),
                ..tampering(&record)
            });
            Made { header, session, process: key(&process), event, urgent: true, held: None }
        }
        Decoded::Code(record) => {
            let head = record.head;
            let executing = head.code.flags & codes::code_record_flags::EXECUTING != 0;
            let event = Event::Code(v1::Code {
                // What it executed before would mislead.
                executable: if executing { String::new() } else { processes.executable(key(&head.process)) },
                executing,
                process: Some(describe(source, processes, &head.process)),
                decided_revision: revision_name(head.decision.revision),
                ..code(&record)
            });
            let (header, session) = (head.header, head.session);
            Made { header, session, process: key(&head.process), event, urgent: true, held: None }
        }
        Decoded::Exec(exec) => {
            let decided_revision = revision_name(exec.head.decision.revision);
            make_exec(source, processes, decided_revision, slot_of, &exec)
        }
    }
}

fn make_exec(
    source: &Source,
    processes: &mut Processes,
    decided_revision: String,
    slot_of: impl Fn(u32) -> Option<u64>,
    record: &DecodedExec<'_>,
) -> Made {
    let part = &record.head.exec;
    let decision = &record.head.decision;
    let context = &record.head.context;
    let process = &record.head.process;
    let (executable, origin) = named(record.path, part.origin);
    let Header { slot, time, .. } = record.head.header;
    let ancestors = processes.ancestors(slot, parent_key(process), slot_of);
    let refused = decision.action == codes::action::REFUSED || part.flags & exec_flags::ONLY_ASKED != 0;
    let (script, script_origin) = if record.script.is_empty() {
        (String::new(), String::new())
    } else {
        named(record.script, part.script_origin)
    };
    let (interpreter, interpreter_origin) = if record.interpreter.is_empty() {
        (String::new(), String::new())
    } else {
        named(record.interpreter, part.interpreter_origin)
    };
    // The kernel has a hash of its path, and none of what is not the image's.
    let caller = Some(processes.executable(key(process)))
        .filter(|program| source.hash(program.as_bytes()) == part.caller)
        .unwrap_or_default();
    if !refused {
        processes.executed(slot, key(process), parent_key(process), &executable, time);
    }
    let name = |found: Option<&str>| found.unwrap_or("unknown").to_owned();
    let has = |flag| part.flags & flag != 0;
    let exec = v1::ProcessExec {
        process: Some(describe(source, processes, process)),
        executable,
        origin,
        verdict: name(codes::verdict::name(decision.verdict)),
        action: name(codes::action::name(decision.action)),
        reason: name(codes::reason::name(decision.reason)),
        arguments: arguments(record.argv, part.argc),
        argument_count: part.argc,
        arguments_truncated: has(exec_flags::ARGV_TRUNCATED),
        arguments_source: name(codes::argv_source::name(part.argv_source)),
        working_directory: text(record.cwd),
        path_truncated: has(exec_flags::PATH_TRUNCATED),
        verdict_of_script: has(exec_flags::VERDICT_OF_SCRIPT),
        inode: part.inode,
        device: device(part.device),
        file_mode: part.file_mode,
        capabilities: Some(v1::Capabilities {
            inheritable: context.capabilities_inheritable,
            permitted: context.capabilities_permitted,
            effective: context.capabilities_effective,
            bounding: context.capabilities_bounding,
            ambient: context.capabilities_ambient,
        }),
        namespaces: Some(v1::Namespaces {
            mount: context.mount_namespace,
            pid: context.pid_namespace,
            network: context.network_namespace,
            uts: context.uts_namespace,
            ipc: context.ipc_namespace,
            cgroup: context.cgroup_namespace,
            user: context.user_namespace,
        }),
        cgroup: context.cgroup,
        terminal: text(until_zero(&context.tty)),
        decided_mode: codes::mode::name(decision.mode).unwrap_or_default().to_owned(),
        decided_revision,
        script_device: if script.is_empty() { String::new() } else { device(part.script_device) },
        script,
        script_origin,
        escaped: has(exec_flags::ESCAPED),
        only_asked: has(exec_flags::ONLY_ASKED),
        elevated: has(exec_flags::ELEVATED),
        caller,
        ancestors: ancestors
            .into_iter()
            .map(|ancestor| v1::Ancestor { start_time: source.wall(ancestor.start_time), ..ancestor })
            .collect(),
        held: 0,
        rule_by_link: String::new(),
        interpreter,
        interpreter_origin,
    };
    let held = (decision.verdict == codes::verdict::HELD).then(|| Held {
        path: record.path.to_vec(),
        origin: part.origin,
        session: record.head.session.kind,
        failure: if decision.reason == codes::reason::UNIDENTIFIED { 0 } else { decision.reason },
        script: (!record.script.is_empty()).then(|| (record.script.to_vec(), part.script_origin)),
        escaped: has(exec_flags::ESCAPED),
        foreign_interpreter: has(exec_flags::FOREIGN_INTERPRETER),
        interpreter: (part.interpreter != [0; 2]).then(|| Interpreter {
            path: record.interpreter.to_vec(),
            origin: part.interpreter_origin,
            path_hash: part.interpreter,
            name_hash: part.interpreter_name,
        }),
        elevated: has(exec_flags::ELEVATED),
        caller: part.caller,
        arguments: compared(record.argv, has(exec_flags::ARGV_TRUNCATED)),
    });
    Made {
        header: record.head.header,
        session: record.head.session,
        process: key(process),
        event: Event::Exec(exec),
        urgent: decision.verdict != codes::verdict::ALLOWED,
        held,
    }
}

fn code(record: &DecodedCode<'_>) -> v1::Code {
    let part = &record.head.code;
    let decision = &record.head.decision;
    let name = |found: Option<&str>| found.unwrap_or("unknown").to_owned();
    let in_file = !record.path.is_empty() || part.origin != codes::origin::UNKNOWN;
    let (file, origin) = if in_file { named(record.path, part.origin) } else { Default::default() };
    v1::Code {
        act: name(codes::code_act::name(part.act)),
        verdict: name(codes::verdict::name(decision.verdict)),
        action: name(codes::action::name(decision.action)),
        reason: name(codes::reason::name(decision.reason)),
        file,
        origin,
        path_truncated: part.flags & exec_flags::PATH_TRUNCATED != 0,
        protection: protection(part.protection),
        inode: part.inode,
        device: if in_file { device(part.device) } else { String::new() },
        target_pid: part.target,
        decided_mode: codes::mode::name(decision.mode).unwrap_or_default().to_owned(),
        ..Default::default()
    }
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

fn tampering(record: &TamperRecord) -> v1::Tampering {
    let TamperRecord { act, decision, target, detail, .. } = *record;
    let name = |found: Option<&str>| found.unwrap_or("unknown").to_owned();
    let is_object = matches!(act, codes::tampering::OPEN_MAP | codes::tampering::OPEN_PROGRAM);
    v1::Tampering {
        act: name(codes::tampering::name(act)),
        verdict: name(codes::verdict::name(decision.verdict)),
        action: name(codes::action::name(decision.action)),
        agent_pid: if is_object { 0 } else { target },
        object: if is_object { target } else { 0 },
        signal: if act == codes::tampering::SIGNAL { detail } else { 0 },
        resource: if act == codes::tampering::LIMIT { detail } else { 0 },
        ..Default::default()
    }
}

/// Major and minor number, as procfs writes them.
fn device(number: u32) -> String {
    format!("{}:{}", number >> 20, number & 0xf_ffff)
}

/// Path and origin of a file as they are recorded.
pub fn named(path: &[u8], origin: u8) -> (String, String) {
    let kind = codes::origin::name(origin).unwrap_or("unknown");
    match volume::split(path) {
        Some((name, path)) if origin == codes::origin::VOLUME => {
            (text(path), format!("{kind}:{}", text(name)))
        }
        _ => (text(path), kind.to_owned()),
    }
}

fn key(process: &ProcessPart) -> ProcessKey {
    (process.pid, process.start_time)
}

fn parent_key(process: &ProcessPart) -> ProcessKey {
    (process.parent_pid, process.parent_start_time)
}

fn describe(source: &Source, processes: &Processes, part: &ProcessPart) -> v1::Process {
    let ProcessPart {
        pid,
        tid,
        namespace_pid,
        parent_pid,
        start_time,
        parent_start_time,
        uid,
        gid,
        suid,
        sgid,
        euid,
        egid,
        fsuid,
        fsgid,
        comm,
        parent_comm,
    } = *part;
    v1::Process {
        pid,
        tid,
        namespace_pid,
        start_time: source.wall(start_time),
        comm: text(until_zero(&comm)),
        parent_pid,
        parent_start_time: source.wall(parent_start_time),
        parent_executable: processes.executable(parent_key(part)),
        parent_comm: text(until_zero(&parent_comm)),
        exec_id: processes.exec_id(key(part)),
        parent_exec_id: processes.exec_id(parent_key(part)),
        credentials: Some(v1::Credentials { uid, gid, euid, egid, suid, sgid, fsuid, fsgid }),
    }
}

fn until_zero(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// Splits the run of strings; at most `count`, since what follows them is the environment.
fn arguments(bytes: &[u8], count: u32) -> Vec<String> {
    let run = bytes.strip_suffix(&[0]).unwrap_or(bytes);
    if run.is_empty() && bytes.is_empty() {
        return Vec::new();
    }
    run.split(|byte| *byte == 0).take(count as usize).map(text).collect()
}

/// The arguments as the kernel compares them.
fn compared(bytes: &[u8], cut: bool) -> Option<Vec<u8>> {
    (!cut && bytes.len() <= MOST_ARGUMENT_BYTES).then(|| bytes.to_vec())
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
    fn arguments_end_where_the_count_says() {
        assert_eq!(arguments(b"a\0b c\0\0", 3), ["a", "b c", ""]);
        assert_eq!(arguments(b"a\0b\0HOME=/\0", 2), ["a", "b"]);
        assert!(arguments(b"", 2).is_empty());
        assert_eq!(arguments(b"cut", 1), ["cut"]);
    }

    #[test]
    fn arguments_are_compared_whole_or_not_at_all() {
        assert_eq!(compared(b"a\0b c\0\0", false).unwrap(), b"a\0b c\0\0");
        assert_eq!(compared(b"", false).unwrap(), b"");
        assert_eq!(compared(b"a\0b", true), None);
        assert_eq!(compared(&[b'a'; 1024], false).map(|arguments| arguments.len()), Some(1024));
        assert_eq!(compared(&[b'a'; 1025], false), None);
    }

    #[test]
    fn bytes_that_are_not_text_stay_readable() {
        assert_eq!(text(b"/tmp/\xff\xfea"), "/tmp/\\xff\\xfea");
    }

    #[test]
    fn a_spliced_container_block_is_read_back() {
        let source = Source::new("n".to_owned(), "b".to_owned(), &SetMeta::default());
        let container = v1::Container { id: "c1".to_owned(), ..Default::default() };
        let bytes = source.encode(
            9,
            None,
            None,
            &container.encode_to_vec().into(),
            Event::Gap(v1::Gap { count: 3, ..Default::default() }),
        );
        let record = v1::Record::decode(bytes).unwrap();
        assert_eq!(record.container.unwrap().id, "c1");
        assert_eq!((record.node.as_str(), record.slot), ("n", 9));
        assert!(matches!(record.event, Some(Event::Gap(v1::Gap { count: 3, .. }))));
    }
}
