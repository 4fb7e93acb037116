//! A container that makes records as fast as it can, and one beside it that loses none by that.
//!
//! The agent does not run for a while, so that the ring fills up whatever the node's speed; the quiet container acts when the noisy
//! one has put in as much as it can.

use std::{path::Path, process::ExitCode};

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::{
    attacks::{EPERM, KILLED, PAYLOAD_RAN, nonce, profile},
    cri::{Runtime, WORKLOAD_IMAGE, until},
    events,
    node::{AgentOptions, Node},
    report::Report,
};

/// A ring that a flood fills soon.
pub const SMALL_RING: &str = "maps: {ringBytes: 262144}\n";
/// Executions of a flood: each is three records, of about a kilobyte together.
const FLOOD: &str = "250";
/// As fast as it can.
const RATE: &str = "1000000";
/// Executions of the quiet container.
const QUIET: usize = 5;

pub async fn run(cri: &Path) -> Result<ExitCode> {
    let mut report = Report::new();
    let runtime = Runtime::connect(cri);
    let mut node = Node::start(cri).await?;
    node.write_profile("enforce.yaml", &profile("enforce", "enforce"))?;
    let options = AgentOptions { settings: SMALL_RING, ..AgentOptions::default() };
    let tier = node.start_agent(&options).await?;
    println!("tier: {tier}");
    report
        .case("who executes as fast as it can costs nobody else a record", telemetry(&node, &runtime))
        .await;
    report.case("nor does who is refused as fast as it can", denials(&node, &runtime)).await;
    report
        .case("a flood of its own does not hide what a container is refused", hiding(&node, &runtime))
        .await;
    report
        .case(
            "the agent's status says what was lost, and the balance of each container",
            status(&node, &runtime),
        )
        .await;
    report.case("the agent stops cleanly", async { node.stop_agent() }).await;
    if report.failed() > 0 {
        println!("--- the agent's log\n{}", node.log("agent"));
    }
    Ok(report.close())
}

async fn status(node: &Node, runtime: &Runtime) -> Result<()> {
    let nonce = nonce("status");
    let pod = runtime.pod(&nonce, "enforce", "").await?;
    let container = runtime.container(&pod, "c", WORKLOAD_IMAGE, &[]).await?;
    events::in_mode(node, &container, "enforce").await?;
    let ended = runtime.exec(&container, &["/usr/bin/workload", "payload", &nonce]).await?;
    ensure!(ended.code == PAYLOAD_RAN, "{ended:?}");
    events::exactly_one(node, &nonce).await?;
    let status = until("everything of the container is delivered", async || {
        let status = node.status()?;
        let of = |own: &Value| {
            let waits = own["on_the_way"] != 0 || own["spooled"] != 0;
            own["id"] == container && !waits && own["made"].as_u64() > Some(3)
        };
        let settled = status["containers"].as_array().is_some_and(|all| all.iter().any(of));
        Ok(settled.then_some(status))
    })
    .await?;
    let own = status["containers"].as_array().into_iter().flatten().find(|own| own["id"] == container);
    let own = own.context("the container is not there")?;
    ensure!(own["made"] == own["delivered"] && own["lost"] == 0 && own["name"] == "c", "{own}");
    ensure!(status["enforces"] == true && status["delivery"]["collector"].is_string(), "{status}");
    let number = |value: &Value| value.as_u64().unwrap_or(0);
    ensure!(number(&status["lost"]["ring-full"]) > 0, "{status}");
    ensure!(number(&status["errors"]["record-share-used"]) > 0, "{status}");
    ensure!(number(&status["verdicts"]["exec"]["denied"]) > 0, "{status}");
    runtime.remove_pod(&pod).await
}

/// With an agent that has a [`SMALL_RING`]: whether a quiet container loses no record.
pub async fn trial(node: &Node, runtime: &Runtime, report: &mut Report) {
    report.case("trial", telemetry(node, runtime)).await;
}

/// Keeps the agent from running until it is dropped.
struct Stopped(Pid);

impl Stopped {
    fn new(node: &Node) -> Result<Self> {
        let agent = node.agent_pid().and_then(|pid| Pid::from_raw(pid.cast_signed())).context("no agent")?;
        kill_process(agent, Signal::STOP)?;
        Ok(Self(agent))
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _gone = kill_process(self.0, Signal::CONT);
    }
}

async fn telemetry(node: &Node, runtime: &Runtime) -> Result<()> {
    beside(node, runtime, "/usr/bin/workload").await
}

async fn denials(node: &Node, runtime: &Runtime) -> Result<()> {
    beside(node, runtime, "/usr/bin/third").await
}

/// One container floods the ring with executions of `program` while another executes a few.
async fn beside(node: &Node, runtime: &Runtime, program: &str) -> Result<()> {
    let nonce = nonce("noisy");
    let pod = runtime.pod(&nonce, "enforce", "").await?;
    let noisy = runtime.container(&pod, "c-noisy", WORKLOAD_IMAGE, &[]).await?;
    let quiet = runtime.container(&pod, "c-quiet", WORKLOAD_IMAGE, &[]).await?;
    for container in [&noisy, &quiet] {
        events::in_mode(node, container, "enforce").await?;
    }
    let stopped = Stopped::new(node)?;
    flood(runtime, &noisy, program, &nonce).await?;
    for _ in 0..QUIET {
        let ended = runtime.exec(&quiet, &["/usr/bin/workload", "payload", &nonce]).await?;
        ensure!(ended.code == PAYLOAD_RAN, "{ended:?}");
    }
    drop(stopped);
    runtime.remove_pod(&pod).await?;
    let (of_noisy, of_quiet) =
        (events::balance(node, &noisy).await?.counted, events::balance(node, &quiet).await?.counted);
    ensure!(of_noisy > 0, "nothing was lost, so nothing was flooded");
    ensure!(of_quiet == 0, "the quiet container has lost {of_quiet} records");
    let found = events::payloads(node, &nonce)?.len();
    ensure!(found == QUIET, "{found} of {QUIET} executions are on record");
    Ok(())
}

/// A container floods the ring with what it may do, and then tries what it may not.
async fn hiding(node: &Node, runtime: &Runtime) -> Result<()> {
    let nonce = nonce("hiding");
    let pod = runtime.pod(&nonce, "enforce", "").await?;
    let container = runtime.container(&pod, "c", WORKLOAD_IMAGE, &[]).await?;
    events::in_mode(node, &container, "enforce").await?;
    let stopped = Stopped::new(node)?;
    flood(runtime, &container, "/usr/bin/workload", &nonce).await?;
    for _ in 0..QUIET {
        let tried = ["/usr/bin/attacker", "run", "/usr/bin/third", "payload", &nonce];
        let ended = runtime.exec(&container, &tried).await?;
        ensure!([EPERM, KILLED].contains(&ended.code), "{ended:?}");
    }
    drop(stopped);
    runtime.remove_pod(&pod).await?;
    ensure!(events::balance(node, &container).await?.counted > 0, "nothing was lost, so nothing was flooded");
    let found = events::payloads(node, &nonce)?;
    let denied = found.iter().filter(|record| record["decision"]["verdict"] == "denied").count();
    ensure!(denied == QUIET, "{denied} of {QUIET} denials are on record");
    Ok(())
}

async fn flood(runtime: &Runtime, container: &str, program: &str, nonce: &str) -> Result<()> {
    let ended =
        runtime.exec(container, &["/usr/bin/attacker", "generate", program, nonce, FLOOD, RATE]).await?;
    ensure!(ended.code == 0, "{ended:?}");
    Ok(())
}
