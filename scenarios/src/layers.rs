//! Layers of images, which containers share: what is written to one below their file systems is not the image's any more, and a
//! container under a profile may not write there.

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{
    attacks::{EPERM, PAYLOAD_RAN, nonce, profile},
    cri::{Pod, Runtime, Spec, WORKLOAD_IMAGE, until},
    events,
    node::{AgentOptions, Node},
    report::Report,
};

/// A file of the image that nothing else executes, and the rule that allows it.
const LAYERED: &str = "usr/libexec/layered";
pub const RULE: &str = "      - path: /usr/libexec/layered\n";

pub async fn run(cri: &Path) -> Result<ExitCode> {
    let mut report = Report::new();
    let runtime = Runtime::connect(cri);
    let mut node = Node::start(cri).await?;
    node.write_profile("layers.yaml", &(profile("layers", "enforce") + RULE))?;
    let tier = node.start_agent(&AgentOptions::default()).await?;
    println!("tier: {tier}");
    let pod = runtime.pod("pod-layers", "layers", "").await?;
    let free = runtime.pod("pod-free", "free", "").await?;
    let victim = runtime.container(&pod, "c-victim", WORKLOAD_IMAGE, &[]).await?;
    events::in_mode(&node, &victim, "enforce").await?;
    let layer = layer_of(runtime.pid(&victim).await?)?;
    let stage = Stage { node: &node, runtime: &runtime, layer: &layer };
    report.case("a file of the image runs", stage.executes(&victim, None)).await;
    if tier == "full" {
        report.case("a container under a profile cannot write below the image", stage.refused(&pod)).await;
        report.case("nor was anything changed by that", stage.executes(&victim, None)).await;
    }
    report.case("one without a profile writes there (control)", stage.writes(&free)).await;
    report.case("what was written to is drift", stage.executes(&victim, Some("drift"))).await;
    report.case("also in a container that comes later", stage.later(&pod)).await;
    for pod in [&pod, &free] {
        runtime.remove_pod(pod).await?;
    }
    report.case("the agent stops cleanly", async { node.stop_agent() }).await;
    if report.failed() > 0 {
        println!("--- the agent's log\n{}", node.log("agent"));
    }
    Ok(report.close())
}

/// Whether a file of the image that is written to in its layer is drift, in a pod under a profile with [`RULE`]. The image stays changed.
pub async fn trial(node: &Node, runtime: &Runtime, pod: &Pod, report: &mut Report) {
    let changed = async {
        let victim = runtime.container(pod, &nonce("c-victim"), WORKLOAD_IMAGE, &[]).await?;
        events::in_mode(node, &victim, "enforce").await?;
        let layer = layer_of(runtime.pid(&victim).await?)?;
        fs::OpenOptions::new().append(true).open(layer.join(LAYERED))?.write_all(b"\0")?;
        let stage = Stage { node, runtime, layer: &layer };
        stage.executes(&victim, Some("drift")).await?;
        runtime.remove_container(&victim).await
    };
    report.case("trial", changed).await;
}

/// The folder on the host in which the image's file is.
fn layer_of(pid: u32) -> Result<PathBuf> {
    let table = fs::read_to_string(format!("/proc/{pid}/mountinfo"))?;
    let root =
        table.lines().find(|line| line.split(' ').nth(4) == Some("/")).context("no root is mounted")?;
    let layers = root
        .split([' ', ','])
        .find_map(|option| option.strip_prefix("lowerdir="))
        .context("its root is no overlay")?;
    let layers = layers.split(':').map(PathBuf::from);
    layers.into_iter().find(|layer| layer.join(LAYERED).exists()).context("no layer has the file")
}

struct Stage<'a> {
    node: &'a Node,
    runtime: &'a Runtime,
    layer: &'a Path,
}

impl Stage<'_> {
    /// Whether the file runs, or is refused for its origin.
    async fn executes(&self, container: &str, refused_as: Option<&str>) -> Result<()> {
        let nonce = nonce("layered");
        let program = format!("/{LAYERED}");
        let ended = self
            .runtime
            .exec(container, &["/usr/bin/attacker", "run", &program, "/dev/null", &nonce])
            .await?;
        let record = until("its record", async || {
            let records = events::query(self.node, &["--kind", "exec", "--executable", &program])?;
            Ok(records.into_iter().find(|record| events::has_argument(record, &nonce)))
        })
        .await?;
        let (verdict, found) = (&record["decision"]["verdict"], &record["exec"]["origin"]);
        match refused_as {
            None => {
                ensure!(ended.code == PAYLOAD_RAN, "{ended:?}");
                ensure!(verdict == "allowed" && found == "image", "{record}");
            }
            Some(origin) => {
                ensure!(ended.code != PAYLOAD_RAN, "it ran");
                ensure!(verdict == "denied" && found == origin, "{record}");
            }
        }
        Ok(())
    }

    /// A container that sees the layer.
    async fn with_layer(&self, pod: &Pod, mode: &str) -> Result<String> {
        let mounts = [(self.layer, "/layer")];
        let spec = Spec { name: "c-writer", mounts: &mounts, ..Spec::default() };
        let container = self.runtime.create(pod, &spec).await?;
        self.runtime.start(&container).await?;
        events::in_mode(self.node, &container, mode).await?;
        Ok(container)
    }

    async fn append(&self, container: &str) -> Result<i32> {
        let file = format!("/layer/{LAYERED}");
        Ok(self.runtime.exec(container, &["/usr/bin/attacker", "append", &file]).await?.code)
    }

    async fn refused(&self, pod: &Pod) -> Result<()> {
        let container = self.with_layer(pod, "enforce").await?;
        let before = fs::read(self.layer.join(LAYERED))?;
        let code = self.append(&container).await?;
        ensure!(fs::read(self.layer.join(LAYERED))? == before, "it was written to");
        ensure!(code == EPERM, "it ended with {code}");
        let record: Value = until("its record", async || {
            Ok(events::query(self.node, &["--kind", "code", "--container", &container])?.pop())
        })
        .await?;
        let decision = &record["decision"];
        ensure!(record["code"]["act"] == "open-layer", "{record}");
        ensure!(decision["verdict"] == "denied" && decision["reason"] == "image-layer", "{record}");
        self.runtime.remove_container(&container).await
    }

    async fn writes(&self, pod: &Pod) -> Result<()> {
        let container = self.with_layer(pod, "none").await?;
        let before = fs::read(self.layer.join(LAYERED))?.len();
        let code = self.append(&container).await?;
        ensure!(code == 0, "it ended with {code}");
        ensure!(fs::read(self.layer.join(LAYERED))?.len() == before + 1, "nothing was written");
        Ok(())
    }

    async fn later(&self, pod: &Pod) -> Result<()> {
        let container = self.runtime.container(pod, "c-later", WORKLOAD_IMAGE, &[]).await?;
        events::in_mode(self.node, &container, "enforce").await?;
        self.executes(&container, Some("drift")).await
    }
}
