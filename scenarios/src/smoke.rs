//! The check that every kernel gets: one allow, two denials, the right origins, and a count of processes where the kernel may skip some.

use std::{path::Path, process::ExitCode};

use anyhow::Result;

use crate::{
    attacks::{ATTACKS, Expect, attack, carry_out, profile},
    cri::Runtime,
    node::{AgentOptions, Node},
    report::Report,
    skipped::{flood, may_skip},
};

/// Processes of each loop of the flood, and attacks meanwhile.
const PROCESSES: u64 = 25;
const TRIES: usize = 3;

pub async fn run(cri: &Path) -> Result<ExitCode> {
    let mut report = Report::new();
    let runtime = Runtime::connect(cri);
    let mut node = Node::start(cri).await?;
    node.write_profile("enforce.yaml", &profile("enforce", "enforce"))?;
    let tier = node.start_agent(&AgentOptions::default()).await?;
    println!("tier: {tier}");
    let denied = if tier == "full" { Expect::Refused } else { Expect::Killed };
    let pod = runtime.pod("pod-smoke", "enforce", "").await?;
    let allowed = attack("none", "/usr/bin/workload", "image", "rule");
    let case = carry_out(&node, &runtime, &pod, &allowed, "enforce", Expect::Allowed);
    report.case("an allowed program runs, origin image", case).await;
    for attack in ATTACKS.iter().filter(|attack| matches!(attack.name, "drop-in" | "third")) {
        let name = format!("{} is denied, origin {}", attack.name, attack.origin);
        report.case(&name, carry_out(&node, &runtime, &pod, attack, "enforce", denied)).await;
    }
    runtime.remove_pod(&pod).await?;
    if may_skip() {
        let case = flood(&node, &runtime, PROCESSES, TRIES);
        report.case("every process of a flood is on record or counted as lost", case).await;
    }
    report.case("the agent stops cleanly", async { node.stop_agent() }).await;
    if report.failed() > 0 {
        println!("--- the agent's log\n{}", node.log("agent"));
    }
    Ok(report.close())
}
