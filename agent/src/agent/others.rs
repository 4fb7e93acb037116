//! Sets of programs that an agent of another build or configuration left in force: they are taken out of force when this
//! agent's own set covers what they guard, their records are delivered, what is missing of them is counted, and then they
//! are taken away.

use std::{
    collections::{HashMap, HashSet},
    time::Instant,
};

use palisade_abi::{codes::verdict, record::decode, state::PROBE_SLOT};
use palisade_proto::v1;

use super::{Agent, accounts::settle, flow::SMALLEST_RECORD};
use crate::{
    containers::{Container, cgroups},
    delivery::{Credit, Queue},
    kernel::{Ledger, OldSet, Policies, State},
    processes::Processes,
    records::{Made, Source, make},
};

/// How often it is said that an older set cannot be taken out of force yet.
const REMINDER: std::time::Duration = std::time::Duration::from_secs(60);

/// How long sets of another layout stay in force for the sake of containers that nobody identifies.
const UNREADABLE: std::time::Duration = std::time::Duration::from_secs(60);

/// Sets that are not this agent's.
pub(super) enum Others {
    /// They refuse beside this agent's own.
    InForce(InForce),
    /// They are out of force, and their records are on their way.
    Leaving(Vec<Leaving>),
}

/// A set that is out of force.
pub(super) struct Leaving {
    set: OldSet,
    /// By slot: what was delivered or reported before, and what is queued since.
    accounted: HashMap<u64, u64>,
    /// Whether its ring has been read.
    read: bool,
}

impl Leaving {
    fn new(mut set: OldSet, queue: &Queue) -> Self {
        let epoch = set.meta.epoch;
        let slots: Vec<u64> = made(&set).into_keys().collect();
        let accounted = slots
            .into_iter()
            .map(|slot| (slot, settle(&mut set.ledger, queue, epoch, slot).settled))
            .collect();
        Self { set, accounted, read: false }
    }

    /// Records that were in the spool are lost: they are counted with the others that are missing.
    pub(super) fn misses(&mut self, slot: u64, count: u64) {
        let accounted = self.accounted.entry(slot).or_default();
        *accounted = accounted.saturating_sub(count);
    }
}

impl Others {
    pub(super) fn sets(&self) -> Vec<&OldSet> {
        match self {
            Self::InForce(others) => others.sets.iter().collect(),
            Self::Leaving(sets) => sets.iter().map(|leaving| &leaving.set).collect(),
        }
    }

    /// The set of an epoch that is on its way out.
    pub(super) fn leaving(&mut self, epoch: u64) -> Option<&mut Leaving> {
        match self {
            Self::InForce(_) => None,
            Self::Leaving(sets) => sets.iter_mut().find(|leaving| leaving.set.meta.epoch == epoch),
        }
    }

    pub(super) fn ledger_mut(&mut self, epoch: u64) -> Option<&mut Ledger> {
        match self {
            Self::InForce(others) => {
                others.sets.iter_mut().find(|set| set.meta.epoch == epoch).map(|set| &mut set.ledger)
            }
            Self::Leaving(_) => self.leaving(epoch).map(|leaving| &mut leaving.set.ledger),
        }
    }
}

pub(super) struct InForce {
    sets: Vec<OldSet>,
    /// Whether some have another layout: what they guard cannot be read, or was not copied.
    unreadable: bool,
    since: Instant,
    /// When it was last said that they stay.
    said: Instant,
}

impl InForce {
    pub(super) fn new(sets: Vec<OldSet>, unreadable: bool) -> Self {
        Self { sets, unreadable, since: Instant::now(), said: Instant::now() }
    }
}

impl Agent {
    /// Takes over the state of the set that recorded so far: `Some(true)` when it is all that any set knows. What
    /// cannot be copied is found out anew.
    pub(super) fn inherit(&mut self, others: &[OldSet]) -> Option<bool> {
        match self.kernel.inherit(others) {
            Ok(None) => None,
            Ok(Some(whole)) => {
                tracing::info!(step = "the state is copied", "upgrade");
                Some(whole)
            }
            Err(error) => {
                tracing::error!(
                    error = format!("{error:#}"),
                    "not all that the set before knows could be taken over; it stays in force until this one knows all"
                );
                Some(false)
            }
        }
    }

    /// Takes other sets a step further on their way out.
    pub(super) fn retire_others(&mut self) {
        match self.others.take() {
            Some(Others::InForce(mut others)) => {
                let uncovered = self.uncovered(&others.sets);
                let all = self.containers.values().all(Container::is_under_policy);
                let blind = others.unreadable && !all && others.since.elapsed() < UNREADABLE;
                if !uncovered.is_empty() || blind {
                    if others.said.elapsed() > REMINDER {
                        others.said = Instant::now();
                        tracing::error!(
                            slots = ?uncovered,
                            "older programs stay in force: they guard containers that this agent does not"
                        );
                    }
                    self.others = Some(Others::InForce(others));
                    return;
                }
                match self.kernel.retire_others() {
                    Ok(()) => {
                        tracing::info!(step = "the old programs are out of force", "upgrade");
                        // Read at the next tick: a program that ran when it was detached has ended by then.
                        self.others = Some(Others::Leaving(
                            others.sets.into_iter().map(|set| Leaving::new(set, &self.queue)).collect(),
                        ));
                    }
                    Err(error) => {
                        tracing::error!(error = format!("{error:#}"), "older programs stay in force");
                        self.others = Some(Others::InForce(others));
                    }
                }
            }
            Some(Others::Leaving(mut sets)) => {
                for leaving in &mut sets {
                    if !std::mem::replace(&mut leaving.read, true) {
                        self.deliver_for(leaving);
                    }
                    self.count_missing(leaving);
                }
                self.queue.flush();
                // What is not acknowledged is counted by the next agent, should this one be killed: it needs the accounts.
                let (done, open): (Vec<Leaving>, Vec<Leaving>) =
                    sets.into_iter().partition(|leaving| is_balanced(&leaving.set));
                let names: Vec<String> = open.iter().map(|leaving| leaving.set.name.clone()).collect();
                if let Err(error) = self.kernel.forget_others(&names) {
                    tracing::error!(error = format!("{error:#}"), "the maps of older programs stay");
                }
                for set in done.iter().map(|leaving| &leaving.set) {
                    made(set).into_keys().for_each(|slot| self.queue.settle((set.meta.epoch, slot)));
                }
                if open.is_empty() {
                    tracing::info!(step = "the old maps are gone", "upgrade");
                }
                self.others = (!open.is_empty()).then_some(Others::Leaving(open));
            }
            None => {}
        }
    }

    /// Containers that other sets guard and this agent's does not.
    fn uncovered(&self, sets: &[OldSet]) -> Vec<u64> {
        let guarded: HashSet<u64> = sets
            .iter()
            .filter(|set| set.in_force)
            .filter_map(|set| Some(set.policies.as_ref()?.guarded(&set.ledger)))
            .flatten()
            .collect();
        let covered =
            |slot: &u64| self.containers.get(slot).is_some_and(|container| container.is_under_policy());
        guarded.into_iter().filter(|slot| !covered(slot)).collect()
    }

    /// Notes in sets that are still in force that a process is not held any more: each refuses to let it be woken.
    pub(super) fn let_go_in_others(&mut self, pid: u32) {
        if let Some(Others::InForce(others)) = &mut self.others {
            for state in others.sets.iter_mut().filter_map(|set| set.state.as_mut()) {
                if let Err(error) = state.let_go(pid) {
                    tracing::error!(
                        pid,
                        error = format!("{error:#}"),
                        "an older set keeps a process stopped"
                    );
                }
            }
        }
    }

    /// Delivers what is left in the ring of a set that makes no records any more.
    fn deliver_for(&mut self, leaving: &mut Leaving) {
        let Leaving { set, accounted, .. } = leaving;
        let epoch = set.meta.epoch;
        let source = Source::new(self.source.node.clone(), self.source.boot.clone(), &set.meta);
        let made = self.read_ring(&source, set);
        let read = made.len();
        for Made { header, session, mut body, .. } in
            made.into_iter().filter(|made| made.header.slot != PROBE_SLOT)
        {
            // Nobody will judge it any more.
            if let Some(decision) =
                body.decision.as_mut().filter(|decision| decision.verdict == verdict::HELD)
            {
                decision.verdict = verdict::AUDITED;
            }
            let slot = header.slot;
            let gone = by_name(set, slot);
            let container = self.containers.get(&slot).unwrap_or(&gone);
            let id = self.processes.session_id((session.pid, session.start));
            let session = Some(self.sessions.reference(slot, &session, id));
            let bytes = source.encode(slot, Some(&header), session, container.encoded(), body);
            if self.queue.push(bytes, true, Credit { epoch, slot, delivered: 1, ..Credit::default() }).is_ok()
            {
                *accounted.entry(slot).or_default() += 1;
            }
        }
        tracing::info!(set = set.name, records = read, "read what an older set has left");
    }

    /// Reports what a set has made and nobody has delivered or reported.
    fn count_missing(&mut self, leaving: &mut Leaving) {
        let Leaving { set, accounted, .. } = leaving;
        let epoch = set.meta.epoch;
        let source = Source::new(self.source.node.clone(), self.source.boot.clone(), &set.meta);
        for (slot, made) in made(set) {
            let accounted = accounted.entry(slot).or_default();
            let count = made.saturating_sub(*accounted);
            if count == 0 {
                continue;
            }
            let now = self.source.now();
            let cause = if set.records.is_some() { "agent-killed" } else { "another-layout" }.to_owned();
            let gap = v1::Gap { count, cause, from: now, to: now };
            let gone = by_name(set, slot);
            let container = self.containers.get(&slot).unwrap_or(&gone);
            let bytes = source.encode(slot, None, None, container.encoded(), v1::record::Event::Gap(gap));
            // Without room it is tried again.
            let reported = i64::try_from(count).unwrap_or(i64::MAX);
            if self.queue.push(bytes, true, Credit { epoch, slot, reported, ..Credit::default() }).is_ok() {
                *accounted += count;
                tracing::info!(set = set.name, slot, missing = count, "records of an older set are missing");
            }
        }
    }

    /// The records that wait in the ring of an older set; none when its records have another layout.
    fn read_ring(&self, source: &Source, set: &mut OldSet) -> Vec<Made> {
        let mut made = Vec::new();
        let OldSet { state, policies, records: Some(records), .. } = set else { return made };
        let revisions = policies.as_ref().map(Policies::revision_names).unwrap_or_default();
        let slot_of = |pid| state.as_ref().and_then(|state: &State| state.slot_of_process(pid));
        // Apart from the live ones: these records are older.
        let mut processes = Processes::new(&self.source.boot);
        // What its ring can hold: a set that has lost the map that all share may go on.
        records.ring.drain(records.ring_bytes / SMALLEST_RECORD, |bytes| match decode(bytes) {
            Ok(decoded) => made.push(make(
                source,
                &mut processes,
                |number| revisions.get(&number).cloned().unwrap_or_default(),
                slot_of,
                decoded,
            )),
            Err(error) => tracing::error!(%error, "a record of an older set cannot be read"),
        });
        made
    }
}

/// Every slot of a set with what was numbered in it.
fn made(set: &OldSet) -> HashMap<u64, u64> {
    let ledger = &set.ledger;
    let mut made: HashMap<u64, u64> =
        ledger.accounts().into_iter().map(|(slot, account)| (slot, account.made)).collect();
    for (slot, _) in ledger.slots().into_iter().filter(|(slot, _)| *slot != PROBE_SLOT) {
        made.insert(slot, ledger.last_numbers(slot).iter().map(|(_, last)| last).sum());
    }
    made
}

/// Whether everything that a set has numbered is in the spool or delivered, or counted there.
fn is_balanced(set: &OldSet) -> bool {
    made(set).into_iter().all(|(slot, made)| {
        let account = set.ledger.account(slot);
        account.spooled + account.from_memory >= made
    })
}

/// A container that is gone, as far as the set knows it.
fn by_name(set: &OldSet, slot: u64) -> Container {
    let name = set.ledger.name(slot);
    let id = cgroups::container_id(&name).unwrap_or(&name).to_owned();
    Container::new(id, std::path::PathBuf::new(), true)
}
