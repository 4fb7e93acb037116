//! The exec allowlist under enforce, under audit, and without a profile.

use std::{
    path::Path,
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{
    attacks::{ATTACKS, Attack, Expect, NOBODY, PAYLOAD_RAN, ROOT, carry_out, carry_out_all, nonce, profile},
    cri::{Pod, Runtime, WORKLOAD_IMAGE},
    events,
    node::{AgentOptions, Node},
    report::Report,
};

pub struct Options {
    /// Only these attacks.
    pub only: Vec<String>,
    /// In audit mode none that needs a container of its own.
    pub short: bool,
}

pub async fn run(cri: &Path, options: &Options) -> Result<ExitCode> {
    let Options { only, short } = options;
    let mut report = Report::new();
    let runtime = Runtime::connect(cri);
    let mut node = Node::start(cri).await?;
    node.write_profile("enforce.yaml", &profile("enforce", "enforce"))?;
    node.write_profile("audit.yaml", &profile("audit", "audit"))?;
    let before = runtime.pod("pod-before", "enforce", "").await?;
    let running = runtime.container(&before, "c-before", WORKLOAD_IMAGE, &[]).await?;
    let tier = node.start_agent(&AgentOptions::default()).await?;
    println!("tier: {tier}");
    report
        .case("enforce: a container that ran before the agent is covered", found(&node, &runtime, &running))
        .await;
    runtime.remove_pod(&before).await?;
    let denied = if tier == "full" { Expect::Refused } else { Expect::Killed };
    let wanted = |attack: &&Attack| only.is_empty() || only.iter().any(|name| name == attack.name);
    for (app, mode, expect) in [
        ("enforce", "enforce", denied),
        ("audit", "audit", Expect::Audited),
        ("free", "none", Expect::Allowed),
    ] {
        let pod = runtime.pod(&format!("pod-{app}"), app, "").await?;
        let seen = |attack: &&Attack| !attack.needs_hooks() || tier == "full";
        let all: Vec<&Attack> = ATTACKS.iter().filter(wanted).filter(seen).collect();
        // What spoils its container has one of its own.
        let (alone, together): (Vec<&Attack>, Vec<&Attack>) =
            all.iter().partition(|attack| !attack.spoils.is_empty());
        let container = format!("c-{mode}");
        let stage = Stage { node: &node, runtime: &runtime, pod: &pod, mode, expect };
        match stage.container(&container).await {
            Ok(id) => {
                report.case(&format!("{mode}: what is allowed runs"), allowed(&node, &runtime, &id)).await;
                stage.attack(&mut report, &container, &id, &together, ROOT).await;
                let by_anybody: Vec<&Attack> =
                    together.iter().copied().filter(|attack| attack.by_anybody).collect();
                if mode != "audit" {
                    stage.attack(&mut report, &container, &id, &by_anybody, NOBODY).await;
                }
            }
            Err(error) => report.case(&format!("{mode}: a container to attack"), async { Err(error) }).await,
        }
        for attack in alone.into_iter().filter(|_| !short || mode != "audit") {
            let name = format!("{mode}: {}", attack.name);
            report.case(&name, carry_out(&node, &runtime, &pod, attack, mode, expect)).await;
        }
        runtime.remove_pod(&pod).await?;
    }
    if only.is_empty() && Path::new("/opt/runc-next").exists() {
        report.case("enforce: the next runc starts and enters", next_runc(&node, &runtime)).await;
    }
    report.case("a profile drafted from the records is good", draft(&node)).await;
    report.case("what was refused is explained", explained(&node)).await;
    report.case("the agent stops cleanly", async { node.stop_agent() }).await;
    if report.failed() > 0 {
        println!("--- the agent's log\n{}", node.log("agent"));
    }
    Ok(report.close())
}

/// A pod in which attacks are carried out, and what is expected of all of them.
struct Stage<'a> {
    node: &'a Node,
    runtime: &'a Runtime,
    pod: &'a Pod,
    mode: &'a str,
    expect: Expect,
}

impl Stage<'_> {
    async fn container(&self, name: &str) -> Result<String> {
        let container = self.runtime.container(self.pod, name, WORKLOAD_IMAGE, &[]).await?;
        events::in_mode(self.node, &container, self.mode).await?;
        Ok(container)
    }

    async fn attack(&self, report: &mut Report, name: &str, container: &str, attacks: &[&Attack], uid: &str) {
        let mode = self.mode;
        let by = if uid == ROOT { String::new() } else { format!(" as user {uid}") };
        match carry_out_all(self.runtime, container, attacks, uid).await {
            Ok(outcomes) => {
                for attack in attacks {
                    let checked = outcomes.check(self.node, name, container, attack, self.expect);
                    report.case(&format!("{mode}: {}{by}", attack.name), checked).await;
                }
            }
            Err(error) => {
                report.case(&format!("{mode}: attacks are carried out{by}"), async { Err(error) }).await;
            }
        }
    }
}

/// Both allowed programs run, and each leaves exactly one record.
async fn allowed(node: &Node, runtime: &Runtime, container: &str) -> Result<()> {
    let nonce = nonce("allowed");
    let ended = runtime.exec(container, &["/usr/bin/attacker", "attack", "none", &nonce]).await?;
    ensure!(ended.code == PAYLOAD_RAN, "exit code {}: {}", ended.code, ended.stderr);
    let record = events::exactly_one(node, &nonce).await?;
    ensure!(record["decision"]["verdict"] == "allowed", "{record}");
    ensure!(record["exec"]["executable"] == "/usr/bin/workload", "{record}");
    ensure!(record["exec"]["origin"] == "image", "{record}");
    let attackers = events::query(node, &["--kind", "exec", "--executable", "/usr/bin/attacker"])?;
    ensure!(
        attackers.iter().filter(|record| events::has_argument(record, &nonce)).count() == 1,
        "the command that entered is not recorded once: {attackers:?}"
    );
    Ok(())
}

/// A container that the agent found: its origins are right, and what is not allowed does not run.
async fn found(node: &Node, runtime: &Runtime, container: &str) -> Result<()> {
    let coverage = events::in_mode(node, container, "enforce").await?;
    ensure!(coverage["coverage"]["found_running"] == true, "it passes for a new one: {coverage}");
    let (good, bad) = (nonce("found-good"), nonce("found-bad"));
    let ended = runtime.exec(container, &["/usr/bin/attacker", "attack", "none", &good]).await?;
    ensure!(ended.code == PAYLOAD_RAN, "an allowed program: exit code {}", ended.code);
    ensure!(events::exactly_one(node, &good).await?["exec"]["origin"] == "image");
    let ended = runtime.exec(container, &["/usr/bin/attacker", "attack", "drop-in", &bad]).await?;
    ensure!(ended.code != PAYLOAD_RAN, "other bytes at an allowed path ran");
    let record = events::exactly_one(node, &bad).await?;
    ensure!(record["decision"]["verdict"] == "denied" && record["exec"]["origin"] == "drift", "{record}");
    Ok(())
}

/// `profile init` on everything recorded: a profile that passes the lint and lists what the image ran.
async fn draft(node: &Node) -> Result<()> {
    let events = node.folder.path().join("events.jsonl");
    std::fs::write(&events, node.palisade(&["events", "--json"])?)?;
    let run = |words: &[&str]| -> Result<String> {
        let output = Command::new("palisade").arg("profile").args(words).output()?;
        let said =
            format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        ensure!(output.status.success(), "palisade profile {words:?}: {said}");
        Ok(said)
    };
    let text = run(&["init", "--from-events", &events.display().to_string()])?;
    let file = node.folder.path().join("drafted.yaml");
    std::fs::write(&file, &text)?;
    run(&["lint", &file.display().to_string()])?;
    for wanted in ["path: \"/usr/bin/workload\"", "app\": \"audit\"", "from: \"drift\""] {
        ensure!(text.contains(wanted), "the draft lacks {wanted}: {text}");
    }
    Ok(())
}

/// `explain` on everything recorded: what is near, and the rule that would allow it.
async fn explained(node: &Node) -> Result<()> {
    let events = node.folder.path().join("events.jsonl");
    std::fs::write(&events, node.palisade(&["events", "--json"])?)?;
    let output = Command::new("palisade")
        .arg("explain")
        .arg(&events)
        .arg("--profiles")
        .arg(node.folder.path().join("profiles"))
        .arg("--json")
        .output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let groups: Vec<Value> = String::from_utf8(output.stdout)?
        .lines()
        .map(serde_json::from_str)
        .collect::<std::result::Result<_, _>>()?;
    let of = |path: &str, reason: &str| -> Result<&Value> {
        let found = groups
            .iter()
            .find(|group| group["path"] == path && group["reason"] == reason && group["verdict"] == "denied");
        found.with_context(|| format!("nothing of {path}, {reason}: {groups:?}"))
    };
    let third = of("/usr/bin/third", "no-rule")?;
    ensure!(third["rule"] == "- {path: \"/usr/bin/third\", sessions: admin}", "{third}");
    let dropped = of("/usr/bin/attentive-er", "origin-not-allowed")?;
    ensure!(dropped["near"][0]["difference"] == "is for image, this is drift", "{dropped}");
    ensure!(dropped["caution"].is_string() && dropped["rule"].is_string(), "{dropped}");
    let deep = groups.iter().find(|group| group["reason"] == "path-too-deep");
    ensure!(deep.is_some_and(|group| group["rule"].is_null() && group["no_rule"].is_string()), "{deep:?}");
    Ok(())
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
    ensure!(events::exactly_one(node, &bad).await?["decision"]["verdict"] == "denied");
    runtime.remove_pod(&pod).await
}
