//! The exec allowlist under enforce, under audit, and without a profile.

use std::{path::Path, process::ExitCode};

use anyhow::{Result, ensure};

use crate::{
    attacks::{ATTACKS, Attack, Expect, PAYLOAD_RAN, carry_out, nonce, profile},
    cri::{Runtime, WORKLOAD_IMAGE},
    events,
    node::{AgentOptions, Node},
    report::Report,
};

pub async fn run(cri: &Path, only: &[String]) -> Result<ExitCode> {
    let mut report = Report::new();
    let runtime = Runtime::connect(cri);
    let mut node = Node::start(cri).await?;
    node.write_profile("enforce.yaml", &profile("enforce", "enforce"))?;
    node.write_profile("audit.yaml", &profile("audit", "audit"))?;
    let tier = node.start_agent(&AgentOptions::default()).await?;
    println!("tier: {tier}");
    let denied = if tier == "full" { Expect::Refused } else { Expect::Killed };
    let wanted = |attack: &&Attack| only.is_empty() || only.iter().any(|name| name == attack.name);
    for (app, mode, expect) in [
        ("enforce", "enforce", denied),
        ("audit", "audit", Expect::Audited),
        ("free", "none", Expect::Allowed),
    ] {
        let pod = runtime.pod(&format!("pod-{app}"), app, "").await?;
        report.case(&format!("{mode}: what is allowed runs"), allowed(&node, &runtime, &pod, mode)).await;
        for attack in ATTACKS.iter().filter(wanted) {
            // Only the hook sees a script; the tracepoint sees its interpreter, which is allowed.
            if attack.name == "script" && tier != "full" {
                continue;
            }
            let name = format!("{mode}: {}", attack.name);
            report.case(&name, carry_out(&node, &runtime, &pod, attack, mode, expect)).await;
        }
        runtime.remove_pod(&pod).await?;
    }
    if only.is_empty() && Path::new("/opt/runc-next").exists() {
        report.case("enforce: the next runc starts and enters", next_runc(&node, &runtime)).await;
    }
    report.case("the agent stops cleanly", async { node.stop_agent() }).await;
    if report.failed() > 0 {
        println!("--- the agent's log\n{}", node.log("agent"));
    }
    Ok(report.close())
}

/// Both allowed programs run, and each leaves exactly one record.
async fn allowed(node: &Node, runtime: &Runtime, pod: &crate::cri::Pod, mode: &str) -> Result<()> {
    let container = runtime.container(pod, &format!("c-allowed-{mode}"), WORKLOAD_IMAGE, &[]).await?;
    events::in_mode(node, &container, mode).await?;
    let nonce = nonce("allowed");
    let ended = runtime.exec(&container, &["/usr/bin/attacker", "attack", "none", &nonce]).await?;
    ensure!(ended.code == PAYLOAD_RAN, "exit code {}: {}", ended.code, ended.stderr);
    let record = events::exactly_one(node, &nonce).await?;
    ensure!(record["exec"]["verdict"] == "allowed", "{record}");
    ensure!(record["exec"]["executable"] == "/usr/bin/workload", "{record}");
    ensure!(record["exec"]["origin"] == "image", "{record}");
    let attackers = events::query(node, &["--kind", "exec", "--executable", "/usr/bin/attacker"])?;
    ensure!(
        attackers.iter().filter(|record| events::has_argument(record, &nonce)).count() == 1,
        "the command that entered is not recorded once: {attackers:?}"
    );
    runtime.remove_container(&container).await
}

/// Start and exec with the newer runc, and a refusal there.
async fn next_runc(node: &Node, runtime: &Runtime) -> Result<()> {
    let pod = runtime.pod("pod-next", "enforce", "runc-next").await?;
    let container = runtime.container(&pod, "c-next", WORKLOAD_IMAGE, &[]).await?;
    events::in_mode(node, &container, "enforce").await?;
    let (good, bad) = (nonce("next-good"), nonce("next-bad"));
    let ended = runtime.exec(&container, &["/usr/bin/attacker", "attack", "none", &good]).await?;
    ensure!(ended.code == PAYLOAD_RAN, "an allowed program: exit code {}", ended.code);
    let ended = runtime.exec(&container, &["/usr/bin/attacker", "attack", "copy", &bad]).await?;
    ensure!(ended.code != PAYLOAD_RAN, "a copy ran");
    ensure!(events::exactly_one(node, &bad).await?["exec"]["verdict"] == "denied");
    runtime.remove_pod(&pod).await
}
