//! Palisade at work: a real service that works, attacks on it that do not, and the audit trail of both.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    path::Path,
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, Result};

use crate::{
    attacks::{nonce, profile},
    cri::{Pod, Runtime, WORKLOAD_IMAGE, until},
    events,
    node::{AgentOptions, Node},
};

const NGINX: &str = "palisade.test/nginx:1";
const ADDRESS: &str = "127.0.0.1:18080";

const PROFILE: &str = "\
apiVersion: palisade.dev/v1alpha1
kind: Profile
metadata: {name: web, namespace: scenarios}
spec:
  selector:
    podSelector: {matchLabels: {app: web}}
  mode: enforce
  exec:
    allow:
      - path: /usr/sbin/nginx
      - path: /usr/bin/busybox
";

struct Scene<'a> {
    runtime: &'a Runtime,
    surprises: u32,
}

pub async fn run(cri: &Path) -> Result<ExitCode> {
    let runtime = Runtime::connect(cri);
    let nonce = nonce("demo");
    println!("== Palisade demo, nonce {nonce}\n");
    let mut node = Node::start(cri).await?;
    node.write_profile("web.yaml", PROFILE)?;
    node.write_profile("batch.yaml", &profile("batch", "enforce"))?;
    let tier = node.start_agent(&AgentOptions::default()).await?;
    if tier == "full" {
        println!("tier: full. A denied program is refused with EPERM.");
    } else {
        println!(
            "tier: fallback. This kernel takes no LSM programs: a denied program is killed before its first"
        );
        println!("instruction instead of being refused. `cargo xtask demo --vm` shows the full tier.");
    }
    println!("\n-- the profile of the service\n{PROFILE}");
    let web = runtime.pod("web-0", "web", "").await?;
    let container = runtime.container(&web, "nginx", NGINX, &[]).await?;
    let batch = runtime.pod("batch-0", "batch", "").await?;
    let job = runtime.container(&batch, "job", WORKLOAD_IMAGE, &[]).await?;
    events::in_mode(&node, &container, "enforce").await?;
    events::in_mode(&node, &job, "enforce").await?;
    let mut scene = Scene { runtime: &runtime, surprises: 0 };
    scene.behave(&container, &nonce).await?;
    scene.attack(&container, &job, &nonce).await?;
    let surprises = scene.surprises;
    finish(&mut node, &runtime, [&web, &batch], &nonce, surprises).await
}

impl Scene<'_> {
    fn say(&mut self, what: &str, outcome: &str, as_expected: bool) {
        if !as_expected {
            self.surprises += 1;
        }
        println!("  {what:<62} {outcome}{}", if as_expected { "" } else { "   <-- not what was expected" });
    }

    async fn behave(&mut self, container: &str, nonce: &str) -> Result<()> {
        println!("-- what behaves");
        let page = until("nginx answers", async || Ok(fetch().ok())).await?;
        self.say("GET / from nginx", page.trim(), page.contains("guarded by Palisade"));
        let ended = self
            .runtime
            .exec(container, &["/usr/bin/wget", "-qO-", &format!("http://{ADDRESS}/?{nonce}")])
            .await?;
        self.say("kubectl exec … wget (an allowed program)", &outcome(ended.code), ended.code == 0);
        Ok(())
    }

    async fn attack(&mut self, container: &str, job: &str, nonce: &str) -> Result<()> {
        println!("\n-- what attacks");
        let shell = |script: String| ["/usr/bin/sh".to_owned(), "-c".to_owned(), script];
        for (what, script) in [
            (
                "drop a program into /tmp and run it",
                format!("cp /usr/bin/busybox /tmp/miner; exec /tmp/miner id {nonce}"),
            ),
            (
                "put another program in the place of nginx and run it",
                format!(
                    "cp /usr/bin/busybox /usr/sbin/new; mv /usr/sbin/new /usr/sbin/nginx; exec /usr/sbin/nginx {nonce}"
                ),
            ),
        ] {
            let words = shell(script);
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            let ended = self.runtime.exec(container, &words).await?;
            self.say(what, &outcome(ended.code), is_denied(ended.code));
        }
        for (what, attack) in [
            ("run a program of the image that is not on the list", "third"),
            ("run from memory (memfd)", "memfd"),
            ("disguise a copy as an allowed path with chroot", "chroot"),
            ("mount a tmpfs over an allowed path in a user namespace", "userns-tmpfs"),
        ] {
            let ended = self.runtime.exec(job, &["/usr/bin/attacker", "attack", attack, nonce]).await?;
            self.say(what, &outcome(ended.code), is_denied(ended.code));
        }
        let page = fetch().unwrap_or_else(|error| format!("{error:#}"));
        self.say("GET / from nginx, after all that", page.trim(), page.contains("guarded by Palisade"));
        Ok(())
    }
}

async fn finish(
    node: &mut Node,
    runtime: &Runtime,
    pods: [&Pod; 2],
    nonce: &str,
    mut surprises: u32,
) -> Result<ExitCode> {
    // Six attacks, each with the nonce.
    let denied = until("the records of the attacks", async || {
        let denied = events::query(node, &["--verdict", "denied"])?;
        let ours: Vec<_> = denied.into_iter().filter(|record| events::has_argument(record, nonce)).collect();
        Ok((ours.len() >= 6).then_some(ours))
    })
    .await?;
    if denied.len() != 6 {
        surprises += 1;
        println!("  {} denials were recorded instead of 6", denied.len());
    }
    println!("\n-- palisade events --kind exec --namespace scenarios   (out of the collector's store)");
    let table = node.palisade(&["events", "--kind", "exec", "--namespace", "scenarios"])?;
    for line in table.lines().filter(|line| line.starts_with("TIME") || line.contains(nonce)) {
        println!("{line}");
    }
    println!("\n-- palisade coverage");
    print!("{}", node.palisade(&["coverage"])?);
    for pod in pods {
        runtime.remove_pod(pod).await?;
    }
    node.stop_agent()?;
    if surprises == 0 {
        println!("\nAll as expected: what is allowed ran, what is not did not, and each is on record.");
        return Ok(ExitCode::SUCCESS);
    }
    println!("\n{surprises} surprises; the agent's log:\n{}", node.log("agent"));
    Ok(ExitCode::FAILURE)
}

fn fetch() -> Result<String> {
    let mut stream = TcpStream::connect(ADDRESS).context("nginx does not listen")?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let body = answer.split("\r\n\r\n").nth(1).context("nginx sent no body")?;
    Ok(body.to_owned())
}

fn is_denied(code: i32) -> bool {
    matches!(code, 1 | 126 | 137)
}

fn outcome(code: i32) -> String {
    match code {
        0 => "runs".to_owned(),
        1 | 126 => "refused (EPERM)".to_owned(),
        137 => "killed before its first instruction".to_owned(),
        42 => "RAN".to_owned(),
        other => format!("exit code {other}"),
    }
}
