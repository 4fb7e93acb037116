//! Options of overlayfs under which an unmodified file of the image has another name (`redirect_dir`), or other attributes
//! (`metacopy`): neither is the image's any more.

use std::{fs, path::Path, process::ExitCode};

use anyhow::{Context as _, Result, ensure};

use crate::{
    attacks::{EPERM, PAYLOAD_RAN, nonce},
    cri::{Runtime, WORKLOAD_IMAGE},
    events,
    node::{AgentOptions, Node},
    report::Report,
};

/// What is on by default for the mounts that come, as long as this lives.
struct Parameter {
    path: String,
    before: String,
}

impl Parameter {
    fn set(name: &str) -> Result<Self> {
        let path = format!("/sys/module/overlay/parameters/{name}");
        let before = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        fs::write(&path, "Y").with_context(|| format!("cannot write {path}"))?;
        Ok(Self { path, before })
    }
}

impl Drop for Parameter {
    fn drop(&mut self) {
        if let Err(error) = fs::write(&self.path, &self.before) {
            eprintln!("{} is not as it was: {error}", self.path);
        }
    }
}

struct Case {
    attack: &'static str,
    app: &'static str,
    mode: &'static str,
    code: i32,
    /// Verdict, origin and executable of its record.
    verdict: &'static str,
    origin: &'static str,
    executable: &'static str,
}

const MOVED: &str = "/opt/tree/one/one/one";
const CASES: &[Case] = &[
    Case {
        attack: "redirect",
        app: "free",
        mode: "none",
        code: PAYLOAD_RAN,
        verdict: "allowed",
        origin: "drift",
        executable: MOVED,
    },
    Case {
        attack: "redirect",
        app: "overlay",
        mode: "enforce",
        code: EPERM,
        verdict: "denied",
        origin: "drift",
        executable: MOVED,
    },
    Case {
        attack: "metacopy",
        app: "watched",
        mode: "audit",
        code: PAYLOAD_RAN,
        verdict: "audited",
        origin: "drift",
        executable: "/usr/bin/third",
    },
];

pub async fn run(cri: &Path) -> Result<ExitCode> {
    let mut report = Report::new();
    let runtime = Runtime::connect(cri);
    let mut node = Node::start(cri).await?;
    for (app, mode) in [("overlay", "enforce"), ("watched", "audit")] {
        node.write_profile(&format!("{app}.yaml"), &profile(app, mode))?;
    }
    let tier = node.start_agent(&AgentOptions::default()).await?;
    ensure!(tier == "full", "this is about the full tier, not {tier}");
    let _parameters = [Parameter::set("redirect_dir")?, Parameter::set("metacopy")?];
    for case in CASES {
        let name = format!("{} of {}: {}", case.attack, case.app, case.verdict);
        report.case(&name, carry_out(&node, &runtime, case)).await;
    }
    report.case("the agent stops cleanly", async { node.stop_agent() }).await;
    if report.failed() > 0 {
        println!("--- the agent's log\n{}", node.log("agent"));
    }
    Ok(report.close())
}

/// Allows the folder by the name that it gets, and the file whose mode changes.
fn profile(app: &str, mode: &str) -> String {
    format!(
        "apiVersion: palisade.dev/v1alpha1\nkind: ClusterProfile\nmetadata: {{name: {app}}}\nspec:\n  selector: {{podSelector: \
         {{matchLabels: {{app: {app}}}}}}}\n  mode: {mode}\n  exec:\n    allow:\n      - path: /usr/bin/attacker\n      - path: \
         /opt/tree/**\n      - path: /usr/bin/third\n"
    )
}

async fn carry_out(node: &Node, runtime: &Runtime, case: &Case) -> Result<()> {
    let nonce = nonce(case.attack);
    let pod = runtime.pod(&nonce, case.app, "").await?;
    let container = runtime.container(&pod, "c", WORKLOAD_IMAGE, &["/usr/bin/attacker", "sleep"]).await?;
    events::in_mode(node, &container, case.mode).await?;
    let ended = runtime.exec(&container, &["/usr/bin/attacker", "attack", case.attack, &nonce]).await?;
    ensure!(ended.code == case.code, "exit code {}, not {}: {}", ended.code, case.code, ended.stderr.trim());
    let record = events::exactly_one(node, &nonce).await?;
    let (exec, decision) = (&record["exec"], &record["decision"]);
    let right = decision["verdict"] == case.verdict
        && exec["origin"] == case.origin
        && exec["executable"] == case.executable;
    ensure!(right, "{record}");
    ensure!(case.verdict == "allowed" || decision["reason"] == "origin-not-allowed", "{record}");
    runtime.remove_pod(&pod).await
}
