//! The manifest that is shipped, run for real: its pod with its security context, through the runtime interface as a
//! kubelet would.

use std::{
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result, bail, ensure};
use k8s_cri::v1::{
    Capability, ContainerConfig, ContainerMetadata, ImageSpec, Int64Value, KeyValue, LinuxContainerConfig,
    LinuxContainerSecurityContext, Mount, NamespaceMode, NamespaceOption, SecurityProfile,
    security_profile::ProfileType,
};
use palisade_transport::local::Purpose;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::{
    attacks::{PAYLOAD_RAN, profile},
    cri::{Pod, Runtime, WORKLOAD_IMAGE, until},
    report::Report,
};

const MANIFEST: &str = include_str!("../../deploy/kubernetes/palisade.yaml");
/// The manifest's image as the tests have it.
const IMAGE: &str = "palisade.test/palisade:1";

pub async fn run(cri: &Path) -> Result<ExitCode> {
    let mut report = Report::new();
    let runtime = Runtime::connect(cri);
    let daemonset = DaemonSet::new()?;
    let pod = runtime.pod_with("palisade", "palisade", "", NamespaceMode::Node, &[]).await?;
    let collector = daemonset.start(&runtime, &pod, "collector", &[]).await?;
    let agent = daemonset.start(&runtime, &pod, "agent", &[]).await?;
    let running = async {
        until("the agent is in force", async || {
            ensure!(runtime.state(&agent).await?.0, "the agent ended: {}", daemonset.log("agent"));
            Ok(daemonset.log("agent").contains("in force").then_some(()))
        })
        .await
    };
    report.case("the agent's pod runs with the manifest's rights", running).await;
    report
        .case("it guards: what is allowed runs, what is not is refused", guards(&daemonset, &runtime))
        .await;
    report
        .case(
            "under whenAgentAbsent: deny its replacement starts, others do not",
            replaced(&daemonset, &runtime, &agent),
        )
        .await;
    let again = std::cell::RefCell::new(agent.clone());
    report
        .case("killed and started again, twice, it is admitted and takes over", async {
            for _ in 0..2 {
                let before = again.borrow().clone();
                let next = restarted(&daemonset, &runtime, &pod, &before).await?;
                again.replace(next);
            }
            guards(&daemonset, &runtime).await
        })
        .await;
    let agent = again.into_inner();
    if report.failed() > 0 {
        for name in ["agent", "collector"] {
            println!("--- the log of {name}\n{}", daemonset.log(name));
        }
    }
    for container in [&agent, &collector] {
        runtime.remove_container(container).await?;
    }
    runtime.remove_pod(&pod).await?;
    let removed = Command::new("palisade-agent").arg("uninstall").output()?;
    let said = String::from_utf8_lossy(&removed.stdout).into_owned();
    report
        .case("it stays in force without the pod, until it is uninstalled", async {
            ensure!(removed.status.success(), "{}", String::from_utf8_lossy(&removed.stderr));
            ensure!(said.contains("removed /sys/fs/bpf/palisade/v"), "nothing was in force any more: {said}");
            Ok(())
        })
        .await;
    Ok(report.close())
}

/// Waits until the agent reports the container in `mode`.
async fn in_mode(daemonset: &DaemonSet, container: &str, mode: &str) -> Result<()> {
    until(&format!("{container} is in mode {mode}"), async || {
        let found = daemonset
            .palisade(&["coverage", "--json"])?
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
            .any(|record| record["container"]["id"] == container && record["container"]["mode"] == mode);
        Ok(found.then_some(()))
    })
    .await
}

async fn guards(daemonset: &DaemonSet, runtime: &Runtime) -> Result<()> {
    let pod = runtime.pod("pod-guarded", "guarded", "").await?;
    let id = runtime.container(&pod, "c-guarded", WORKLOAD_IMAGE, &[]).await?;
    in_mode(daemonset, &id, "enforce").await?;
    let good = runtime.exec(&id, &["/usr/bin/workload", "payload"]).await?;
    ensure!(good.code == PAYLOAD_RAN, "{good:?}");
    let bad = runtime.exec(&id, &["/usr/bin/attacker", "attack", "copy", "daemonset"]).await?;
    ensure!(bad.code != PAYLOAD_RAN, "{bad:?}");
    until("the refusal is stored", async || {
        let stored = daemonset.palisade(&["events", "--json", "--verdict", "denied", "--container", &id])?;
        Ok((!stored.is_empty()).then_some(()))
    })
    .await?;
    runtime.remove_pod(&pod).await
}

/// The agent hangs and its lease ends: only the pause program and its own may start.
async fn replaced(daemonset: &DaemonSet, runtime: &Runtime, agent: &str) -> Result<()> {
    let pid = Pid::from_raw(i32::try_from(runtime.pid(agent).await?)?).context("no pid")?;
    kill_process(pid, Signal::STOP)?;
    let outcome = async {
        // Twice the lease that the test configures: it ends by the clock alone.
        tokio::time::sleep(std::time::Duration::from_secs(4)).await;
        let pod = runtime.pod_with("replacement", "palisade", "", NamespaceMode::Node, &[]).await?;
        let replacement =
            daemonset.start(runtime, &pod, "agent", &["/usr/bin/palisade-agent", "--version"]).await?;
        let other = daemonset.start(runtime, &pod, "collector", &["/usr/bin/palisade", "--version"]).await?;
        let (replacement, other) = (runtime.ended(&replacement).await?, runtime.ended(&other).await?);
        anyhow::Ok((pod, replacement, other))
    }
    .await;
    kill_process(pid, Signal::CONT)?;
    let (pod, replacement, other) = outcome?;
    ensure!(replacement == 0, "the replacement ended with {replacement}");
    ensure!(other != 0, "another program of the image started");
    runtime.remove_pod(&pod).await
}

/// Kills the agent and starts it again, as a kubelet does; returns the new container.
async fn restarted(daemonset: &DaemonSet, runtime: &Runtime, pod: &Pod, agent: &str) -> Result<String> {
    let pid = Pid::from_raw(i32::try_from(runtime.pid(agent).await?)?).context("no pid")?;
    kill_process(pid, Signal::KILL)?;
    runtime.ended(agent).await?;
    runtime.remove_container(agent).await?;
    let started = || daemonset.log("agent").matches("took over the pinned programs").count();
    let before = started();
    let next = daemonset.start(runtime, pod, "agent", &[]).await?;
    until("the agent has taken over", async || Ok((started() > before).then_some(()))).await?;
    Ok(next)
}

/// The manifest's pod, with what its volumes hold.
struct DaemonSet {
    pod: Value,
    folder: tempfile::TempDir,
}

impl DaemonSet {
    fn new() -> Result<Self> {
        let documents: Vec<Value> =
            serde_saphyr::from_multiple(MANIFEST).map_err(|error| anyhow::anyhow!("{error}"))?;
        let find = |kind: &str, name: &str| {
            documents
                .iter()
                .find(|document| document["kind"] == kind && document["metadata"]["name"] == name)
                .cloned()
                .with_context(|| format!("the manifest has no {kind} {name}"))
        };
        let folder = tempfile::tempdir()?;
        let config = folder.path().join("config");
        std::fs::create_dir(&config)?;
        for (name, text) in find("ConfigMap", "palisade")?["data"].as_object().context("no data")? {
            let mut text = text.as_str().unwrap_or_default().to_owned();
            if name == "agent.yaml" {
                text = text.replace("whenAgentAbsent: audit", "whenAgentAbsent: deny\nagentLeaseSeconds: 2");
            }
            std::fs::write(config.join(name), text)?;
        }
        for name in ["profiles", "store", "spool", "scratch", "run", "sockets"] {
            std::fs::create_dir(folder.path().join(name))?;
        }
        std::fs::write(folder.path().join("profiles/guarded.yaml"), profile("guarded", "enforce"))?;
        let pod = find("DaemonSet", "palisade")?["spec"]["template"]["spec"].clone();
        ensure!(pod["hostPID"] == true, "the manifest's pod is not in the host's pid namespace");
        Ok(Self { pod, folder })
    }

    /// What a kubelet would mount for a volume.
    fn volume(&self, name: &str) -> Result<PathBuf> {
        let volume = self.pod["volumes"]
            .as_array()
            .and_then(|volumes| volumes.iter().find(|volume| volume["name"] == name))
            .with_context(|| format!("no volume {name}"))?;
        // Store and spool are the test's, so that nothing is left on the node.
        if let Some(path) =
            volume["hostPath"]["path"].as_str().filter(|_| !["store", "spool"].contains(&name))
        {
            if volume["hostPath"]["type"] == "DirectoryOrCreate" {
                std::fs::create_dir_all(path)?;
            }
            return Ok(PathBuf::from(path));
        }
        Ok(self.folder.path().join(name))
    }

    /// Starts a container of the pod; `command` takes the place of the manifest's.
    async fn start(&self, runtime: &Runtime, pod: &Pod, name: &str, command: &[&str]) -> Result<String> {
        let spec = self.pod["containers"]
            .as_array()
            .and_then(|containers| containers.iter().find(|container| container["name"] == name))
            .with_context(|| format!("no container {name}"))?;
        let words = |list: &Value| -> Vec<String> {
            list.as_array()
                .into_iter()
                .flatten()
                .filter_map(|word| word.as_str().map(str::to_owned))
                .collect()
        };
        let security = &spec["securityContext"];
        if security["privileged"] == true {
            bail!("{name} is privileged");
        }
        let mounts = spec["volumeMounts"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|mount| {
                let text = |key: &str| mount[key].as_str().unwrap_or_default();
                Ok(Mount {
                    host_path: self.volume(text("name"))?.join(text("subPath")).display().to_string(),
                    container_path: text("mountPath").to_owned(),
                    readonly: mount["readOnly"] == true,
                    ..Default::default()
                })
            })
            .collect::<Result<Vec<Mount>>>()?;
        let seccomp = match security["seccompProfile"]["type"].as_str() {
            Some("RuntimeDefault") => ProfileType::RuntimeDefault,
            _ => bail!("{name} has no seccomp profile"),
        };
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata { name: name.to_owned(), attempt: 0 }),
            image: Some(ImageSpec { image: IMAGE.to_owned(), ..Default::default() }),
            command: if command.is_empty() {
                words(&spec["command"])
            } else {
                command.iter().map(|word| (*word).to_owned()).collect()
            },
            envs: vec![KeyValue { key: "PALISADE_NODE".to_owned(), value: "test-node".to_owned() }],
            mounts,
            log_path: format!("{name}.log"),
            linux: Some(LinuxContainerConfig {
                security_context: Some(LinuxContainerSecurityContext {
                    capabilities: Some(Capability {
                        add_capabilities: words(&security["capabilities"]["add"]),
                        drop_capabilities: words(&security["capabilities"]["drop"]),
                        ..Default::default()
                    }),
                    namespace_options: Some(NamespaceOption {
                        network: NamespaceMode::Node as i32,
                        pid: NamespaceMode::Node as i32,
                        ..Default::default()
                    }),
                    run_as_user: security["runAsUser"].as_i64().map(|value| Int64Value { value }),
                    readonly_rootfs: security["readOnlyRootFilesystem"] == true,
                    no_new_privs: security["allowPrivilegeEscalation"] == false,
                    seccomp: Some(SecurityProfile { profile_type: seccomp as i32, ..Default::default() }),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let log = self.folder.path().join("logs");
        runtime.run(pod, config, &log).await
    }

    /// Runs `palisade` against the pod's collector, by the folder that a kubelet would have made for the volume of its sockets.
    fn palisade(&self, arguments: &[&str]) -> Result<String> {
        let address = Purpose::Ask.address(&self.volume("sockets")?);
        let output = Command::new("palisade").args(arguments).args(["--collector", &address]).output()?;
        ensure!(
            output.status.success(),
            "palisade {arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// What a container of the pod has written.
    fn log(&self, name: &str) -> String {
        std::fs::read_to_string(self.folder.path().join(format!("logs/{name}.log"))).unwrap_or_default()
    }
}
