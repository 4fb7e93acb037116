//! A file whose folder changes its name and place while it is executed: its path is the one of before or the one of after, and never
//! half of each. Needs processors that run at the same time, which those of an emulator that takes turns do not.

use std::{collections::BTreeMap, path::Path, process::ExitCode};

use anyhow::{Context as _, Result, ensure};

use crate::{
    attacks::{nonce, profile},
    cri::{Pod, Runtime, WORKLOAD_IMAGE},
    events,
    node::{AgentOptions, Node},
    report::Report,
};

/// What the file is called in turns.
const PATHS: [&str; 2] = ["/tmp/torn/a/x/program", "/tmp/torn/b/y/program"];
/// Paths that it never has.
const RULES: &str = "      - {path: /tmp/torn/a/y/program, from: drift}\n      - {path: /tmp/torn/b/x/program, from: drift}\n";

pub async fn run(cri: &Path, count: u64) -> Result<ExitCode> {
    let mut report = Report::new();
    let runtime = Runtime::connect(cri);
    let mut node = Node::start(cri).await?;
    node.write_profile("enforce.yaml", &(profile("enforce", "enforce") + RULES))?;
    let tier = node.start_agent(&AgentOptions::default()).await?;
    println!("tier: {tier}");
    for (app, mode) in [("free", "none"), ("enforce", "enforce")] {
        let pod = runtime.pod(&format!("pod-torn-{app}"), app, "").await?;
        let name = format!("{app}: {count} executions below a folder that moves");
        report.case(&name, moving(&node, &runtime, &pod, mode, count)).await;
        runtime.remove_pod(&pod).await?;
    }
    report.case("the agent stops cleanly", async { node.stop_agent() }).await;
    if report.failed() > 0 {
        println!("--- the agent's log\n{}", node.log("agent"));
    }
    Ok(report.close())
}

async fn moving(node: &Node, runtime: &Runtime, pod: &Pod, mode: &str, count: u64) -> Result<()> {
    let container = runtime.container(pod, "c-torn", WORKLOAD_IMAGE, &[]).await?;
    events::in_mode(node, &container, mode).await?;
    let nonce = nonce("torn");
    let ended = runtime.exec(&container, &["/usr/bin/attacker", "torn", &count.to_string(), &nonce]).await?;
    let ran: u64 = ended.stdout.trim().parse().with_context(|| format!("{ended:?}"))?;
    runtime.remove_container(&container).await?;
    // Says that everything has come.
    events::balance(node, &container).await?;
    let mut paths: BTreeMap<String, u64> = BTreeMap::new();
    let mut unknown = 0;
    for record in events::payloads(node, &nonce)? {
        let exec = &record["exec"];
        if record["decision"]["reason"] == "path-changes" || exec["path_truncated"] == true {
            unknown += 1;
        } else {
            *paths.entry(exec["executable"].as_str().unwrap_or_default().to_owned()).or_default() += 1;
        }
    }
    println!("   {ran} ran; {unknown} without a path, others by path: {paths:?}");
    ensure!(
        paths.keys().all(|path| PATHS.contains(&path.as_str())),
        "some have a path that the file never had"
    );
    ensure!(paths.len() == PATHS.len(), "the folder did not move, so nothing was tried");
    if mode == "enforce" {
        ensure!(ran == 0, "it ran {ran} times by a path that it never had");
    } else {
        ensure!(ran == count, "without a profile {ran} of {count} ran, so that nothing is proven");
    }
    Ok(())
}
