//! Who may run it: rules for the workload alone, and for those who enter from outside.

use std::{path::Path, process::ExitCode};

use anyhow::{Result, ensure};

use crate::{
    attacks::{PAYLOAD_RAN, nonce},
    cri::{Pod, Runtime, Spec},
    events,
    gate::Gate,
    node::{AgentOptions, Node},
    report::Report,
};

const PROFILE: &str = "apiVersion: palisade.dev/v1alpha1\nkind: Profile\nmetadata: {name: who, namespace: scenarios}\nspec:\n  selector: \
     {podSelector: {matchLabels: {app: who}}}\n  mode: enforce\n  exec:\n    allow:\n      - path: \
     /usr/bin/workload\n      - {path: /usr/bin/third, sessions: admin}\n      - {path: /usr/bin/att*er, sessions: \
     [workload]}\n";
/// For those who enter, exactly named.
const TOOL: &str = "/usr/bin/third";
/// For the workload, by a pattern.
const SERVICE: &str = "/usr/bin/attacker";
/// Where containers see the folder of gates.
const GATES: &str = "/gates";

pub async fn run(cri: &Path) -> Result<ExitCode> {
    let mut report = Report::new();
    let runtime = Runtime::connect(cri);
    let mut node = Node::start(cri).await?;
    node.write_profile("who.yaml", PROFILE)?;
    let pod = runtime.pod("pod-who", "who", "").await?;
    let mut stage = Stage { node: &mut node, runtime: &runtime, pod: &pod, gates: tempfile::tempdir()? };
    report.case("control: without an agent anybody runs both", stage.unguarded()).await;
    stage.node.start_agent(&AgentOptions::default()).await?;
    report.case("a tool of those who enter is refused to the workload", stage.workload(TOOL, false)).await;
    report.case("the workload's own program runs", stage.workload(SERVICE, true)).await;
    report.case("who enters runs the tool, also by way of another program", stage.entered(TOOL, true)).await;
    report.case("who enters is refused the workload's own program", stage.entered(SERVICE, false)).await;
    report.case("a workload that ran before the agent's restart is still one", stage.restarted()).await;
    runtime.remove_pod(&pod).await?;
    report.case("the agent stops cleanly", async { node.stop_agent() }).await;
    if report.failed() > 0 {
        println!("--- the agent's log\n{}", node.log("agent"));
    }
    Ok(report.close())
}

/// The rule of the tool.
pub const TOOL_RULE: &str = "      - {path: /usr/libexec/tree/one/one/one, sessions: admin}\n";

/// Whether a workload is refused what is for those who enter, in a pod under a profile with [`TOOL_RULE`].
pub async fn trial(node: &mut Node, runtime: &Runtime, pod: &Pod, report: &mut Report) -> Result<()> {
    let mut stage = Stage { node, runtime, pod, gates: tempfile::tempdir()? };
    report.case("trial", stage.workload("/usr/libexec/tree/one/one/one", false)).await;
    Ok(())
}

struct Stage<'a> {
    node: &'a mut Node,
    runtime: &'a Runtime,
    pod: &'a Pod,
    gates: tempfile::TempDir,
}

impl Stage<'_> {
    /// A container whose workload waits, then runs `program`.
    async fn waiting(&self, name: &str, program: &str, nonce: &str) -> Result<(String, Gate)> {
        let gate = Gate::new(&self.gates.path().join(name))?;
        let place = format!("{GATES}/{name}");
        let command = ["/usr/bin/workload", "after", place.as_str(), program, "payload", nonce];
        let mounts = [(self.gates.path(), GATES)];
        let spec = Spec { name, command: &command, mounts: &mounts, ..Spec::default() };
        let container = self.runtime.create(self.pod, &spec).await?;
        self.runtime.start(&container).await?;
        Ok((container, gate))
    }

    async fn unguarded(&mut self) -> Result<()> {
        for program in [TOOL, SERVICE] {
            let name = nonce("c-unguarded");
            let (container, gate) = self.waiting(&name, program, &name).await?;
            let entered = self.runtime.exec(&container, &[program, "payload"]).await?;
            ensure!(entered.code == PAYLOAD_RAN, "{program} entered: {entered:?}");
            gate.open().await?;
            let code = self.runtime.ended(&container).await?;
            ensure!(code == PAYLOAD_RAN, "{program} of the workload ended with {code}");
            self.runtime.remove_container(&container).await?;
        }
        Ok(())
    }

    async fn workload(&mut self, program: &str, runs: bool) -> Result<()> {
        let nonce = nonce("c-workload");
        let (container, gate) = self.waiting(&nonce, program, &nonce).await?;
        events::in_mode(self.node, &container, "enforce").await?;
        self.let_through(&container, &gate, program, &nonce, runs).await
    }

    /// Opens the gate; whether the program runs is as expected, and so is its record.
    async fn let_through(
        &self,
        container: &str,
        gate: &Gate,
        program: &str,
        nonce: &str,
        runs: bool,
    ) -> Result<()> {
        gate.open().await?;
        let code = self.runtime.ended(container).await?;
        ensure!((code == PAYLOAD_RAN) == runs, "{program} ended with {code}");
        self.recorded(program, nonce, "workload", runs).await?;
        self.runtime.remove_container(container).await
    }

    async fn entered(&mut self, program: &str, runs: bool) -> Result<()> {
        let name = nonce("c-entered");
        let (container, _gate) = self.waiting(&name, program, &name).await?;
        events::in_mode(self.node, &container, "enforce").await?;
        for way in [&[][..], &["/usr/bin/workload", "run"]] {
            let nonce = nonce("entered");
            let command = [way, &[program, "payload", &nonce]].concat();
            let ended = self.runtime.exec(&container, &command).await;
            // The runtime may call an exec failed that was refused.
            ensure!(ended.as_ref().is_ok_and(|ended| ended.code == PAYLOAD_RAN) == runs, "{ended:?}");
            self.recorded(program, &nonce, "admin", runs).await?;
        }
        self.runtime.remove_container(&container).await
    }

    async fn restarted(&mut self) -> Result<()> {
        let nonce = nonce("c-restarted");
        let (container, gate) = self.waiting(&nonce, TOOL, &nonce).await?;
        events::in_mode(self.node, &container, "enforce").await?;
        self.node.kill_agent()?;
        self.node.start_agent(&AgentOptions::default()).await?;
        self.let_through(&container, &gate, TOOL, &nonce, false).await
    }

    /// One record says so, of that session.
    async fn recorded(&self, program: &str, nonce: &str, session: &str, runs: bool) -> Result<()> {
        let record = crate::cri::until("its record", async || {
            let records = events::query(self.node, &["--kind", "exec", "--executable", program])?;
            Ok(records.into_iter().find(|record| events::has_argument(record, nonce)))
        })
        .await?;
        let (verdict, reason) = if runs { ("allowed", "rule") } else { ("denied", "session-not-allowed") };
        let decision = &record["decision"];
        ensure!(
            decision["verdict"] == verdict && decision["reason"] == reason,
            "not {verdict}, {reason}: {record}"
        );
        ensure!(record["session_of"]["kind"] == session, "not of {session}: {record}");
        Ok(())
    }
}
