//! What goes wrong between agent and runtime while containers start: none may stay unknown, none may start unguarded.

use std::{
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use palisade_abi::state::Process;
use rustix::process::Signal;
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
    task::JoinHandle,
};

use crate::{
    attacks::{PAYLOAD_RAN, profile},
    containerd::{Containerd, Version, stop_the_guests},
    counters,
    cri::{Pod, Runtime, Spec, WORKLOAD_IMAGE, until},
    events,
    gate::Gate,
    node::{AgentOptions, Interfaces, Node},
    report::Report,
};

const MARK: &str = "/usr/bin/mark";

pub async fn run(only: &str, short: bool) -> Result<ExitCode> {
    let mut report = Report::of(only);
    stop_the_guests().await?;
    let mut containerd = Containerd::start(Version::Stable, true).await?;
    for case in CASES.iter().filter(|case| !short || case.is_in_short()) {
        report.case(case.name(), case.run(&mut containerd)).await;
    }
    Ok(report.close())
}

#[derive(Clone, Copy)]
enum Case {
    Restarts,
    Deadline,
    GarbledAnswers,
    GarbledQuestions,
    AbsentDeny,
    AbsentAudit,
    Killed,
    LetGo,
    Orphaned,
}

const CASES: &[Case] = &[
    Case::Restarts,
    Case::Deadline,
    Case::GarbledAnswers,
    Case::GarbledQuestions,
    Case::AbsentDeny,
    Case::AbsentAudit,
    Case::Killed,
    Case::LetGo,
    Case::Orphaned,
];

impl Case {
    /// Whether it is one of those that differ most.
    fn is_in_short(self) -> bool {
        matches!(
            self,
            Self::Restarts
                | Self::GarbledAnswers
                | Self::AbsentDeny
                | Self::Killed
                | Self::LetGo
                | Self::Orphaned
        )
    }

    fn name(self) -> &'static str {
        match self {
            Self::Restarts => "containerd restarts while containers start",
            Self::Deadline => "the agent exceeds the runtime's deadline",
            Self::GarbledAnswers => "the agent's answers are garbled on their way",
            Self::GarbledQuestions => "the runtime's questions are garbled on their way",
            Self::AbsentDeny => "an agent that does not renew its lease, whenAgentAbsent: deny",
            Self::AbsentAudit => "an agent that does not renew its lease, whenAgentAbsent: audit",
            Self::Killed => "an agent that is killed while it holds a container",
            Self::LetGo => "nobody but the agent lets go what is held",
            Self::Orphaned => "nor does the kernel, of an orphaned process group",
        }
    }

    async fn run(self, containerd: &mut Containerd) -> Result<()> {
        match self {
            Self::Restarts => restarts(containerd).await,
            Self::Deadline => deadline(containerd).await,
            Self::GarbledAnswers => garbled(containerd, Direction::Answers).await,
            Self::GarbledQuestions => garbled(containerd, Direction::Questions).await,
            Self::AbsentDeny => absent(containerd, "deny").await,
            Self::AbsentAudit => absent(containerd, "audit").await,
            Self::Killed => killed(containerd).await,
            Self::LetGo => let_go(containerd).await,
            Self::Orphaned => orphaned(containerd).await,
        }
    }
}

/// A guarded node on a containerd.
struct Stage {
    node: Node,
    runtime: Runtime,
    marks: tempfile::TempDir,
}

impl Stage {
    async fn new(containerd: &Containerd, options: &AgentOptions) -> Result<Self> {
        let mut node = Node::start(&containerd.socket).await?;
        node.write_profile("disturbed.yaml", &profile("disturbed", "enforce"))?;
        node.start_agent(options).await?;
        let stage = Self { node, runtime: Runtime::connect(&containerd.socket), marks: tempfile::tempdir()? };
        stage.registered(1).await?;
        Ok(stage)
    }

    /// Waits until the plugin has been registered so many times.
    async fn registered(&self, times: usize) -> Result<()> {
        until("the runtime has registered the plugin", async || {
            Ok((self.node.log("agent").matches("NRI: registered").count() >= times).then_some(()))
        })
        .await
    }

    async fn marker(&self, pod: &Pod, name: &str) -> Result<String> {
        let mark = format!("/marks/{name}");
        let mounts = [(self.marks.path(), "/marks")];
        let command = [MARK, mark.as_str()];
        self.runtime.create(pod, &Spec { name, command: &command, mounts: &mounts, ..Spec::default() }).await
    }

    fn marks(&self) -> Result<usize> {
        Ok(std::fs::read_dir(self.marks.path())?.count())
    }

    async fn record(&self, container: &str) -> Result<Value> {
        until(&format!("a record of {container}'s entrypoint"), async || {
            let records = events::query(&self.node, &["--kind", "exec", "--container", container])?;
            Ok(records.into_iter().find(|record| record["exec"]["executable"] == MARK))
        })
        .await
    }

    /// Starts a container whose entrypoint is not allowed and checks that it never ran, and that the record says
    /// whose it was.
    async fn refused(&self, pod: &Pod, name: &str) -> Result<()> {
        let id = self.marker(pod, name).await?;
        let _outcome = self.runtime.start(&id).await;
        let code = self.runtime.ended(&id).await?;
        ensure!(code != PAYLOAD_RAN && self.marks()? == 0, "{name} ran: {code}, {} marks", self.marks()?);
        let record = self.record(&id).await?;
        ensure!(record["decision"]["verdict"] == "denied" && record["container"]["name"] == name, "{record}");
        Ok(())
    }

    async fn close(mut self, pod: &Pod) -> Result<()> {
        self.runtime.remove_pod(pod).await?;
        self.node.stop_agent()
    }
}

fn holding(containerd: &Containerd) -> Result<AgentOptions> {
    let socket = containerd.nri.clone().context("this containerd has no NRI")?;
    Ok(AgentOptions {
        unidentified: Some("hold"),
        interfaces: Interfaces::NriAt(socket),
        ..AgentOptions::default()
    })
}

async fn restarts(containerd: &mut Containerd) -> Result<()> {
    let stage = Stage::new(containerd, &holding(containerd)?).await?;
    let pod = stage.runtime.pod("pod-restarts", "disturbed", "").await?;
    let mut ids = Vec::new();
    for number in 0..6 {
        ids.push(stage.marker(&pod, &format!("c-{number}")).await?);
    }
    for (round, some) in ids.chunks(3).enumerate() {
        // Three starts under way, and the runtime goes.
        let starts =
            futures_util::future::join_all(some.iter().map(async |id| stage.runtime.start(id).await));
        let restart = async {
            let first = format!("container=\"c-{}\"", 3 * round);
            until("a start is under way", async || {
                Ok(stage.node.log("agent").contains(&first).then_some(()))
            })
            .await?;
            containerd.stop()?;
            containerd.launch().await
        };
        let (_outcomes, restarted) = tokio::join!(starts, restart);
        restarted?;
        stage.registered(2 + round).await?;
    }
    for id in &ids {
        // What the restart interrupted is started again, as the kubelet does.
        let again = stage.runtime.start(id).await;
        // One whose start was cut in half is of no known state for containerd, and would be made anew.
        if again.is_err_and(|error| format!("{error:#}").contains("CONTAINER_UNKNOWN")) {
            stage.runtime.remove_container(id).await?;
            continue;
        }
        let code = stage.runtime.ended(id).await?;
        ensure!(code != PAYLOAD_RAN, "{id} ran its entrypoint");
    }
    ensure!(stage.marks()? == 0, "{} marks were made", stage.marks()?);
    let after = stage.runtime.container(&pod, "c-after", WORKLOAD_IMAGE, &[]).await?;
    events::in_mode(&stage.node, &after, "enforce").await?;
    let unknown: Vec<Value> = stage
        .node
        .palisade(&["coverage", "--json"])?
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .filter(|record: &Value| record["container"]["identified"] == false)
        .collect();
    ensure!(unknown.is_empty(), "containers are unknown: {unknown:?}");
    stage.close(&pod).await
}

async fn deadline(containerd: &Containerd) -> Result<()> {
    let stage = Stage::new(containerd, &holding(containerd)?).await?;
    let pod = stage.runtime.pod("pod-deadline", "disturbed", "").await?;
    let id = stage.marker(&pod, "c-late").await?;
    stage.node.signal_agent(Signal::STOP)?;
    // The runtime waits for its deadline and goes on without the agent; the kernel holds the entrypoint.
    let started = stage.runtime.start(&id).await;
    let held =
        until("the entrypoint is held", async || Ok(is_stopped(stage.runtime.pid(&id).await?).then_some(())))
            .await;
    let marks = stage.marks()?;
    stage.node.signal_agent(Signal::CONT)?;
    started.context("the runtime does not go on without the agent")?;
    held?;
    ensure!(marks == 0, "the entrypoint ran while the agent was stopped");
    let code = stage.runtime.ended(&id).await?;
    ensure!(code != PAYLOAD_RAN && stage.marks()? == 0, "the entrypoint ran: {code}");
    let record = stage.record(&id).await?;
    ensure!(
        record["decision"]["verdict"] == "denied" && record["exec"]["held"].as_u64() > Some(0),
        "{record}"
    );
    stage.registered(2).await?;
    stage.refused(&pod, "c-next").await?;
    stage.close(&pod).await
}

fn is_stopped(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .ok()
        .and_then(|stat| stat.rsplit(") ").next().map(|rest| rest.starts_with('T')))
        .unwrap_or(false)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    Questions,
    Answers,
}

/// Passes everything on between a plugin and the runtime, but turns bits over in one direction once told to.
fn garbling_proxy(
    runtime: PathBuf,
    socket: PathBuf,
    wrong: Direction,
    flag: PathBuf,
) -> Result<JoinHandle<()>> {
    let listener = UnixListener::bind(&socket)?;
    Ok(tokio::spawn(async move {
        while let Ok((plugin, _)) = listener.accept().await {
            let (runtime, flag) = (runtime.clone(), flag.clone());
            tokio::spawn(async move {
                let Ok(runtime) = UnixStream::connect(&runtime).await else { return };
                let (from_plugin, to_plugin) = plugin.into_split();
                let (from_runtime, to_runtime) = runtime.into_split();
                let answers = pass(from_plugin, to_runtime, wrong == Direction::Answers, &flag);
                let questions = pass(from_runtime, to_plugin, wrong == Direction::Questions, &flag);
                tokio::select! { () = answers => {}, () = questions => {} }
            });
        }
    }))
}

async fn pass(
    mut from: tokio::net::unix::OwnedReadHalf,
    mut to: tokio::net::unix::OwnedWriteHalf,
    wrong: bool,
    flag: &Path,
) {
    let mut bytes = [0; 4096];
    while let Ok(count @ 1..) = from.read(&mut bytes).await {
        if wrong && flag.exists() {
            // Every layer is hit: the multiplexer's head, the message's and what is inside.
            bytes[..count].iter_mut().step_by(3).for_each(|byte| *byte ^= 0x5a);
        }
        if to.write_all(&bytes[..count]).await.is_err() {
            return;
        }
    }
}

async fn garbled(containerd: &Containerd, wrong: Direction) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (socket, flag) = (folder.path().join("nri.sock"), folder.path().join("garble"));
    let runtime = containerd.nri.clone().context("this containerd has no NRI")?;
    let proxy = garbling_proxy(runtime, socket.clone(), wrong, flag.clone())?;
    let options = AgentOptions { interfaces: Interfaces::NriAt(socket), ..holding(containerd)? };
    let stage = Stage::new(containerd, &options).await?;
    let pod = stage.runtime.pod("pod-garbled", "disturbed", "").await?;
    stage.refused(&pod, "c-before").await?;
    std::fs::write(&flag, "")?;
    for number in 0..3 {
        stage.refused(&pod, &format!("c-garbled-{number}")).await?;
    }
    let allowed = stage.runtime.container(&pod, "c-allowed", WORKLOAD_IMAGE, &[]).await?;
    events::in_mode(&stage.node, &allowed, "enforce").await?;
    let ran = stage.runtime.exec(&allowed, &["/usr/bin/workload", "payload"]).await?;
    ensure!(ran.code == PAYLOAD_RAN, "an allowed container does not run: {ran:?}");
    let registered = stage.node.log("agent").matches("NRI: registered").count();
    std::fs::remove_file(&flag)?;
    stage.registered(registered + 1).await?;
    stage.refused(&pod, "c-after").await?;
    stage.close(&pod).await?;
    proxy.abort();
    Ok(())
}

/// An agent that hangs: what starts meanwhile falls under `whenAgentAbsent`.
async fn absent(containerd: &Containerd, policy: &'static str) -> Result<()> {
    let settings = match policy {
        "deny" => "whenAgentAbsent: deny\nagentLeaseSeconds: 2\n",
        _ => "whenAgentAbsent: audit\nagentLeaseSeconds: 2\n",
    };
    let stage = Stage::new(containerd, &AgentOptions { settings, ..holding(containerd)? }).await?;
    let pod = stage.runtime.pod(&format!("pod-absent-{policy}"), "disturbed", "").await?;
    let id = stage.marker(&pod, "c-absent").await?;
    stage.node.signal_agent(Signal::STOP)?;
    // The lease of two seconds was renewed at the latest when the agent was stopped, and ends by the clock alone.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let act = async {
        let _outcome = stage.runtime.start(&id).await;
        let code = stage.runtime.ended(&id).await?;
        // A pod's sandbox is known by its file, so it starts also under deny.
        let sandbox = stage.runtime.pod(&format!("pod-while-absent-{policy}"), "disturbed", "").await?;
        anyhow::Ok((code, sandbox))
    };
    let acted = act.await;
    let marks = stage.marks()?;
    stage.node.signal_agent(Signal::CONT)?;
    let (code, sandbox) = acted?;
    let (ran, verdict) = if policy == "deny" { (false, "denied") } else { (true, "audited") };
    ensure!(
        (code == PAYLOAD_RAN) == ran && (marks == 1) == ran,
        "it ended with {code} and made {marks} marks"
    );
    let record = stage.record(&id).await?;
    ensure!(
        record["decision"]["verdict"] == verdict && record["decision"]["reason"] == "agent-absent",
        "{record}"
    );
    if policy == "deny" {
        let pause = until("the record of the sandbox", async || {
            let records = events::query(
                &stage.node,
                &["--kind", "exec", "--pod", &format!("pod-while-absent-{policy}")],
            )?;
            Ok(records.into_iter().find(|record| record["exec"]["executable"] == "/pause"))
        })
        .await?;
        ensure!(pause["decision"]["reason"] == "admitted", "{pause}");
    }
    stage.runtime.remove_pod(&sandbox).await?;
    stage.close(&pod).await
}

/// What an agent left stopped is settled by the next one.
async fn killed(containerd: &Containerd) -> Result<()> {
    let nobody = AgentOptions { interfaces: Interfaces::None, ..holding(containerd)? };
    let mut node = Node::start(&containerd.socket).await?;
    node.write_profile("disturbed.yaml", &profile("disturbed", "enforce"))?;
    node.start_agent(&holding(containerd)?).await?;
    let runtime = Runtime::connect(&containerd.socket);
    let pod = runtime.pod("pod-killed", "disturbed", "").await?;
    node.stop_agent()?;
    node.start_agent(&nobody).await?;
    let id = runtime.container(&pod, "c-held", WORKLOAD_IMAGE, &[]).await?;
    until("the entrypoint is held", async || Ok(is_stopped(runtime.pid(&id).await?).then_some(()))).await?;
    node.kill_agent()?;
    ensure!(is_stopped(runtime.pid(&id).await?), "it went on when the agent was killed");
    node.start_agent(&holding(containerd)?).await?;
    // Nobody judged what it executed, so under enforce it may not go on.
    let code = runtime.ended(&id).await?;
    ensure!(code == 137, "it ended with {code}");
    runtime.remove_pod(&pod).await?;
    node.stop_agent()
}

/// A process in a group of its own executes something, is held, and its parent ends: the kernel lets go what is stopped in an orphaned
/// group, and asks nobody. It is stopped again, and nothing of it runs. The control stops itself, and the kernel lets it go.
async fn orphaned(containerd: &Containerd) -> Result<()> {
    let runtime = Runtime::connect(&containerd.socket);
    let marks = tempfile::tempdir()?;
    let pod = runtime.pod("pod-orphaned", "disturbed", "").await?;
    let mounts = [(marks.path(), "/marks")];
    let start = async |name: &str, how: &str| {
        let gate = Gate::new(&marks.path().join(format!(".{name}")))?;
        let (wait, mark) = (format!("/marks/.{name}"), format!("/marks/{name}"));
        let command = ["/usr/bin/workload", "after", &wait, "/usr/bin/attacker", "orphan", how, MARK, &mark];
        let spec = Spec { name, command: &command, mounts: &mounts, ..Spec::default() };
        let id = runtime.create(&pod, &spec).await?;
        runtime.start(&id).await?;
        anyhow::Ok((gate, id))
    };
    let made = |name: &str| marks.path().join(name).exists();
    let (gate, _) = start("c-control", "stop").await?;
    gate.open().await?;
    until("the kernel has let go what had stopped itself", async || Ok(made("c-control").then_some(())))
        .await?;

    // A container that is there before the agent goes on while nobody knows it.
    let (gate, id) = start("c-orphaned", "exec").await?;
    let nobody = AgentOptions { interfaces: Interfaces::None, ..holding(containerd)? };
    let mut node = Node::start(&containerd.socket).await?;
    node.start_agent(&nobody).await?;
    let outcome = async {
        let pid = runtime.pid(&id).await?;
        gate.open().await?;
        // Each exec on the way is held as well, and let go by the scenario as an agent would that knows the container.
        until("the kernel has let it go", async || {
            for pid in descendants(pid)? {
                if is_stopped(pid) && !executes(pid, MARK) {
                    let_on(&node, pid)?;
                }
            }
            Ok((node.status()?["errors"]["held-woken"].as_u64().unwrap_or(0) > 0).then_some(()))
        })
        .await?;
        let held = descendants(pid)?.into_iter().find(|pid| executes(*pid, MARK)).context("it is gone")?;
        until("it is stopped again", async || Ok(is_stopped(held).then_some(()))).await?;
        ensure!(!made("c-orphaned"), "it ran");
        Ok(())
    }
    .await;
    node.stop_agent()?;
    outcome?;
    runtime.remove_pod(&pod).await
}

/// Lets a held process go as the agent does: first the kernel's note, then the signal.
fn let_on(node: &Node, pid: u32) -> Result<()> {
    let set = node.sets()?.pop().context("no set of programs is pinned")?;
    let mut processes: aya::maps::HashMap<_, u32, Process> = counters::map(&set, "PROCESSES")?.try_into()?;
    let Ok(known) = processes.get(&pid, 0) else { return Ok(()) };
    processes.insert(pid, Process { held: 0, ..known }, 0)?;
    let target = rustix::process::Pid::from_raw(i32::try_from(pid)?).context("no pid")?;
    Ok(rustix::process::kill_process(target, Signal::CONT)?)
}

fn executes(pid: u32, program: &str) -> bool {
    std::fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|found| found == Path::new(program))
}

/// A process and all below it.
fn descendants(first: u32) -> Result<Vec<u32>> {
    let mut parents = Vec::new();
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let parent = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1)?.parse::<u32>().ok());
        parents.extend(parent.map(|parent| (pid, parent)));
    }
    let mut all = vec![first];
    let mut at = 0;
    while let Some(above) = all.get(at).copied() {
        all.extend(parents.iter().filter(|(_, parent)| *parent == above).map(|(pid, _)| *pid));
        at += 1;
    }
    Ok(all)
}

/// A process of the same pid namespace, with every right, cannot wake what is held.
async fn let_go(containerd: &Containerd) -> Result<()> {
    let nobody = AgentOptions { interfaces: Interfaces::None, ..holding(containerd)? };
    let mut node = Node::start(&containerd.socket).await?;
    node.start_agent(&nobody).await?;
    let runtime = Runtime::connect(&containerd.socket);
    let outcome = async {
        let pod = runtime.pod("pod-let-go", "free", "").await?;
        let id = runtime.container(&pod, "c-held", WORKLOAD_IMAGE, &[]).await?;
        let pid = runtime.pid(&id).await?;
        until("the entrypoint is held", async || Ok(is_stopped(pid).then_some(()))).await?;
        let target = rustix::process::Pid::from_raw(i32::try_from(pid)?).context("no pid")?;
        let refused = rustix::process::kill_process(target, Signal::CONT);
        ensure!(refused == Err(rustix::io::Errno::PERM), "SIGCONT was answered with {refused:?}");
        let woken = Command::new("palisade-fixture").args(["wake", &pid.to_string()]).status()?;
        ensure!(woken.code() == Some(1), "trying to wake it ended with {woken}");
        ensure!(is_stopped(pid), "it was let go");
        anyhow::Ok(pod)
    }
    .await;
    // A clean stop lets go what nobody will ever identify, so that nothing hangs.
    node.stop_agent()?;
    runtime.remove_pod(&outcome?).await
}
