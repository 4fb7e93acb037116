//! A name that turns from an allowed program into a dropped one and back while it is executed, thousands of times, beside containers
//! that flood the ring from other processors: the dropped one never runs.

use std::{cell::Cell, path::Path, process::ExitCode};

use anyhow::{Result, ensure};

use crate::{
    attacks::{nonce, profile},
    cri::{Pod, Runtime, WORKLOAD_IMAGE},
    events,
    node::{AgentOptions, Node},
    report::Report,
};

/// Containers that do what is refused, as fast as they can.
const FLOODS: usize = 2;
/// Executions of a flood in one go.
const FLOOD: &str = "500";

pub async fn run(cri: &Path, count: u64) -> Result<ExitCode> {
    let mut report = Report::new();
    let runtime = Runtime::connect(cri);
    let mut node = Node::start(cri).await?;
    node.write_profile("enforce.yaml", &profile("enforce", "enforce"))?;
    // A ring that cannot hold what comes.
    let small = AgentOptions { settings: "maps: {ringBytes: 65536}\n", ..AgentOptions::default() };
    let tier = node.start_agent(&small).await?;
    println!("tier: {tier}");
    for (app, mode) in [("free", "none"), ("enforce", "enforce")] {
        let pod = runtime.pod(&format!("pod-{app}"), app, "").await?;
        let name = format!("{app}: {count} executions of a name that changes");
        report.case(&name, race(&node, &runtime, &pod, mode, count)).await;
        runtime.remove_pod(&pod).await?;
    }
    report.case("the agent stops cleanly", async { node.stop_agent() }).await;
    if report.failed() > 0 {
        println!("--- the agent's log\n{}", node.log("agent"));
    }
    Ok(report.close())
}

struct SetOnDrop<'a>(&'a Cell<bool>);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.set(true);
    }
}

async fn race(node: &Node, runtime: &Runtime, pod: &Pod, mode: &str, count: u64) -> Result<()> {
    let mut containers = Vec::new();
    for number in 0..=FLOODS {
        let container = runtime.container(pod, &format!("c-{number}"), WORKLOAD_IMAGE, &[]).await?;
        events::in_mode(node, &container, mode).await?;
        containers.push(container);
    }
    let over = Cell::new(false);
    let flood = async |container: &str| {
        while !over.get() {
            let words = ["/usr/bin/attacker", "generate", "/usr/bin/third", &nonce("flood"), FLOOD, "100000"];
            let ended = runtime.exec(container, &words).await?;
            ensure!(ended.code == 0, "{ended:?}");
            let ran = ended.stdout.trim();
            ensure!((ran == "0") == (mode == "enforce"), "{ran} of {FLOOD} ran, mode {mode}");
        }
        anyhow::Ok(())
    };
    let racing = async {
        // However it ends, the floods must end with it.
        let _over = SetOnDrop(&over);
        let (mut good, mut bad, mut neither) = (0, 0, 0);
        // In turns, since one question to the runtime must not take too long.
        let turn = 500.min(count);
        for _ in 0..count.div_ceil(turn) {
            let ended = runtime.exec(&containers[0], &["/usr/bin/attacker", "race", &turn.to_string()]).await;
            let ended = ended?;
            let found: Vec<u64> =
                ended.stdout.split_whitespace().filter_map(|word| word.parse().ok()).collect();
            let [a, b, c] = found.as_slice() else { anyhow::bail!("{ended:?}") };
            good += a;
            bad += b;
            neither += c;
        }
        Ok((good, bad, neither))
    };
    let (raced, first, second) = tokio::join!(racing, flood(&containers[1]), flood(&containers[2]));
    let (good, bad, neither) = raced?;
    first?;
    second?;
    println!("   allowed {good}, dropped {bad}, neither {neither}");
    ensure!(good > count / 20, "the allowed program ran {good} times only");
    if mode == "enforce" {
        ensure!(bad == 0, "the dropped program ran {bad} times");
        ensure!(neither > count / 20, "the name was the dropped program {neither} times only");
    } else {
        ensure!(bad > count / 20, "the dropped program ran {bad} times only, so there is no race");
    }
    Ok(())
}
