//! The agent at work: one task that owns the kernel's maps, the containers, the profiles and the process table,
//! and takes one event after the other.

mod lifecycle;
mod report;

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
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

use crate::{
    config::Config,
    containers::{
        Container, Containers, Identity, NOT_IN_FORCE, cgroups,
        containerd::RuntimeEvent,
        identify::{self, Sources},
        nri,
    },
    delivery::{self, Queue},
    kernel::{self, Kernel},
    losses::Losses,
    policies::{Profiles, Revisions},
    processes::Processes,
    records::{self, Held, Made, Source},
    sessions::{Beginning, Sessions},
};

/// How long telemetry may wait in the ring; what is urgent wakes the agent at once.
const RING_PERIOD: Duration = Duration::from_millis(100);
/// How often profiles are looked at and losses are counted.
const HOUSEKEEPING_PERIOD: Duration = Duration::from_secs(1);
/// How often containers are looked for in the cgroup tree, should the kernel's word have been lost.
const SCAN_PERIOD: Duration = Duration::from_secs(30);
/// Bytes that a record takes in the ring at least.
const SMALLEST_RECORD: usize = size_of::<palisade_abi::record::ForkRecord>();
/// How long records wait for the name of their container, and how many of one container.
const PATIENCE: Duration = Duration::from_secs(5);
const MOST_WAITING: usize = 1024;
/// Records taken from the ring before anything else gets its turn.
const RING_ROUND: usize = 1024;

pub struct Agent {
    kernel: Kernel,
    source: Source,
    containers: Containers,
    profiles: Profiles,
    revisions: Revisions,
    processes: Processes,
    losses: Losses,
    queue: Arc<Queue>,
    sessions: Sessions,
    sources: Arc<Sources>,
    identified: mpsc::Sender<(u64, Identity)>,
    asking: HashMap<u64, JoinHandle<()>>,
    /// Slots by the runtime's id of the container.
    slots: HashMap<String, u64>,
    /// What the runtime described before its cgroup was there.
    expected: HashMap<String, Identity>,
    /// What is stopped until its container is identified.
    held: HashMap<u64, Vec<HeldExec>>,
    /// Records of containers that are not identified yet, and since when they wait.
    waiting: HashMap<u64, (Instant, Vec<(Stamp, Event, bool)>)>,
    /// Files that may start in containers that are not identified.
    admitted: HashSet<(Vec<u8>, u64)>,
    lease: Duration,
    slowest_answer: Duration,
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

/// An execution that is stopped, and its record as far as it is made.
struct HeldExec {
    made: Stamp,
    event: v1::ProcessExec,
    held: Held,
    since: Instant,
}

/// What a record needs besides its event.
#[derive(Clone, Copy)]
struct Stamp {
    header: Header,
    session: palisade_abi::record::SessionPart,
    process: crate::processes::ProcessKey,
}

/// Everything that tells the agent something, apart from the kernel.
struct Inputs {
    identities: mpsc::Receiver<(u64, Identity)>,
    questions: mpsc::Receiver<nri::Question>,
    events: mpsc::Receiver<RuntimeEvent>,
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
    let mut kernel = Kernel::load(&config.kernel_options(), &features)?;
    #[cfg(debug_assertions)]
    kernel.forward_logs();
    let boot = boot_id()?;
    let source = Source::new(node_name(&config)?, boot.clone());
    let sources = Arc::new(Sources::new(&config.runtimes));
    if !config.runtimes.sockets().any(|socket| socket.exists()) {
        tracing::error!(
            looked_for = ?config.runtimes,
            "no container runtime is there yet; containers stay unidentified. If it has another socket, name it under runtimes:"
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
    let (asked, questions) = mpsc::channel(16);
    let (told, events) = mpsc::channel(256);
    let mut speaking = Vec::new();
    for socket in &config.runtimes.nri {
        speaking.push(tokio::spawn(nri::serve(socket.clone(), asked.clone())));
    }
    for (socket, channel) in &sources.containerd {
        speaking.push(tokio::spawn(identify::follow(socket.clone(), channel.clone(), told.clone())));
    }
    // Before anything is attached, so that no container starts without an agent.
    let lease = Duration::from_secs(config.agent_lease_seconds);
    let mut agent = Agent {
        kernel,
        source,
        containers: Containers::new(),
        profiles,
        revisions: Revisions::default(),
        processes: Processes::new(&boot),
        sessions: Sessions::default(),
        losses: Losses::default(),
        queue,
        sources,
        identified,
        asking: HashMap::new(),
        slots: HashMap::new(),
        expected: HashMap::new(),
        held: HashMap::new(),
        waiting: HashMap::new(),
        admitted: HashSet::new(),
        lease,
        slowest_answer: Duration::ZERO,
        cgroups: cgroup_root,
        pending: HashSet::new(),
        unsaid: VecDeque::new(),
        more: false,
        ring_bytes: config.maps.ring_bytes as usize,
        evidence: Vec::new(),
    };
    agent.renew_lease();
    agent.admit_own_program();
    agent.kernel.attach()?;
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
    let result = agent.work(Inputs { identities, questions, events }).await;
    for task in speaking {
        task.abort();
    }
    agent.drain(Duration::from_secs(config.drain_seconds)).await;
    delivery.abort();
    result
}

impl Agent {
    async fn work(&mut self, mut inputs: Inputs) -> Result<()> {
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
                // The runtime waits for these.
                Some(question) = inputs.questions.recv() => self.answer(question),
                ready = self.kernel.control.readable() => {
                    ready?;
                    self.take_control();
                    self.identify_expected();
                }
                Some((slot, identity)) = inputs.identities.recv() => {
                    self.asking.remove(&slot);
                    self.identify(slot, identity);
                }
                Some(event) = inputs.events.recv() => self.runtime_event(event),
                ready = self.kernel.records.readable() => { ready?; self.take_records(); }
                _ = ring.tick() => self.take_records(),
                _ = housekeeping.tick() => self.keep_house(),
                _ = scan.tick() => { self.find_running(); self.prune(); }
                // What is left of a full ring, after everything else had its turn.
                () = tokio::task::yield_now(), if self.more => self.take_records(),
            }
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
                // The slot stays until its last process is gone; see `keep_house`.
                control::CONTAINER_REMOVED => {}
                other => tracing::error!(kind = other, "a control record of unknown kind"),
            }
        }
    }

    /// Takes one round of records out of the ring, after the news of the containers that they belong to.
    fn take_records(&mut self) {
        self.take_control();
        let Self { kernel, source, processes, losses, revisions, .. } = self;
        let Kernel { records: ring, maps, .. } = kernel;
        let mut made = Vec::new();
        let taken = ring.drain(RING_ROUND, |bytes| match decode(bytes) {
            Ok(decoded) => made.push(records::make(
                source,
                processes,
                |number| revisions.name(number),
                |pid| maps.slot_of_process(pid),
                decoded,
            )),
            Err(error) => {
                tracing::error!(%error, "a record cannot be read");
                losses.undecodable(claimed_slot(bytes), source.now());
            }
        });
        self.more = taken == RING_ROUND;
        let mut settled = HashSet::new();
        for made in made {
            let slot = made.header.slot;
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
        let Made { header, session, process, event, urgent, held } = made;
        let slot = header.slot;
        let stamp = Stamp { header, session, process };
        match (event, held) {
            (Event::Exec(event), Some(held)) => {
                let exec = HeldExec { made: stamp, event, held, since: Instant::now() };
                self.held.entry(slot).or_default().push(exec);
                return true;
            }
            (Event::Exec(event), None) => self.deliver(slot, &stamp, event),
            (Event::Fork(event), _) => {
                self.sessions.forked(slot, &session, process.0);
                self.push(slot, &stamp, Event::Fork(event), urgent);
            }
            (Event::Exit(event), _) => {
                let over =
                    self.sessions.exited(slot, &session, process.0, &event, self.source.wall(header.time));
                self.push(slot, &stamp, Event::Exit(event), urgent);
                self.tell_sessions(over.map(|over| (slot, over)).into_iter().collect());
            }
            (event, _) => self.push(slot, &stamp, event, urgent),
        }
        false
    }

    /// Passes an exec on, after the start of its session when it is the first.
    fn deliver(&mut self, slot: u64, stamp: &Stamp, event: v1::ProcessExec) {
        let allowed = event.verdict == "allowed";
        if event.reason != "runtime-step" {
            let probes = self
                .containers
                .get(&slot)
                .and_then(|container| container.identity.as_ref())
                .map(|identity| identity.probes.as_slice())
                .unwrap_or_default();
            let beginning = || Beginning {
                id: self.processes.session_id((stamp.session.pid, stamp.session.start)),
                exec: &event,
                time: self.source.wall(stamp.header.time),
                probes,
            };
            let begun = self.sessions.executed(slot, &stamp.session, stamp.process.0, beginning, allowed);
            self.tell_sessions(begun.map(|begun| (slot, begun)).into_iter().collect());
            self.note_entrypoint(slot, &event);
        }
        self.push(slot, stamp, Event::Exec(event), !allowed);
    }

    /// Queues a record; of a container that is not identified yet it waits for a while, so that it can say whose it
    /// is.
    fn push(&mut self, slot: u64, stamp: &Stamp, event: Event, urgent: bool) {
        let unidentified = self.containers.get(&slot).is_some_and(|container| !container.is_under_policy());
        if unidentified {
            let waiting = self.waiting.entry(slot).or_insert_with(|| (Instant::now(), Vec::new()));
            if waiting.0.elapsed() < PATIENCE && waiting.1.len() < MOST_WAITING {
                waiting.1.push((*stamp, event, urgent));
                return;
            }
            self.push_waiting(slot);
        }
        self.push_now(slot, stamp, event, urgent);
    }

    /// Queues what has waited for its container's name.
    fn push_waiting(&mut self, slot: u64) {
        let Some((_, waiting)) = self.waiting.get_mut(&slot) else { return };
        for (stamp, event, urgent) in std::mem::take(waiting) {
            self.push_now(slot, &stamp, event, urgent);
        }
    }

    /// Gives up on names that nobody told in time.
    fn push_overdue(&mut self) {
        let overdue: Vec<u64> = self
            .waiting
            .iter()
            .filter(|(_, (since, _))| since.elapsed() >= PATIENCE)
            .map(|(slot, _)| *slot)
            .collect();
        for slot in overdue {
            self.push_waiting(slot);
        }
    }

    fn push_now(&mut self, slot: u64, stamp: &Stamp, event: Event, urgent: bool) {
        let unknown = Container::new(String::new(), false);
        let container = self.containers.get(&slot).unwrap_or(&unknown);
        let id = self.processes.session_id((stamp.session.pid, stamp.session.start));
        let session = self.sessions.reference(slot, &stamp.session, id);
        let bytes = self.source.encode(slot, Some(&stamp.header), Some(session), container.encoded(), event);
        if self.queue.push(bytes, urgent).is_err() {
            self.losses.turned_away(slot, self.source.wall(stamp.header.time));
        }
    }

    /// Forgets processes and sessions whose end was not told.
    fn prune(&mut self) {
        self.empty_ring();
        let alive: HashSet<u32> = self.kernel.maps.processes().into_iter().map(|(pid, _)| pid).collect();
        self.processes.prune(&alive);
        let over = self.sessions.prune(&alive, self.source.now());
        self.tell_sessions(over);
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
        self.renew_lease();
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
        self.push_overdue();
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

    /// Takes the programs out of force, reads what is left in the ring, and waits until it is delivered.
    async fn drain(&mut self, deadline: Duration) {
        self.report_evidence();
        self.kernel.detach();
        self.empty_ring();
        // Nobody is left to ask for them.
        for (slot, held) in std::mem::take(&mut self.held) {
            for exec in held {
                self.finish(slot, exec, lifecycle::Settled::unidentified());
            }
        }
        for slot in self.waiting.keys().copied().collect::<Vec<_>>() {
            self.push_waiting(slot);
        }
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

/// Whether a container is identified and under its policy.
fn containers_know(containers: &Containers, slot: u64) -> bool {
    containers.get(&slot).is_some_and(|container| container.is_under_policy())
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
