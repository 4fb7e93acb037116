//! What the agent adds to the start of a container: starts without it and with it in alternation, in one boot.

use std::{path::Path, process::ExitCode, time::Instant};

use anyhow::{Context as _, Result, ensure};
use serde::Serialize;

use crate::{
    attacks::profile,
    cri::{Pod, Runtime, Spec, until},
    events,
    node::{AgentOptions, Node},
};

/// One repeat. Nanoseconds of each start, from the question to the runtime's answer.
#[derive(Serialize)]
struct Repeat {
    without: Vec<u64>,
    with: Vec<u64>,
    /// How long the runtime waited for the agent in each start with it.
    answered: Vec<u64>,
}

pub async fn run(cri: &Path, count: u32, repeats: u32) -> Result<ExitCode> {
    let runtime = Runtime::connect(cri);
    let pod = runtime.pod("pod-bench", "enforce", "").await?;
    let mut done = Vec::new();
    for repeat in 0..=repeats {
        let mut without = Vec::new();
        starts(&runtime, &pod, count, &mut without).await?;
        let mut node = Node::start(cri).await?;
        node.write_profile("enforce.yaml", &profile("enforce", "enforce"))?;
        node.start_agent(&AgentOptions { unidentified: Some("hold"), ..AgentOptions::default() }).await?;
        let mut with = Vec::new();
        let ids = starts(&runtime, &pod, count, &mut with).await?;
        let mut answered = Vec::new();
        for id in &ids {
            let found = until("the attestation of a start", async || {
                let records = events::query(&node, &["--kind", "coverage", "--container", id])?;
                let enforced = records.iter().any(|record| record["container"]["mode"] == "enforce");
                let last =
                    records.iter().filter_map(|record| record["coverage"]["answered_in"].as_u64()).max();
                Ok(last.filter(|_| enforced))
            })
            .await?;
            answered.push(found);
        }
        ensure!(answered.len() == count as usize, "starts are not attested");
        node.stop_agent()?;
        // The first repeat after boot warms caches and is left out.
        if repeat > 0 {
            done.push(Repeat { without, with, answered });
        }
        eprintln!("repeat {repeat} of {repeats} is done");
    }
    runtime.remove_pod(&pod).await?;
    println!("{}", serde_json::to_string(&done)?);
    Ok(ExitCode::SUCCESS)
}

/// Starts containers one after the other and notes how long each took; they are removed afterwards.
async fn starts(runtime: &Runtime, pod: &Pod, count: u32, times: &mut Vec<u64>) -> Result<Vec<String>> {
    let mut ids = Vec::new();
    for number in 0..count {
        let name = format!("c-{number}");
        let id = runtime.create(pod, &Spec { name: &name, ..Spec::default() }).await?;
        let begun = Instant::now();
        runtime.start(&id).await?;
        times.push(u64::try_from(begun.elapsed().as_nanos()).context("a start took too long")?);
        runtime.remove_container(&id).await?;
        ids.push(id);
    }
    Ok(ids)
}
