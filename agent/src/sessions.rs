//! Sessions: the process trees under each entry into a container, from their first exec to the end of their last
//! process.

use std::collections::{HashMap, HashSet, VecDeque};

use palisade_abi::{codes::session, record::SessionPart};
use palisade_proto::v1;

use crate::records::Exec;

/// Names a session: slot, and its root's process id and start.
type Key = (u64, u32, u64);

struct Open {
    /// What has been told of it; grows.
    event: v1::Session,
    is_workload: bool,
    /// Processes that live.
    live: HashSet<u32>,
}

/// The sessions that last.
#[derive(Default)]
pub struct Sessions {
    open: HashMap<Key, Open>,
    /// The runtime's names of entries whose first exec has not been seen yet, by process id.
    named: HashMap<u32, String>,
    /// Sessions that ended a short while ago: the runtime names them late.
    ended: VecDeque<(u64, v1::Session)>,
}

/// Most names that wait for their session, and most ended sessions that wait for their name.
const MOST_WAITING: usize = 256;

fn key(slot: u64, part: &SessionPart) -> Option<Key> {
    (part.pid != 0).then_some((slot, part.pid, part.start))
}

/// What the first exec of a session tells about it.
pub struct Beginning<'a> {
    pub id: String,
    pub actor: Option<&'a v1::Process>,
    pub exec: &'a Exec,
    pub time: u64,
    /// Commands that the pod declares as probes.
    pub probes: &'a [Vec<String>],
}

impl Sessions {
    /// What records say of the session they belong to.
    pub fn reference(&self, slot: u64, part: &SessionPart, id: String) -> v1::SessionReference {
        let known = key(slot, part).and_then(|key| self.open.get(&key));
        let kind = match (known, part.kind) {
            (Some(open), _) => open.event.kind.clone(),
            (None, session::WORKLOAD) => "workload".to_owned(),
            (None, session::ENTERED) => "admin".to_owned(),
            _ => "unknown".to_owned(),
        };
        v1::SessionReference { id: if part.pid == 0 { String::new() } else { id }, kind }
    }

    /// Notes an exec. Returns the record of the session's start when it is its first.
    pub fn executed<'a>(
        &mut self,
        slot: u64,
        part: &SessionPart,
        pid: u32,
        beginning: impl FnOnce() -> Beginning<'a>,
        allowed: bool,
    ) -> Option<v1::Session> {
        let key = key(slot, part)?;
        let mut begins = None;
        let open = match self.open.entry(key) {
            std::collections::hash_map::Entry::Occupied(open) => open.into_mut(),
            std::collections::hash_map::Entry::Vacant(vacant) => {
                let event = start(part, beginning(), self.named.remove(&part.pid));
                // One that began before the agent did is told at its end only.
                begins = (pid == part.pid).then(|| event.clone());
                // Its root lives, as far as anybody knows: it must not end with the first of its children.
                vacant.insert(Open {
                    event,
                    is_workload: part.kind == session::WORKLOAD,
                    live: HashSet::from([part.pid]),
                })
            }
        };
        open.live.insert(pid);
        open.event.execs += 1;
        open.event.not_allowed += u64::from(!allowed);
        begins
    }

    pub fn forked(&mut self, slot: u64, part: &SessionPart, child: u32) {
        if let Some(open) = key(slot, part).and_then(|key| self.open.get_mut(&key)) {
            open.live.insert(child);
        }
    }

    /// Notes the end of a process. Returns the record of the session's end when it was its last.
    pub fn exited(
        &mut self,
        slot: u64,
        part: &SessionPart,
        pid: u32,
        exit: &v1::ProcessExit,
        time: u64,
    ) -> Option<v1::Session> {
        let key = key(slot, part)?;
        let open = self.open.get_mut(&key)?;
        open.live.remove(&pid);
        if pid == part.pid {
            (open.event.status, open.event.signal) = (exit.status, exit.signal);
        }
        if !open.live.is_empty() {
            return None;
        }
        self.close(&key, time)
    }

    fn close(&mut self, key: &Key, time: u64) -> Option<v1::Session> {
        let Open { event, is_workload, .. } = self.open.remove(key)?;
        let event = v1::Session { change: "end".to_owned(), ended: time, ..event };
        if event.runtime_exec_id.is_empty() && !is_workload {
            self.ended.push_back((key.0, event.clone()));
            if self.ended.len() > MOST_WAITING {
                self.ended.pop_front();
            }
        }
        Some(event)
    }

    /// Takes the runtime's own name of the session whose root is `pid`. Returns the record that says so, unless its
    /// start is still to come and will.
    pub fn name(&mut self, pid: u32, exec_id: String) -> Option<(u64, v1::Session)> {
        let found = self.open.iter_mut().find(|((_, root, _), _)| *root == pid);
        let (slot, event) = match found {
            Some(((slot, ..), open)) => (*slot, &mut open.event),
            None => match self.ended.iter_mut().find(|(_, ended)| ended.root_pid == pid) {
                Some((slot, ended)) => (*slot, ended),
                None => {
                    if self.named.len() >= MOST_WAITING {
                        self.named.clear();
                    }
                    self.named.insert(pid, exec_id);
                    return None;
                }
            },
        };
        event.runtime_exec_id = exec_id;
        Some((slot, v1::Session { change: "named".to_owned(), ..event.clone() }))
    }

    /// Ends sessions whose processes are gone without a word.
    pub fn prune(&mut self, alive: &HashSet<u32>, time: u64) -> Vec<(u64, v1::Session)> {
        for open in self.open.values_mut() {
            open.live.retain(|pid| alive.contains(pid));
        }
        self.end(time, |_, open| open.live.is_empty())
    }

    /// Ends what is left of a container's sessions.
    pub fn end_of_container(&mut self, slot: u64, time: u64) -> Vec<(u64, v1::Session)> {
        self.end(time, |key, _| key.0 == slot)
    }

    fn end(&mut self, time: u64, is_over: impl Fn(&Key, &Open) -> bool) -> Vec<(u64, v1::Session)> {
        let over: Vec<Key> =
            self.open.iter().filter(|(key, open)| is_over(key, open)).map(|(key, _)| *key).collect();
        over.into_iter().filter_map(|key| Some((key.0, self.close(&key, time)?))).collect()
    }
}

fn start(part: &SessionPart, beginning: Beginning<'_>, name: Option<String>) -> v1::Session {
    let Beginning { id, actor, exec, time, probes } = beginning;
    let actor = actor.cloned().unwrap_or_default();
    let arguments = exec.rest.arguments.clone();
    let is_probe = probes.contains(&arguments);
    v1::Session {
        change: "start".to_owned(),
        id,
        kind: match part.kind {
            session::WORKLOAD => "workload",
            session::ENTERED if is_probe => "probe",
            session::ENTERED => "admin",
            _ => "unknown",
        }
        .to_owned(),
        root_pid: part.pid,
        started: time,
        executable: exec.file.path_text(),
        arguments,
        terminal: exec.rest.terminal.clone(),
        entered_by_pid: actor.parent_pid,
        entered_by_comm: actor.parent_comm,
        entered_by_executable: actor.parent_executable,
        runtime_exec_id: name.unwrap_or_default(),
        credentials: actor.credentials,
        ..v1::Session::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(kind: u8) -> SessionPart {
        SessionPart { start: 5, pid: 10, kind, reserved: [0; 3] }
    }

    fn begin(
        sessions: &mut Sessions,
        kind: u8,
        words: &[&str],
        probes: &[Vec<String>],
    ) -> Option<v1::Session> {
        let mut exec = Exec::default();
        exec.rest.arguments = words.iter().map(|word| (*word).to_owned()).collect();
        let beginning = || Beginning { id: "s".to_owned(), actor: None, exec: &exec, time: 7, probes };
        sessions.executed(1, &part(kind), 10, beginning, true)
    }

    #[test]
    fn a_session_ends_with_its_last_process() {
        let mut sessions = Sessions::default();
        let begun = begin(&mut sessions, session::ENTERED, &["sh"], &[]).unwrap();
        assert_eq!((begun.change.as_str(), begun.kind.as_str(), begun.started), ("start", "admin", 7));
        assert!(begin(&mut sessions, session::ENTERED, &["ls"], &[]).is_none(), "it starts once");
        sessions.forked(1, &part(session::ENTERED), 11);
        let exit = v1::ProcessExit { status: 3, ..Default::default() };
        assert!(sessions.exited(1, &part(session::ENTERED), 10, &exit, 8).is_none());
        let ended = sessions.exited(1, &part(session::ENTERED), 11, &v1::ProcessExit::default(), 9).unwrap();
        assert_eq!((ended.change.as_str(), ended.ended, ended.status, ended.execs), ("end", 9, 3, 2));
    }

    #[test]
    fn a_declared_command_is_a_probe_and_a_longer_one_is_not() {
        let probes = [vec!["cat".to_owned(), "/ok".to_owned()]];
        let kind =
            |words: &[&str]| begin(&mut Sessions::default(), session::ENTERED, words, &probes).unwrap().kind;
        assert_eq!(kind(&["cat", "/ok"]), "probe");
        assert_eq!(kind(&["cat", "/ok", "/etc/shadow"]), "admin");
        let workload = begin(&mut Sessions::default(), session::WORKLOAD, &["cat", "/ok"], &probes).unwrap();
        assert_eq!(workload.kind, "workload");
    }

    #[test]
    fn the_runtimes_name_may_come_before_or_after() {
        let mut sessions = Sessions::default();
        assert!(sessions.name(10, "exec-1".to_owned()).is_none());
        assert_eq!(begin(&mut sessions, session::ENTERED, &["sh"], &[]).unwrap().runtime_exec_id, "exec-1");
        let (slot, named) = sessions.name(10, "exec-2".to_owned()).unwrap();
        assert_eq!((slot, named.change.as_str(), named.runtime_exec_id.as_str()), (1, "named", "exec-2"));
        let ended = sessions.prune(&HashSet::new(), 9);
        assert_eq!((ended.len(), ended[0].1.runtime_exec_id.as_str()), (1, "exec-2"));
        begin(&mut sessions, session::ENTERED, &["ls"], &[]).unwrap();
        assert_eq!(sessions.prune(&HashSet::new(), 9).len(), 1);
        let (_, late) = sessions.name(10, "exec-3".to_owned()).unwrap();
        assert_eq!((late.change.as_str(), late.ended, late.runtime_exec_id.as_str()), ("named", 9, "exec-3"));
    }

    #[test]
    fn a_process_of_no_known_session_has_an_empty_reference() {
        let nobody = SessionPart { start: 0, pid: 0, kind: session::UNKNOWN, reserved: [0; 3] };
        let reference = Sessions::default().reference(1, &nobody, "x".to_owned());
        assert_eq!((reference.id.as_str(), reference.kind.as_str()), ("", "unknown"));
    }
}
