//! The agent at work: one task that owns the kernel's maps, the containers, the profiles and the process table,
//! and takes one event after the other.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use palisade_abi::{
    codes::control,
    record::{ControlRecord, decode, decode_control},
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
    containers::{Container, Containers, Identity, NO_PROFILE, UNIDENTIFIED, cgroups, cri},
    delivery::{self, Queue},
    kernel::{self, Kernel},
    losses::Losses,
    policies::{Profiles, Revisions},
    processes::Processes,
    records::{self, Source},
};

/// How long telemetry may wait in the ring; what is urgent wakes the agent at once.
const RING_PERIOD: Duration = Duration::from_millis(100);
/// How often profiles are looked at and losses are counted.
const HOUSEKEEPING_PERIOD: Duration = Duration::from_secs(1);
/// How often containers are looked for in the cgroup tree, should the kernel's word have been lost.
const SCAN_PERIOD: Duration = Duration::from_secs(30);
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
    undecodable: u64,
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
    let features = kernel::features();
    let options = kernel::Options { unidentified: config.unidentified.mode(), sizes: config.sizes() };
    let mut kernel = Kernel::load(&options, &features)?;
    #[cfg(debug_assertions)]
    kernel.forward_logs();
    let source = Source::new(node_name(&config)?, boot_id()?);
    let mut profiles = Profiles::new(&config.profiles);
    profiles.refresh();
    let runtimes: Vec<Channel> =
        config.cri.iter().filter(|socket| socket.exists()).map(|socket| cri::connect(socket)).collect();
    if runtimes.is_empty() {
        tracing::error!(
            looked_for = ?config.cri,
            "no container runtime answers; containers stay unidentified. Name its CRI socket in the configuration"
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
        undecodable: 0,
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
            }
        }
    }

    /// Takes over containers that exist already.
    fn find_running(&mut self) {
        for found in cgroups::scan(&self.cgroups) {
            if self.containers.contains_key(&found.slot) {
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

    fn take_over(&mut self, found: &cgroups::Found) -> Result<()> {
        let is_new = self.kernel.maps.add_slot(found.slot, 0)?;
        if is_new {
            for cgroup in &found.cgroups {
                self.kernel.maps.add_cgroup(*cgroup, found.slot)?;
            }
            for process in &found.processes {
                self.kernel.maps.add_process(*process, found.slot)?;
            }
            self.processes.seed(&found.processes);
            // The first process of the container was set up by the runtime.
            if let Some(first) = found.processes.iter().min() {
                let root = std::path::PathBuf::from(format!("/proc/{first}/root"));
                self.kernel.learn_root(found.slot, &root)?;
            }
        }
        self.begin(found.slot, found.id.clone(), is_new);
        Ok(())
    }

    /// A container is there; ask what it is.
    fn begin(&mut self, slot: u64, id: String, found_running: bool) {
        if self.containers.contains_key(&slot) {
            return;
        }
        self.containers.insert(slot, Container::new(id.clone(), found_running));
        if !self.runtimes.is_empty() {
            let task = tokio::spawn(cri::identify(self.runtimes.clone(), slot, id, self.identified.clone()));
            self.asking.insert(slot, task);
        }
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
                control::CONTAINER_REMOVED => self.take_records(),
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
        let Some(container) = self.containers.get_mut(&slot) else { return };
        let Some(identity) = &container.identity else { return };
        // The pause container runs nothing but itself and is no workload.
        let policy = if identity.sandbox { None } else { self.profiles.policy_for(&identity.facts) };
        match self.revisions.apply(&mut self.kernel.maps, slot, policy.as_ref()) {
            Ok(revision) => {
                if change == "policy-changed" && revision == container.revision {
                    return;
                }
                container.revision = revision;
                container.mode = policy.as_ref().map_or(NO_PROFILE, |policy| policy.mode.as_str());
                container.profiles = policy.map(|policy| policy.profiles).unwrap_or_default();
                container.in_force_since = self.source.now();
            }
            Err(error) => tracing::error!(
                container = container.id,
                error = format!("{error:#}"),
                "its policy is not in force; it stays under what it was under"
            ),
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
        if self.queue.push(bytes, true).is_err() {
            tracing::warn!(container = container.id, "no room to report a change of coverage");
        }
        self.queue.flush();
    }

    fn take_records(&mut self) {
        let Self { kernel, source, containers, processes, losses, queue, undecodable, .. } = self;
        let unknown = Container::new(String::new(), false);
        let mut flush = false;
        loop {
            let taken = kernel.records.drain(RING_ROUND, |bytes| {
                let decoded = match decode(bytes) {
                    Ok(decoded) => decoded,
                    Err(error) => {
                        *undecodable += 1;
                        tracing::error!(%error, "a record cannot be read");
                        return;
                    }
                };
                let made = records::make(source, processes, decoded);
                let slot = made.header.slot;
                let container = containers.get(&slot).unwrap_or(&unknown);
                let bytes = source.encode(slot, Some(&made.header), container.encoded(), made.event);
                if queue.push(bytes, made.urgent).is_err() {
                    losses.turned_away(slot, source.wall(made.header.time));
                }
                flush = true;
            });
            if taken < RING_ROUND {
                break;
            }
        }
        if flush {
            self.queue.flush();
        }
    }

    fn keep_house(&mut self) {
        if self.profiles.refresh() {
            let slots: Vec<u64> = self.containers.keys().copied().collect();
            for slot in slots {
                self.apply(slot, "policy-changed");
            }
        }
        self.report_losses();
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
        self.take_records();
        self.report_losses();
        let made = self.kernel.maps.records_made(slot);
        self.tell_coverage(slot, "ended", made);
        if let Some(asking) = self.asking.remove(&slot) {
            asking.abort();
        }
        self.revisions.release(&mut self.kernel.maps, slot);
        self.kernel.maps.remove_slot(slot);
        self.losses.forget(slot);
        self.containers.remove(&slot);
    }

    /// Takes the programs out of force, reads what is left in the ring, and waits until it is delivered.
    async fn drain(&mut self, deadline: Duration) {
        self.kernel.detach();
        self.take_records();
        self.report_losses();
        for (name, count) in self.kernel.maps.errors() {
            tracing::warn!(site = name, count, "errors in the kernel programs");
        }
        if let Some(misses @ 1..) = self.kernel.recursion_misses() {
            tracing::error!(misses, "the kernel skipped a program while it was running already");
        }
        let unidentified =
            self.containers.values().filter(|container| container.mode == UNIDENTIFIED).count();
        if tokio::time::timeout(deadline, self.queue.drained()).await.is_err() {
            tracing::error!(
                records = self.queue.counts().0,
                "the collector did not take these in time; they are lost"
            );
        }
        tracing::info!(
            delivered = self.queue.counts().1,
            undecodable = self.undecodable,
            unidentified,
            processes = self.processes.len(),
            "stopped"
        );
    }
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
