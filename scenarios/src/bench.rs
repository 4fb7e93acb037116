//! What the agent costs per exec: base, agent, base in one boot, outside and inside a container.
//!
//! Under the instruction clock a nanosecond is an instruction, so the numbers repeat on a noisy machine.

use std::{
    path::Path,
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result, ensure};
use serde::Serialize;

use crate::{
    attacks::profile,
    bench_programs::{self, Program},
    cri::{Runtime, WORKLOAD_IMAGE, until},
    events,
    node::{AgentOptions, Node},
};

/// One repeat. Times in nanoseconds per exec.
#[derive(Serialize)]
struct Repeat {
    outside_before: f64,
    outside_agent: f64,
    outside_after: f64,
    inside_before: f64,
    inside_agent: f64,
    inside_after: f64,
    /// On-processor time from the loop's start to the last acknowledgement.
    agent_per_exec: f64,
    collector_per_exec: f64,
    records: u64,
    rss_kib: u64,
    maps_kib: u64,
    programs: Vec<Program>,
}

/// Nanoseconds per exec of a loop outside any container.
fn outside(count: u64) -> Result<f64> {
    let program = "/palisade/bin/palisade-fixture";
    let output = Command::new(program).args(["loop", program, &count.to_string()]).output()?;
    per_exec(&String::from_utf8_lossy(&output.stdout), count)
}

async fn inside(runtime: &Runtime, container: &str, count: u64) -> Result<f64> {
    let words = ["/usr/bin/attacker", "loop", "/usr/bin/workload", &count.to_string()];
    let ended = runtime.exec(container, &words).await?;
    ensure!(ended.code == 0, "the loop ended with {}: {}", ended.code, ended.stderr);
    per_exec(&ended.stdout, count)
}

fn per_exec(output: &str, count: u64) -> Result<f64> {
    let total: u64 = output.trim().parse().with_context(|| format!("the loop printed {output:?}"))?;
    Ok(total as f64 / count as f64)
}

/// Nanoseconds that a process was on a processor, over all threads.
fn on_processor(pid: u32) -> Result<u64> {
    let mut sum = 0;
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let text = std::fs::read_to_string(task?.path().join("schedstat"))?;
        sum += text.split(' ').next().and_then(|word| word.parse::<u64>().ok()).context("schedstat")?;
    }
    Ok(sum)
}

fn rss_kib(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:")?.trim().split(' ').next()?.parse().ok())
        .context("VmRSS")
}

/// Kernel memory of all maps that a process holds.
fn maps_kib(pid: u32) -> Result<u64> {
    let mut bytes = 0;
    let mut seen = std::collections::BTreeSet::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
        let text = std::fs::read_to_string(entry?.path())?;
        let field =
            |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok());
        if let (Some(id), Some(locked)) = (field("map_id:"), field("memlock:"))
            && seen.insert(id)
        {
            bytes += locked;
        }
    }
    Ok(bytes / 1024)
}

pub async fn run(cri: &Path, count: u64, repeats: u32, scale: Scale) -> Result<ExitCode> {
    let runtime = Runtime::connect(cri);
    let pod = runtime.pod("pod-bench", "enforce", "").await?;
    let container = runtime.container(&pod, "c-bench", WORKLOAD_IMAGE, &[]).await?;
    let mut done = Vec::new();
    for repeat in 0..=repeats {
        let found = measure(cri, &runtime, &container, count, scale).await?;
        // The first repeat after boot warms caches and is left out.
        if repeat > 0 {
            done.push(found);
        }
        eprintln!("repeat {repeat} of {repeats} is done");
    }
    runtime.remove_pod(&pod).await?;
    println!("{}", serde_json::to_string(&done)?);
    Ok(ExitCode::SUCCESS)
}

/// How large policies are.
#[derive(Clone, Copy)]
pub struct Scale {
    /// Rules of the container's profile, besides those of the loop.
    pub rules: usize,
    /// Profiles of the node, besides the container's.
    pub profiles: usize,
}

/// The profile, and settings with room for all.
fn scaled(node: &mut Node, scale: Scale) -> Result<(String, &'static str)> {
    let Scale { rules, profiles } = scale;
    let mut text = profile("enforce", "enforce");
    for number in 0..rules {
        text += &format!("      - path: /opt/scale/{}/{number}\n", number % 100);
    }
    for number in 0..profiles {
        let other = profile(&format!("other-{number}"), "enforce");
        node.write_profile(&format!("other-{number}.yaml"), &other)?;
    }
    let settings = format!("maps: {{rules: {}}}\n", 32_768.max(rules * 2));
    Ok((text, settings.leak()))
}

async fn measure(cri: &Path, runtime: &Runtime, container: &str, count: u64, scale: Scale) -> Result<Repeat> {
    let outside_before = outside(count)?;
    let inside_before = inside(runtime, container, count).await?;
    let mut node = Node::start(cri).await?;
    let (text, settings) = scaled(&mut node, scale)?;
    node.write_profile("enforce.yaml", &text)?;
    // So that nothing is in force without it.
    node.start_agent(&AgentOptions { unpinned: true, settings, ..AgentOptions::default() }).await?;
    events::in_mode(&node, container, "enforce").await?;
    let outside_agent = outside(count)?;
    let (agent, collector) =
        (node.agent_pid().context("no agent")?, node.collector_pid().context("no collector")?);
    let begun = (on_processor(agent)?, on_processor(collector)?);
    let inside_agent = inside(runtime, container, count).await?;
    // The last acknowledgement: the log has not grown over five of the agent's rounds of 100 ms. Asking instead would cost
    // the collector. That every exec is there is checked below.
    let log_size = || -> Result<u64> {
        Ok(std::fs::metadata(node.folder.path().join("store/segment-000000000000.log"))?.len())
    };
    let mut size = 0;
    until("the log stops growing", async || {
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
        let now = log_size()?;
        let still = now == size;
        size = now;
        Ok(still.then_some(()))
    })
    .await?;
    let ended = (on_processor(agent)?, on_processor(collector)?);
    let (rss_kib, maps_kib) = (rss_kib(agent)?, maps_kib(agent)?);
    let records = events::query(&node, &["--kind", "exec", "--executable", "/usr/bin/workload"])?;
    let captured = records
        .iter()
        .filter(|record| record["exec"]["arguments"].as_array().is_some_and(|words| words.len() == 2))
        .count() as u64;
    let gaps = events::query(&node, &["--kind", "gap"])?;
    ensure!(
        captured == count && gaps.is_empty(),
        "invalid: {captured} of {count} execs captured, gaps {gaps:?}"
    );
    let programs = bench_programs::during(agent, count, inside(runtime, container, count)).await?;
    node.stop_agent()?;
    let outside_after = outside(count)?;
    let inside_after = inside(runtime, container, count).await?;
    Ok(Repeat {
        outside_before,
        outside_agent,
        outside_after,
        inside_before,
        inside_agent,
        inside_after,
        agent_per_exec: (ended.0 - begun.0) as f64 / count as f64,
        collector_per_exec: (ended.1 - begun.1) as f64 / count as f64,
        records: captured,
        rss_kib,
        maps_kib,
        programs,
    })
}
