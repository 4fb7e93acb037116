//! What is executed.

use palisade_abi::{
    codes::{self, exec_flags},
    record::{DecodedExec, ExecPart, Header},
};
use palisade_profile::exec::condition::MOST_ARGUMENT_BYTES;
use palisade_proto::v1;
use prost::Message as _;

use super::{
    Body, Decision, Event, File, Made, Source, name,
    process::{describe, key, parent_key},
    text, until_zero,
};
use crate::processes::Processes;

/// What was executed.
#[derive(Clone, Debug, Default)]
pub struct Exec {
    pub file: File,
    /// The script that led to it.
    pub script: Option<File>,
    /// The program that loads it.
    pub interpreter: Option<File>,
    /// The rest. What the files have to say is in it only when it is encoded.
    pub rest: v1::ProcessExec,
}

/// What the verdict on an execution that waits for it will depend on, besides what its record says.
pub struct Held {
    /// Code of [`palisade_abi::codes::session`].
    pub session: u8,
    /// Why the path is not known; 0 when it is.
    pub failure: u8,
    /// Whether it has an interpreter that is not the image's.
    pub foreign_interpreter: bool,
    /// The program that loads it; `None` without one, or where the kernel does not tell.
    pub interpreter: Option<Interpreter>,
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

impl Exec {
    /// The file by which the verdict came about.
    pub fn judged(&self) -> &File {
        self.script.as_ref().filter(|_| self.rest.verdict_of_script).unwrap_or(&self.file)
    }

    pub(super) fn size(&self) -> usize {
        let files = [Some(&self.file), self.script.as_ref(), self.interpreter.as_ref()];
        files.into_iter().flatten().map(|file| file.path.len() + size_of::<File>()).sum::<usize>()
            + self.rest.encoded_len()
    }

    pub(super) fn encode(self) -> v1::ProcessExec {
        let Self { file, script, interpreter, rest } = self;
        let script = script.map(|script| (script.path_text(), script.origin_text(), script.device_text()));
        let (script, script_origin, script_device) = script.unwrap_or_default();
        let interpreter = interpreter.map(|interpreter| (interpreter.path_text(), interpreter.origin_text()));
        let (interpreter, interpreter_origin) = interpreter.unwrap_or_default();
        v1::ProcessExec {
            executable: file.path_text(),
            origin: file.origin_text(),
            device: file.device_text(),
            script,
            script_origin,
            script_device,
            interpreter,
            interpreter_origin,
            ..rest
        }
    }
}

pub(super) fn make(
    source: &Source,
    processes: &mut Processes,
    revision_name: impl Fn(u32) -> String,
    slot_of: impl Fn(u32) -> Option<u64>,
    record: &DecodedExec<'_>,
) -> Made {
    let part = &record.head.exec;
    let process = &record.head.process;
    let Header { slot, time, .. } = record.head.header;
    let decision = Decision::new(&record.head.decision, revision_name);
    let ancestors = processes.ancestors(slot, parent_key(process), slot_of);
    let took_place = decision.action != codes::action::REFUSED && part.flags & exec_flags::ONLY_ASKED == 0;
    // Of one that took place procfs tells what was executed, and not by what.
    let before =
        if took_place { processes.recorded(key(process)) } else { processes.executable(key(process)) };
    // The kernel has a hash of its path, and none of what is not the image's.
    let caller = Some(before.clone())
        .filter(|program| source.hash(program.as_bytes()) == part.caller)
        .unwrap_or_default();
    let actor = describe(source, processes, process, before);
    let file = File { path: record.path.to_vec(), origin: part.origin, device: part.device };
    let exec_id = if took_place {
        processes.executed(slot, key(process), parent_key(process), &file.path_text(), time);
        processes.exec_id(key(process))
    } else {
        String::new()
    };
    let there = |path: &[u8], origin, device| {
        (!path.is_empty()).then(|| File { path: path.to_vec(), origin, device })
    };
    let exec = Exec {
        file,
        script: there(record.script, part.script_origin, part.script_device),
        interpreter: there(record.interpreter, part.interpreter_origin, 0),
        rest: v1::ProcessExec {
            exec_id,
            caller,
            ancestors: ancestors
                .into_iter()
                .map(|ancestor| v1::Ancestor { start_time: source.wall(ancestor.start_time), ..ancestor })
                .collect(),
            ..rest(record)
        },
    };
    let held = (decision.verdict == codes::verdict::HELD).then(|| held(record));
    Made {
        header: record.head.header,
        session: record.head.session,
        process: key(process),
        body: Body { actor: Some(actor), decision: Some(decision), event: Event::Exec(Box::new(exec)) },
        held,
    }
}

/// What needs nothing but the record.
fn rest(record: &DecodedExec<'_>) -> v1::ProcessExec {
    let ExecPart { flags, argc, argv_source, inode, file_mode, .. } = record.head.exec;
    let context = &record.head.context;
    let has = |flag| flags & flag != 0;
    v1::ProcessExec {
        path_truncated: has(exec_flags::PATH_TRUNCATED),
        inode,
        file_mode,
        arguments: arguments(record.argv, argc),
        argument_count: argc,
        arguments_truncated: has(exec_flags::ARGV_TRUNCATED),
        arguments_source: name(codes::argv_source::name(argv_source)),
        working_directory: text(record.cwd),
        terminal: text(until_zero(&context.tty)),
        verdict_of_script: has(exec_flags::VERDICT_OF_SCRIPT),
        escaped: has(exec_flags::ESCAPED),
        elevated: has(exec_flags::ELEVATED),
        only_asked: has(exec_flags::ONLY_ASKED),
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
        ..Default::default()
    }
}

fn held(record: &DecodedExec<'_>) -> Held {
    let part = &record.head.exec;
    let reason = record.head.decision.reason;
    Held {
        session: record.head.session.kind,
        failure: if reason == codes::reason::UNIDENTIFIED { 0 } else { reason },
        foreign_interpreter: part.flags & exec_flags::FOREIGN_INTERPRETER != 0,
        interpreter: (part.interpreter != [0; 2]).then(|| Interpreter {
            path: record.interpreter.to_vec(),
            origin: part.interpreter_origin,
            path_hash: part.interpreter,
            name_hash: part.interpreter_name,
        }),
        caller: part.caller,
        arguments: compared(record.argv, part.flags & exec_flags::ARGV_TRUNCATED != 0),
    }
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

#[cfg(test)]
mod tests {
    use palisade_abi::{
        ledger::SetMeta,
        record::{ExecHead, SmallExec},
    };

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

    /// The record of an exec of `path` by process 7, which is no process of this machine.
    fn executed(path: &[u8], action: u8, time: u64) -> (ExecHead, Vec<u8>) {
        let bytes = vec![0_u8; size_of::<SmallExec>()];
        let mut head: ExecHead = bytemuck::pod_read_unaligned(&bytes[..size_of::<ExecHead>()]);
        (head.header.slot, head.header.time) = (1, time);
        (head.process.pid, head.process.start_time) = (u32::MAX - 7, 5);
        (head.decision.action, head.exec.origin) = (action, codes::origin::IMAGE);
        head.decision.verdict =
            if action == codes::action::NONE { codes::verdict::ALLOWED } else { codes::verdict::DENIED };
        (head, path.to_vec())
    }

    /// Who calls exec is told as it was before, whatever comes of it; what it began has the name of all that follows.
    #[test]
    fn the_actor_of_an_exec_is_what_called_it() {
        let source = Source::new("n".to_owned(), "b".to_owned(), &SetMeta::default());
        let mut processes = Processes::new("b");
        let mut made = |path: &[u8], action, time| {
            let (head, path) = executed(path, action, time);
            let record =
                DecodedExec { head, path: &path, cwd: &[], script: &[], interpreter: &[], argv: &[] };
            let made = make(&source, &mut processes, |_| String::new(), |_| None, &record);
            let Event::Exec(exec) = made.body.event else { panic!("it is an exec") };
            (made.body.actor.unwrap(), exec.encode())
        };
        let (_, first) = made(b"/bin/first", codes::action::NONE, 10);
        let (actor, refused) = made(b"/bin/second", codes::action::REFUSED, 20);
        assert_eq!((actor.executable.as_str(), &actor.exec_id), ("/bin/first", &first.exec_id));
        assert_eq!((refused.executable.as_str(), refused.exec_id.as_str()), ("/bin/second", ""));
        let (actor, third) = made(b"/bin/third", codes::action::KILLED, 30);
        assert_eq!((actor.executable.as_str(), &actor.exec_id), ("/bin/first", &first.exec_id));
        assert_ne!(third.exec_id, first.exec_id);
        let (actor, _) = made(b"/bin/fourth", codes::action::NONE, 40);
        assert_eq!((actor.executable.as_str(), &actor.exec_id), ("/bin/third", &third.exec_id));
    }
}
