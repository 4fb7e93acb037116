//! Is the policy in force before the first instruction? Entrypoints that are not allowed, and whose first system call
//! makes a file on the host, in every combination of runtime, interface and moment.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, Result, ensure};
use futures_util::future::join_all;
use serde_json::Value;

use crate::{
    attacks::{PAYLOAD_RAN, profile},
    containerd::{Containerd, Version, stop_the_guests},
    cri::{Pod, Runtime, Spec, WORKLOAD_IMAGE, until},
    events,
    gate::Gate,
    node::{AgentOptions, Interfaces, Node},
    report::Report,
};

/// Where containers see the folder of marks, and the program that makes one.
const MARKS: &str = "/marks";
const MARK: &str = "/usr/bin/mark";
/// Containers that start at the same time.
const AT_ONCE: usize = 4;

pub struct Options {
    /// Containers per cell.
    pub count: usize,
    /// Only the runtime that is running, instead of the guest's two.
    pub here: bool,
    /// One containerd with NRI and the other without, instead of both with and without.
    pub short: bool,
    /// Only cases whose name holds this.
    pub only: String,
}

pub async fn run(cri: &Path, options: &Options) -> Result<ExitCode> {
    let mut report = Report::of(&options.only);
    if options.here {
        cells(&mut report, "this runtime", cri, None, options.count).await?;
        return Ok(report.close());
    }
    ensure!(
        Version::ALL.iter().all(|version| version.is_here()),
        "the guest's two containerds are not here; --here takes the one that runs"
    );
    stop_the_guests().await?;
    for version in Version::ALL {
        for with_nri in [true, false] {
            if options.short && with_nri != (version == Version::Next) {
                continue;
            }
            let containerd = Containerd::start(version, with_nri).await?;
            let name = format!("{version:?}, {}", if with_nri { "NRI" } else { "no NRI" });
            cells(&mut report, &name, &containerd.socket, containerd.nri.clone(), options.count).await?;
            if with_nri {
                for handler in ["runc", "runc-next", "crun"] {
                    let name = format!("{name}: {handler} starts and enters");
                    report.case(&name, generations(&containerd, handler)).await;
                }
            }
        }
    }
    Ok(report.close())
}

/// The control, then the agent before and after the containers.
async fn cells(
    report: &mut Report,
    name: &str,
    cri: &Path,
    nri: Option<PathBuf>,
    count: usize,
) -> Result<()> {
    report.case(&format!("{name}: without an agent the mark is made"), control(cri)).await;
    let early = |unidentified| AgentOptions {
        unidentified: Some(unidentified),
        interfaces: nri.clone().map_or(Interfaces::WithoutNri, Interfaces::NriAt),
        ..AgentOptions::default()
    };
    if let Some(socket) = &nri {
        // What is not identified would run, and nobody else is asked: NRI alone must be early enough.
        let interfaces = Interfaces::NriAlone(socket.clone());
        let case = present(cri, AgentOptions { interfaces, ..early("audit") }, count);
        report.case(&format!("{name} alone, agent present, unidentified: audit"), case).await;
    }
    report
        .case(&format!("{name}, agent present, unidentified: hold"), present(cri, early("hold"), count))
        .await;
    report.case(&format!("{name}, agent present, unidentified: deny"), denying(cri, early("deny"))).await;
    report.case(&format!("{name}, agent started later"), later(cri, early("audit"), count)).await;
    Ok(())
}

/// A folder of marks, on the host and for one cell.
struct Marks(tempfile::TempDir);

impl Marks {
    fn new() -> Result<Self> {
        Ok(Self(tempfile::tempdir()?))
    }

    fn made(&self) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(self.0.path())? {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        Ok(names)
    }
}

/// The attack works when nobody guards.
async fn control(cri: &Path) -> Result<()> {
    let runtime = Runtime::connect(cri);
    let marks = Marks::new()?;
    let pod = runtime.pod("pod-control", "starts", "").await?;
    let id = create_marker(&runtime, &pod, &marks, "control").await?;
    runtime.start(&id).await?;
    let code = runtime.ended(&id).await?;
    ensure!(code == PAYLOAD_RAN, "it ended with {code}");
    ensure!(marks.made()? == ["control"], "no mark: {:?}", marks.made()?);
    runtime.remove_pod(&pod).await
}

async fn create_marker(runtime: &Runtime, pod: &Pod, marks: &Marks, name: &str) -> Result<String> {
    let mark = format!("{MARKS}/{name}");
    let command = [MARK, mark.as_str()];
    let mounts = [(marks.0.path(), MARKS)];
    runtime.create(pod, &Spec { name, command: &command, mounts: &mounts, ..Spec::default() }).await
}

/// Starts `count` containers whose entrypoint is not allowed. None may make its mark; each leaves one record that
/// names it whole.
async fn present(cri: &Path, options: AgentOptions, count: usize) -> Result<()> {
    let runtime = Runtime::connect(cri);
    let marks = Marks::new()?;
    let mut node = Node::start(cri).await?;
    node.write_profile("starts.yaml", &profile("starts", "enforce"))?;
    node.start_agent(&options).await?;
    if matches!(options.interfaces, Interfaces::NriAlone(_)) {
        until("the runtime has registered the plugin", async || {
            Ok(node.log("agent").contains("NRI: registered").then_some(()))
        })
        .await?;
    }
    let pod = runtime.pod("pod-present", "starts", "").await?;
    let mut ids = Vec::new();
    let names: Vec<String> = (0..count).map(|number| format!("c-{number}")).collect();
    for some in names.chunks(AT_ONCE) {
        let starts = some.iter().map(async |name| {
            let id = create_marker(&runtime, &pod, &marks, name).await?;
            // The runtime may call a start failed whose entrypoint was refused.
            let outcome = runtime.start(&id).await;
            let code = runtime.ended(&id).await?;
            anyhow::Ok((name, id, format!("ended with {code}; started: {outcome:?}"), code))
        });
        for ended in join_all(starts).await {
            ids.push(ended?);
        }
    }
    for (name, id, _, code) in &ids {
        ensure!(*code != PAYLOAD_RAN, "{name} ({id}) ran its entrypoint");
    }
    ensure!(marks.made()?.is_empty(), "marks were made: {:?}", marks.made()?);
    for (name, id, ended, _) in &ids {
        let records = until(&format!("a record of {name}"), async || {
            let records = marks_of(&node, id)?;
            Ok((!records.is_empty()).then_some(records))
        })
        .await
        .with_context(|| {
            let told = events::query(&node, &["--container", id]);
            format!("{name} ({id}) {ended}; its records: {told:?}")
        })?;
        ensure!(records.len() == 1, "{} records of one exec: {records:?}", records.len());
        complete(&records[0], name)?;
    }
    attested(&node, &runtime, &pod, &options).await?;
    runtime.remove_pod(&pod).await?;
    node.stop_agent()
}

fn marks_of(node: &Node, container: &str) -> Result<Vec<Value>> {
    let records = events::query(node, &["--kind", "exec", "--container", container])?;
    Ok(records.into_iter().filter(|record| record["exec"]["executable"] == MARK).collect())
}

/// A record of a refused entrypoint says who, what and why.
fn complete(record: &Value, name: &str) -> Result<()> {
    let (exec, decision, about) = (&record["exec"], &record["decision"], &record["container"]);
    for (what, found, wanted) in [
        ("verdict", &decision["verdict"], "denied"),
        ("reason", &decision["reason"], "no-rule"),
        ("origin", &exec["origin"], "image"),
        ("container", &about["name"], name),
        ("pod", &about["pod"], "pod-present"),
        ("namespace", &about["namespace"], "scenarios"),
        ("label app", &about["labels"]["app"], "starts"),
        ("image", &about["image"], WORKLOAD_IMAGE),
        ("session", &record["session_of"]["kind"], "workload"),
        ("first argument", &exec["arguments"][0], MARK),
    ] {
        ensure!(found == wanted, "{what} is {found}, not {wanted:?}: {record}");
    }
    ensure!(exec["arguments"][1] == format!("{MARKS}/{name}"), "{record}");
    ensure!(about["identified"] == true, "{record}");
    Ok(())
}

/// An allowed entrypoint runs, and the policy was in force before its exec as the kernel saw it.
async fn attested(node: &Node, runtime: &Runtime, pod: &Pod, options: &AgentOptions) -> Result<()> {
    let id = runtime.container(pod, "c-allowed", WORKLOAD_IMAGE, &[]).await?;
    let coverage = events::in_mode(node, &id, "enforce").await?;
    let exec = until("the entrypoint's exec", async || {
        let records = events::query(node, &["--kind", "exec", "--container", &id])?;
        Ok(records.into_iter().find(|record| record["exec"]["executable"] == "/usr/bin/workload"))
    })
    .await?;
    ensure!(exec["decision"]["verdict"] == "allowed" && exec["decision"]["reason"] == "rule", "{exec}");
    let in_force = coverage["coverage"]["in_force_since"].as_u64().context("no time of the policy")?;
    let executed = exec["time"].as_u64().context("no time of the exec")?;
    let held = exec["exec"]["held"].as_u64().unwrap_or(0);
    ensure!(
        in_force < executed || held > 0,
        "the policy stood at {in_force}, the entrypoint ran at {executed} and was not held"
    );
    if matches!(options.interfaces, Interfaces::NriAlone(_)) {
        ensure!(coverage["container"]["identified_by"] == "nri", "{coverage}");
        let answered = until("the runtime has been answered", async || {
            let records = events::query(node, &["--kind", "coverage", "--container", &id])?;
            Ok(records
                .iter()
                .find_map(|record| record["coverage"]["answered_in"].as_u64().filter(|in_| *in_ > 0)))
        })
        .await?;
        println!(
            "   answered in {:.1} ms, in force {:.1} ms before the exec",
            answered as f64 / 1e6,
            (executed - in_force) as f64 / 1e6
        );
    }
    runtime.remove_container(&id).await
}

/// Under `deny` what is not identified in time is refused, and nothing runs in any case.
async fn denying(cri: &Path, options: AgentOptions) -> Result<()> {
    let runtime = Runtime::connect(cri);
    let marks = Marks::new()?;
    let mut node = Node::start(cri).await?;
    node.write_profile("starts.yaml", &profile("starts", "enforce"))?;
    node.start_agent(&options).await?;
    // The pause program is refused as well until the runtime has said what it is.
    let pod = until("a pod starts", async || Ok(runtime.pod("pod-deny", "starts", "").await.ok())).await?;
    for number in 0..3 {
        let id = create_marker(&runtime, &pod, &marks, &format!("c-{number}")).await?;
        let _outcome = runtime.start(&id).await;
        ensure!(runtime.ended(&id).await? != PAYLOAD_RAN, "the entrypoint of {id} ran");
        let record = until("its record", async || Ok(marks_of(&node, &id)?.pop())).await?;
        ensure!(record["decision"]["verdict"] == "denied", "{record}");
    }
    ensure!(marks.made()?.is_empty(), "marks were made: {:?}", marks.made()?);
    runtime.remove_pod(&pod).await?;
    node.stop_agent()
}

/// Containers that ran before the agent: covered from when the attestation says.
async fn later(cri: &Path, options: AgentOptions, count: usize) -> Result<()> {
    let runtime = Runtime::connect(cri);
    let marks = Marks::new()?;
    let pod = runtime.pod("pod-later", "starts", "").await?;
    let mut waiting = Vec::new();
    for number in 0..count {
        let name = format!("c-{number}");
        let gate = Gate::new(&marks.0.path().join(format!(".gate-{number}")))?;
        let (wait, mark) = (format!("{MARKS}/.gate-{number}"), format!("{MARKS}/{name}"));
        let command = ["/usr/bin/workload", "after", &wait, MARK, &mark];
        let mounts = [(marks.0.path(), MARKS)];
        let id = runtime
            .create(&pod, &Spec { name: &name, command: &command, mounts: &mounts, ..Spec::default() })
            .await?;
        runtime.start(&id).await?;
        waiting.push((id, gate));
    }
    let mut node = Node::start(cri).await?;
    node.write_profile("starts.yaml", &profile("starts", "enforce"))?;
    node.start_agent(&options).await?;
    for (id, _) in &waiting {
        let coverage = events::in_mode(&node, id, "enforce").await?;
        ensure!(coverage["coverage"]["found_running"] == true, "{coverage}");
    }
    let let_go = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_nanos() as u64;
    for some in waiting.chunks(AT_ONCE) {
        let ends = some.iter().map(async |(id, gate)| {
            gate.open().await?;
            anyhow::Ok((id, runtime.ended(id).await?))
        });
        for ended in join_all(ends).await {
            let (id, code) = ended?;
            ensure!(code != PAYLOAD_RAN, "{id} ran what is not allowed");
        }
    }
    for (id, _) in &waiting {
        let record = until("its record", async || Ok(marks_of(&node, id)?.pop())).await?;
        ensure!(record["decision"]["verdict"] == "denied", "{record}");
        ensure!(
            record["exec"]["ancestors"].is_array() && record["session_of"]["kind"] == "workload",
            "{record}"
        );
        let since = events::query(&node, &["--kind", "coverage", "--container", id])?
            .iter()
            .find(|record| record["container"]["mode"] == "enforce")
            .and_then(|record| record["coverage"]["in_force_since"].as_u64())
            .context("no attestation")?;
        ensure!(since < let_go, "the attestation says {since}, which is after {let_go}");
    }
    let left: Vec<String> = marks.made()?.into_iter().filter(|name| !name.starts_with('.')).collect();
    ensure!(left.is_empty(), "marks were made: {left:?}");
    runtime.remove_pod(&pod).await?;
    node.stop_agent()
}

/// Start, exec and refusal with one OCI runtime: its own steps are none of the workload's.
async fn generations(containerd: &Containerd, handler: &str) -> Result<()> {
    let runtime = Runtime::connect(&containerd.socket);
    let mut node = Node::start(&containerd.socket).await?;
    node.write_profile("starts.yaml", &profile("starts", "enforce"))?;
    let options = AgentOptions {
        unidentified: Some("hold"),
        interfaces: containerd.nri.clone().map_or(Interfaces::WithoutNri, Interfaces::NriAt),
        ..AgentOptions::default()
    };
    node.start_agent(&options).await?;
    let pod = runtime.pod(&format!("pod-{handler}"), "starts", handler).await?;
    let id = runtime.container(&pod, "c-runs", WORKLOAD_IMAGE, &[]).await?;
    events::in_mode(&node, &id, "enforce").await?;
    let good = runtime.exec(&id, &["/usr/bin/workload", "payload"]).await?;
    ensure!(good.code == PAYLOAD_RAN, "an allowed program: {good:?}");
    let bad = runtime.exec(&id, &["/usr/bin/third", "payload"]).await;
    ensure!(bad.as_ref().map_or(true, |ended| ended.code != PAYLOAD_RAN), "what is not allowed ran: {bad:?}");
    let record = until("its record", async || {
        let records = events::query(&node, &["--kind", "exec", "--container", &id])?;
        Ok(records.into_iter().find(|record| record["exec"]["executable"] == "/usr/bin/third"))
    })
    .await?;
    ensure!(record["decision"]["verdict"] == "denied" && record["session_of"]["kind"] == "admin", "{record}");
    runtime.remove_pod(&pod).await?;
    node.stop_agent()
}
