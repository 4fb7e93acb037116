//! The way of a record: out of the ring, decoded and described, kept while it waits for a verdict or for its
//! container's name, and into the queue.

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use palisade_abi::{
    record::{ForkRecord, Header, SessionPart, decode},
    state::PROBE_SLOT,
};
use palisade_proto::v1;

use super::{Agent, RING_ROUND};
use crate::{
    containers::Containers,
    delivery::Credit,
    kernel::Kernel,
    processes::ProcessKey,
    records::{self, Body, Decision, Event, Exec, Held, Made},
    sessions::Beginning,
};

/// Bytes that a record takes in the ring at least.
pub(super) const SMALLEST_RECORD: usize = size_of::<ForkRecord>();
/// How long records wait for the name of their container, and how many bytes of one container.
const PATIENCE: Duration = Duration::from_secs(5);
const MOST_WAITING: usize = 256 << 10;

/// Records of a container that is not identified yet.
pub(super) struct Waiting {
    since: Instant,
    records: Vec<Outgoing>,
    bytes: usize,
}

/// A record that is made but for its container.
struct Outgoing {
    /// Absent for what the agent says of its own accord.
    header: Option<Header>,
    session: Option<v1::SessionReference>,
    body: Body,
}

impl Waiting {
    pub(super) fn execs(&mut self) -> impl Iterator<Item = &mut Exec> {
        self.records.iter_mut().filter_map(|record| record.body.exec_mut())
    }

    fn begin() -> Self {
        Self { since: Instant::now(), records: Vec::new(), bytes: 0 }
    }
}

/// An execution that is stopped, and its record as far as it is made.
pub(super) struct HeldExec {
    pub made: Stamp,
    pub actor: Option<v1::Process>,
    /// Its verdict is to come.
    pub decision: Decision,
    pub exec: Box<Exec>,
    pub held: Held,
    pub since: Instant,
}

/// What a record needs besides what it says.
#[derive(Clone, Copy)]
pub(super) struct Stamp {
    pub header: Header,
    pub session: SessionPart,
    pub process: ProcessKey,
}

impl Agent {
    /// Takes one round of records out of the ring, after the news of the containers that they belong to. It puts nothing under a policy,
    /// so whoever does may have records taken before: what is due then waits for [`Agent::apply_due`].
    pub(super) fn take_records(&mut self) {
        self.renew_lease();
        self.take_control();
        let Self { kernel, source, processes, losses, revisions, .. } = self;
        let Kernel { records: ring, maps, .. } = kernel;
        let mut made = Vec::new();
        let taken = ring.drain(RING_ROUND, |bytes| match decode(bytes) {
            Ok(decoded) => made.push(records::make(
                source,
                processes,
                |number| revisions.name(number),
                |pid| maps.state.slot_of_process(pid),
                decoded,
            )),
            Err(error) => {
                tracing::error!(%error, "a record cannot be read");
                losses.undecodable(claimed_slot(bytes), source.now());
            }
        });
        self.more = taken == RING_ROUND;
        let mut settled = HashSet::new();
        for mut made in made {
            let slot = made.header.slot;
            if let Some(settling) = &mut self.settling {
                settling.saw(&made.header);
            }
            let of_runtime = made.body.is_runtime_step();
            if let Some(exec) = made.body.exec_mut() {
                // By its workload's first exec it has its mounts. Its policy is for after this round, which it would
                // overtake.
                if !of_runtime
                    && self.containers.get(&slot).is_some_and(|container| container.volumes.is_none())
                {
                    self.learn_volumes(slot);
                    self.due.insert(slot);
                }
                self.name_early(slot, made.header.time, exec);
            }
            if self.take_record(made) && containers_know(&self.containers, slot) {
                settled.insert(slot);
            }
        }
        // What was stopped just before its container was identified.
        for slot in settled {
            self.settle(slot);
        }
        if taken > 0 {
            self.queue.flush();
        }
    }

    /// Passes one record on, or keeps it until its verdict can be given; returns whether it was kept.
    fn take_record(&mut self, made: Made) -> bool {
        let Made { header, session, process, body, held } = made;
        if header.slot == PROBE_SLOT {
            self.self_probe.take(&body);
            return false;
        }
        let slot = header.slot;
        let stamp = Stamp { header, session, process };
        let body = match (body, held) {
            (Body { actor, decision: Some(decision), event: Event::Exec(exec) }, Some(held)) => {
                let exec = HeldExec { made: stamp, actor, decision, exec, held, since: Instant::now() };
                self.held.entry(slot).or_default().push(exec);
                return true;
            }
            (body, _) => body,
        };
        match &body.event {
            Event::Exec(_) => self.deliver(slot, &stamp, body),
            Event::Fork => {
                self.sessions.forked(slot, &session, process.0);
                self.push(slot, &stamp, body);
            }
            Event::Exit(exit) => {
                let exit = *exit;
                // Before its session may end, so that it is still of its kind.
                self.push(slot, &stamp, body);
                let over =
                    self.sessions.exited(slot, &session, process.0, &exit, self.source.wall(header.time));
                self.tell_sessions(over.map(|over| (slot, over)).into_iter().collect());
            }
            Event::Code(_) | Event::Tamper(_) | Event::Own(_) => self.push(slot, &stamp, body),
        }
        false
    }

    /// Passes an exec on, after the start of its session when it is the first.
    pub(super) fn deliver(&mut self, slot: u64, stamp: &Stamp, mut body: Body) {
        self.name_rule_by_link(slot, &mut body);
        if let Event::Exec(exec) = &body.event
            && !body.is_runtime_step()
        {
            let probes = self
                .containers
                .get(&slot)
                .and_then(|container| container.identity.as_ref())
                .map(|identity| identity.probes.as_slice())
                .unwrap_or_default();
            let beginning = || Beginning {
                id: self.processes.session_id((stamp.session.pid, stamp.session.start)),
                actor: body.actor.as_ref(),
                exec,
                time: self.source.wall(stamp.header.time),
                probes,
            };
            let allowed = !body.is_urgent();
            let begun = self.sessions.executed(slot, &stamp.session, stamp.process.0, beginning, allowed);
            self.tell_sessions(begun.map(|begun| (slot, begun)).into_iter().collect());
            self.note_entrypoint(slot, exec);
        }
        self.push(slot, stamp, body);
    }

    fn push(&mut self, slot: u64, stamp: &Stamp, body: Body) {
        self.verdicts.count(stamp.header.kind, body.decision.as_ref());
        let id = self.processes.session_id((stamp.session.pid, stamp.session.start));
        let session = Some(self.sessions.reference(slot, &stamp.session, id));
        self.pass(slot, Outgoing { header: Some(stamp.header), session, body });
    }

    /// Queues what the agent says of sessions. Unlike a container's coverage, a container decides how many there are:
    /// what finds no room is counted.
    pub(super) fn tell_sessions(&mut self, sessions: Vec<(u64, v1::Session)>) {
        for (slot, session) in sessions {
            let body = v1::record::Event::Session(session).into();
            self.pass(slot, Outgoing { header: None, session: None, body });
        }
    }

    /// Queues a record; of a container that is not identified yet it waits for a while, so that it can say whose it
    /// is.
    fn pass(&mut self, slot: u64, record: Outgoing) {
        let unidentified = self.containers.get(&slot).is_some_and(|container| !container.is_under_policy());
        if unidentified {
            let waiting = self.waiting.entry(slot).or_insert_with(Waiting::begin);
            if waiting.since.elapsed() < PATIENCE && waiting.bytes < MOST_WAITING {
                waiting.bytes += record.body.size();
                waiting.records.push(record);
                return;
            }
            self.push_waiting(slot);
        }
        self.push_now(slot, record);
    }

    /// Queues what has waited for its container's name.
    pub(super) fn push_waiting(&mut self, slot: u64) {
        let Some(waiting) = self.waiting.get_mut(&slot) else { return };
        for record in std::mem::take(&mut waiting.records) {
            self.push_now(slot, record);
        }
    }

    /// Gives up on names that nobody told in time.
    pub(super) fn push_overdue(&mut self) {
        let overdue: Vec<u64> = self
            .waiting
            .iter()
            .filter(|(_, waiting)| waiting.since.elapsed() >= PATIENCE)
            .map(|(slot, _)| *slot)
            .collect();
        for slot in overdue {
            self.push_waiting(slot);
        }
    }

    fn push_now(&mut self, slot: u64, record: Outgoing) {
        let Outgoing { header, session, body } = record;
        let container = self.containers.get(&slot).unwrap_or(&self.unknown);
        let urgent = body.is_urgent();
        let bytes = self.source.encode(slot, header.as_ref(), session, container.encoded(), body);
        let credit = Credit {
            epoch: self.kernel.meta.epoch,
            slot,
            delivered: i64::from(header.is_some()),
            ..Credit::default()
        };
        if let Err(why) = self.queue.push(bytes, urgent, credit) {
            let time = header.map_or_else(|| self.source.now(), |header| self.source.wall(header.time));
            self.losses.turned_away(slot, header.is_some(), why, time);
        }
    }

    /// Takes all that is in the ring now; bounded by what it can hold.
    pub(super) fn empty_ring(&mut self) {
        self.more = true;
        let mut rounds = 0;
        while self.more && rounds <= self.ring_bytes / SMALLEST_RECORD / RING_ROUND {
            self.take_records();
            rounds += 1;
        }
    }
}

/// Whether a container is identified and under its policy.
fn containers_know(containers: &Containers, slot: u64) -> bool {
    containers.get(&slot).is_some_and(|container| container.is_under_policy())
}

/// The slot that a record claims, of bytes that are not a record of this build.
fn claimed_slot(bytes: &[u8]) -> u64 {
    let at = std::mem::offset_of!(Header, slot);
    bytes.get(at..at + 8).and_then(|slot| slot.try_into().ok()).map_or(0, u64::from_le_bytes)
}
