//! Numbered execs: each is stored, or a gap record counts it.

use std::{collections::BTreeSet, path::Path, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, ensure};

use crate::{
    attacks::{nonce, profile},
    cri::{Runtime, WORKLOAD_IMAGE, until, until_within},
    events,
    node::{AgentOptions, Node},
    report::Report,
};

pub async fn run(cri: &Path, count: u64, rate: f64) -> Result<ExitCode> {
    let mut report = Report::new();
    let runtime = Runtime::connect(cri);
    let mut node = Node::start(cri).await?;
    node.write_profile("enforce.yaml", &profile("enforce", "enforce"))?;
    node.start_agent(&AgentOptions::default()).await?;
    let pod = runtime.pod("pod-generator", "enforce", "").await?;
    let name = format!("{count} numbered execs at {rate}/s are stored or counted");
    report.case(&name, generate(&node, &runtime, &pod, count, rate)).await;
    runtime.remove_pod(&pod).await?;
    report.case("the agent stops cleanly", async { node.stop_agent() }).await;
    Ok(report.close())
}

async fn generate(
    node: &Node,
    runtime: &Runtime,
    pod: &crate::cri::Pod,
    count: u64,
    rate: f64,
) -> Result<()> {
    let nonce = nonce("generator");
    let container = runtime
        .container(
            pod,
            "c-generator",
            WORKLOAD_IMAGE,
            &[
                "/usr/bin/attacker",
                "generate",
                "/usr/bin/workload",
                &nonce,
                &count.to_string(),
                &rate.to_string(),
            ],
        )
        .await?;
    // An emulated machine does not reach the rate.
    let deadline = Duration::from_secs_f64(300.0 + 10.0 * count as f64 / rate);
    let code = until_within(deadline, "the generator ends", async || {
        let (runs, code) = runtime.state(&container).await?;
        Ok((!runs).then_some(code))
    })
    .await?;
    ensure!(code == 0, "the generator ended with {code}");
    // The agent says "ended" after everything else of the container.
    let ended = until("the container's last record", async || {
        let records = events::query(node, &["--kind", "coverage", "--container", &container])?;
        Ok(records.into_iter().find(|record| record["coverage"]["change"] == "ended"))
    })
    .await?;
    let prefix = format!("{nonce}-");
    let mut numbers = BTreeSet::new();
    let mut all = 0_u64;
    let mut numbered = 0_u64;
    let mut gaps = 0_u64;
    let mut sequences = BTreeSet::new();
    for record in events::query(node, &["--all", "--container", &container])? {
        gaps += record["gap"]["count"].as_u64().unwrap_or(0);
        let sequence = record["sequence"].as_u64().unwrap_or(0);
        if sequence > 0 {
            all += 1;
            let lane = record["lane"].as_u64().unwrap_or(0);
            ensure!(sequences.insert((lane, sequence)), "number {sequence} of lane {lane} came twice");
        }
        let last = record["exec"]["arguments"].as_array().and_then(|list| list.last()?.as_str());
        if let Some(number) = last.and_then(|word| word.strip_prefix(&prefix)) {
            numbered += 1;
            numbers.insert(number.parse::<u64>().context("a number")?);
        }
    }
    let made = ended["coverage"]["records_made"].as_u64().unwrap_or(0);
    println!(
        "     {numbered} of {count} execs stored, {gaps} records missing and counted, {all} of {made} records stored"
    );
    ensure!(
        numbered as usize == numbers.len(),
        "{} execs were stored twice",
        numbered as usize - numbers.len()
    );
    ensure!(all + gaps == made, "{made} records were made, {all} are stored and {gaps} counted as missing");
    ensure!(numbered + gaps >= count, "{} execs are neither stored nor counted", count - numbered - gaps);
    ensure!(gaps * 1000 <= count, "more than 0.1 % are missing");
    Ok(())
}
