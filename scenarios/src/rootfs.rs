//! Containers that ran before the agent: what counts as their image is what the runtime has made, not what their first process
//! has put in its place; and where the runtime's cannot be found, `enforce` is not claimed.

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, Result, ensure};
use k8s_cri::v1::NamespaceMode;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde_json::Value;

use crate::{
    attacks::{EPERM, KILLED, PAYLOAD_RAN, nonce, profile},
    cri::{Pod, Runtime, Spec, until},
    events,
    gate::Gate,
    node::{AgentOptions, Node},
    report::Report,
};

const MARKS: &str = "/marks";
/// At this path a rule allows the image's program.
const ALLOWED: &str = "/usr/bin/workload";
/// The same file where a pivot has left it.
const BEHIND: &str = "/old/usr/bin/workload";

pub async fn run(cri: &Path) -> Result<ExitCode> {
    let mut report = Report::new();
    let runtime = Runtime::connect(cri);
    let marks = tempfile::tempdir()?;
    let pod = runtime.pod_with("pod-rootfs", "rootfs", "", NamespaceMode::Node, &[]).await?;
    let stage = Stage { runtime: &runtime, pod: &pod, marks: marks.path() };
    for how in ["chroot", "pivot"] {
        report.case(&format!("{how}: without an agent the foreign program runs"), stage.control(how)).await;
    }
    let changed = [
        (stage.start("chroot", ALLOWED).await?, "chroot: the foreign program is refused", false),
        (stage.start("pivot", ALLOWED).await?, "pivot_root: the foreign program is refused", false),
        (stage.start("pivot", BEHIND).await?, "pivot_root: the image's own program is known and runs", true),
    ];
    let untouched = stage.start("", ALLOWED).await?;
    let silent = stage.start("", ALLOWED).await?;
    // Whoever has no bundle has no runtime that says anything.
    let hidden = Hidden::new(&stage.bundle(&silent).await?.join("config.json"))?;
    let covered = stage.start("", ALLOWED).await?;
    let cover = Cover::new(&stage.bundle(&covered).await?.join("rootfs"))?;
    let mut node = Node::start(cri).await?;
    node.write_profile("rootfs.yaml", &profile("rootfs", "enforce"))?;
    let tier = node.start_agent(&AgentOptions::default()).await?;
    println!("tier: {tier}");
    for (container, name, is_image) in &changed {
        report.case(name, left(&node, &stage, container, *is_image)).await;
    }
    report
        .case("a container that has left its root alone is found as it is", found(&node, &stage, &untouched))
        .await;
    report
        .case(
            "without a description enforce is not claimed, until it is there",
            silence(&node, &stage, &silent, hidden),
        )
        .await;
    report
        .case(
            "nor with something over the runtime's mount, until it is gone",
            silence(&node, &stage, &covered, cover),
        )
        .await;
    report.case("a container that starts under the agent has the runtime's root", fresh(&node, &stage)).await;
    report.case("the agent stops cleanly", async { node.stop_agent() }).await;
    if report.failed() > 0 {
        println!("--- the agent's log\n{}", node.log("agent"));
    }
    runtime.remove_pod(&pod).await?;
    Ok(report.close())
}

struct Stage<'a> {
    runtime: &'a Runtime,
    pod: &'a Pod,
    marks: &'a Path,
}

/// A container that waits before it executes its payload.
struct Waiting {
    id: String,
    nonce: String,
    gate: Gate,
}

impl Stage<'_> {
    /// Starts a container whose first process has changed its root by `how` (not at all, when empty) when this returns.
    async fn start(&self, how: &str, program: &str) -> Result<Waiting> {
        let nonce = nonce(if how.is_empty() { "rootfs" } else { how });
        let ready = format!("ready-{nonce}");
        let gate = Gate::new(&self.marks.join(&nonce))?;
        let [ready_inside, gate_inside] = [&ready, &nonce].map(|name| format!("{MARKS}/{name}"));
        let words = ["payload", nonce.as_str()];
        let mut command = if how.is_empty() {
            Vec::from(["/usr/bin/attacker", "after", &gate_inside, program])
        } else {
            Vec::from(["/usr/bin/attacker", "root", how, &ready_inside, &gate_inside, program])
        };
        command.extend(words);
        let mounts = [(self.marks, MARKS)];
        let spec =
            Spec { name: &nonce, command: &command, mounts: &mounts, privileged: true, ..Spec::default() };
        let id = self.runtime.create(self.pod, &spec).await?;
        self.runtime.start(&id).await?;
        if !how.is_empty() {
            until("its first process has changed its root", async || {
                let (runs, code) = self.runtime.state(&id).await?;
                ensure!(runs, "it ended with {code}");
                Ok(self.marks.join(&ready).exists().then_some(()))
            })
            .await?;
        }
        Ok(Waiting { id, nonce, gate })
    }

    /// Lets a container execute its payload; returns how it ended.
    async fn let_go(&self, container: &Waiting) -> Result<i32> {
        container.gate.open().await?;
        self.runtime.ended(&container.id).await
    }

    async fn control(&self, how: &str) -> Result<()> {
        let container = self.start(how, ALLOWED).await?;
        let code = self.let_go(&container).await?;
        ensure!(code == PAYLOAD_RAN, "it ended with {code}");
        self.runtime.remove_container(&container.id).await
    }

    /// The folder that the runtime was started on.
    async fn bundle(&self, container: &Waiting) -> Result<PathBuf> {
        let first = self.runtime.pid(&container.id).await?;
        let stat = fs::read_to_string(format!("/proc/{first}/stat"))?;
        // Behind the name, which may hold anything.
        let shim = stat.rsplit(')').next().and_then(|rest| rest.split(' ').nth(2)).context("no parent")?;
        let folder = fs::read_link(format!("/proc/{shim}/cwd"))?;
        Ok(folder.parent().context("the shim is in no bundle")?.join(&container.id))
    }
}

/// A file that is out of the way as long as this lives.
struct Hidden(PathBuf, PathBuf);

impl Hidden {
    fn new(path: &Path) -> Result<Self> {
        let aside = path.with_extension("aside");
        fs::rename(path, &aside).with_context(|| format!("cannot hide {}", path.display()))?;
        Ok(Self(path.to_owned(), aside))
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        if let Err(error) = fs::rename(&self.1, &self.0) {
            eprintln!("{} is not as it was: {error}", self.0.display());
        }
    }
}

/// A filesystem over the runtime's, as long as this lives: what a container can do that has its root shared with the host.
struct Cover(PathBuf);

impl Cover {
    fn new(path: &Path) -> Result<Self> {
        mount("tmpfs", path, "tmpfs", MountFlags::empty(), None)
            .with_context(|| format!("cannot mount over {}", path.display()))?;
        Ok(Self(path.to_owned()))
    }
}

impl Drop for Cover {
    fn drop(&mut self) {
        if let Err(error) = unmount(&self.0, UnmountFlags::empty()) {
            eprintln!("{} is not as it was: {error}", self.0.display());
        }
    }
}

/// The exec of a container's payload.
async fn executed(node: &Node, container: &Waiting) -> Result<Value> {
    until("the record of the payload", async || {
        let query = ["--kind", "exec", "--container", &container.id, "--executable", ALLOWED];
        Ok(events::query(node, &query)?
            .into_iter()
            .find(|record| events::has_argument(record, &container.nonce)))
    })
    .await
}

/// What is said of the root filesystem, when the container is in `mode`.
async fn said(node: &Node, container: &Waiting, mode: &str, root: &str) -> Result<()> {
    let coverage = events::in_mode(node, &container.id, mode).await?;
    let about = &coverage["coverage"];
    ensure!(about["root_filesystem"] == root, "its root is not {root:?}: {coverage}");
    let objects = about["objection"].as_str().is_some_and(|why| !why.is_empty());
    ensure!(objects == (root != "runtime"), "{coverage}");
    ensure!(about["found_running"] == true, "{coverage}");
    Ok(())
}

fn is_refused(code: i32) -> Result<()> {
    ensure!([EPERM, KILLED].contains(&code), "it ended with {code}");
    Ok(())
}

/// A container whose first process has left the runtime's root.
async fn left(node: &Node, stage: &Stage<'_>, container: &Waiting, is_image: bool) -> Result<()> {
    let told = said(node, container, "enforce", "left").await;
    let code = stage.let_go(container).await?;
    let record = executed(node, container).await?;
    let (exec, decision) = (&record["exec"], &record["decision"]);
    ensure!(exec["executable"] == ALLOWED, "{record}");
    if is_image {
        ensure!(code == PAYLOAD_RAN, "it ended with {code}: {record}");
        ensure!(decision["verdict"] == "allowed" && exec["origin"] == "image", "{record}");
    } else {
        ensure!(
            decision["verdict"] == "denied" && exec["origin"] == "unknown",
            "it ended with {code}: {record}"
        );
        is_refused(code)?;
    }
    told
}

async fn found(node: &Node, stage: &Stage<'_>, container: &Waiting) -> Result<()> {
    said(node, container, "enforce", "runtime").await?;
    let code = stage.let_go(container).await?;
    let record = executed(node, container).await?;
    ensure!(record["decision"]["verdict"] == "allowed" && record["exec"]["origin"] == "image", "{record}");
    ensure!(code == PAYLOAD_RAN, "it ended with {code}");
    Ok(())
}

/// What enters such a container does not decide what its image is.
async fn silence<H>(node: &Node, stage: &Stage<'_>, container: &Waiting, hidden: H) -> Result<()> {
    said(node, container, "not-in-force", "not-found").await?;
    let nonce = nonce("entered");
    let ended = stage.runtime.exec(&container.id, &[ALLOWED, "payload", &nonce]).await;
    ensure!(ended.as_ref().map_or(true, |ended| ended.code != PAYLOAD_RAN), "it ran: {ended:?}");
    let record = events::exactly_one(node, &nonce).await?;
    ensure!(record["decision"]["verdict"] == "denied" && record["exec"]["origin"] == "unknown", "{record}");
    drop(hidden);
    found(node, stage, container).await
}

/// The kernel's own word on a container that starts while the agent runs is compared as well, if later.
async fn fresh(node: &Node, stage: &Stage<'_>) -> Result<()> {
    let container = stage.start("", ALLOWED).await?;
    let compared = until("its root filesystem is compared", async || {
        let records = events::query(node, &["--kind", "coverage", "--container", &container.id])?;
        Ok(records.into_iter().find(|record| record["coverage"]["root_filesystem"] != ""))
    })
    .await?;
    let about = &compared["coverage"];
    ensure!(about["root_filesystem"] == "runtime" && about["objection"] == "", "{compared}");
    ensure!(about["found_running"] == false && compared["container"]["mode"] == "enforce", "{compared}");
    let code = stage.let_go(&container).await?;
    let record = executed(node, &container).await?;
    ensure!(code == PAYLOAD_RAN && record["exec"]["origin"] == "image", "it ended with {code}: {record}");
    Ok(())
}
