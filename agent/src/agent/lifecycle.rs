//! Containers from their cgroup's creation to their end: found, identified, under a policy, let go.

use std::{collections::HashMap, os::unix::fs::MetadataExt as _, time::Duration};

use anyhow::Result;
use palisade_abi::{
    codes::{action, mode, origin, reason, session, slot_flags, verdict},
    maps::Process,
};
use palisade_profile::{evaluate::evaluate, image, policy::Policy};
use palisade_proto::v1;

use super::{Agent, flow::HeldExec};
use crate::{
    containers::{
        Container, Identity, NO_PROFILE, UNIDENTIFIED,
        cgroups::{self, Found},
        containerd::RuntimeEvent,
        identify,
        nri::{Described, Notice, Question},
    },
    processes::{self, ProcessKey},
    records::Held,
};

/// How long a container that NRI has described starts in peace before others are asked about it.
const DIGEST_WAIT: Duration = Duration::from_secs(2);
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
        if let Some(container) = self.containers.get(&found.slot) {
            if container.found_running && !self.kernel.maps.has_root(found.slot) {
                self.learn_root(found, &found.members());
            }
            return;
        }
        if let Err(error) = self.take_over(found) {
            tracing::error!(container = found.id, error = format!("{error:#}"), "a container is not covered");
        }
    }

    /// Gives a running container's cgroup and processes to its slot, and learns its root. Every step may be
    /// repeated: after a failure the next scan begins anew.
    fn take_over(&mut self, found: &Found) -> Result<()> {
        let first = processes::oldest(&found.members()).unwrap_or(0);
        let is_new = self.kernel.maps.add_slot(found.slot, first)?;
        // The cgroup first: what forks from now on is found by it.
        self.kernel.maps.add_cgroup(found.slot, found.slot)?;
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
        let preparing = members.iter().all(|pid| self.kernel.is_at_home(*pid));
        for pid in &members {
            let process = if preparing {
                Process::new(found.slot, 1)
            } else {
                running_process(found.slot, *pid, first, &above, &mut roots)
            };
            if let Err(error) = self.kernel.maps.add_process(*pid, process) {
                // Its cgroup still says where it belongs.
                tracing::error!(
                    container = found.id,
                    error = format!("{error:#}"),
                    "a process is found by its cgroup only"
                );
                break;
            }
        }
        // One that ended meanwhile must not leave its number to whoever gets it next.
        let still = found.members();
        for process in members.iter().filter(|process| !still.contains(process)) {
            self.kernel.maps.remove_process(*process);
        }
        self.processes.seed(found.slot, &still);
        if !self.kernel.maps.has_root(found.slot) {
            self.learn_root(found, &still);
        }
        // A slot that the kernel made itself has a time of creation.
        let found_running = is_new || self.kernel.maps.slot(found.slot).is_some_and(|slot| slot.created == 0);
        self.begin(found.slot, found.id.clone(), found_running);
        Ok(())
    }

    /// Learns a running container's root from its oldest process, which the runtime set up: its start time cannot be
    /// forged, a number can be hit.
    fn learn_root(&mut self, found: &Found, members: &[u32]) {
        let Some(first) = processes::oldest(members) else { return };
        let root = std::path::PathBuf::from(format!("/proc/{first}/root"));
        if let Err(error) = self.kernel.learn_root(found.slot, &root) {
            tracing::warn!(
                container = found.id,
                error = format!("{error:#}"),
                "its root file system is not known yet, so the origin of its files is unknown; this is tried again"
            );
        }
    }

    /// A container is there; find out what it is.
    pub(super) fn begin(&mut self, slot: u64, id: String, found_running: bool) {
        if self.containers.contains_key(&slot) {
            return;
        }
        self.containers.insert(slot, Container::new(id.clone(), found_running));
        self.slots.insert(id.clone(), slot);
        self.tell_coverage(slot, "found", 0);
        // Who has been described by the runtime already only lacks the image's digest, which need not compete with its
        // start.
        let wait = if self.expected.contains_key(&id) { DIGEST_WAIT } else { Duration::ZERO };
        let asking = identify::identify(self.sources.clone(), slot, id, self.identified.clone(), wait);
        self.asking.insert(slot, tokio::spawn(asking));
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
                if cgroups::container_id(&id).is_some() && self.slots.contains_key(&id) {
                    return;
                }
                match cgroups::of_process(&self.cgroups, pid, id.clone()) {
                    Some(found) => self.take_over_or_say(&found),
                    None => {
                        tracing::warn!(container = id, pid, "its cgroup is not found, so it is not covered")
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
        let Some(container) = self.containers.get_mut(&slot) else { return };
        let Some(identity) = &container.identity else { return };
        // The pause container runs nothing but itself and is no workload.
        let policy = if identity.sandbox { None } else { self.profiles.policy_for(&identity.facts) };
        let first = self.kernel.maps.slot(slot).map_or(0, |slot| slot.workload_pid);
        let is_its_own = first != 0 && self.kernel.maps.slot_of_process(first) == Some(slot);
        let flags = if is_its_own && self.kernel.has_hosts_root(first) {
            tracing::warn!(container = container.id, "its root file system is the host's own");
            slot_flags::ROOT_IS_HOSTS
        } else {
            0
        };
        match self.revisions.apply(&mut self.kernel.maps, slot, policy.as_ref(), flags) {
            Ok(revision) => {
                self.pending.remove(&slot);
                if change == "policy-changed"
                    && revision == container.revision
                    && container.mode != UNIDENTIFIED
                {
                    return;
                }
                container.revision = revision;
                container.mode = policy.as_ref().map_or(NO_PROFILE, |policy| policy.mode.as_str());
                container.profiles =
                    policy.as_ref().map(|policy| policy.profiles.clone()).unwrap_or_default();
                container.in_force_since = self.source.now();
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

    /// Decides what was stopped until its container was identified, and lets it go or kills it.
    pub(super) fn settle(&mut self, slot: u64) {
        let Some(held) = self.held.remove(&slot) else { return };
        let policy = self
            .containers
            .get(&slot)
            .and_then(|container| container.identity.as_ref())
            .filter(|identity| !identity.sandbox)
            .and_then(|identity| self.profiles.policy_for(&identity.facts));
        for exec in held {
            let decision = judge(policy.as_ref(), &exec.held);
            self.finish(slot, exec, decision);
        }
    }

    /// Carries a decision out and records it.
    pub(super) fn finish(&mut self, slot: u64, exec: HeldExec, decision: Settled) {
        let HeldExec { made, mut event, since, held: _ } = exec;
        let killed = decision.verdict == verdict::DENIED;
        self.let_go(made.process, killed);
        let name = |found: Option<&str>| found.unwrap_or("unknown").to_owned();
        event.verdict = name(verdict::name(decision.verdict));
        event.reason = name(reason::name(decision.reason));
        event.action = name(action::name(if killed { action::KILLED } else { action::NONE }));
        event.decided_mode = mode::name(decision.mode).unwrap_or_default().to_owned();
        event.verdict_of_script = decision.of_script;
        if let Some(container) = self.containers.get(&slot)
            && decision.reason != reason::UNIDENTIFIED
        {
            event.decided_revision.clone_from(&container.revision);
        }
        event.held = since.elapsed().as_nanos() as u64;
        self.deliver(slot, &made, event);
    }

    /// Lets a process go or kills it; tried again as long as that fails.
    fn let_go(&mut self, process: ProcessKey, kill: bool) {
        if let Err(error) = self.kernel.let_go(process, kill) {
            tracing::error!(
                pid = process.0,
                error = format!("{error:#}"),
                "a held process stays stopped for now"
            );
            self.not_let_go.push((process, kill));
        }
    }

    /// Settles what is held without a record that says so: the record was lost. Nobody knows what it executed, so under
    /// an enforced profile it is killed.
    pub(super) fn settle_unrecorded(&mut self) {
        let recorded: Vec<u32> = self.held.values().flatten().map(|exec| exec.made.process.0).collect();
        let unrecorded: Vec<(u32, Process)> = self
            .kernel
            .maps
            .processes()
            .into_iter()
            .filter(|(pid, process)| process.held != 0 && !recorded.contains(pid))
            .collect();
        for (pid, process) in unrecorded {
            let Some(container) = self.containers.get(&process.slot) else { continue };
            let Some((start, _)) = processes::start_and_parent(pid) else { continue };
            if container.is_under_policy() && processes::is_stopped(pid) {
                let kill = container.mode == "enforce";
                tracing::warn!(pid, container = container.id, kill, "held, and its record was lost");
                self.let_go((pid, start), kill);
            }
        }
    }

    pub(super) fn let_go_again(&mut self) {
        for (process, kill) in std::mem::take(&mut self.not_let_go) {
            self.let_go(process, kill);
        }
    }

    /// Lets go whoever an agent that was killed left stopped, now that his container is identified: what an enforced
    /// profile covers and nobody judged is killed. That is a container older than this agent in which everything is
    /// stopped; what this agent holds itself is not meant.
    fn release_left_behind(&mut self, slot: u64) {
        let Some(container) = self.containers.get(&slot) else { return };
        if !container.found_running || !container.is_under_policy() {
            return;
        }
        let members: Vec<(u32, Process)> =
            self.kernel.maps.processes().into_iter().filter(|(_, process)| process.slot == slot).collect();
        if !members.iter().all(|(pid, process)| process.held == 0 && processes::is_stopped(*pid)) {
            return;
        }
        let enforced = container.mode == "enforce";
        for (pid, _) in members {
            let Some((start, _)) = processes::start_and_parent(pid) else { continue };
            tracing::warn!(pid, slot, killed = enforced, "it was left stopped");
            self.let_go((pid, start), enforced);
        }
    }

    pub(super) fn end(&mut self, slot: u64) {
        self.empty_ring();
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
        let made = self.kernel.maps.records_made(slot);
        self.tell_coverage(slot, "ended", made);
        if let Some(asking) = self.asking.remove(&slot) {
            asking.abort();
        }
        self.pending.remove(&slot);
        self.revisions.release(&mut self.kernel.maps, slot);
        self.kernel.maps.remove_slot(slot);
        self.losses.forget(slot);
        self.admit_no_more(slot);
        if let Some(container) = self.containers.remove(&slot)
            && self.slots.get(&container.id) == Some(&slot)
        {
            self.slots.remove(&container.id);
        }
    }

    /// Remembers what a container that is not identified executed, in case it is a pod's sandbox.
    pub(super) fn note_entrypoint(&mut self, slot: u64, exec: &v1::ProcessExec) {
        let of_image = exec.origin == origin::name(origin::IMAGE).unwrap_or_default() && !exec.path_truncated;
        if let Some(container) = self.containers.get_mut(&slot)
            && container.entrypoint.is_none()
            && of_image
        {
            container.entrypoint = Some((exec.executable.clone().into_bytes(), exec.inode));
            self.admit_sandbox(slot);
        }
    }

    /// Lets the pause program start in containers that are not identified, once it has been seen as one.
    fn admit_sandbox(&mut self, slot: u64) {
        let Some(container) = self.containers.get(&slot) else { return };
        let is_sandbox = container.identity.as_ref().is_some_and(|identity| identity.sandbox);
        if let Some((path, inode)) = container.entrypoint.clone()
            && is_sandbox
        {
            self.admit(path, inode);
        }
    }

    /// Takes the admission of a sandbox's program back with the last sandbox that runs it: the layer may be deleted then,
    /// and its inodes given to others.
    fn admit_no_more(&mut self, slot: u64) {
        let Some(container) = self.containers.get(&slot) else { return };
        let Some(program) = container.entrypoint.clone() else { return };
        let is_sandbox =
            |container: &Container| container.identity.as_ref().is_some_and(|identity| identity.sandbox);
        let of_others = self.containers.iter().any(|(other, found)| {
            *other != slot && is_sandbox(found) && found.entrypoint.as_ref() == Some(&program)
        });
        if is_sandbox(container) && !of_others && self.admitted.remove(&program) {
            self.kernel.maps.admit_no_more(&program.0, program.1);
        }
    }

    /// Lets the agent's own program start in a container that is not identified: its replacement, from the same image.
    /// An agent on the host is replaced on the host, where nothing is refused.
    pub(super) fn admit_own_program(&mut self) {
        if self.kernel.has_hosts_root(std::process::id()) {
            return;
        }
        let own = std::fs::read_link("/proc/self/exe")
            .and_then(|path| Ok((path, std::fs::metadata("/proc/self/exe")?)));
        match own {
            Ok((path, metadata)) => {
                self.admit(std::os::unix::ffi::OsStringExt::into_vec(path.into_os_string()), metadata.ino());
            }
            Err(error) => tracing::debug!(%error, "the agent's own program is not admitted"),
        }
    }

    fn admit(&mut self, path: Vec<u8>, inode: u64) {
        let result = self.kernel.maps.admit(&path, inode);
        if self.admitted.insert((path, inode))
            && let Err(error) = result
        {
            tracing::warn!(error = format!("{error:#}"), "not admitted while unidentified");
        }
    }

    /// Says that the agent works. Called wherever it works for long.
    pub(super) fn renew_lease(&mut self) {
        let now = crate::records::now_since_boot();
        if now.saturating_sub(self.renewed) < RENEWAL.as_nanos() as u64 {
            return;
        }
        self.renewed = now;
        let until = now + self.lease.as_nanos() as u64;
        if let Err(error) = self.kernel.maps.renew_lease(until) {
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

/// A decision that was taken late.
pub(super) struct Settled {
    verdict: u8,
    reason: u8,
    mode: u8,
    of_script: bool,
}

impl Settled {
    /// Nobody will ever say what the container is: recorded, and let go.
    pub(super) fn unidentified() -> Self {
        Self { verdict: verdict::AUDITED, reason: reason::UNIDENTIFIED, mode: mode::HOLD, of_script: false }
    }
}

/// Judges what was held as the kernel would have: the script first, then its interpreter, and the worse of the two.
fn judge(policy: Option<&Policy>, held: &Held) -> Settled {
    let Some(policy) = policy else {
        return Settled { verdict: verdict::ALLOWED, reason: reason::NO_PROFILE, mode: 0, of_script: false };
    };
    let code = policy.mode.code();
    let mismatch = |reason| Settled {
        verdict: if code == mode::AUDIT { verdict::AUDITED } else { verdict::DENIED },
        reason,
        mode: code,
        of_script: false,
    };
    if held.escaped {
        return mismatch(reason::ESCAPED);
    }
    // A policy that cannot be compiled was not applied either.
    let Ok(image) = image::compile(policy) else { return mismatch(reason::LOOKUP_MISSED) };
    let own = evaluate(&image, &held.path, held.origin, held.failure);
    let script = held.script.as_ref().map(|(path, origin)| evaluate(&image, path, *origin, 0));
    let of_script = script.is_some_and(|script| script.verdict > own.verdict);
    let worse = script.filter(|_| of_script).unwrap_or(own);
    Settled { verdict: worse.verdict, reason: worse.reason, mode: code, of_script }
}
