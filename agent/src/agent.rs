//! The agent at work: one task that owns the kernel's maps, the containers, the profiles and the process table,
//! and takes one event after the other.

use std::{
    collections::{HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use palisade_abi::{
    codes::control,
    record::{ControlRecord, Header, decode, decode_control},
};
use palisade_proto::v1::{self, record::Event};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    task::JoinHandle,
    time::{MissedTickBehavior, interval},
};
use tonic::transport::Channel;

use crate::{
    config::Config,
    containers::{Container, Containers, Identity, NO_PROFILE, NOT_IN_FORCE, UNIDENTIFIED, cgroups, cri},
    delivery::{self, Queue},
    kernel::{self, Kernel},
    losses::Losses,
    policies::{Profiles, Revisions},
    processes::{self, Processes},
    records::{self, Source},
};

/// How long telemetry may wait in the ring; what is urgent wakes the agent at once.
const RING_PERIOD: Duration = Duration::from_millis(100);
/// How often profiles are looked at and losses are counted.
const HOUSEKEEPING_PERIOD: Duration = Duration::from_secs(1);
/// How often containers are looked for in the cgroup tree, should the kernel's word have been lost.
const SCAN_PERIOD: Duration = Duration::from_secs(30);
/// Bytes that a record takes in the ring at least.
const SMALLEST_RECORD: usize = size_of::<palisade_abi::record::ForkRecord>();
/// Records taken from the ring before anything else gets its turn.
const RING_ROUND: usize = 4096;

pub struct Agent {
    kernel: Kernel,
    source: Source,
    containers: Containers,
    profiles: Profiles,
    revisions: Revisions,
    processes: Processes,
    losses: Losses,
    queue: Arc<Queue>,
    runtimes: Vec<Channel>,
    identified: mpsc::Sender<(u64, Identity)>,
    asking: std::collections::HashMap<u64, JoinHandle<()>>,
    cgroups: std::path::PathBuf,
    /// Slots whose policy could not be put in force; tried again.
    pending: HashSet<u64>,
    /// Changes of coverage that found no room in the queue.
    unsaid: VecDeque<Bytes>,
    /// Whether the ring may hold more than the last round took.
    more: bool,
    ring_bytes: usize,
    /// Evidence against the programs that was last reported.
    evidence: Vec<(String, u64)>,
}

/// Runs until SIGTERM or SIGINT, then drains.
///
/// # Errors
///
/// When the programs cannot be put in force, or the kernel's rings cannot be read.
pub async fn run(config: Config) -> Result<()> {
    let cgroup_root = match &config.cgroups {
        Some(path) => path.clone(),
        None => cgroups::mount_point()?,
    };
    let mut profiles = Profiles::new(&config.profiles);
    profiles.load()?;
    let features = kernel::features();
    let options = kernel::Options { unidentified: config.unidentified.mode(), sizes: config.sizes() };
    let mut kernel = Kernel::load(&options, &features)?;
    #[cfg(debug_assertions)]
    kernel.forward_logs();
    let source = Source::new(node_name(&config)?, boot_id()?);
    // Connections are made when they are needed, so a runtime that starts later is found.
    let runtimes: Vec<Channel> = config.cri.iter().map(|socket| cri::connect(socket)).collect();
    if !config.cri.iter().any(|socket| socket.exists()) {
        tracing::error!(
            looked_for = ?config.cri,
            "no container runtime is there yet; containers stay unidentified. If it has another CRI socket, name it under cri:"
        );
    }
    let queue = Arc::new(Queue::new(config.queue.bytes));
    let hello = v1::Hello {
        node: source.node.clone(),
        boot: source.boot.clone(),
        epoch: source.epoch,
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    let delivery = tokio::spawn(delivery::deliver(config.collector.clone(), hello, Arc::clone(&queue)));
    let (identified, identities) = mpsc::channel(64);
    kernel.attach()?;
    let mut agent = Agent {
        kernel,
        source,
        containers: Containers::new(),
        profiles,
        revisions: Revisions::default(),
        processes: Processes::default(),
        losses: Losses::default(),
        queue,
        runtimes,
        identified,
        asking: std::collections::HashMap::new(),
        cgroups: cgroup_root,
        pending: HashSet::new(),
        unsaid: VecDeque::new(),
        more: false,
        ring_bytes: config.maps.ring_bytes as usize,
        evidence: Vec::new(),
    };
    agent.find_running();
    tracing::info!(
        node = agent.source.node,
        tier = agent.kernel.tier.as_str(),
        containers = agent.containers.len(),
        "in force"
    );
    if let Some(reason) = &agent.kernel.tier_reason {
        tracing::warn!(
            reason,
            "fallback tier: a denied program is killed before its first instruction, not refused"
        );
    }
    let result = agent.work(identities).await;
    agent.drain(Duration::from_secs(config.drain_seconds)).await;
    delivery.abort();
    result
}

impl Agent {
    async fn work(&mut self, mut identities: mpsc::Receiver<(u64, Identity)>) -> Result<()> {
        let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;
        let period = |duration| {
            let mut interval = interval(duration);
            interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
            interval
        };
        let mut ring = period(RING_PERIOD);
        let mut housekeeping = period(HOUSEKEEPING_PERIOD);
        let mut scan = period(SCAN_PERIOD);
        loop {
            tokio::select! {
                biased;
                _ = terminate.recv() => return Ok(()),
                _ = interrupt.recv() => return Ok(()),
                ready = self.kernel.control.readable() => { ready?; self.take_control(); }
                Some((slot, identity)) = identities.recv() => self.identify(slot, identity),
                ready = self.kernel.records.readable() => { ready?; self.take_records(); }
                _ = ring.tick() => self.take_records(),
                _ = housekeeping.tick() => self.keep_house(),
                _ = scan.tick() => self.find_running(),
                // What is left of a full ring, after everything else had its turn.
                () = tokio::task::yield_now(), if self.more => self.take_records(),
            }
        }
    }

    /// Takes over containers that exist already.
    fn find_running(&mut self) {
        for found in cgroups::scan(&self.cgroups) {
            if let Some(container) = self.containers.get(&found.slot) {
                if container.found_running && !self.kernel.maps.has_root(found.slot) {
                    self.learn_root(&found, &found.members());
                }
                continue;
            }
            if let Err(error) = self.take_over(&found) {
                tracing::error!(
                    container = found.id,
                    error = format!("{error:#}"),
                    "a container is not covered"
                );
            }
        }
    }

    /// Gives a running container's cgroup and processes to its slot, and learns its root. Every step may be
    /// repeated: after a failure the next scan begins anew.
    fn take_over(&mut self, found: &cgroups::Found) -> Result<()> {
        let is_new = self.kernel.maps.add_slot(found.slot, 0)?;
        // The cgroup first: what forks from now on is found by it.
        self.kernel.maps.add_cgroup(found.slot, found.slot)?;
        if !found.is_there() {
            // It went before the kernel knew that it is a container's, so nobody would ever say that it ended.
            self.kernel.maps.remove_slot(found.slot);
            return Ok(());
        }
        let processes = found.members();
        for process in &processes {
            let entering = self.kernel.is_at_home(*process);
            if let Err(error) = self.kernel.maps.add_process(*process, found.slot, entering) {
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
        for process in processes.iter().filter(|process| !still.contains(process)) {
            self.kernel.maps.remove_process(*process);
        }
        self.processes.seed(&still);
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
    fn learn_root(&mut self, found: &cgroups::Found, processes: &[u32]) {
        let Some(first) = processes::oldest(processes) else { return };
        let root = std::path::PathBuf::from(format!("/proc/{first}/root"));
        if let Err(error) = self.kernel.learn_root(found.slot, &root) {
            tracing::warn!(
                container = found.id,
                error = format!("{error:#}"),
                "its root file system is not known yet, so the origin of its files is unknown; this is tried again"
            );
        }
    }

    /// A container is there; ask what it is.
    fn begin(&mut self, slot: u64, id: String, found_running: bool) {
        if self.containers.contains_key(&slot) {
            return;
        }
        self.containers.insert(slot, Container::new(id.clone(), found_running));
        self.tell_coverage(slot, "found", 0);
        let task = tokio::spawn(cri::identify(self.runtimes.clone(), slot, id, self.identified.clone()));
        self.asking.insert(slot, task);
    }

    fn take_control(&mut self) {
        let mut news: Vec<(ControlRecord, String)> = Vec::new();
        self.kernel.control.drain(RING_ROUND, |bytes| match decode_control(bytes) {
            Ok((record, name)) => news.push((record, String::from_utf8_lossy(name).into_owned())),
            Err(error) => tracing::error!(%error, "a control record cannot be read"),
        });
        for (record, name) in news {
            match record.kind {
                control::CONTAINER_CREATED => {
                    let id = cgroups::container_id(&name).unwrap_or(&name).to_owned();
                    self.begin(record.slot, id, false);
                }
                // The slot stays until its last process is gone; see `keep_house`.
                control::CONTAINER_REMOVED => {}
                other => tracing::error!(kind = other, "a control record of unknown kind"),
            }
        }
    }

    fn identify(&mut self, slot: u64, identity: Identity) {
        self.asking.remove(&slot);
        let Some(container) = self.containers.get_mut(&slot) else { return };
        tracing::info!(
            namespace = identity.facts.namespace,
            pod = identity.facts.pod,
            container = identity.facts.name,
            "identified"
        );
        container.identity = Some(identity);
        self.apply(slot, "identified");
    }

    /// Puts a container under the policy that its profiles make.
    fn apply(&mut self, slot: u64, change: &str) {
        // Records made before the change belong under what held then.
        self.take_records();
        let Some(container) = self.containers.get_mut(&slot) else { return };
        let Some(identity) = &container.identity else { return };
        // The pause container runs nothing but itself and is no workload.
        let policy = if identity.sandbox { None } else { self.profiles.policy_for(&identity.facts) };
        match self.revisions.apply(&mut self.kernel.maps, slot, policy.as_ref()) {
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
                container.profiles = policy.map(|policy| policy.profiles).unwrap_or_default();
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
    }

    fn tell_coverage(&mut self, slot: u64, change: &str, records_made: u64) {
        let Some(container) = self.containers.get(&slot) else { return };
        let coverage = v1::Coverage {
            change: change.to_owned(),
            in_force_since: container.in_force_since,
            first_exec: self.source.wall(self.kernel.maps.slot(slot).map_or(0, |slot| slot.first_exec)),
            tier: self.kernel.tier.as_str().to_owned(),
            found_running: container.found_running,
            records_made,
        };
        let bytes = self.source.encode(slot, None, container.encoded(), Event::Coverage(coverage));
        self.unsaid.push_back(bytes);
        self.say();
    }

    /// Queues what has waited for room, in order.
    fn say(&mut self) {
        while let Some(bytes) = self.unsaid.front() {
            if self.queue.push(bytes.clone(), true).is_err() {
                break;
            }
            self.unsaid.pop_front();
        }
        self.queue.flush();
    }

    /// Takes one round of records out of the ring, after the news of the containers that they belong to.
    fn take_records(&mut self) {
        self.take_control();
        let Self { kernel, source, containers, processes, losses, queue, revisions, .. } = self;
        let unknown = Container::new(String::new(), false);
        let taken = kernel.records.drain(RING_ROUND, |bytes| {
            let decoded = match decode(bytes) {
                Ok(decoded) => decoded,
                Err(error) => {
                    tracing::error!(%error, "a record cannot be read");
                    losses.undecodable(claimed_slot(bytes), source.now());
                    return;
                }
            };
            let made = records::make(source, processes, |number| revisions.name(number), decoded);
            let slot = made.header.slot;
            let container = containers.get(&slot).unwrap_or(&unknown);
            let bytes = source.encode(slot, Some(&made.header), container.encoded(), made.event);
            if queue.push(bytes, made.urgent).is_err() {
                losses.turned_away(slot, source.wall(made.header.time));
            }
        });
        self.more = taken == RING_ROUND;
        if taken > 0 {
            self.queue.flush();
        }
    }

    /// Takes all that is in the ring now; bounded by what it can hold.
    fn empty_ring(&mut self) {
        self.more = true;
        let mut rounds = 0;
        while self.more && rounds <= self.ring_bytes / SMALLEST_RECORD / RING_ROUND {
            self.take_records();
            rounds += 1;
        }
    }

    fn keep_house(&mut self) {
        if self.profiles.refresh() {
            let slots: Vec<u64> = self.containers.keys().copied().collect();
            for slot in slots {
                self.apply(slot, "policy-changed");
            }
        }
        for slot in self.pending.iter().copied().collect::<Vec<_>>() {
            self.apply(slot, "policy-changed");
        }
        self.kernel.maps.reap();
        self.report_first_execs();
        self.report_losses();
        self.say();
        self.report_evidence();
        let ended: Vec<u64> = self
            .kernel
            .maps
            .slots()
            .iter()
            .filter(|(_, slot)| slot.ended != 0)
            .map(|(slot, _)| *slot)
            .collect();
        for slot in ended {
            // A process that was moved out of the cgroup keeps its slot.
            if !self.kernel.maps.has_processes(slot) {
                self.end(slot);
            }
        }
    }

    /// Completes the attestation of containers whose workload has begun.
    fn report_first_execs(&mut self) {
        for (slot, value) in self.kernel.maps.slots() {
            if value.first_exec == 0 {
                continue;
            }
            if let Some(container) = self.containers.get_mut(&slot)
                && !std::mem::replace(&mut container.first_exec_told, true)
            {
                self.tell_coverage(slot, "first-exec", 0);
            }
        }
    }

    /// Says what speaks against the programs: skipped runs, and errors inside them.
    fn report_evidence(&mut self) {
        let mut evidence: Vec<(String, u64)> =
            self.kernel.maps.errors().into_iter().map(|(site, count)| (site.to_owned(), count)).collect();
        let misses = self.kernel.recursion_misses();
        if misses > 0 {
            evidence.push(("recursion-misses".to_owned(), misses));
        }
        for (site, count) in &evidence {
            if !self.evidence.iter().any(|(known, before)| known == site && before == count) {
                tracing::warn!(site, count, "errors in the kernel programs");
            }
        }
        self.evidence = evidence;
    }

    /// Turns what was lost since the last time into gap records.
    fn report_losses(&mut self) {
        let now = self.source.now();
        for (slot, value) in self.kernel.maps.slots() {
            self.losses.lost_in_kernel(slot, value.lost, now);
        }
        let unknown = Container::new(String::new(), false);
        let Self { losses, source, containers, queue, .. } = self;
        losses.report(now, |slot, gap| {
            let container = containers.get(&slot).unwrap_or(&unknown);
            let bytes = source.encode(slot, None, container.encoded(), Event::Gap(gap));
            queue.push(bytes, true).is_ok()
        });
        queue.flush();
    }

    fn end(&mut self, slot: u64) {
        self.empty_ring();
        self.report_losses();
        if self.losses.concerns(slot) {
            // The loss must be reported under the container's name; there is no room now.
            return;
        }
        let made = self.kernel.maps.records_made(slot);
        self.tell_coverage(slot, "ended", made);
        if let Some(asking) = self.asking.remove(&slot) {
            asking.abort();
        }
        self.pending.remove(&slot);
        self.revisions.release(&mut self.kernel.maps, slot);
        self.kernel.maps.remove_slot(slot);
        self.losses.forget(slot);
        self.containers.remove(&slot);
    }

    /// Takes the programs out of force, reads what is left in the ring, and waits until it is delivered.
    async fn drain(&mut self, deadline: Duration) {
        self.report_evidence();
        self.kernel.detach();
        self.empty_ring();
        let slots: Vec<u64> = self.containers.keys().copied().collect();
        for slot in slots {
            let made = self.kernel.maps.records_made(slot);
            if let Some(container) = self.containers.get_mut(&slot) {
                container.mode = NOT_IN_FORCE;
                container.encode();
            }
            self.tell_coverage(slot, "agent-stopped", made);
        }
        let emptied = async {
            loop {
                self.report_losses();
                self.say();
                self.queue.drained().await;
                if self.losses.unsaid() == 0 && self.unsaid.is_empty() {
                    break;
                }
            }
        };
        if tokio::time::timeout(deadline, emptied).await.is_err() {
            tracing::error!(
                records = self.queue.counts().0,
                uncounted = self.losses.unsaid(),
                "the collector did not take these in time; they are lost"
            );
        }
        tracing::info!(delivered = self.queue.counts().1, processes = self.processes.len(), "stopped");
    }
}

/// The slot that a record claims, of bytes that are not a record of this build.
fn claimed_slot(bytes: &[u8]) -> u64 {
    let at = std::mem::offset_of!(Header, slot);
    bytes.get(at..at + 8).and_then(|slot| slot.try_into().ok()).map_or(0, u64::from_le_bytes)
}

fn node_name(config: &Config) -> Result<String> {
    if let Some(node) = &config.node {
        return Ok(node.clone());
    }
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    anyhow::ensure!(!name.is_empty(), "the host has no name; write one under node: in the configuration");
    Ok(name)
}

fn boot_id() -> Result<String> {
    let id =
        std::fs::read_to_string("/proc/sys/kernel/random/boot_id").context("cannot read the boot's id")?;
    Ok(id.trim().to_owned())
}
