//! What goes wrong on a node: each fault has a message that names the place, an exit code, and an end in time; and
//! nothing is lost silently.

use std::{
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    attacks::{nonce, profile},
    cri::{Runtime, WORKLOAD_IMAGE, until},
    events,
    node::{AgentOptions, Interfaces, Node},
    report::Report,
};

/// Longest time in which a program must have said what is wrong, also under emulation.
const DEADLINE: Duration = Duration::from_secs(60);

/// Runs a command that must end by itself. Returns exit code and what it said on standard error.
fn ends(command: &mut Command) -> Result<(Option<i32>, String)> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {command:?}"))?;
    let begun = Instant::now();
    while child.try_wait()?.is_none() {
        if begun.elapsed() > DEADLINE {
            child.kill()?;
            bail!("{command:?} did not end within {} s", DEADLINE.as_secs());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let mut said = String::new();
    for stream in [child.stdout.take().map(read_all), child.stderr.take().map(read_all)].into_iter().flatten()
    {
        said.push_str(&stream?);
    }
    Ok((child.wait()?.code(), said))
}

fn read_all(mut stream: impl std::io::Read) -> Result<String> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The command must end with `code` and say every one of `words`.
pub fn fails(command: &mut Command, code: i32, words: &[&str]) -> Result<()> {
    let (found, said) = ends(command)?;
    ensure!(found == Some(code), "exit code {found:?} instead of {code}: {said}");
    for word in words {
        ensure!(said.contains(word), "the message lacks {word:?}: {said}");
    }
    Ok(())
}

pub async fn run(cri: &Path) -> Result<ExitCode> {
    let mut report = Report::new();
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    report
        .case("a wrong configuration of the agent names file and field", async {
            std::fs::write(at("agent.yaml"), "colector: unix:///run/a.sock\n")?;
            let mut command = Command::new("palisade-agent");
            command.arg("--config").arg(at("agent.yaml")).arg("run");
            fails(&mut command, 1, &["agent.yaml", "colector"])?;
            std::fs::write(at("agent.yaml"), "collector: http://127.0.0.1:1\n")?;
            fails(&mut command, 1, &["agent.yaml", "collector", "without TLS", "unix:///run/palisade/"])
        })
        .await;
    report
        .case("a wrong configuration of the collector names file and field", async {
            std::fs::write(at("collector.yaml"), "listen: 0.0.0.0:7443\n")?;
            let mut command = Command::new("palisade-collector");
            command.arg("--config").arg(at("collector.yaml"));
            fails(&mut command, 1, &["collector.yaml", "listen", "without TLS", "/run/palisade/collector"])
        })
        .await;
    report
        .case("a folder of profiles that is not there is named", async {
            let mut command = Command::new("palisade-agent");
            command.args(["run", "--profiles", "/nowhere"]);
            fails(&mut command, 1, &["/nowhere", "profiles:"])
        })
        .await;
    report
        .case("without rights the agent says which it needs", async {
            let mut command = Command::new("palisade-agent");
            command.args(["run", "--profiles", "/"]).uid(65534).gid(65534);
            fails(&mut command, 1, &["needs root", "CAP_BPF"])
        })
        .await;
    report
        .case("a place for the pins that does not last, or is somebody else's, is refused", async {
            let link = Path::new("/sys/fs/bpf").join(nonce("link"));
            std::os::unix::fs::symlink("/sys/fs/bpf", &link)?;
            let mut outcome = Ok(());
            for (pins, word) in [
                ("/tmp/palisade".to_owned(), "/tmp is not a bpffs"),
                ("palisade".to_owned(), "pins: palisade is no folder"),
                (link.display().to_string(), "and no link"),
            ] {
                std::fs::write(at("agent.yaml"), format!("profiles: /\npins: {pins}\n"))?;
                let mut command = Command::new("palisade-agent");
                command.arg("--config").arg(at("agent.yaml")).arg("run");
                outcome = outcome.and(fails(&mut command, 1, &[word]));
            }
            std::fs::remove_file(link)?;
            outcome
        })
        .await;
    report
        .case("uninstalling without rights says so", async {
            let mut command = Command::new("palisade-agent");
            command.arg("uninstall").uid(65534).gid(65534);
            fails(&mut command, 1, &["needs root"])
        })
        .await;
    report
        .case("without BTF the agent names file and kernel option", async {
            let script = "mount -t tmpfs none /sys/kernel/btf && exec palisade-agent run --profiles /";
            let mut command = Command::new("unshare");
            command.args(["--mount", "sh", "-c", script]);
            fails(&mut command, 1, &["/sys/kernel/btf/vmlinux", "CONFIG_DEBUG_INFO_BTF"])
        })
        .await;
    report
        .case("without BTF the doctor reports tier nothing", async {
            let script = "mount -t tmpfs none /sys/kernel/btf && exec palisade-agent doctor";
            let mut command = Command::new("unshare");
            command.args(["--mount", "sh", "-c", script]);
            fails(&mut command, 1, &["FAIL kernel layout (BTF)", "tier: nothing"])
        })
        .await;
    report
        .case("a store that cannot be written is named", async {
            let mut command = Command::new("palisade-collector");
            command.args(["--store", "/proc/store"]);
            fails(&mut command, 1, &["cannot make the store's folder /proc/store"])
        })
        .await;
    report
        .case("a query without a collector says how to name it", async {
            let mut command = Command::new("palisade");
            command.args(["events", "--collector", "unix:///nowhere/ask.sock"]);
            fails(&mut command, 1, &["cannot reach the collector at unix:///nowhere/ask.sock", "--collector"])
        })
        .await;
    report
        .case("a broken profile is reported with its place", async {
            std::fs::write(at("bad.yaml"), profile("bad", "enforce").replace("- path: /usr", "- path: usr"))?;
            let mut command = Command::new("palisade");
            command.args(["profile", "lint"]).arg(at("bad.yaml"));
            fails(&mut command, 1, &["bad.yaml:11:15", "spec.exec.allow[0].path", "does not start with '/'"])
        })
        .await;
    report.case("the agent works on without collector and profiles, and ends in time", alone(cri)).await;
    for (policy, verdict) in [("audit", "audited"), ("deny", "denied")] {
        let name = format!("what the runtime does not identify is {verdict} under unidentified: {policy}");
        report.case(&name, unidentified(cri, policy, verdict)).await;
    }
    report.case("records outlive a collector that is killed", killed_collector(cri)).await;
    report.case("records outlive a store that is full", full_store(cri)).await;
    Ok(report.close())
}

/// No collector, a profile folder that does not exist: said, and SIGTERM still ends it.
async fn alone(cri: &Path) -> Result<()> {
    let mut node = Node::without_collector(cri)?;
    node.write_profile("broken.yaml", "apiVersion: [\n")?;
    node.start_agent(&AgentOptions::default()).await?;
    std::fs::rename(node.folder.path().join("profiles"), node.folder.path().join("away"))?;
    until("the agent says what is missing", async || {
        let log = node.log("agent");
        let said = [
            "broken.yaml",
            "nothing of it is in force",
            "profiles cannot be read",
            "cannot reach the collector",
        ];
        Ok(said.iter().all(|word| log.contains(word)).then_some(()))
    })
    .await?;
    let begun = Instant::now();
    node.stop_agent()?;
    ensure!(begun.elapsed() < DEADLINE, "it took {} s to stop", begun.elapsed().as_secs());
    Ok(())
}

/// A runtime that never answers: the kernel's own policy holds, and the record says why.
async fn unidentified(cri: &Path, policy: &'static str, verdict: &str) -> Result<()> {
    let mut node = Node::start(cri).await?;
    let options =
        AgentOptions { unidentified: Some(policy), interfaces: Interfaces::None, ..AgentOptions::default() };
    let tier = node.start_agent(&options).await?;
    let runtime = Runtime::connect(cri);
    // The runtime's start returns before the exec that is refused, so the pod may count as started.
    let pod = runtime.pod(&format!("pod-unidentified-{policy}"), "free", "").await;
    let record = until("a record of the pause container", async || {
        let records = events::query(&node, &["--kind", "exec", "--verdict", verdict])?;
        Ok(records.into_iter().find(|record| record["exec"]["executable"] == "/pause"))
    })
    .await?;
    ensure!(record["decision"]["reason"] == "unidentified", "{record}");
    let action = match (policy, tier.as_str()) {
        ("audit", _) => "none",
        (_, "full") => "refused",
        _ => "killed",
    };
    ensure!(record["decision"]["action"] == action, "{record}");
    ensure!(record["container"]["identified"] == false, "{record}");
    if let Ok(pod) = pod {
        runtime.remove_pod(&pod).await?;
    }
    node.stop_agent()
}

/// Execs numbered execs in a container while `disturb` does its worst; each must be stored once.
async fn all_stored(
    node: &mut Node,
    cri: &Path,
    count: u64,
    disturb: impl AsyncFnOnce(&mut Node) -> Result<()>,
) -> Result<()> {
    let runtime = Runtime::connect(cri);
    node.start_agent(&AgentOptions::default()).await?;
    let pod = runtime.pod("pod-faults", "free", "").await?;
    let container = runtime.container(&pod, "c-faults", WORKLOAD_IMAGE, &[]).await?;
    let nonce = nonce("faults");
    let words = ["/usr/bin/attacker", "generate", "/usr/bin/workload", &nonce, &count.to_string(), "100"];
    let (ended, disturbed) = tokio::join!(runtime.exec(&container, &words), disturb(node));
    disturbed?;
    let ended = ended?;
    ensure!(ended.code == 0, "the generator ended with {}: {}", ended.code, ended.stderr);
    let prefix = format!("{nonce}-");
    let stored = |node: &Node| -> Result<Vec<String>> {
        let records = events::query(node, &["--kind", "exec"])?;
        Ok(records
            .iter()
            .filter_map(|record| record["exec"]["arguments"].as_array()?.last()?.as_str().map(str::to_owned))
            .filter(|word| word.starts_with(&prefix))
            .collect())
    };
    until("every exec is stored", async || Ok((stored(node)?.len() as u64 >= count).then_some(()))).await?;
    let mut words = stored(node)?;
    let all = words.len();
    words.sort();
    words.dedup();
    ensure!(all == words.len(), "{} execs are stored twice", all - words.len());
    ensure!(words.len() as u64 == count, "{} of {count} execs are stored", words.len());
    runtime.remove_pod(&pod).await?;
    node.stop_agent()
}

async fn killed_collector(cri: &Path) -> Result<()> {
    let mut node = Node::start(cri).await?;
    all_stored(&mut node, cri, 300, async |node| {
        for _ in 0..3 {
            let before = store_size(node)?;
            until("records arrive", async || Ok((store_size(node)? > before).then_some(()))).await?;
            node.kill_collector()?;
            node.start_collector().await?;
        }
        Ok(())
    })
    .await
}

fn store_size(node: &Node) -> Result<u64> {
    Ok(std::fs::metadata(node.folder.path().join("store/segment-000000000000.log"))?.len())
}

/// The store is on a file system that fills up, and later has room again.
async fn full_store(cri: &Path) -> Result<()> {
    let mut node = Node::without_collector(cri)?;
    let store = node.folder.path().join("store");
    let mount = |options: &str| -> Result<()> {
        let output = Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "store"])
            .arg(&store)
            .output()
            .context("cannot start mount")?;
        ensure!(output.status.success(), "mount: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    };
    mount("size=64k")?;
    node.start_collector().await?;
    let result = all_stored(&mut node, cri, 300, async |node| {
        until("the collector says that the store is full", async || {
            Ok(node.log("collector").contains("the store takes nothing").then_some(()))
        })
        .await?;
        until("the agent says that records wait", async || {
            Ok(node.log("agent").contains("the store takes nothing").then_some(()))
        })
        .await?;
        mount("remount,size=64m")
    })
    .await;
    node.kill_collector()?;
    let _best_effort = Command::new("umount").arg("--lazy").arg(&store).status();
    result
}
