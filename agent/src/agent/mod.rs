//! The agent at work: one task that owns the kernel's maps, the containers, the profiles and the process table,
//! and takes one event after the other.

mod accounts;
mod admitted;
mod adopt;
pub mod digests;
mod flow;
mod health;
mod held;
pub mod interpreters;
mod lifecycle;
pub mod links;
mod others;
mod report;
mod root;
mod self_probe;
mod volumes;

pub use self_probe::{REFUSED, SIGNAL_LET_THROUGH};

use std::{
    collections::{BTreeSet, HashMap, HashSet, VecDeque},
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use palisade_abi::{
    codes::{control, mode},
    record::{ControlRecord, decode_control},
    state::AgentState,
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    time::{MissedTickBehavior, interval},
};

use self::{
    flow::{HeldExec, Waiting},
    health::{Inquiry, Socket, Verdicts},
    others::{InForce, Others},
    self_probe::SelfProbe,
};
use crate::{
    config::Config,
    containers::{
        Container, Containers, Identity, Standing, cgroups,
        containerd::RuntimeEvent,
        identify::{self, Questions, Sources},
        nri,
    },
    delivery::{self, Link, News, Queue, Run},
    kernel::{self, Kernel, OldSet},
    losses::Losses,
    policies::{Profiles, Revisions},
    processes::{ProcessKey, Processes},
    records::Source,
    sessions::Sessions,
};

/// How long telemetry may wait in the ring; what is urgent wakes the agent at once.
const RING_PERIOD: Duration = Duration::from_millis(100);
/// How often profiles are looked at and losses are counted.
const HOUSEKEEPING_PERIOD: Duration = Duration::from_secs(1);
/// How often containers are looked for in the cgroup tree, should the kernel's word have been lost.
const SCAN_PERIOD: Duration = Duration::from_secs(30);
/// Records taken from the ring before anything else gets its turn.
const RING_ROUND: usize = 1024;

pub struct Agent {
    kernel: Kernel,
    source: Source,
    containers: Containers,
    /// Whose records belong to no container that is known.
    unknown: Container,
    profiles: Profiles,
    revisions: Revisions,
    processes: Processes,
    losses: Losses,
    queue: Arc<Queue>,
    link: Arc<Link>,
    verdicts: Verdicts,
    begun: Instant,
    sessions: Sessions,
    questions: Questions,
    /// Slots by the runtime's id of the container.
    slots: HashMap<String, u64>,
    /// What the runtime described before its cgroup was there.
    expected: HashMap<String, Identity>,
    /// What is stopped until its container is identified.
    held: HashMap<u64, Vec<HeldExec>>,
    /// Held processes without a record, at the last scan.
    unrecorded: HashSet<u32>,
    /// Held processes that could not be let go, or killed, and are tried again.
    not_let_go: Vec<(ProcessKey, bool)>,
    /// Records of containers that are not identified yet, and since when they wait.
    waiting: HashMap<u64, Waiting>,
    /// Files that may start in containers that are not identified.
    admitted: HashSet<(Vec<u8>, u64)>,
    lease: Duration,
    /// What the kernel is told with every renewal.
    state: AgentState,
    /// When the lease was renewed last, nanoseconds since boot.
    renewed: u64,
    /// Whether it is not renewed any more.
    leaving: bool,
    slowest_answer: Duration,
    cgroups: std::path::PathBuf,
    /// Slots whose policy could not be put in force; tried again.
    pending: HashSet<u64>,
    /// Slots whose policy speaks of volumes and waits until they are mounted.
    awaiting_mounts: HashMap<u64, Instant>,
    /// Containers whose mounts became known while records were taken; see [`Agent::apply_due`].
    due: BTreeSet<u64>,
    /// Changes of coverage that found no room in the queue.
    unsaid: VecDeque<Bytes>,
    /// Whether the ring may hold more than the last round took.
    more: bool,
    ring_bytes: usize,
    self_probe: SelfProbe,
    /// What an agent before this one left, while it is counted.
    settling: Option<adopt::Settling>,
    /// Sets of programs of other builds or configurations, beside this agent's own.
    others: Option<Others>,
    /// Whether nothing is claimed, since the self-probe fails.
    withdrawn: bool,
    /// Whether enforcement does not work and another set of programs must be loaded.
    start_over: bool,
    /// Evidence against the programs that was last reported.
    evidence: Vec<(String, u64)>,
}

/// Everything that tells the agent something, apart from the kernel.
struct Inputs {
    identities: mpsc::Receiver<(u64, Identity)>,
    questions: mpsc::Receiver<nri::Question>,
    events: mpsc::Receiver<RuntimeEvent>,
    news: mpsc::UnboundedReceiver<News>,
    inquiries: mpsc::Receiver<Inquiry>,
}

/// Runs until SIGTERM or SIGINT, then drains.
///
/// # Errors
///
/// When the programs cannot be put in force, or the kernel's rings cannot be read.
pub async fn run(config: Config) -> Result<()> {
    config.check_identity()?;
    let cgroup_root = match &config.cgroups {
        Some(path) => path.clone(),
        None => cgroups::mount_point()?,
    };
    let mut profiles = Profiles::new(&config.profiles);
    profiles.load()?;
    let features = kernel::features();
    let kernel = Kernel::open(&config.sizes(), &features, config.pins())?;
    let boot = boot_id()?;
    let source = Source::new(node_name(&config)?, boot.clone(), &kernel.meta);
    let sources = Arc::new(Sources::new(&config.runtimes));
    if !config.runtimes.sockets().any(|socket| socket.exists()) {
        tracing::error!(
            looked_for = ?config.runtimes,
            "no container runtime is there yet; containers stay unidentified. If it has another socket, name it under runtimes:"
        );
    }
    let (tell, news) = mpsc::unbounded_channel();
    let own = Run {
        number: 0,
        node: source.node.clone(),
        boot: source.boot.clone(),
        started: source.started,
        first: 0,
    };
    let queue = Arc::new(Queue::new(config.limits(), own, tell));
    let link = Arc::new(Link::default());
    let delivery = tokio::spawn(delivery::deliver(config.targets()?, Arc::clone(&queue), Arc::clone(&link)));
    let (identified, identities) = mpsc::channel(64);
    let (asked, questions) = mpsc::channel(16);
    let (told, events) = mpsc::channel(256);
    nri::spawn(&config.runtimes.nri, &asked)?;
    let mut speaking = Vec::new();
    for (socket, channel) in &sources.containerd {
        speaking.push(tokio::spawn(identify::follow(socket.clone(), channel.clone(), told.clone())));
    }
    // Before anything is attached, so that no container starts without an agent.
    let lease = Duration::from_secs(config.agent_lease_seconds);
    let mut agent = Agent {
        kernel,
        source,
        containers: Containers::new(),
        unknown: Container::new(String::new(), std::path::PathBuf::new(), false),
        profiles,
        revisions: Revisions::default(),
        processes: Processes::new(&boot),
        sessions: Sessions::default(),
        losses: Losses::default(),
        queue,
        link,
        verdicts: Verdicts::default(),
        begun: Instant::now(),
        questions: Questions::new(sources, identified),
        slots: HashMap::new(),
        expected: HashMap::new(),
        held: HashMap::new(),
        unrecorded: HashSet::new(),
        not_let_go: Vec::new(),
        waiting: HashMap::new(),
        admitted: HashSet::new(),
        lease,
        state: AgentState {
            unidentified: u32::from(config.unidentified.mode()),
            when_agent_absent: u32::from(config.when_agent_absent.mode()),
            pid: std::process::id(),
            parent: std::os::unix::process::parent_id(),
            self_protection: u32::from(config.self_protection.mode()),
            // Until the first proof.
            failing: 1,
            ..AgentState::default()
        },
        renewed: 0,
        leaving: false,
        slowest_answer: Duration::ZERO,
        cgroups: cgroup_root,
        pending: HashSet::new(),
        awaiting_mounts: HashMap::new(),
        due: BTreeSet::new(),
        unsaid: VecDeque::new(),
        more: false,
        self_probe: SelfProbe::new(Duration::from_secs(config.self_probe_seconds)),
        settling: None,
        others: None,
        withdrawn: false,
        start_over: false,
        ring_bytes: config.maps.ring_bytes as usize,
        evidence: Vec::new(),
    };
    agent.protect_pins();
    agent.renew_lease();
    agent.admit_own_program();
    agent.kernel.protect()?;
    agent.kernel.attach()?;
    let others = agent.kernel.old_sets()?;
    if agent.kernel.other_sets()? > 0 {
        tracing::info!(step = "the new programs are attached", "upgrade");
    }
    let others = agent.kernel.clear_away(others)?;
    // It may take a second for each gigabyte, while the programs are in force already.
    agent.queue.open();
    agent.renew_lease();
    let keeper = {
        let queue = Arc::clone(&agent.queue);
        std::thread::Builder::new().name("spool".to_owned()).spawn(move || queue.keep())
    };
    let keeper = keeper.context("cannot start a thread for the spool")?;
    let inherited = if agent.kernel.adopted { None } else { agent.inherit(&others) };
    if agent.kernel.adopted || inherited.is_some() {
        agent.adopt()?;
    }
    if let Err(error) = agent.prepare_self_probe() {
        tracing::error!(error = format!("{error:#}"), "the self-probe has no place in the kernel");
    }
    let unreadable = agent.kernel.other_sets()? > others.len() || !others.iter().all(OldSet::can_be_copied);
    if others.is_empty() && !unreadable {
        agent.kernel.activate(true)?;
        agent.find_running();
        // What was never completed.
        agent.kernel.retire_others()?;
        agent.kernel.forget_others(&[])?;
    } else {
        // The other one makes the records, and gates what is new, until this one knows every container.
        agent.find_running();
        agent.kernel.activate(inherited == Some(true))?;
        tracing::info!(step = "this set records", "upgrade");
        agent.find_running();
        agent.others = Some(Others::InForce(InForce::new(others, unreadable)));
    }
    tracing::info!(
        node = agent.source.node,
        tier = agent.kernel.tier.as_str(),
        containers = agent.containers.len(),
        "in force"
    );
    if let Some(reason) = &agent.kernel.tier_reason {
        tracing::warn!(
            reason,
            "fallback tier: a denied program is killed before its first instruction, not refused, and containers that turn \
             on the agent are not stopped"
        );
    }
    let (inquire, inquiries) = mpsc::channel(4);
    if let Some(address) = config.metrics {
        health::serve_metrics(address, inquire.clone()).await?;
    }
    let _socket = config.socket().and_then(|path| {
        let opened = Socket::open(path, inquire);
        opened
            .inspect_err(|error| {
                tracing::warn!(socket = %path.display(), error = format!("{error:#}"), "nobody can ask for the agent's status");
            })
            .ok()
    });
    agent.forget_unknown_slots();
    let mut inputs = Inputs { identities, questions, events, news, inquiries };
    let result = agent.work(&mut inputs, &keeper).await;
    for task in speaking {
        task.abort();
    }
    agent.drain(Duration::from_secs(config.drain_seconds), &mut inputs).await;
    delivery.abort();
    agent.queue.close();
    if keeper.join().is_err() {
        tracing::error!("the thread of the spool has failed; what it had not written is lost");
    }
    while let Ok(news) = inputs.news.try_recv() {
        agent.learn(news);
    }
    result
}

impl Agent {
    async fn work(&mut self, inputs: &mut Inputs, keeper: &JoinHandle<()>) -> Result<()> {
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
                    self.identify(slot, identity);
                }
                Some(event) = inputs.events.recv() => self.runtime_event(event),
                Some(news) = inputs.news.recv() => self.learn(news),
                ready = self.kernel.records.readable() => { ready?; self.take_records(); }
                _ = ring.tick() => { self.look_for_mounts(); self.take_records(); self.probe_self(); }
                _ = housekeeping.tick() => {
                    self.keep_house();
                    if keeper.is_finished() {
                        bail!("the thread of the spool has failed; start the agent again");
                    }
                    if self.start_over {
                        self.kernel.give_up()?;
                        bail!("enforcement does not work; another set of programs must be loaded: start the agent again");
                    }
                }
                Some(inquiry) = inputs.inquiries.recv() => drop(inquiry.send(self.status())),
                _ = scan.tick() => { self.find_running(); self.look_for_more_mounts(); self.prune(); }
                // What is left of a full ring, after everything else had its turn.
                () = tokio::task::yield_now(), if self.more => self.take_records(),
            }
            self.apply_due();
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
                    let path = record.path.split(|byte| *byte == 0).next().unwrap_or_default();
                    let folder = cgroups::folder(&self.cgroups, path, record.slot);
                    self.begin(record.slot, Container::new(id, folder, false));
                }
                // The slot stays until its last process is gone; see `keep_house`.
                control::CONTAINER_REMOVED => {}
                other => tracing::error!(kind = other, "a control record of unknown kind"),
            }
        }
    }

    /// Forgets processes and sessions whose end was not told.
    fn prune(&mut self) {
        self.empty_ring();
        let alive: HashSet<u32> =
            self.kernel.maps.state.processes().into_iter().map(|(pid, _)| pid).collect();
        self.processes.prune(&alive);
        self.settle_unrecorded();
        let over = self.sessions.prune(&alive, self.source.now());
        self.tell_sessions(over);
    }

    fn keep_house(&mut self) {
        self.renew_lease();
        self.let_go_again();
        if !self.unrecorded.is_empty() {
            self.settle_unrecorded();
        }
        if self.profiles.refresh() {
            let slots: Vec<u64> = self.containers.keys().copied().collect();
            for slot in slots {
                self.apply(slot, "policy-changed");
            }
        }
        for slot in self.pending.iter().copied().collect::<Vec<_>>() {
            self.apply(slot, "policy-changed");
        }
        self.compare_roots_early();
        self.kernel.maps.policies.reap();
        self.retire_others();
        self.push_overdue();
        self.report_first_execs();
        self.report_losses();
        self.say();
        self.report_evidence();
        let ended: Vec<u64> = self
            .kernel
            .maps
            .ledger
            .slots()
            .iter()
            .filter(|(_, slot)| slot.ended != 0)
            .map(|(slot, _)| *slot)
            .collect();
        for slot in ended {
            // A process that was moved out of the cgroup keeps its slot.
            if !self.kernel.maps.state.has_processes(slot) {
                self.end(slot);
            }
        }
    }

    /// Reads what is left in the ring, and waits until it is delivered. What is pinned stays in force.
    async fn drain(&mut self, deadline: Duration, inputs: &mut Inputs) {
        self.report_evidence();
        if self.kernel.outlives_the_agent() {
            // From now on nobody lets go what is held.
            self.end_lease();
        } else {
            self.kernel.detach();
        }
        self.empty_ring();
        self.apply_due();
        // Nobody is left to ask for them.
        let deny =
            self.kernel.outlives_the_agent() && self.state.when_agent_absent == u32::from(mode::ENFORCE);
        for (slot, held) in std::mem::take(&mut self.held) {
            for exec in held {
                self.finish(slot, exec, held::Settled::without_agent(deny));
            }
        }
        for slot in self.waiting.keys().copied().collect::<Vec<_>>() {
            self.push_waiting(slot);
        }
        let slots: Vec<u64> = self.containers.keys().copied().collect();
        for slot in slots {
            let made = self.kernel.maps.ledger.records_made(slot);
            if let Some(container) = self.containers.get_mut(&slot)
                && !self.kernel.outlives_the_agent()
            {
                container.standing = Standing::NotInForce;
                container.encode();
            }
            self.tell_coverage(slot, "agent-stopped", made);
        }
        let deadline = if self.queue.outlives_the_agent() && self.link.state().collector.is_none() {
            // The next agent delivers it.
            Duration::ZERO
        } else {
            deadline
        };
        let emptied = async {
            loop {
                self.report_losses();
                self.say();
                tokio::select! {
                    () = self.queue.drained() => {
                        if self.losses.unsaid() == 0 && self.unsaid.is_empty() {
                            break;
                        }
                        // There was no room for them.
                        tokio::time::sleep(RING_PERIOD).await;
                    }
                    Some(news) = inputs.news.recv() => self.learn(news),
                }
            }
        };
        let in_time = tokio::time::timeout(deadline, emptied).await.is_ok();
        let waiting = self.queue.waiting();
        if !in_time && self.queue.outlives_the_agent() && self.losses.unsaid() == 0 {
            tracing::info!(records = waiting.records, "the next agent delivers these");
        } else if !in_time {
            tracing::error!(
                records = waiting.records,
                uncounted = self.losses.unsaid(),
                "the collector did not take these in time; they are lost"
            );
        }
        tracing::info!(delivered = waiting.acknowledged, processes = self.processes.len(), "stopped");
    }
}

fn node_name(config: &Config) -> Result<String> {
    let name = config.node_name();
    anyhow::ensure!(!name.is_empty(), "the host has no name; write one under node: in the configuration");
    Ok(name)
}

fn boot_id() -> Result<String> {
    let id =
        std::fs::read_to_string("/proc/sys/kernel/random/boot_id").context("cannot read the boot's id")?;
    Ok(id.trim().to_owned())
}
