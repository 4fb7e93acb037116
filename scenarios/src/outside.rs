//! What a container has others do outside of it: the kernel, which starts a program from its files, and whoever takes a cgroup for a
//! container by its name.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{
    attacks::{EPERM, KILLED, PAYLOAD_RAN, nonce, profile},
    cri::{Pod, Runtime, Spec, WORKLOAD_IMAGE, until},
    events,
    node::{AgentOptions, Node, cgroup_root},
    report::Report,
};

/// Makes a file; no rule allows it.
const MARK: &str = "/usr/bin/mark";
const CORE_PATTERN: &str = "/proc/sys/kernel/core_pattern";

pub async fn run(cri: &Path) -> Result<ExitCode> {
    let mut report = Report::new();
    let runtime = Runtime::connect(cri);
    let mut node = Node::start(cri).await?;
    node.write_profile("outside.yaml", &profile("outside", "enforce"))?;
    let pod = runtime.pod("pod-outside", "outside", "").await?;
    let container = runtime.container(&pod, "c-helped", WORKLOAD_IMAGE, &[]).await?;
    let marks = tempfile::tempdir()?;
    let helper = Helper { runtime: &runtime, container: &container, marks: marks.path() };
    report.case("without an agent the kernel starts a program of the container", helper.runs()).await;
    let tier = node.start_agent(&AgentOptions::default()).await?;
    println!("tier: {tier}");
    events::in_mode(&node, &container, "enforce").await?;
    report.case("what the kernel starts of a container is the container's", helper.refused(&node)).await;
    report
        .case(
            "a cgroup that a container names like one gets no slot",
            forged(&node, &runtime, &pod, &container),
        )
        .await;
    runtime.remove_pod(&pod).await?;
    report.case("the agent stops cleanly", async { node.stop_agent() }).await;
    if report.failed() > 0 {
        println!("--- the agent's log\n{}", node.log("agent"));
    }
    Ok(report.close())
}

/// The program that the kernel starts for a process that crashes, until this is dropped.
struct CorePattern(String);

impl CorePattern {
    fn set(program: &str) -> Result<Self> {
        let before = fs::read_to_string(CORE_PATTERN)?;
        fs::write(CORE_PATTERN, program)?;
        Ok(Self(before))
    }
}

impl Drop for CorePattern {
    fn drop(&mut self) {
        let _nothing_can_be_done = fs::write(CORE_PATTERN, &self.0);
    }
}

struct Helper<'a> {
    runtime: &'a Runtime,
    container: &'a str,
    marks: &'a Path,
}

impl Helper<'_> {
    /// Has the kernel start a program of the container, which would make a file on the host. Returns its name.
    async fn crash(&self) -> Result<PathBuf> {
        let mark = self.marks.join(nonce("mark"));
        let pid = self.runtime.pid(self.container).await?;
        let pattern = CorePattern::set(&format!("|/proc/{pid}/root{MARK} {}", mark.display()))?;
        let ended = Command::new("sh").args(["-c", "kill -SEGV $$"]).status()?;
        drop(pattern);
        ensure!(!ended.success(), "nothing crashed: {ended}");
        Ok(mark)
    }

    async fn runs(&self) -> Result<()> {
        let mark = self.crash().await?;
        until("the program has run", async || Ok(mark.exists().then_some(()))).await
    }

    async fn refused(&self, node: &Node) -> Result<()> {
        let mark = self.crash().await?;
        let record = until("its record", async || {
            let arguments = ["--kind", "exec", "--container", self.container, "--executable", MARK];
            Ok(events::query(node, &arguments)?.pop())
        })
        .await?;
        let decision = &record["decision"];
        ensure!(decision["verdict"] == "denied" && decision["reason"] == "escaped-to-host", "{record}");
        ensure!(!mark.exists(), "it ran");
        Ok(())
    }
}

/// 64 hexadecimal digits, as runtimes name containers.
fn name() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos());
    format!("{now:064x}")
}

/// The containers of the agent's status that are called so.
fn known_as(node: &Node, id: &str) -> Result<usize> {
    let status = node.status()?;
    let all = status["containers"].as_array().context("no containers in the status")?;
    Ok(all.iter().filter(|container| container["id"] == id).count())
}

/// A folder that is taken away when this is dropped.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _nothing_can_be_done = fs::remove_dir(&self.0);
    }
}

async fn forged(node: &Node, runtime: &Runtime, pod: &Pod, victim: &str) -> Result<()> {
    let top = cgroup_root()?;
    let mounts = [(top.as_path(), "/cgroup")];
    let spec = Spec { name: "c-forger", mounts: &mounts, ..Spec::default() };
    let forger = runtime.create(pod, &spec).await?;
    runtime.start(&forger).await?;
    events::in_mode(node, &forger, "enforce").await?;
    // The host's own is one, so the name is right.
    let (by_host, by_container) = (name(), name());
    let made = Folder(top.join(&by_host));
    fs::create_dir(&made.0)?;
    until("the host's cgroup is a container's", async || Ok((known_as(node, &by_host)? == 1).then_some(())))
        .await?;
    drop(made);
    for id in [by_container.as_str(), victim] {
        let made = Folder(top.join(id));
        let ended = runtime.exec(&forger, &["/usr/bin/workload", "mkdir", &format!("/cgroup/{id}")]).await?;
        ensure!(ended.code == 0 && made.0.is_dir(), "{ended:?}");
        // What is told of later has come.
        let marker = Folder(top.join(name()));
        fs::create_dir(&marker.0)?;
        let last = marker.0.file_name().unwrap_or_default().to_string_lossy().into_owned();
        until("a later one is known", async || Ok((known_as(node, &last)? == 1).then_some(()))).await?;
        let expected = usize::from(id == victim);
        let found = known_as(node, id)?;
        ensure!(found == expected, "{id} is known {found} times");
    }
    // The agent looks at the counters once a second.
    until("both are counted", async || {
        let counted: &Value = &node.status()?["errors"]["cgroup-forged"];
        Ok((counted == 2).then_some(()))
    })
    .await?;
    let ended = runtime.exec(victim, &["/usr/bin/attacker", "run", MARK, "/dev/null"]).await?;
    ensure!([EPERM, KILLED].contains(&ended.code) && ended.code != PAYLOAD_RAN, "{ended:?}");
    runtime.remove_container(&forger).await
}
