//! Programs that have rights their caller has not: recorded, and refused where the profile says so.

use std::{collections::BTreeMap, path::Path, process::ExitCode};

use anyhow::{Result, ensure};

use crate::{
    attacks::{EPERM, KILLED, PAYLOAD_RAN, nonce},
    cri::{Runtime, WORKLOAD_IMAGE},
    events,
    node::{AgentOptions, Node},
    report::Report,
};

/// Belong to root: with the set-user-id bit, with the set-group-id bit, and with a capability.
const PROGRAMS: [&str; 3] = [USER, "/usr/bin/elevating-group", "/usr/bin/capable"];
const USER: &str = "/usr/bin/elevating";

/// What is expected of one execution.
struct Case {
    program: &'static str,
    uid: &'static str,
    verdict: &'static str,
    reason: &'static str,
    elevated: bool,
}

pub async fn run(cri: &Path) -> Result<ExitCode> {
    let mut report = Report::new();
    let runtime = Runtime::connect(cri);
    let mut node = Node::start(cri).await?;
    for (app, mode, field) in [
        ("elevates", "enforce", ""),
        ("keeps", "enforce", "    elevation: deny\n"),
        ("watches", "audit", "    elevation: deny\n"),
    ] {
        node.write_profile(&format!("{app}.yaml"), &profile(app, mode, field))?;
    }
    let tier = node.start_agent(&AgentOptions::default()).await?;
    println!("tier: {tier}");
    // Only the hook sees both credentials.
    let full = tier == "full";
    let mut pods = Vec::new();
    let mut containers = BTreeMap::new();
    for (app, mode) in [("elevates", "enforce"), ("keeps", "enforce"), ("watches", "audit")] {
        let pod = runtime.pod(&format!("pod-{app}"), app, "").await?;
        let container = runtime.container(&pod, "c", WORKLOAD_IMAGE, &[]).await?;
        events::in_mode(&node, &container, mode).await?;
        pods.push(pod);
        containers.insert(app, container);
    }
    for program in PROGRAMS {
        let allowed = |uid, elevated| Case { program, uid, verdict: "allowed", reason: "rule", elevated };
        let objected = |verdict| Case {
            program,
            uid: "65534",
            verdict,
            reason: "elevation-not-allowed",
            elevated: true,
        };
        for (app, case) in [
            ("elevates", allowed("65534", full)),
            ("keeps", if full { objected("denied") } else { allowed("65534", false) }),
            ("keeps", allowed("0", false)),
            ("watches", if full { objected("audited") } else { allowed("65534", false) }),
        ] {
            let name = format!("{app}, {program}, uid {}: {}", case.uid, case.verdict);
            report.case(&name, executes(&node, &runtime, &containers[app], &case)).await;
        }
    }
    for pod in &pods {
        runtime.remove_pod(pod).await?;
    }
    report.case("the agent stops cleanly", async { node.stop_agent() }).await;
    if report.failed() > 0 {
        println!("--- the agent's log\n{}", node.log("agent"));
    }
    Ok(report.close())
}

fn profile(app: &str, mode: &str, field: &str) -> String {
    format!(
        "apiVersion: palisade.dev/v1alpha1\nkind: ClusterProfile\nmetadata: {{name: {app}}}\nspec:\n  selector: {{podSelector: \
         {{matchLabels: {{app: {app}}}}}}}\n  mode: {mode}\n  exec:\n    allow:\n      - path: /usr/bin/workload\n      - path: \
         {}\n      - path: {}\n      - path: {}\n{field}",
        PROGRAMS[0], PROGRAMS[1], PROGRAMS[2]
    )
}

async fn executes(node: &Node, runtime: &Runtime, container: &str, case: &Case) -> Result<()> {
    let nonce = nonce("elevation");
    let ended = runtime
        .exec(container, &["/usr/bin/workload", "as", case.uid, case.program, "payload", &nonce])
        .await?;
    let wanted: &[i32] = if case.verdict == "denied" { &[EPERM, KILLED] } else { &[PAYLOAD_RAN] };
    ensure!(wanted.contains(&ended.code), "{ended:?}");
    let record = crate::cri::until("its record", async || {
        let records = events::query(node, &["--kind", "exec", "--executable", case.program])?;
        Ok(records.into_iter().find(|record| events::has_argument(record, &nonce)))
    })
    .await?;
    let (exec, decision) = (&record["exec"], &record["decision"]);
    ensure!(decision["verdict"] == case.verdict && decision["reason"] == case.reason, "{record}");
    ensure!(exec["elevated"] == case.elevated, "{record}");
    // By then it is root, if it is the user that changes.
    let elevated = case.elevated && case.verdict != "denied" && case.program == USER;
    let euid: u64 = if elevated { 0 } else { case.uid.parse()? };
    ensure!(record["actor"]["credentials"]["euid"] == euid || !case.elevated, "{record}");
    Ok(())
}
