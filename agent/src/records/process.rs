//! Processes: who acts, and their beginning and end.

use palisade_abi::record::{ExitRecord, ForkRecord, ProcessPart};
use palisade_proto::v1;

use super::{Body, Event, Made, Source, text, until_zero};
use crate::processes::{ProcessKey, Processes};

pub(super) fn fork(source: &Source, processes: &mut Processes, record: &ForkRecord) -> Made {
    let ForkRecord { header, process, session, .. } = *record;
    processes.forked(header.slot, parent_key(&process), key(&process));
    let actor = Some(describe(source, processes, &process, processes.executable(key(&process))));
    Made {
        header,
        session,
        process: key(&process),
        body: Body { actor, decision: None, event: Event::Fork },
        held: None,
    }
}

pub(super) fn exit(source: &Source, processes: &mut Processes, record: &ExitRecord) -> Made {
    let ExitRecord { header, process, session, exit_code, .. } = *record;
    let actor = Some(describe(source, processes, &process, processes.recorded(key(&process))));
    processes.exited(key(&process));
    let event = Event::Exit(v1::ProcessExit {
        status: exit_code >> 8 & 0xff,
        signal: exit_code & 0x7f,
        core_dumped: exit_code & 0x80 != 0,
    });
    Made { header, session, process: key(&process), body: Body { actor, decision: None, event }, held: None }
}

pub(super) fn key(process: &ProcessPart) -> ProcessKey {
    (process.pid, process.start_time)
}

pub(super) fn parent_key(process: &ProcessPart) -> ProcessKey {
    (process.parent_pid, process.parent_start_time)
}

/// Describes the process that acts and executes `executable`, as the table of processes knows it before that.
pub(super) fn describe(
    source: &Source,
    processes: &Processes,
    part: &ProcessPart,
    executable: String,
) -> v1::Process {
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
        executable,
        exec_id: processes.exec_id(key(part)),
        credentials: Some(v1::Credentials { uid, gid, euid, egid, suid, sgid, fsuid, fsgid }),
        parent_pid,
        parent_start_time: source.wall(parent_start_time),
        parent_comm: text(until_zero(&parent_comm)),
        parent_executable: processes.executable(parent_key(part)),
        parent_exec_id: processes.exec_id(parent_key(part)),
    }
}
