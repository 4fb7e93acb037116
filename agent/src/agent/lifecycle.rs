//! Containers from their cgroup's creation to their end: found, identified, under a policy, let go.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use anyhow::Result;
use palisade_abi::{
    codes::{session, slot_flags},
    state::{AgentState, Process},
};
use palisade_profile::{mode::Mode, policy::Policy};

use super::{Agent, held::Settled, volumes};
use crate::{
    containers::{
        Container, Identity, RootFilesystem, Standing,
        cgroups::{self, Found},
        containerd::RuntimeEvent,
        nri::{Described, Notice, Question},
    },
    processes,
};

/// How long a container that NRI has described starts in peace before others are asked about it.
const DIGEST_WAIT: Duration = Duration::from_millis(250);
/// How often the lease is renewed, at most; a quarter of the shortest one.
const RENEWAL: Duration = Duration::from_millis(500);
/// Most descriptions that wait for their container.
const MOST_EXPECTED: usize = 1024;

impl Agent {
    /// Takes over containers that exist already.
    pub(super) fn find_running(&mut self) {
        for found in cgroups::scan(&self.cgroups) {
            self.take_over_or_say(&found);
            // There may be many, and what starts meanwhile must find the agent present.
            self.renew_lease();
        }
        self.identify_expected();
    }

    fn take_over_or_say(&mut self, found: &Found) {
        if self.containers.contains_key(&found.slot) {
            self.compare_root(found);
            return;
        }
        if let Err(error) = self.take_over(found) {
            tracing::error!(container = found.id, error = format!("{error:#}"), "a container is not covered");
        }
    }

    /// Gives a running container's cgroup and processes to its slot, and learns its root filesystem. Every step may be
    /// repeated: after a failure the next scan begins anew.
    fn take_over(&mut self, found: &Found) -> Result<()> {
        let first = processes::oldest(&found.members()).unwrap_or(0);
        let is_new = self.kernel.maps.add_slot(found.slot, first, &found.id)?;
        // The cgroup first: what forks from now on is found by it.
        self.kernel.maps.state.add_cgroup(found.slot, found.slot)?;
        if !found.is_there() {
            // It went before the kernel knew that it is a container's, so nobody would ever say that it ended.
            self.kernel.maps.remove_slot(found.slot);
            return Ok(());
        }
        let members = found.members();
        let above: HashMap<u32, (u64, u32)> =
            members.iter().filter_map(|pid| Some((*pid, processes::start_and_parent(*pid)?))).collect();
        let mut roots = HashMap::new();
        // As long as nothing is in the container's root, the runtime is still at work. Afterwards nobody is the runtime: a
        // process in the host's root may have escaped.
        // A list that cannot be read is empty.
        let mut members_known = !members.is_empty();
        let preparing = members.iter().all(|pid| self.kernel.is_at_home(*pid));
        for pid in &members {
            let process = if preparing {
                Process::new(found.slot, 1)
            } else {
                running_process(found.slot, *pid, first, &above, &mut roots)
            };
            if let Err(error) = self.kernel.maps.state.add_process(*pid, process) {
                // Its cgroup still says where it belongs.
                tracing::error!(
                    container = found.id,
                    error = format!("{error:#}"),
                    "a process is found by its cgroup only"
                );
                members_known = false;
                break;
            }
        }
        // One that ended meanwhile must not leave its number to whoever gets it next.
        let still = found.members();
        // One that only moved is still a process of the container.
        let ended = |process: &&u32| {
            let start = |pid| processes::start_and_parent(pid).map(|(start, _)| start);
            let now = start(**process);
            !still.contains(process) && (now.is_none() || now != above.get(*process).map(|(start, _)| *start))
        };
        for process in members.iter().filter(ended) {
            self.kernel.maps.state.remove_process(*process);
        }
        self.processes.seed(found.slot, &still);
        // A slot that the kernel made itself has a time of creation.
        let found_running =
            is_new || self.kernel.maps.ledger.slot(found.slot).is_some_and(|slot| slot.created == 0);
        let mut container = Container::new(found.id.clone(), found.folder.clone(), found_running);
        container.members_known = members_known;
        container.root = self.find_root(found, &still, found_running);
        self.begin(found.slot, container);
        Ok(())
    }

    /// A container is there; find out what it is.
    pub(super) fn begin(&mut self, slot: u64, container: Container) {
        if self.containers.contains_key(&slot) {
            return;
        }
        // A name is its first cgroup's as long as that is there: what the runtime says of it is not for another one that is made later
        // under the same name.
        match self.slots.get(&container.id) {
            Some(first) if self.containers.contains_key(first) => {
                tracing::warn!(
                    container = container.id,
                    slot,
                    "another cgroup has the name of a container that is there already"
                );
            }
            _ => {
                self.slots.insert(container.id.clone(), slot);
            }
        }
        self.containers.insert(slot, container);
        self.tell_coverage(slot, "found", 0);
        self.ask_about(slot);
    }

    /// Asks everybody who may know a container.
    pub(super) fn ask_about(&mut self, slot: u64) {
        let Some(container) = self.containers.get(&slot) else { return };
        let (id, starts) = (container.id.clone(), !container.found_running);
        // Who has been described by the runtime already only lacks the image's digest, which need not compete with its
        // start.
        let wait = if self.expected.contains_key(&id) { DIGEST_WAIT } else { Duration::ZERO };
        self.questions.ask(slot, id, wait, starts);
    }

    /// Identifies containers that the runtime has described before their cgroup was there. Not while cgroups are being
    /// taken in: identifying takes in records, which must find their containers.
    pub(super) fn identify_expected(&mut self) {
        let ready: Vec<(u64, String)> =
            self.expected.keys().filter_map(|id| Some((*self.slots.get(id)?, id.clone()))).collect();
        for (slot, id) in ready {
            if let Some(identity) = self.expected.remove(&id) {
                self.identify(slot, identity);
            }
        }
    }

    /// The runtime tells something over NRI and waits.
    pub(super) fn answer(&mut self, question: Question) {
        let Question { notice, asked, deadline, answer } = question;
        // The cgroups of what it tells about.
        self.take_control();
        self.identify_expected();
        match notice {
            Notice::Known(all) => {
                self.find_running();
                for described in all {
                    self.describe(described);
                }
            }
            Notice::Created(described) => self.describe(described),
            Notice::Starting(described) => {
                let id = described.id.clone();
                self.describe(described);
                if let Some(slot) = self.slots.get(&id).copied() {
                    self.root_may_be_there(slot);
                }
                let took = asked.elapsed();
                self.note_answer(&id, took, deadline);
            }
        }
        let _nobody_waits_any_more = answer.send(());
    }

    /// Takes what NRI says of a container that has a slot, or keeps it until it has one.
    fn describe(&mut self, described: Described) {
        let Described { id, identity } = described;
        let Some(slot) = self.slots.get(&id).copied() else {
            if self.expected.len() >= MOST_EXPECTED {
                self.expected.clear();
            }
            self.expected.insert(id, identity);
            return;
        };
        // Who has been identified already is so by a source that knows more.
        if self.containers.get(&slot).is_some_and(|container| container.identity.is_none()) {
            self.identify(slot, identity);
        }
    }

    /// A container's first process is in its root by now, where the runtime has told in time: what its policy needs of its files and
    /// mounts can be looked at.
    fn root_may_be_there(&mut self, slot: u64) {
        self.mounts_may_be_there(slot);
        if self.pending.contains(&slot) {
            self.apply(slot, "policy-changed");
        }
    }

    fn note_answer(&mut self, id: &str, took: Duration, deadline: Duration) {
        let Some(container) = self.slots.get(id).and_then(|slot| self.containers.get_mut(slot)) else {
            return;
        };
        container.answered_in = took.as_nanos() as u64;
        container.answer_deadline = deadline.as_nanos() as u64;
        if took > self.slowest_answer {
            self.slowest_answer = took;
            tracing::info!(
                answered_in_us = took.as_micros() as u64,
                deadline_ms = deadline.as_millis() as u64,
                "NRI: the slowest answer so far"
            );
        }
    }

    /// What a runtime tells while it happens.
    pub(super) fn runtime_event(&mut self, event: RuntimeEvent) {
        match event {
            RuntimeEvent::Created { id, pid } => {
                self.take_control();
                // One that the kernel knows by its cgroup's name needs no more.
                if cgroups::container_id(&id).is_some()
                    && let Some(slot) = self.slots.get(&id).copied()
                {
                    self.root_may_be_there(slot);
                    return;
                }
                match cgroups::of_process(&self.cgroups, pid, id.clone()) {
                    Some(found) => self.take_over_or_say(&found),
                    None => {
                        tracing::warn!(container = id, pid, "its cgroup is not found, so it is not covered");
                    }
                }
            }
            RuntimeEvent::Entered { exec_id, pid } => {
                self.take_records();
                let named = self.sessions.name(pid, exec_id);
                self.tell_sessions(named.into_iter().collect());
            }
        }
    }

    pub(super) fn identify(&mut self, slot: u64, identity: Identity) {
        let Some(container) = self.containers.get_mut(&slot) else { return };
        let is_enforced =
            || self.profiles.policy_for(&identity.facts).is_some_and(|policy| policy.mode == Mode::Enforce);
        if container.identity.is_none()
            && !identity.sandbox
            && self.profiles.waits_for_image(&identity.facts)
            && !is_enforced()
        {
            // It would be let go under no profile, and come under one when another source names its image.
            tracing::info!(
                container = container.id,
                by = identity.by,
                "its image is not known yet, and profiles depend on it"
            );
            return;
        }
        if let Some(known) = &mut container.identity
            && known.is_the_same_as(&identity)
        {
            // The same, told by another in words of his own: only what the first did not know is new.
            if known.image_digest.is_empty() {
                known.image_digest = identity.image_digest;
            }
            let image_is_new = known.facts.image.is_empty() && !identity.facts.image.is_empty();
            if image_is_new {
                known.facts.image = identity.facts.image;
            }
            container.encode();
            if image_is_new {
                self.apply(slot, "identified");
            }
            return;
        }
        tracing::info!(
            namespace = identity.facts.namespace,
            pod = identity.facts.pod,
            container = identity.facts.name,
            image = identity.facts.image,
            by = identity.by,
            "identified"
        );
        container.identity = Some(identity);
        self.apply(slot, "identified");
    }

    /// Puts a container under the policy that its profiles make.
    pub(super) fn apply(&mut self, slot: u64, change: &str) {
        // Records made before the change belong under what held then.
        self.take_records();
        let Some(container) = self.containers.get(&slot) else { return };
        let Some(identity) = &container.identity else { return };
        // The pause container runs nothing but itself and is no workload.
        let policy = if identity.sandbox { None } else { self.profiles.policy_for(&identity.facts) };
        let needs_mounts = policy.as_ref().is_some_and(Policy::needs_mounts);
        if !self.learn_volumes(slot) && needs_mounts {
            // Not under a policy that would refuse what it allows: until then it is as one that is not identified.
            let since = *self.awaiting_mounts.entry(slot).or_insert_with(Instant::now);
            if since.elapsed() <= volumes::PATIENCE {
                return;
            }
            tracing::error!(
                slot,
                "the mounts of a container cannot be read; its policy holds, and refuses what is on its volumes"
            );
        }
        self.awaiting_mounts.remove(&slot);
        let mut complete = true;
        let policy = policy.map(|policy| {
            // Both, also where one is not done yet.
            complete = self.read_digests(slot, &policy) & self.learn_interpreters(slot, &policy);
            self.verified(slot, policy)
        });
        let Some(container) = self.containers.get_mut(&slot) else { return };
        let first = self.kernel.maps.ledger.slot(slot).map_or(0, |slot| slot.workload_pid);
        let is_its_own = first != 0 && self.kernel.maps.state.slot_of_process(first) == Some(slot);
        // Only where the kernel has no other root for it: a `chroot` into a mounted host directory must not count.
        let has_own_root = self.kernel.maps.state.has_root(slot);
        // Nor where one that ran before has gone there by itself.
        let is_given = !container.found_running || container.root == RootFilesystem::Runtimes;
        let mut flags = if is_its_own && is_given && !has_own_root && self.kernel.has_hosts_root(first) {
            tracing::warn!(container = container.id, "its root file system is the host's own");
            slot_flags::ROOT_IS_HOSTS
        } else {
            0
        };
        if container.members_known {
            flags |= slot_flags::MEMBERS_KNOWN;
        }
        match self.revisions.apply(&mut self.kernel.maps, slot, policy.as_ref(), flags) {
            Ok(revision) => {
                self.pending.remove(&slot);
                if !complete {
                    // Without the rules whose files are not read yet.
                    self.pending.insert(slot);
                }
                if change == "policy-changed"
                    && revision == container.revision
                    && container.standing != Standing::Unidentified
                {
                    return;
                }
                container.withdrawn = self.withdrawn;
                container.revision = revision;
                container.standing =
                    policy.as_ref().map_or(Standing::NoProfile, |policy| Standing::Under(policy.mode));
                container.profiles =
                    policy.as_ref().map(|policy| policy.profiles.clone()).unwrap_or_default();
                container.in_force_since = self.source.wall(self.kernel.maps.policies.in_force_since(slot));
            }
            Err(error) => {
                if self.pending.insert(slot) {
                    tracing::error!(
                        container = container.id,
                        error = format!("{error:#}"),
                        "its policy is not in force; it stays under what it was under, and this is tried again"
                    );
                }
                return;
            }
        }
        container.encode();
        self.tell_coverage(slot, change, 0);
        self.push_waiting(slot);
        self.waiting.remove(&slot);
        self.settle(slot);
        self.admit_sandbox(slot);
        self.release_left_behind(slot);
    }

    pub(super) fn end(&mut self, slot: u64) {
        self.empty_ring();
        self.apply_due();
        let unsettled = self.held.remove(&slot).unwrap_or_default();
        for exec in unsettled {
            self.finish(slot, exec, Settled::unidentified());
        }
        let over = self.sessions.end_of_container(slot, self.source.now());
        self.tell_sessions(over);
        self.push_waiting(slot);
        self.report_losses();
        if self.losses.concerns(slot) {
            // The loss must be reported under the container's name; there is no room now.
            return;
        }
        self.waiting.remove(&slot);
        let made = self.kernel.maps.ledger.records_made(slot);
        self.tell_coverage(slot, "ended", made);
        let settled = self.kernel.maps.ledger.book(slot, |account| account.made = made);
        self.questions.forget(slot);
        self.pending.remove(&slot);
        self.awaiting_mounts.remove(&slot);
        self.revisions.release(&mut self.kernel.maps, slot);
        self.kernel.maps.remove_slot(slot);
        if settled {
            self.queue.settle((self.kernel.meta.epoch, slot));
        }
        self.losses.forget(slot);
        self.admit_no_more(slot);
        if let Some(container) = self.containers.remove(&slot)
            && self.slots.get(&container.id) == Some(&slot)
        {
            self.slots.remove(&container.id);
        }
    }

    /// Says that the agent goes.
    pub(super) fn end_lease(&mut self) {
        self.leaving = true;
        if let Err(error) = self.kernel.maps.renew_lease(AgentState { lease_until: 0, ..self.state }) {
            tracing::error!(error = format!("{error:#}"), "the agent counts as present until its lease ends");
        }
    }

    /// Says where the pins are that containers may not take away. Told with the next renewal of the lease.
    pub(super) fn protect_pins(&mut self) {
        let (device, inode) = self.kernel.place_of_pins().unwrap_or_default();
        self.state.pins_device = device;
        self.state.pins_inode = inode;
    }

    /// Says that the agent works. Called wherever it works for long.
    pub(super) fn renew_lease(&mut self) {
        if self.leaving {
            return;
        }
        let now = crate::records::now_since_boot();
        if now.saturating_sub(self.renewed) < RENEWAL.as_nanos() as u64 {
            return;
        }
        self.renewed = now;
        let state = AgentState { lease_until: now + self.lease.as_nanos() as u64, ..self.state };
        if let Err(error) = self.kernel.maps.renew_lease(state) {
            tracing::error!(error = format!("{error:#}"), "containers that start fall under whenAgentAbsent");
        }
    }
}

/// What the kernel is told of a process that it did not see enter: it is of the session of its topmost ancestor in the container.
fn running_process(
    slot: u64,
    pid: u32,
    first: u32,
    above: &HashMap<u32, (u64, u32)>,
    roots: &mut HashMap<u32, u32>,
) -> Process {
    // Every process is passed once over all calls: a container decides how long its chains are.
    let mut chain = vec![pid];
    let root = loop {
        let last = *chain.last().unwrap_or(&pid);
        if let Some(root) = roots.get(&last) {
            break *root;
        }
        match above.get(&last) {
            Some((_, parent)) if above.contains_key(parent) && chain.len() <= above.len() => {
                chain.push(*parent);
            }
            _ => break last,
        }
    };
    roots.extend(chain.into_iter().map(|pid| (pid, root)));
    let start = above.get(&root).map_or(0, |(start, _)| *start);
    Process {
        session_start: start,
        session_pid: root,
        session_kind: if root == first { session::WORKLOAD } else { session::ENTERED },
        ..Process::new(slot, 0)
    }
}
