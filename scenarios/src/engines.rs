//! Engines without Kubernetes: plain `ctr run`, Podman and Docker. Their containers are found, named and guarded.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{
    attacks::{PAYLOAD_RAN, nonce},
    cri::{WORKLOAD_IMAGE, until},
    events,
    node::{AgentOptions, Node, which},
    report::Report,
};

/// For every container of the image, whoever runs it.
const PROFILE: &str = "apiVersion: palisade.dev/v1alpha1\nkind: ClusterProfile\nmetadata: {name: engines}\nspec:\n  \
    selector: {containers: [{image: \"*palisade.test/workload:1\"}]}\n  mode: enforce\n  \
    exec: {allow: [{path: /usr/bin/workload}]}\n";

pub async fn run(cri: &Path, archive: &Path) -> Result<ExitCode> {
    let mut report = Report::new();
    let mut node = Node::start(cri).await?;
    node.write_profile("engines.yaml", PROFILE)?;
    let options = AgentOptions { engines: true, unidentified: Some("hold"), ..AgentOptions::default() };
    node.start_agent(&options).await?;
    report
        .case("ctr run: found by containerd's events, named, guarded", ctr(&node, cri, "plain-ctr", &[]))
        .await;
    let mapped = ["--uidmap", "0:100000:65536", "--gidmap", "0:100000:65536"];
    report.case("the same in a user namespace", ctr(&node, cri, "mapped-ctr", &mapped)).await;
    if which("podman").is_ok() {
        report
            .case("Podman: named by its storage, guarded from its first exec", podman(&node, archive))
            .await;
    } else {
        println!("skip Podman: it is not installed here");
    }
    if which("dockerd").is_ok() {
        report.case("Docker: named by its engine, guarded from its first exec", docker(&node, archive)).await;
    } else {
        println!("skip Docker: it is not installed here");
    }
    report.case("the agent stops cleanly", async { node.stop_agent() }).await;
    if report.failed() > 0 {
        println!("--- the agent's log\n{}", node.log("agent"));
    }
    Ok(report.close())
}

/// Runs a command to its end; returns its exit code and what it wrote.
fn ends(command: &mut Command) -> Result<(i32, String)> {
    let output =
        command.stdin(Stdio::null()).output().with_context(|| format!("cannot start {command:?}"))?;
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    Ok((output.status.code().unwrap_or(-1), said))
}

fn succeeds(command: &mut Command) -> Result<String> {
    let (code, said) = ends(command)?;
    ensure!(code == 0, "{command:?} ended with {code}: {said}");
    Ok(said)
}

/// The image that an engine says it has loaded.
fn loaded(said: &str) -> Result<String> {
    said.lines()
        .find_map(|line| line.split_once("Loaded image: ").map(|(_, image)| image.trim().to_owned()))
        .with_context(|| format!("no image is loaded: {said}"))
}

/// The record of the refused program with `nonce`, of a container named `name`.
async fn refused(node: &Node, name: &str, nonce: &str, by: &str) -> Result<Value> {
    let record = until(&format!("a record of {nonce}"), async || {
        let records = events::query(node, &["--kind", "exec", "--executable", "/usr/bin/third"])?;
        Ok(records.into_iter().find(|record| events::has_argument(record, nonce)))
    })
    .await?;
    let about = &record["container"];
    ensure!(record["decision"]["verdict"] == "denied", "{record}");
    ensure!(about["name"] == name && about["identified_by"] == by, "{record}");
    ensure!(about["image"].as_str().is_some_and(|image| image.ends_with(WORKLOAD_IMAGE)), "{record}");
    Ok(record)
}

async fn ctr(node: &Node, cri: &Path, name: &str, options: &[&str]) -> Result<()> {
    let ctr = |words: &[&str]| {
        let mut command = Command::new("ctr");
        command.arg("--address").arg(cri).args(["--namespace", "k8s.io"]).args(words);
        command
    };
    let (started, nonce) = (nonce("plain"), nonce("ctr"));
    let what = [WORKLOAD_IMAGE, name, "/usr/bin/workload", "sleep", &started];
    succeeds(ctr(&["run", "--detach"]).args(options).args(what))?;
    let id = events::in_mode(node, name, "enforce").await?;
    ensure!(id["container"]["identified_by"] == "containerd", "{id}");
    let (code, said) =
        ends(&mut ctr(&["task", "exec", "--exec-id", "x", name, "/usr/bin/third", "payload", &nonce]))?;
    ensure!(code != PAYLOAD_RAN, "what is not allowed ran: {said}");
    let record = refused(node, name, &nonce, "containerd").await?;
    ensure!(record["session_of"]["kind"] == "admin", "{record}");
    ensure!(record["exec"]["origin"] == "image", "{record}");
    let root_of_container = if options.is_empty() { 0 } else { 100_000 };
    ensure!(record["actor"]["credentials"]["uid"] == root_of_container, "{record}");
    succeeds(&mut ctr(&["task", "kill", "--signal", "SIGKILL", name]))?;
    until("the container is deleted", async || {
        let (deleted, _) = ends(&mut ctr(&["task", "delete", name]))?;
        Ok((deleted == 0).then_some(()))
    })
    .await?;
    succeeds(&mut ctr(&["container", "delete", name])).map(|_| ())
}

async fn podman(node: &Node, archive: &Path) -> Result<()> {
    let podman = |words: &[&str]| {
        let mut command = Command::new("podman");
        command.args(["--cgroup-manager", "cgroupfs", "--events-backend", "none"]).args(words);
        command
    };
    let said = succeeds(podman(&["load", "--input"]).arg(archive))?;
    let image = loaded(&said)?;
    let run = |words: &[&str]| {
        let mut command = podman(&["run", "--network", "none", "--security-opt", "seccomp=unconfined"]);
        command.args(words);
        command
    };
    let nonce = nonce("podman");
    let (code, said) = ends(&mut run(&[
        "--name",
        "bad-podman",
        "--entrypoint",
        "/usr/bin/third",
        &image,
        "payload",
        &nonce,
    ]))?;
    ensure!(code != PAYLOAD_RAN, "an entrypoint that is not allowed ran: {said}");
    refused(node, "bad-podman", &nonce, "podman").await?;
    let (code, said) =
        ends(&mut run(&["--name", "good-podman", "--entrypoint", "/usr/bin/workload", &image, "payload"]))?;
    ensure!(code == PAYLOAD_RAN, "an allowed entrypoint ended with {code}: {said}");
    succeeds(&mut podman(&["rm", "--force", "bad-podman", "good-podman"])).map(|_| ())
}

async fn docker(node: &Node, archive: &Path) -> Result<()> {
    let engine = Engine::start().await?;
    let said = succeeds(engine.docker(&["load", "--input"]).arg(archive))?;
    let image = loaded(&said)?;
    let run = |words: &[&str]| {
        let mut command = engine.docker(&["run", "--network", "host"]);
        command.args(words);
        command
    };
    let nonce = nonce("docker");
    let (code, said) = ends(&mut run(&[
        "--name",
        "bad-docker",
        "--entrypoint",
        "/usr/bin/third",
        &image,
        "payload",
        &nonce,
    ]))?;
    ensure!(code != PAYLOAD_RAN, "an entrypoint that is not allowed ran: {said}");
    refused(node, "bad-docker", &nonce, "docker").await?;
    let (code, said) =
        ends(&mut run(&["--name", "good-docker", "--entrypoint", "/usr/bin/workload", &image, "payload"]))?;
    ensure!(code == PAYLOAD_RAN, "an allowed entrypoint ended with {code}: {said}");
    succeeds(&mut engine.docker(&["rm", "--force", "bad-docker", "good-docker"])).map(|_| ())
}

/// Docker's engine with a containerd of its own.
struct Engine {
    child: Child,
    log: PathBuf,
}

impl Engine {
    async fn start() -> Result<Self> {
        let log = PathBuf::from("/tmp/dockerd.log");
        let file = std::fs::File::create(&log)?;
        let child = Command::new("dockerd")
            .args([
                "--bridge",
                "none",
                "--iptables=false",
                "--ip6tables=false",
                "--storage-driver",
                "overlay2",
            ])
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .context("cannot start dockerd")?;
        let mut engine = Self { child, log };
        until("Docker's engine answers", async || {
            if let Some(status) = engine.child.try_wait()? {
                anyhow::bail!(
                    "dockerd ended with {status}: {}",
                    std::fs::read_to_string(&engine.log).unwrap_or_default()
                );
            }
            Ok(ends(&mut engine.docker(&["version"])).is_ok_and(|(code, _)| code == 0).then_some(()))
        })
        .await?;
        Ok(engine)
    }

    fn docker(&self, words: &[&str]) -> Command {
        let mut command = Command::new("docker");
        command.args(["--host", "unix:///var/run/docker.sock"]).args(words);
        command
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let _gone_already = rustix::process::kill_process(
            rustix::process::Pid::from_child(&self.child),
            rustix::process::Signal::TERM,
        );
        let _reaped = self.child.wait();
    }
}
