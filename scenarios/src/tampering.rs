//! Containers that turn on the agent itself: its process, its maps and programs, their pins. Each row of the table in
//! `docs/threat-model.md` is a case here, first with an agent that only records it, which shows that the act would work.

use std::{
    cell::RefCell,
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, Result, ensure};
use k8s_cri::v1::NamespaceMode;
use serde_json::Value;

use crate::{
    attacks::{EPERM, nonce, profile},
    cri::{Pod, Runtime, Spec, WORKLOAD_IMAGE, until},
    events,
    node::{AgentOptions, Node},
    report::Report,
};

const EACCES: i32 = 13;
const BPFFS: &str = "/sys/fs/bpf";
/// Where containers see the host's bpffs.
const PINS: &str = "/pins";

/// What an act is on.
#[derive(Clone, Copy)]
enum Target {
    /// The agent's process.
    Process,
    /// The maps or programs that the agent has open, by their ids.
    Maps,
    Programs,
    /// Something in the folder of the set.
    Pin(&'static str),
    /// The whole bpffs.
    Mount,
}

struct Act {
    name: &'static str,
    target: Target,
    /// What its record calls it; `None` when there is none.
    recorded: Option<&'static str>,
    /// Whether a container without privileges can do it where nobody objects.
    unprivileged: bool,
    /// Whether it ends or stops the agent where nobody objects.
    harms: bool,
}

const fn act(name: &'static str, target: Target, recorded: &'static str) -> Act {
    Act { name, target, recorded: Some(recorded), unprivileged: false, harms: false }
}

const fn by_anybody(act: Act) -> Act {
    Act { unprivileged: true, ..act }
}

const fn harmful(act: Act) -> Act {
    Act { harms: true, ..act }
}

const ACTS: &[Act] = &[
    by_anybody(act("continue", Target::Process, "signal")),
    by_anybody(act("thread-kill", Target::Process, "signal")),
    by_anybody(act("pidfd-kill", Target::Process, "signal")),
    by_anybody(act("queue-signal", Target::Process, "signal")),
    by_anybody(harmful(act("stop", Target::Process, "signal"))),
    by_anybody(harmful(act("kill", Target::Process, "signal"))),
    // Nobody can say who arranged for it, so it is refused without a record.
    Act {
        name: "descriptor-signal",
        target: Target::Process,
        recorded: None,
        unprivileged: true,
        harms: true,
    },
    act("trace", Target::Process, "trace"),
    act("memory", Target::Process, "trace"),
    act("read-memory", Target::Process, "trace"),
    act("take-descriptor", Target::Process, "trace"),
    act("schedule", Target::Process, "schedule"),
    act("affinity", Target::Process, "schedule"),
    act("priority", Target::Process, "schedule"),
    by_anybody(act("limit", Target::Process, "limit")),
    act("open-maps", Target::Maps, "open-map"),
    act("open-programs", Target::Programs, "open-program"),
    act("open-pin", Target::Pin("maps/SLOT_POLICIES"), "open-map"),
    act("open-pin", Target::Pin("programs/task_kill"), "open-program"),
    by_anybody(act("unlink", Target::Pin("links/task_kill"), "remove-pin")),
    by_anybody(act("rename", Target::Pin("links/bprm_check_security"), "remove-pin")),
    by_anybody(act("rename", Target::Pin("maps"), "remove-pin")),
    by_anybody(act("replace", Target::Pin("programs"), "remove-pin")),
    by_anybody(act("rmdir", Target::Pin("links"), "remove-pin")),
    act("unmount", Target::Mount, "unmount"),
];

pub async fn run(cri: &Path) -> Result<ExitCode> {
    let mut report = Report::new();
    let runtime = Runtime::connect(cri);
    let stage = Stage { cri, runtime: &runtime };
    report.case("control: an agent that only records it", stage.control()).await;
    stage.refused(&mut report).await?;
    Ok(report.close())
}

struct Stage<'a> {
    cri: &'a Path,
    runtime: &'a Runtime,
}

/// An agent, and containers next to it that see its process.
struct Scene {
    node: Node,
    privileged: String,
    unprivileged: String,
    pod: Pod,
    /// Those of acts that were asked for last.
    records: RefCell<Vec<Value>>,
}

impl Stage<'_> {
    async fn scene(&self, settings: &'static str) -> Result<Scene> {
        let mut node = Node::start(self.cri).await?;
        // Tracing is the attack on the agent here, which no profile allows.
        node.write_profile("tampering.yaml", &(profile("tampering", "enforce") + "    trace: allow\n"))?;
        let tier = node.start_agent(&AgentOptions { settings, ..AgentOptions::default() }).await?;
        ensure!(tier == "full", "the {tier} tier cannot protect the agent");
        let name = format!("pod-tampering-{}", node.agent_pid().context("no agent")?);
        let pod = self.runtime.pod_with(&name, "tampering", "", NamespaceMode::Node, &[]).await?;
        let mut ids = Vec::new();
        for (name, privileged) in [("c-privileged", true), ("c-unprivileged", false)] {
            let mounts = [(Path::new(BPFFS), PINS)];
            let spec = Spec { name, privileged, mounts: &mounts, ..Spec::default() };
            let id = self.runtime.create(&pod, &spec).await?;
            self.runtime.start(&id).await?;
            events::in_mode(&node, &id, "enforce").await?;
            ids.push(id);
        }
        let unprivileged = ids.pop().context("no container")?;
        let privileged = ids.pop().context("no container")?;
        Ok(Scene { node, privileged, unprivileged, pod, records: RefCell::default() })
    }
}

impl Stage<'_> {
    /// Every act works, and is on record as audited; the last one kills the agent.
    async fn control(&self) -> Result<()> {
        let mut scene = self.scene("selfProtection: audit\nselfProbeSeconds: 1\n").await?;
        let (mended, others): (Vec<&Act>, Vec<&Act>) = ACTS
            .iter()
            .filter(|act| !act.harms)
            .partition(|act| matches!(act.target, Target::Pin(_) | Target::Mount));
        for id in scene.containers() {
            let others: Vec<&Act> =
                others.iter().copied().filter(|act| scene.actors(act).contains(&id)).collect();
            for (act, (code, by)) in others.iter().zip(scene.carry_out_all(self.runtime, id, &others).await?)
            {
                succeeds(act, code)?;
                scene.recorded(id, act, "audited", by).await?;
            }
        }
        for act in mended {
            for id in scene.actors(act) {
                let (code, by) = scene.carry_out(self.runtime, id, act).await?;
                succeeds(act, code)?;
                scene.recorded(id, act, "audited", by).await?;
                // The next act finds everything in its place.
                scene.is_mended().await?;
            }
        }
        let by_name = |name: &str| ACTS.iter().find(|act| act.name == name).context("there is no such act");
        // A descriptor's signal has no known sender, and is refused only where the rest is.
        scene.carry_out(self.runtime, &scene.unprivileged, by_name("descriptor-signal")?).await?;
        until("the agent is stopped", async || Ok(scene.node.agent_is_stopped()?.then_some(()))).await?;
        scene.node.signal_agent(rustix::process::Signal::CONT)?;
        let kill = by_name("kill")?;
        scene.carry_out(self.runtime, &scene.unprivileged, kill).await?;
        scene.node.agent_was_killed()?;
        scene.end(self.runtime).await
    }

    /// Every act is refused, and is on record as denied. The agent goes on working.
    async fn refused(&self, report: &mut Report) -> Result<()> {
        let scene = self.scene("").await?;
        let mut outcomes = Vec::new();
        for id in scene.containers() {
            let acts: Vec<&Act> = ACTS.iter().filter(|act| scene.actors(act).contains(&id)).collect();
            let codes = scene.carry_out_all(self.runtime, id, &acts).await?;
            outcomes.extend(acts.into_iter().zip(codes).map(|(act, outcome)| (id.to_owned(), act, outcome)));
        }
        for act in ACTS {
            let of_act = outcomes.iter().filter(|(_, other, _)| std::ptr::eq(*other, act));
            let of_act: Vec<_> = of_act.map(|(id, _, outcome)| (id.as_str(), *outcome)).collect();
            let name = format!("{}: refused, on record", act.describe());
            report.case(&name, scene.is_refused(act, of_act)).await;
        }
        report.case("the agent goes on", async { scene.node.is_ready().await }).await;
        report
            .case("whether it is there anybody may ask", async {
                let asks = Act { name: "is-there", recorded: None, ..act("", Target::Process, "") };
                let (code, _) = scene.carry_out(self.runtime, &scene.unprivileged, &asks).await?;
                ensure!(code == 0, "kill(pid, 0) fails with {code}");
                Ok(())
            })
            .await;
        report.case("a container with a pid namespace of its own cannot name it", self.hidden(&scene)).await;
        report.case("the agent works as before, and its pins are whole", scene.works(self.runtime)).await;
        report.case("another agent may take over", self.taken_over(scene)).await;
        Ok(())
    }

    /// By default a container sees its own processes only.
    async fn hidden(&self, scene: &Scene) -> Result<()> {
        let pod = self.runtime.pod("pod-tampering-own", "tampering", "").await?;
        let id = self.runtime.container(&pod, "c-own", WORKLOAD_IMAGE, &[]).await?;
        events::in_mode(&scene.node, &id, "enforce").await?;
        let kill = ACTS.iter().find(|act| act.name == "kill").context("no act kills")?;
        let (code, _) = scene.carry_out(self.runtime, &id, kill).await?;
        ensure!(code == libc::ESRCH, "it fails with {code}");
        self.runtime.remove_pod(&pod).await
    }

    /// What protects the agent ends with it: the next one opens the maps, and the last one takes away the pins.
    async fn taken_over(&self, mut scene: Scene) -> Result<()> {
        scene.node.kill_agent()?;
        let open = ACTS.iter().find(|act| act.name == "open-pin").context("no act opens a pin")?;
        let (code, _) = scene.carry_out(self.runtime, &scene.privileged, open).await?;
        ensure!(code == 0, "without an agent the maps cannot be opened: {code}");
        scene.node.start_agent(&AgentOptions::default()).await?;
        ensure!(scene.node.log("agent").contains("took over"), "it did not take over");
        let (code, _) = scene.carry_out(self.runtime, &scene.privileged, open).await?;
        ensure!(code == EPERM, "the new agent does not protect itself: {code}");
        scene.end(self.runtime).await
    }
}

impl Act {
    fn describe(&self) -> String {
        match self.target {
            Target::Pin(path) => format!("{} {path}", self.name),
            _ => self.name.to_owned(),
        }
    }
}

impl Scene {
    /// The containers that can do `act` where nobody objects.
    fn actors(&self, act: &Act) -> Vec<&str> {
        let mut actors = vec![self.privileged.as_str()];
        if act.unprivileged {
            actors.push(&self.unprivileged);
        }
        actors
    }

    fn containers(&self) -> [&str; 2] {
        [&self.privileged, &self.unprivileged]
    }

    async fn is_refused(&self, act: &Act, outcomes: Vec<(&str, (i32, u64))>) -> Result<()> {
        for (id, (code, by)) in outcomes {
            if act.name == "descriptor-signal" {
                // The write into the pipe succeeds; the signal must not have come.
                ensure!(code == 0, "the pipe could not be prepared: {code}");
                ensure!(!self.node.agent_is_stopped()?, "{id}: the agent is stopped");
            } else {
                ensure!(code == EPERM || code == EACCES, "{id}: it ended with {code}");
            }
            self.recorded(id, act, "denied", by).await?;
        }
        Ok(())
    }

    /// What an act is on, as the attacker's program takes it.
    fn target(&self, act: &Act) -> Result<String> {
        let agent = || self.node.agent_pid().context("no agent");
        Ok(match act.target {
            Target::Process => agent()?.to_string(),
            Target::Maps => ids(agent()?, "map_id:")?,
            Target::Programs => ids(agent()?, "prog_id:")?,
            Target::Pin(path) => seen(&self.set()?.join(path))?.display().to_string(),
            Target::Mount => PINS.to_owned(),
        })
    }

    /// Runs the attacker's program in a container; returns its exit code, 0 or the `errno`, and its process id.
    async fn carry_out(&self, runtime: &Runtime, container: &str, act: &Act) -> Result<(i32, u64)> {
        let mut outcomes = self.carry_out_all(runtime, container, &[act]).await?;
        outcomes.pop().context("no outcome")
    }

    /// The same for acts one after the other.
    async fn carry_out_all(
        &self,
        runtime: &Runtime,
        container: &str,
        acts: &[&Act],
    ) -> Result<Vec<(i32, u64)>> {
        let targets: Vec<String> = acts.iter().map(|act| self.target(act)).collect::<Result<_>>()?;
        let mut command = vec!["/usr/bin/attacker", "tamper-all"];
        command.extend(acts.iter().zip(&targets).flat_map(|(act, target)| [act.name, target]));
        let ended = runtime.exec(container, &command).await?;
        // The host's number of each: the pod is in its pid namespace. Then its exit code.
        let said: Vec<u64> = ended.stdout.lines().filter_map(|line| line.trim().parse().ok()).collect();
        ensure!(said.len() == 2 * acts.len(), "{} acts: {ended:?}", acts.len());
        said.chunks_exact(2).map(|said| Ok((i32::try_from(said[1])?, said[0]))).collect()
    }

    /// The folder of the set that is in force.
    fn set(&self) -> Result<PathBuf> {
        self.node.sets()?.pop().context("no set is pinned")
    }

    /// There is a record of what the process `by` did, which says what became of it.
    async fn recorded(&self, container: &str, act: &Act, verdict: &str, by: u64) -> Result<()> {
        let Some(name) = act.recorded else { return Ok(()) };
        let is_of_act = |record: &Value| {
            let actor = &record["actor"];
            record["container"]["id"] == container
                && record["tampering"]["act"] == name
                && record["decision"]["verdict"] == verdict
                && actor["executable"] == "/usr/bin/attacker"
                && record["session_of"]["kind"] == "admin"
                && actor["pid"] == by
        };
        // Of acts one after the other, one question brings the records of many.
        if self.records.borrow().iter().any(is_of_act) {
            return Ok(());
        }
        until(&format!("a record of {}", act.describe()), async || {
            let records = events::query(&self.node, &["--kind", "tampering"])?;
            let found = records.iter().any(is_of_act);
            self.records.replace(records);
            Ok(found.then_some(()))
        })
        .await
    }

    /// It records what is new.
    async fn works(&self, runtime: &Runtime) -> Result<()> {
        let nonce = nonce("works");
        runtime.exec(&self.unprivileged, &["/usr/bin/workload", "payload", &nonce]).await?;
        events::exactly_one(&self.node, &nonce).await?;
        self.is_mended().await
    }

    /// The agent claims what it claims in peace: everything is pinned.
    async fn is_mended(&self) -> Result<()> {
        until("everything is pinned and claimed", async || {
            let whole = self.set().is_ok_and(|set| {
                ["links/task_kill", "links/bprm_check_security", "programs/task_kill", "maps/SLOT_POLICIES"]
                    .iter()
                    .all(|pin| set.join(pin).exists())
            });
            let last: Option<Value> = events::query(&self.node, &["--kind", "node-state"])?.pop();
            let holds = last.is_some_and(|record| record["node_state"]["claim"] == "holds");
            Ok((whole && holds).then_some(()))
        })
        .await
    }

    async fn end(self, runtime: &Runtime) -> Result<()> {
        runtime.remove_pod(&self.pod).await
    }
}

/// That an act succeeds where nobody objects.
fn succeeds(act: &Act, code: i32) -> Result<()> {
    // A folder that is not empty is not removed, but that is for the filesystem to say, after all who may object.
    ensure!(
        code == 0 || code == libc::ENOTEMPTY,
        "{} fails with {code} though nobody objects, so it proves nothing",
        act.name
    );
    Ok(())
}

/// Where a container sees a path on the host's bpffs.
fn seen(path: &Path) -> Result<PathBuf> {
    Ok(Path::new(PINS).join(path.strip_prefix(BPFFS)?))
}

/// The ids of all kernel objects that the agent has open, as its descriptors tell.
fn ids(pid: u32, field: &str) -> Result<String> {
    let mut ids = BTreeSet::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
        let text = fs::read_to_string(entry?.path()).unwrap_or_default();
        ids.extend(text.lines().filter_map(|line| line.strip_prefix(field)?.trim().parse::<u32>().ok()));
    }
    ensure!(!ids.is_empty(), "the agent has no {field}");
    Ok(ids.iter().map(u32::to_string).collect::<Vec<_>>().join(","))
}
