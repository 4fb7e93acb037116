//! Processes by the hundred, from several at once. Since 7.0 kernels skip a tracepoint's program when another task is in it on the same
//! processor: whatever is skipped, every process is on record or counted as lost, nothing passes that must not, and the claim holds.

use std::{path::Path, process::ExitCode};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{
    attacks::{EPERM, KILLED, nonce, profile},
    cri::{Runtime, WORKLOAD_IMAGE},
    events,
    node::{AgentOptions, Node},
    report::Report,
};

/// Loops at the same time.
const LOOPS: usize = 6;
/// Processes of each.
const PROCESSES: u64 = 300;
/// A fork, an exec and an exit.
const RECORDS: u64 = 3;
/// Attacks meanwhile.
const ATTACKS: usize = 10;

pub async fn run(cri: &Path) -> Result<ExitCode> {
    let mut report = Report::new();
    let runtime = Runtime::connect(cri);
    let mut node = Node::start(cri).await?;
    node.write_profile("enforce.yaml", &profile("enforce", "enforce"))?;
    let tier = node.start_agent(&AgentOptions::default()).await?;
    println!("tier: {tier}");
    report
        .case("every process is on record or counted as lost", flood(&node, &runtime, PROCESSES, ATTACKS))
        .await;
    report.case("the claim holds", claim(&node, tier == "full")).await;
    report.case("the agent stops cleanly", async { node.stop_agent() }).await;
    if report.failed() > 0 {
        println!("--- the agent's log\n{}", node.log("agent"));
    }
    Ok(report.close())
}

/// Whether this kernel may skip a program on a tracepoint: since 7.0 those may be preempted.
pub fn may_skip() -> bool {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    release.split('.').next().and_then(|major| major.parse::<u32>().ok()).is_some_and(|major| major >= 7)
}

/// A flood of so many processes in each loop, beside attacks that are tried so often. Needs a profile for the pods of `enforce`.
pub async fn flood(node: &Node, runtime: &Runtime, processes: u64, tries: usize) -> Result<()> {
    let pod = runtime.pod("pod-skipped", "enforce", "").await?;
    let mut containers = Vec::new();
    for name in ["c-none", "c-many", "c-attacked"] {
        let container = runtime.container(&pod, name, WORKLOAD_IMAGE, &[]).await?;
        events::in_mode(node, &container, "enforce").await?;
        containers.push(container);
    }
    let [none, many, attacked] = containers.as_slice() else { unreachable!("three were made") };
    // What letting the loops in takes is the same for both.
    loops(runtime, none, 0).await?;
    let (looped, refused) = tokio::join!(loops(runtime, many, processes), attacks(runtime, attacked, tries));
    looped?;
    refused?;
    runtime.remove_pod(&pod).await?;
    let (none, lost) = of_workload(node, none).await?;
    let (many, _) = of_workload(node, many).await?;
    let expected = LOOPS as u64 * processes * RECORDS;
    let made = many.saturating_sub(none);
    ensure!(made == expected, "{made} records were made of {expected}");
    // Entering takes processes, too, several at the same time.
    ensure!(lost == 0 || may_skip(), "{lost} were lost while nothing was going on");
    Ok(())
}

/// How many records an ended container has made, and how many of them were lost. Without those that runc makes when it executes the
/// copy of itself: whether it is in the container's cgroup by then is chance.
async fn of_workload(node: &Node, container: &str) -> Result<(u64, u64)> {
    let events::Balance { made, counted } = events::balance(node, container).await?;
    let execs = events::query(node, &["--kind", "exec", "--container", container])?;
    let of_runc =
        |record: &&Value| record["actor"]["comm"].as_str().is_some_and(|comm| comm.starts_with("memfd:runc"));
    let of_runc = execs.iter().filter(of_runc).count() as u64;
    Ok((made - of_runc, counted))
}

/// Starts loops at the same time, each of so many processes.
async fn loops(runtime: &Runtime, container: &str, processes: u64) -> Result<()> {
    let count = processes.to_string();
    let one = async || {
        let ended =
            runtime.exec_long(container, &["/usr/bin/workload", "loop", "/usr/bin/workload", &count]).await?;
        ensure!(ended.code == 0, "{ended:?}");
        anyhow::Ok(())
    };
    let all: Vec<_> = (0..LOOPS).map(|_| one()).collect();
    for ended in futures_util::future::join_all(all).await {
        ended?;
    }
    Ok(())
}

async fn attacks(runtime: &Runtime, container: &str, tries: usize) -> Result<()> {
    for _ in 0..tries {
        let tried = ["/usr/bin/attacker", "run", "/usr/bin/third", "payload", &nonce("skipped")];
        let ended = runtime.exec(container, &tried).await?;
        ensure!([EPERM, KILLED].contains(&ended.code), "{ended:?}");
    }
    Ok(())
}

/// On the full tier nothing rests on a program that may be skipped. Prints what was.
async fn claim(node: &Node, full: bool) -> Result<()> {
    let status = node.status()?;
    let errors = status["errors"].as_object().context("no errors in the status")?;
    let skipped: Vec<(&String, &Value)> =
        errors.iter().filter(|(site, _)| site.starts_with("skipped-")).collect();
    println!("   skipped: {skipped:?}");
    if full || skipped.is_empty() {
        node.is_ready().await?;
    }
    Ok(())
}
