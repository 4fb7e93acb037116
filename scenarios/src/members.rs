//! What belongs to a container, however it got there or away: nested cgroups, processes that are moved, `nsenter`,
//! the host's pid namespace; and whose session it is.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use k8s_cri::v1::NamespaceMode;
use serde_json::Value;

use crate::{
    attacks::{PAYLOAD_RAN, nonce, profile},
    cri::{Pod, Runtime, Spec, WORKLOAD_IMAGE, until},
    events,
    gate::Gate,
    node::{AgentOptions, Node, cgroup_root, which},
    report::Report,
};

/// Commands that the pod declares as a probe.
const PROBES: &str = r#"{"c-probed": [["/usr/bin/workload", "true", "probe"]]}"#;

/// `arrivals` processes are moved into a container while they execute something.
pub async fn run(cri: &Path, arrivals: u64) -> Result<ExitCode> {
    let mut report = Report::new();
    let runtime = Runtime::connect(cri);
    let mut node = Node::start(cri).await?;
    node.write_profile("members.yaml", &profile("members", "enforce"))?;
    node.write_profile("watched.yaml", &profile("watched", "audit"))?;
    node.write_profile("default.yaml", DEFAULT)?;
    let tier =
        node.start_agent(&AgentOptions { unidentified: Some("hold"), ..AgentOptions::default() }).await?;
    println!("tier: {tier}");
    let marks = tempfile::tempdir()?;
    let pod = runtime
        .pod_with("pod-members", "members", "", NamespaceMode::Container, &[("palisade.dev/probes", PROBES)])
        .await?;
    let mounts = [(marks.path(), "/marks")];
    let spec = Spec { name: "c-probed", mounts: &mounts, ..Spec::default() };
    let container = runtime.create(&pod, &spec).await?;
    runtime.start(&container).await?;
    events::in_mode(&node, &container, "enforce").await?;
    let other = runtime.container(&pod, "c-other", WORKLOAD_IMAGE, &[]).await?;
    let stage = Stage { node: &node, runtime: &runtime, container: &container, marks: marks.path() };
    let moved = |target: Target| stage.moved(target, &other);
    report.case("a process moved to a cgroup below its container's", moved(Target::Nested)).await;
    report.case("a process moved out of its container's cgroup", moved(Target::Outside)).await;
    report.case("a process moved to another container's cgroup", moved(Target::Other)).await;
    report
        .case("processes that come in while they execute are the runtime's", stage.arriving(arrivals))
        .await;
    report.case("nsenter from the host, by the mount namespace alone", stage.nsenter(&["--mount"])).await;
    report.case("nsenter from the host, all namespaces", stage.nsenter(&["--all"])).await;
    report.case("a command that the pod declares is a probe, others are not", stage.probe()).await;
    report.case("exec without a terminal: start, end, who let it in", stage.without_terminal()).await;
    report.case("exec with a terminal, under the runtime's name of it", stage.with_terminal(cri)).await;
    report.case("the tree above a process ends at the container's first", stage.ancestors()).await;
    report
        .case(
            "a container that no profile names shows it, and the default names the rest",
            ephemeral(&stage, &pod),
        )
        .await;
    runtime.remove_pod(&pod).await?;
    for (app, verdict) in [("members", "denied"), ("watched", "audited"), ("free", "allowed")] {
        let name = format!("nsenter -t 1 -m out of a pod in the host's pid namespace is {verdict}");
        report.case(&name, escape(&node, &runtime, app, verdict)).await;
    }
    report.case("the agent stops cleanly", async { node.stop_agent() }).await;
    if report.failed() > 0 {
        println!("--- the agent's log\n{}", node.log("agent"));
    }
    Ok(report.close())
}

/// For every container that no other profile names, of one image only.
const DEFAULT: &str = "apiVersion: palisade.dev/v1alpha1\nkind: ClusterProfile\nmetadata: {name: default}\nspec:\n  \
    selector: {containers: [{name: \"c-default*\"}]}\n  mode: audit\n  exec: {allow: [{path: /usr/bin/workload}]}\n";

#[derive(Clone, Copy)]
enum Target {
    Nested,
    Outside,
    Other,
}

/// A container on a guarded node.
struct Stage<'a> {
    node: &'a Node,
    runtime: &'a Runtime,
    container: &'a str,
    marks: &'a Path,
}

impl Stage<'_> {
    /// Records of execs in any container with `nonce` among their arguments that executed `executable`.
    async fn record(&self, executable: &str, nonce: &str) -> Result<Value> {
        until(&format!("a record of {executable} with {nonce}"), async || {
            let records = events::query(self.node, &["--kind", "exec", "--executable", executable])?;
            Ok(records.into_iter().find(|record| events::has_argument(record, nonce)))
        })
        .await
    }

    fn belongs(&self, record: &Value, kind: &str) -> Result<()> {
        ensure!(record["container"]["id"] == self.container, "it belongs to another container: {record}");
        ensure!(record["session_of"]["kind"] == kind, "its session is not {kind}: {record}");
        ensure!(record["session_of"]["id"] != "", "its session has no name: {record}");
        Ok(())
    }

    /// Processes of the host that execute themselves again and again are moved into the container's cgroup: none of
    /// their execs is taken for the workload's, however the two meet.
    async fn arriving(&self, arrivals: u64) -> Result<()> {
        let cgroup = cgroup_of(self.runtime.pid(self.container).await?)?;
        for turn in 0..arrivals {
            let mut arriving = Command::new("env").args(["env"; 12]).arg("true").spawn()?;
            // Somewhere between its execs, and each time elsewhere.
            std::thread::sleep(Duration::from_micros(200 + 37 * (turn % 64)));
            let moved = fs::write(cgroup.join("cgroup.procs"), arriving.id().to_string());
            let ended = arriving.wait()?;
            moved.context("it ended before it was moved")?;
            ensure!(ended.success(), "arrival {turn}: {ended}");
        }
        Ok(())
    }

    /// A process that entered is moved, and then executes what its container may not.
    async fn moved(&self, target: Target, other: &str) -> Result<()> {
        let nonce = nonce("moved");
        let gate = Gate::new(&self.marks.join(&nonce))?;
        let wait = format!("/marks/{nonce}");
        let command =
            ["/usr/bin/workload", "after", wait.as_str(), "/usr/bin/third", "payload", nonce.as_str()];
        let own = cgroup_of(self.runtime.pid(self.container).await?)?;
        let folder = match target {
            Target::Nested => own.join("nested"),
            Target::Outside => cgroup_root()?.join("palisade-elsewhere"),
            Target::Other => cgroup_of(self.runtime.pid(other).await?)?,
        };
        let move_it = async {
            fs::create_dir_all(&folder)?;
            let pid = until("the process waits", async || process_with(&nonce)).await?;
            fs::write(folder.join("cgroup.procs"), pid.to_string())
                .with_context(|| format!("moving {pid} to {}", folder.display()))?;
            gate.open().await
        };
        let (ended, moved) = tokio::join!(self.runtime.exec(self.container, &command), move_it);
        moved.and_then(|()| {
            let ended = ended?;
            ensure!(ended.code != PAYLOAD_RAN, "what is not allowed ran: {ended:?}");
            Ok(())
        })?;
        let record = self.record("/usr/bin/third", &nonce).await?;
        ensure!(record["decision"]["verdict"] == "denied", "{record}");
        self.belongs(&record, "admin")?;
        if !matches!(target, Target::Other) {
            // A cgroup that was just emptied may need a moment.
            until("the cgroup is empty", async || Ok(fs::remove_dir(&folder).ok())).await?;
        }
        Ok(())
    }

    /// Who comes by the mount namespace is in the container as much as who is let in by the runtime.
    async fn nsenter(&self, how: &[&str]) -> Result<()> {
        let pid = self.runtime.pid(self.container).await?.to_string();
        let nonce = nonce("nsenter");
        let enter = |program: &str| -> Result<Option<i32>> {
            Ok(Command::new("nsenter")
                .args(["--target", &pid])
                .args(how)
                .args(["--", program, "payload", &nonce])
                .stdin(Stdio::null())
                .stderr(Stdio::null())
                .status()
                .context("cannot start nsenter")?
                .code())
        };
        let (good, bad) = (enter("/usr/bin/workload")?, enter("/usr/bin/third")?);
        ensure!(good == Some(PAYLOAD_RAN), "an allowed program ended with {good:?}");
        ensure!(bad != Some(PAYLOAD_RAN), "what is not allowed ran");
        for (program, verdict) in [("/usr/bin/workload", "allowed"), ("/usr/bin/third", "denied")] {
            let record = self.record(program, &nonce).await?;
            ensure!(
                record["decision"]["verdict"] == verdict && record["exec"]["origin"] == "image",
                "{record}"
            );
            ensure!(record["exec"]["escaped"] == false, "{record}");
            self.belongs(&record, "admin")?;
        }
        Ok(())
    }

    async fn probe(&self) -> Result<()> {
        let nonce = nonce("probe");
        for words in
            [&["/usr/bin/workload", "true", "probe"][..], &["/usr/bin/workload", "true", "probe", &nonce][..]]
        {
            let ended = self.runtime.exec(self.container, words).await?;
            ensure!(ended.code == 0, "{ended:?}");
        }
        let record = self.record("/usr/bin/workload", &nonce).await?;
        self.belongs(&record, "admin")?;
        let probes = ["--session", "probe", "--kind", "session", "--container", self.container];
        let ended = until("the probe's session has ended", async || {
            Ok(events::query(self.node, &probes)?
                .into_iter()
                .find(|record| record["session"]["change"] == "end"))
        })
        .await?;
        ensure!(ended["session"]["arguments"][2] == "probe" && ended["session"]["execs"] == 1, "{ended}");
        Ok(())
    }

    /// The start and the end of the session whose root has `nonce` among its arguments.
    async fn session(&self, nonce: &str) -> Result<(Value, Value)> {
        let of = |change: &'static str| {
            until(format!("the {change} of the session {nonce}").leak(), async move || {
                let records = events::query(
                    self.node,
                    &["--session", "admin", "--kind", "session", "--container", self.container],
                )?;
                Ok(records.into_iter().find(|record| {
                    let session = &record["session"];
                    let words = session["arguments"].as_array();
                    session["change"] == change
                        && words.is_some_and(|words| words.iter().any(|word| word == nonce))
                }))
            })
        };
        Ok((of("start").await?, of("end").await?))
    }

    async fn without_terminal(&self) -> Result<()> {
        let nonce = nonce("session");
        let words = ["/usr/bin/attacker", "run", "/usr/bin/third", "payload", &nonce];
        let ended = self.runtime.exec(self.container, &words).await?;
        ensure!(ended.code != PAYLOAD_RAN, "{ended:?}");
        let (start, end) = self.session(&nonce).await?;
        let (start, end) = (&start["session"], &end["session"]);
        ensure!(start["id"] == end["id"] && start["id"] != "", "{start} {end}");
        ensure!(start["terminal"] == "" && start["executable"] == "/usr/bin/attacker", "{start}");
        let let_in = start["entered_by_comm"].as_str().unwrap_or_default();
        ensure!(let_in.contains("containerd-shim") || let_in.contains("runc"), "let in by {let_in:?}");
        ensure!(end["not_allowed"] == 1, "{end}");
        ensure!(
            end["status"].as_u64() == u64::try_from(ended.code).ok() || end["signal"] == 9,
            "it ended with {}: {end}",
            ended.code
        );
        // "Who did what by hand in this container" is one query.
        let id = start["id"].as_str().unwrap_or_default();
        let all = events::query(self.node, &["--all", "--session", id])?;
        let kinds: Vec<&str> = ["fork", "exec", "exit", "session"]
            .into_iter()
            .filter(|kind| all.iter().any(|record| record.get(*kind).is_some_and(Value::is_object)))
            .collect();
        ensure!(
            kinds.contains(&"exec") && kinds.contains(&"exit") && kinds.contains(&"session"),
            "{kinds:?}"
        );
        Ok(())
    }

    async fn with_terminal(&self, cri: &Path) -> Result<()> {
        let nonce = nonce("terminal");
        let command = format!(
            "ctr --address {} --namespace k8s.io task exec --tty --exec-id {nonce} {} /usr/bin/workload true {nonce}",
            cri.display(),
            self.container
        );
        // `script` gives it the terminal that it asks for.
        let output = Command::new("script")
            .args(["--quiet", "--return", "--command", &command, "/dev/null"])
            .stdin(Stdio::null())
            .output()
            .context("cannot start script")?;
        let said = String::from_utf8_lossy(&output.stdout);
        let (start, end) = self.session(&nonce).await.with_context(|| format!("{command}: {said}"))?;
        let terminal = start["session"]["terminal"].as_str().unwrap_or_default();
        ensure!(terminal.starts_with("pts"), "its terminal is {terminal:?}: {said}");
        let id = end["session"]["id"].as_str().unwrap_or_default();
        until("the runtime's name of the session is on record", async || {
            let records = events::query(self.node, &["--kind", "session", "--session", id])?;
            Ok(records.into_iter().find(|record| record["session"]["runtime_exec_id"] == nonce.as_str()))
        })
        .await?;
        Ok(())
    }

    async fn ancestors(&self) -> Result<()> {
        let nonce = nonce("tree");
        let words = ["/usr/bin/attacker", "generate", "/usr/bin/workload", &nonce, "1", "100"];
        let ended = self.runtime.exec(self.container, &words).await?;
        ensure!(ended.code == 0, "{ended:?}");
        let record = self.record("/usr/bin/workload", &format!("{nonce}-0")).await?;
        let exec = &record["exec"];
        let above = exec["ancestors"].as_array().context("no ancestors")?;
        ensure!(above.first().is_some_and(|first| first["executable"] == "/usr/bin/attacker"), "{record}");
        ensure!(above[0]["exec_id"] == record["actor"]["parent_exec_id"], "{record}");
        ensure!(exec["exec_id"] != above[0]["exec_id"] && exec["exec_id"] != "", "{record}");
        // Until then it is a copy of its parent, under a name of its own.
        let actor = &record["actor"];
        ensure!(
            actor["executable"] == "/usr/bin/attacker" && actor["exec_id"] != exec["exec_id"],
            "{record}"
        );
        // What a program has started is one query.
        let started = ["--kind", "exec", "--actor-executable", "/usr/bin/attacker"];
        let started = events::query(self.node, &started)?;
        ensure!(started.iter().any(|other| other["exec"]["exec_id"] == exec["exec_id"]), "{record}");
        let parent = self.record("/usr/bin/attacker", &nonce).await?;
        ensure!(parent["exec"]["exec_id"] == above[0]["exec_id"], "the parent has another name: {parent}");
        Ok(())
    }
}

/// A container that is added to a running pod, as `kubectl debug` does.
async fn ephemeral(stage: &Stage<'_>, pod: &Pod) -> Result<()> {
    let Stage { node, runtime, .. } = stage;
    // The pod's profile names every container of the image; the namespace's comes before the cluster's.
    let added = runtime.container(pod, "c-default-debugger", WORKLOAD_IMAGE, &[]).await?;
    let found = events::in_mode(node, &added, "enforce").await?;
    ensure!(found["container"]["profiles"][0] == "scenarios/members", "{found}");
    runtime.remove_container(&added).await?;
    let free = runtime.pod("pod-free", "free", "").await?;
    let named = runtime.container(&free, "c-default", WORKLOAD_IMAGE, &[]).await?;
    let found = events::in_mode(node, &named, "audit").await?;
    ensure!(found["container"]["profiles"][0] == "default", "{found}");
    let unnamed = runtime.container(&free, "c-unnamed", WORKLOAD_IMAGE, &[]).await?;
    let found = events::in_mode(node, &unnamed, "none").await?;
    ensure!(found["container"]["identified"] == true, "{found}");
    runtime.remove_pod(&free).await
}

/// A privileged container in the host's pid namespace goes into the host's mount namespace and executes there.
async fn escape(node: &Node, runtime: &Runtime, app: &str, verdict: &str) -> Result<()> {
    let pod = runtime.pod_with(&format!("pod-escape-{app}"), app, "", NamespaceMode::Node, &[]).await?;
    let spec = Spec { name: "c-escape", privileged: true, ..Spec::default() };
    let container = runtime.create(&pod, &spec).await?;
    runtime.start(&container).await?;
    let mode = match verdict {
        "denied" => "enforce",
        "audited" => "audit",
        _ => "none",
    };
    events::in_mode(node, &container, mode).await?;
    let nonce = nonce("escape");
    let host = which("palisade-fixture")?.display().to_string();
    let words = ["/usr/bin/attacker", "escape", &host, "payload", &nonce];
    let ended = runtime.exec(&container, &words).await?;
    ensure!((ended.code == PAYLOAD_RAN) != (verdict == "denied"), "it ended with {ended:?}");
    let record = until("the record of what was executed on the host", async || {
        let records = events::query(node, &["--kind", "exec", "--container", &container])?;
        Ok(records.into_iter().find(|record| {
            events::has_argument(record, &nonce) && record["exec"]["executable"] != "/usr/bin/attacker"
        }))
    })
    .await?;
    ensure!(record["decision"]["verdict"] == verdict && record["exec"]["escaped"] == true, "{record}");
    if verdict != "allowed" {
        ensure!(record["decision"]["reason"] == "escaped-to-host", "{record}");
    }
    runtime.remove_pod(&pod).await
}

/// The cgroup of a process.
fn cgroup_of(pid: u32) -> Result<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/")).context("no unified cgroup")?;
    Ok(cgroup_root()?.join(path))
}

/// The process that waits with `word` among its arguments, once there is one.
fn process_with(word: &str) -> Result<Option<u32>> {
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
        if words.get(1) == Some(&&b"after"[..]) && words.contains(&word.as_bytes()) {
            return Ok(Some(pid));
        }
    }
    Ok(None)
}
