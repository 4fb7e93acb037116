//! Rules that ask for a file's bytes: they hold for these alone, from the first exec on.

use std::{
    path::Path,
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    attacks::{PAYLOAD_RAN, nonce},
    cri::{Pod, Runtime, Spec, WORKLOAD_IMAGE, until},
    events,
    node::{AgentOptions, Node},
    report::Report,
};

/// What rules with a digest are about.
const PROGRAM: &str = "/usr/bin/third";

pub async fn run(cri: &Path) -> Result<ExitCode> {
    let mut report = Report::new();
    let runtime = Runtime::connect(cri);
    let mut node = Node::start(cri).await?;
    // Else an entrypoint may begin before the runtime has said what its container is.
    node.start_agent(&AgentOptions { unidentified: Some("hold"), ..AgentOptions::default() }).await?;
    let pod = runtime.pod("pod-pinned", "pinned", "").await?;
    let stage = Stage { node: &node, runtime: &runtime, pod: &pod };
    let digest = stage.digest().await?;
    let other = "0".repeat(64);
    node.write_profile("pinned.yaml", &profile(&digest))?;
    report.case("the image's file with these bytes runs", stage.entered(true)).await;
    report.case("an entrypoint with these bytes runs", stage.entrypoint(true)).await;
    report.case("a rule for other bytes comes into force while it runs", stage.changed(&other)).await;
    report.case("an entrypoint with other bytes does not run", stage.entrypoint(false)).await;
    runtime.remove_pod(&pod).await?;
    report.case("the agent stops cleanly", async { node.stop_agent() }).await;
    if report.failed() > 0 {
        println!("--- the agent's log\n{}", node.log("agent"));
    }
    Ok(report.close())
}

fn profile(digest: &str) -> String {
    format!(
        "apiVersion: palisade.dev/v1alpha1\nkind: ClusterProfile\nmetadata: {{name: pinned}}\nspec:\n  selector: {{podSelector: \
         {{matchLabels: {{app: pinned}}}}}}\n  mode: enforce\n  exec:\n    allow:\n      - path: /usr/bin/workload\n      - \
         {{path: {PROGRAM}, sha256: {digest}}}\n"
    )
}

struct Stage<'a> {
    node: &'a Node,
    runtime: &'a Runtime,
    pod: &'a Pod,
}

impl Stage<'_> {
    /// Of the program, as the host reads it in a container that no profile names yet.
    async fn digest(&self) -> Result<String> {
        let container = self.runtime.container(self.pod, "c-read", WORKLOAD_IMAGE, &[]).await?;
        let path = format!("/proc/{}/root{PROGRAM}", self.runtime.pid(&container).await?);
        let output = Command::new("sha256sum").arg(&path).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout)?;
        self.runtime.remove_container(&container).await?;
        text.split(' ').next().map(str::to_owned).context("sha256sum prints nothing")
    }

    async fn runs(&self, container: &str, runs: bool) -> Result<()> {
        let nonce = nonce("pinned");
        // The runtime may call an exec failed that was refused.
        let ended = self.runtime.exec(container, &[PROGRAM, "payload", &nonce]).await;
        let ran = ended.as_ref().is_ok_and(|ended| ended.code == PAYLOAD_RAN);
        ensure!(ran == runs, "{ended:?}");
        let record = events::exactly_one(self.node, &nonce).await?;
        let (verdict, reason) = if runs { ("allowed", "rule") } else { ("denied", "no-rule") };
        let decision = &record["decision"];
        ensure!(decision["verdict"] == verdict && decision["reason"] == reason, "{record}");
        Ok(())
    }

    async fn entered(&self, runs: bool) -> Result<()> {
        let container = self.runtime.container(self.pod, "c-entered", WORKLOAD_IMAGE, &[]).await?;
        events::in_mode(self.node, &container, "enforce").await?;
        self.runs(&container, runs).await?;
        self.runtime.remove_container(&container).await
    }

    async fn changed(&self, other: &str) -> Result<()> {
        let container = self.runtime.container(self.pod, "c-changed", WORKLOAD_IMAGE, &[]).await?;
        let before = events::in_mode(self.node, &container, "enforce").await?;
        self.runs(&container, true).await?;
        self.node.write_profile("pinned.yaml", &profile(other))?;
        until("another revision is in force", async || {
            let now = events::in_mode(self.node, &container, "enforce").await?;
            Ok((now["container"]["revision"] != before["container"]["revision"]).then_some(()))
        })
        .await?;
        self.runs(&container, false).await?;
        self.runtime.remove_container(&container).await
    }

    /// The program as the container's first: its rule must be decided by then.
    async fn entrypoint(&self, runs: bool) -> Result<()> {
        let name = nonce("c-first");
        let command = [PROGRAM, "payload", &name];
        let container = self
            .runtime
            .create(self.pod, &Spec { name: &name, command: &command, ..Spec::default() })
            .await?;
        let started = self.runtime.start(&container).await;
        if runs {
            started?;
            let code = self.runtime.ended(&container).await?;
            ensure!(code == PAYLOAD_RAN, "it ended with {code}");
            self.runtime.remove_container(&container).await?;
        }
        // One that was refused goes with its pod: the runtime may still be undoing its start.
        let record = events::exactly_one(self.node, &name).await?;
        ensure!((record["decision"]["verdict"] == "allowed") == runs, "{record}");
        Ok(())
    }
}
