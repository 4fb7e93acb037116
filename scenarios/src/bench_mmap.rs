//! What the agent costs where code is mapped: the start of a dynamically linked program, and of a Java virtual machine.

use std::{path::Path, process::ExitCode};

use anyhow::{Context as _, Result, ensure};
use aya::programs::loaded_programs;
use serde::Serialize;

use crate::{
    bench_programs::{self, Program},
    cri::{Pod, Runtime, Spec, until},
    events,
    node::{AgentOptions, Node},
};

const IMAGE: &str = "palisade.test/apps:1";
/// Where the container sees the program that measures.
const TOOLS: &str = "/bench";
const JAVA: &str = "/usr/lib/jvm/java-21-openjdk-amd64/bin/java";
const PROFILE: &str = "apiVersion: palisade.dev/v1alpha1\nkind: ClusterProfile\nmetadata: {name: bench}\nspec:\n  selector: {podSelector: \
                       {matchLabels: {app: bench}}}\n  mode: enforce\n  exec:\n    allow:\n      - path: /usr/bin/sleep\n      - path: \
                       /usr/bin/true\n      - path: /usr/lib/jvm/java-21-openjdk-amd64/bin/java\n      - {path: /bench/*, from: \
                       \"volume:/bench\"}\n    jit: allow\n";

/// Nanoseconds per start, without the agent, with it, and without it again.
#[derive(Serialize)]
struct Repeat {
    linked_before: f64,
    linked_agent: f64,
    linked_after: f64,
    java_before: f64,
    java_agent: f64,
    java_after: f64,
    /// Of the linked program.
    programs: Vec<Program>,
}

pub async fn run(cri: &Path, count: u64, repeats: u32) -> Result<ExitCode> {
    let runtime = Runtime::connect(cri);
    let pod = runtime.pod("pod-bench", "bench", "").await?;
    let stage = Stage { runtime: &runtime, pod: &pod, count };
    let container = stage.container().await?;
    let mut done = Vec::new();
    for repeat in 0..=repeats {
        let found = stage.measure(cri, &container).await?;
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

struct Stage<'a> {
    runtime: &'a Runtime,
    pod: &'a Pod,
    count: u64,
}

impl Stage<'_> {
    async fn container(&self) -> Result<String> {
        let mounts = [(Path::new("/palisade/bin"), TOOLS)];
        let command = ["/usr/bin/sleep", "infinity"];
        let spec = Spec { name: "c", image: IMAGE, command: &command, mounts: &mounts, ..Spec::default() };
        let container = self.runtime.create(self.pod, &spec).await?;
        self.runtime.start(&container).await?;
        Ok(container)
    }

    /// Nanoseconds per start of `program`, `count` times.
    async fn starts(&self, container: &str, count: u64, program: &[&str]) -> Result<f64> {
        let number = count.to_string();
        let (path, words) = program.split_first().context("no program")?;
        let mut command = vec!["/bench/palisade-fixture", "loop", path, &number];
        command.extend(words);
        let ended = self.runtime.exec(container, &command).await?;
        ensure!(ended.code == 0, "{command:?}: {ended:?}");
        let total: u64 = ended.stdout.trim().parse().with_context(|| format!("{ended:?}"))?;
        Ok(total as f64 / count as f64)
    }

    async fn both(&self, container: &str) -> Result<(f64, f64)> {
        let linked = self.starts(container, self.count, &["/usr/bin/true"]).await?;
        let java =
            self.starts(container, self.count.div_ceil(50), &[JAVA, "-Xshare:auto", "-version"]).await?;
        Ok((linked, java))
    }

    async fn measure(&self, cri: &Path, container: &str) -> Result<Repeat> {
        let (linked_before, java_before) = self.both(container).await.context("before the agent")?;
        let programs_before = loaded_programs().count();
        let mut node = Node::start(cri).await?;
        node.write_profile("bench.yaml", PROFILE)?;
        // So that nothing is in force without it.
        node.start_agent(&AgentOptions { unpinned: true, ..AgentOptions::default() }).await?;
        events::in_mode(&node, container, "enforce").await?;
        let under = self.both(container).await;
        let denied = events::query(&node, &["--verdict", "denied"])?;
        let (linked_agent, java_agent) =
            under.with_context(|| format!("under the agent, which refused: {denied:#?}"))?;
        ensure!(denied.is_empty(), "invalid: something was refused: {denied:?}");
        let agent = node.agent_pid().context("no agent")?;
        let linked = self.starts(container, self.count, &["/usr/bin/true"]);
        let programs = bench_programs::during(agent, self.count, linked).await?;
        node.stop_agent()?;
        // The kernel lets go of them one after the other, a grace period after the last of their users.
        until("the agent's programs are gone", async || {
            Ok((loaded_programs().count() <= programs_before).then_some(()))
        })
        .await?;
        let (linked_after, java_after) = self.both(container).await.context("after the agent")?;
        Ok(Repeat {
            linked_before,
            linked_agent,
            linked_after,
            java_before,
            java_agent,
            java_after,
            programs,
        })
    }
}
