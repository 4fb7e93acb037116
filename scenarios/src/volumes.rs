//! Volumes: each file named by its volume and by its path as the pod sees it, and allowed only where a profile names the
//! volume. The folders are those that a kubelet makes.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result, ensure};
use k8s_cri::v1::{ImageSpec, Mount};
use serde_json::Value;

use crate::{
    attacks::{PAYLOAD_RAN, nonce},
    containerd::{Containerd, Version, stop_the_guests},
    cri::{Pod, Runtime, Spec, WORKLOAD_IMAGE, until},
    events,
    gate::Gate,
    node::{AgentOptions, Interfaces, Node, which},
    report::Report,
};

pub async fn run(cri: &Path, here: bool, short: bool) -> Result<ExitCode> {
    let mut report = Report::new();
    if here {
        cell(&mut report, "this runtime", cri, AgentOptions::default(), false, true).await?;
        return Ok(report.close());
    }
    ensure!(
        Version::ALL.iter().all(|version| version.is_here()),
        "the guest's two containerds are not here; --here takes the one that runs"
    );
    stop_the_guests().await?;
    let cells = [(Version::Next, true), (Version::Stable, true), (Version::Stable, false)];
    for (version, with_nri) in cells {
        // The newest with everything, and what holds containers instead.
        if short && (version, with_nri) == (Version::Stable, true) {
            continue;
        }
        let containerd = Containerd::start(version, with_nri).await?;
        let name = format!("{version:?}, {}", if with_nri { "NRI" } else { "no NRI, hold" });
        let options = AgentOptions {
            // With NRI alone the volumes are known in time; without it, who executes waits for them.
            unidentified: Some(if with_nri { "audit" } else { "hold" }),
            interfaces: containerd.nri.clone().map_or(Interfaces::WithoutNri, Interfaces::NriAt),
            ..AgentOptions::default()
        };
        // Images as volumes came with containerd 2.1.
        let newest = version == Version::Next;
        // That everything runs without a profile is the same with both.
        cell(&mut report, &name, &containerd.socket, options, newest, newest || !short).await?;
    }
    Ok(report.close())
}

/// What a container executes, and what the record must say.
struct Act {
    name: &'static str,
    program: &'static str,
    volume: &'static str,
    /// The path in the record.
    path: &'static str,
    allowed: bool,
}

const fn act(
    name: &'static str,
    program: &'static str,
    volume: &'static str,
    path: &'static str,
    allowed: bool,
) -> Act {
    Act { name, program, volume, path, allowed }
}

/// In the first container of the pod.
const FIRST: &[Act] = &[
    act("emptyDir on disk", "/tools/tool", "shared", "/tools/tool", true),
    act("emptyDir in memory", "/memory/tool", "memory", "/memory/tool", true),
    act("subPath of an emptyDir", "/sub/tool", "shared", "/sub/tool", true),
    act("the same file by its longer way", "/tools/below/tool", "shared", "/sub/tool", true),
    act("hostPath", "/host/tool", "/host", "/host/tool", true),
    act("another file of it", "/host/other", "/host", "/host/other", false),
    act("hostPath, read-only", "/readonly/tool", "/readonly", "/readonly/tool", false),
    act("/etc/hosts", "/etc/hosts", "/etc/hosts", "/etc/hosts", true),
    act("projected, below a link of the image", "/var/run/secrets/tool", "token", "/run/secrets/tool", true),
    act("a volume over a folder of the image", "/mnt/bin/workload", "scratch", "/mnt/bin/workload", false),
];
/// In the second, which has the same volume in another place.
const SECOND: &[Act] =
    &[act("shared between containers of a pod", "/other/tool", "shared", "/other/tool", false)];
const OF_AN_IMAGE: Act = act("image volume", "/image/usr/bin/third", "/image", "/image/usr/bin/third", true);

const PROFILE: &str =
    "apiVersion: palisade.dev/v1alpha1\nkind: Profile\nmetadata: {name: volumes, namespace: scenarios}\n\
spec:
  selector: {podSelector: {matchLabels: {app: volumes}}}
  mode: enforce
  exec:
    allow:
      - path: /usr/bin/workload
      - path: /usr/bin/attacker
      - path: /mnt/bin/workload
      - {path: /tools/**, from: \"volume:shared\"}
      - {path: /sub/tool, from: \"volume:shared\"}
      - {path: /memory/tool, from: \"volume:memory\"}
      - {path: /host/tool, from: \"volume:/host\"}
      - {path: /etc/hosts, from: \"volume:/etc/hosts\"}
      - {path: /run/secrets/*, from: \"volume:token\"}
      - {path: /image/**, from: \"volume:/image\"}
";

/// Folders as a kubelet makes them for one pod, removed at the end.
struct Kubelet {
    folder: tempfile::TempDir,
    uid: String,
    mounted: Vec<PathBuf>,
}

impl Kubelet {
    fn new(pod: &str) -> Result<Self> {
        // On the host's own disk: a tmpfs would be memory whatever is done with it.
        let folder = tempfile::tempdir_in("/var/lib")?;
        let mut kubelet = Self { folder, uid: format!("uid-{pod}"), mounted: Vec::new() };
        let program = which("palisade-fixture")?;
        for (plugin, name) in [
            ("empty-dir", "shared"),
            ("empty-dir", "memory"),
            ("empty-dir", "scratch"),
            ("projected", "token"),
        ] {
            let volume = kubelet.volume(plugin, name);
            fs::create_dir_all(&volume)?;
            if matches!(name, "memory" | "token") {
                mount(&["-t", "tmpfs", "tmpfs"], &volume)?;
                kubelet.mounted.push(volume.clone());
            }
            if name == "token" {
                // As the kubelet keeps what it replaces as a whole.
                fs::create_dir(volume.join("..2026_11_22_09_00_00.1"))?;
                fs::copy(&program, volume.join("..2026_11_22_09_00_00.1/tool"))?;
                symlink("..2026_11_22_09_00_00.1", volume.join("..data"))?;
                symlink("..data/tool", volume.join("tool"))?;
            } else {
                fs::copy(&program, volume.join("tool"))?;
            }
            let script = volume.join("script");
            fs::write(&script, "#!/usr/bin/workload payload\n")?;
            fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
        }
        let below = kubelet.volume("empty-dir", "shared").join("below");
        fs::create_dir(&below)?;
        fs::copy(&program, below.join("tool"))?;
        let sub_path = kubelet.at("volume-subpaths/shared/c-first/1");
        fs::create_dir_all(&sub_path)?;
        mount(&["--bind", &below.display().to_string()], &sub_path)?;
        kubelet.mounted.push(sub_path);
        fs::copy(&program, kubelet.volume("empty-dir", "scratch").join("workload"))?;
        fs::copy(&program, kubelet.at("etc-hosts"))?;
        for (folder, name) in [("host", "tool"), ("host", "other"), ("readonly", "tool")] {
            let host = kubelet.folder.path().join(folder);
            fs::create_dir_all(&host)?;
            fs::copy(&program, host.join(name))?;
        }
        Ok(kubelet)
    }

    fn at(&self, below: &str) -> PathBuf {
        self.folder.path().join("pods").join(&self.uid).join(below)
    }

    fn volume(&self, plugin: &str, name: &str) -> PathBuf {
        self.at(&format!("volumes/kubernetes.io~{plugin}/{name}"))
    }

    fn first(&self) -> Vec<Mount> {
        let bind = |host: PathBuf, container: &str| Mount {
            host_path: host.display().to_string(),
            container_path: container.to_owned(),
            ..Default::default()
        };
        let on_host = |name: &str| self.folder.path().join(name);
        vec![
            bind(self.volume("empty-dir", "shared"), "/tools"),
            bind(self.volume("empty-dir", "memory"), "/memory"),
            bind(self.volume("empty-dir", "scratch"), "/mnt/bin"),
            bind(self.at("volume-subpaths/shared/c-first/1"), "/sub"),
            bind(on_host("host"), "/host"),
            Mount { readonly: true, ..bind(on_host("readonly"), "/readonly") },
            bind(self.at("etc-hosts"), "/etc/hosts"),
            bind(self.volume("projected", "token"), "/var/run/secrets"),
        ]
    }

    fn second(&self) -> Vec<Mount> {
        vec![Mount {
            host_path: self.volume("empty-dir", "shared").display().to_string(),
            container_path: "/other".to_owned(),
            ..Default::default()
        }]
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        for mounted in &self.mounted {
            let _reported_by_the_folder = Command::new("umount").arg("--lazy").arg(mounted).status();
        }
    }
}

fn mount(words: &[&str], place: &Path) -> Result<()> {
    let status = Command::new("mount").args(words).arg(place).status().context("cannot start mount")?;
    ensure!(status.success(), "mount {words:?} {}: {status}", place.display());
    Ok(())
}

async fn cell(
    report: &mut Report,
    name: &str,
    cri: &Path,
    options: AgentOptions,
    with_image: bool,
    whole: bool,
) -> Result<()> {
    let runtime = Runtime::connect(cri);
    let mut node = Node::start(cri).await?;
    node.write_profile("volumes.yaml", PROFILE)?;
    node.start_agent(&options).await?;
    for (app, guarded) in [("volumes", true), ("free", false)].into_iter().take(1 + usize::from(whole)) {
        let pod = runtime.pod(&format!("pod-{app}"), app, "").await?;
        let kubelet = Kubelet::new(&format!("pod-{app}"))?;
        let stage = Stage { node: &node, runtime: &runtime, pod: &pod, kubelet: &kubelet, guarded };
        let title =
            |case: &str| format!("{name}: {case}{}", if guarded { "" } else { ", without a profile" });
        let mut volumes = kubelet.first();
        if with_image {
            volumes.push(Mount {
                container_path: "/image".to_owned(),
                readonly: true,
                image: Some(ImageSpec { image: WORKLOAD_IMAGE.to_owned(), ..Default::default() }),
                ..Default::default()
            });
        }
        let first = stage.start("c-first", &volumes).await?;
        let second = stage.start("c-second", &kubelet.second()).await?;
        for act in FIRST {
            report.case(&title(act.name), stage.carry_out(&first, act)).await;
        }
        for act in SECOND {
            report.case(&title(act.name), stage.carry_out(&second, act)).await;
        }
        if with_image {
            report.case(&title(OF_AN_IMAGE.name), stage.carry_out(&first, &OF_AN_IMAGE)).await;
        }
        report.case(&title("one volume in the place of another"), stage.rebound(&first)).await;
        report.case(&title("an entrypoint on a volume"), stage.entrypoint()).await;
        report.case(&title("an entrypoint that is a script on a volume"), stage.script()).await;
        if guarded {
            report.case(&title("the attestation names the volumes"), stage.attested(&first)).await;
            let gate = Gate::new(&kubelet.volume("empty-dir", "memory").join("gate"))?;
            let command = [
                "/usr/bin/attacker",
                "rebind",
                "/mnt/bin",
                "/tools",
                "/usr/bin/attacker",
                "after",
                "/memory/gate",
                "/tools/tool",
                "payload",
                "rebound-before",
            ];
            let volumes = kubelet.first();
            let spec = Spec { name: "c-rebound", command: &command, volumes: &volumes, ..Spec::default() };
            let rebound = runtime.create(&pod, &spec).await?;
            runtime.start(&rebound).await?;
            let table = format!("/proc/{}/mountinfo", runtime.pid(&rebound).await?);
            until("it has swapped its volumes", async || {
                let at_tools = fs::read_to_string(&table)?.matches(" /tools ").count();
                Ok((at_tools == 2).then_some(()))
            })
            .await?;
            // Containers that ran before the agent: what the runtime describes has its name again.
            node.stop_agent()?;
            node.start_agent(&options).await?;
            let stage = Stage { node: &node, runtime: &runtime, pod: &pod, kubelet: &kubelet, guarded };
            events::in_mode(&node, &first, "enforce").await?;
            report
                .case(&title("volumes swapped before the agent's restart"), stage.rebound_before(&gate))
                .await;
            // What is read anew is the same with both.
            for act in FIRST.iter().filter(|_| whole) {
                let title = title(&format!("after the agent's restart, {}", act.name));
                report.case(&title, stage.carry_out(&first, act)).await;
            }
        }
        runtime.remove_pod(&pod).await?;
    }
    report.case(&format!("{name}: the agent stops cleanly"), async { node.stop_agent() }).await;
    if report.failed() > 0 {
        println!("--- the agent's log\n{}", node.log("agent"));
    }
    Ok(())
}

struct Stage<'a> {
    node: &'a Node,
    runtime: &'a Runtime,
    pod: &'a Pod,
    kubelet: &'a Kubelet,
    /// Whether a profile names the pod: the control runs everything.
    guarded: bool,
}

impl Stage<'_> {
    async fn start(&self, name: &str, volumes: &[Mount]) -> Result<String> {
        let container = self.runtime.create(self.pod, &Spec { name, volumes, ..Spec::default() }).await?;
        self.runtime.start(&container).await?;
        events::in_mode(self.node, &container, if self.guarded { "enforce" } else { "none" }).await?;
        Ok(container)
    }

    async fn carry_out(&self, container: &str, act: &Act) -> Result<()> {
        let nonce = nonce("volume");
        let ended = self
            .runtime
            .exec(container, &["/usr/bin/attacker", "run", act.program, "payload", &nonce])
            .await?;
        let runs = act.allowed || !self.guarded;
        ensure!((ended.code == PAYLOAD_RAN) == runs, "it ended with {ended:?}");
        self.check(&nonce, act.volume, act.path, runs).await
    }

    async fn check(&self, nonce: &str, volume: &str, path: &str, runs: bool) -> Result<()> {
        let record = until("the record", async || {
            let found = events::payloads(self.node, nonce)?;
            Ok(found.into_iter().find(|record| record["exec"]["executable"] != "/usr/bin/attacker"))
        })
        .await?;
        let exec = &record["exec"];
        ensure!(exec["executable"] == path, "its path is {}", exec["executable"]);
        ensure!(exec["origin"] == format!("volume:{volume}"), "its origin is {}", exec["origin"]);
        let wanted = if runs { "allowed" } else { "denied" };
        ensure!(record["decision"]["verdict"] == wanted, "{record}");
        ensure!(record["container"]["labels"]["app"] != Value::Null, "whose it is is not said: {record}");
        Ok(())
    }

    /// What is mounted inside the container has the name that it had before.
    async fn rebound(&self, container: &str) -> Result<()> {
        let nonce = nonce("rebound");
        let words = ["/usr/bin/attacker", "rebind", "/mnt/bin", "/tools", "/tools/tool", "payload", &nonce];
        let ended = self.runtime.exec(container, &words).await?;
        ensure!((ended.code == PAYLOAD_RAN) != self.guarded, "it ended with {ended:?}");
        self.check(&nonce, "scratch", "/mnt/bin/tool", !self.guarded).await
    }

    /// The first thing that a container executes is on a volume: its name must be known by then.
    async fn entrypoint(&self) -> Result<()> {
        for (program, volume, allowed) in
            [("/tools/tool", "shared", true), ("/mnt/bin/tool", "scratch", false)]
        {
            let nonce = nonce("entrypoint");
            let runs = allowed || !self.guarded;
            let container = self.run_as_entrypoint(&[program, "payload", &nonce], runs).await?;
            self.check(&nonce, volume, program, runs).await?;
            self.runtime.remove_container(&container).await?;
        }
        Ok(())
    }

    /// The same for a script, which is on the record beside its interpreter.
    async fn script(&self) -> Result<()> {
        for (program, volume, allowed) in
            [("/tools/script", "shared", true), ("/mnt/bin/script", "scratch", false)]
        {
            let nonce = nonce("script");
            let runs = allowed || !self.guarded;
            let container = self.run_as_entrypoint(&[program, &nonce], runs).await?;
            let record = until("the record", async || {
                let records = events::query(self.node, &["--kind", "exec", "--container", &container])?;
                Ok(records.into_iter().find(|record| events::has_argument(record, &nonce)))
            })
            .await?;
            let exec = &record["exec"];
            let wanted = if runs { "allowed" } else { "denied" };
            ensure!(record["decision"]["verdict"] == wanted, "{record}");
            // Refused in its own pass it is the executable, let through it stands beside its interpreter.
            let named = |path: &str, origin: &str| {
                exec[path] == program && exec[origin] == format!("volume:{volume}")
            };
            ensure!(named("script", "script_origin") || named("executable", "origin"), "{record}");
            self.runtime.remove_container(&container).await?;
        }
        Ok(())
    }

    /// Starts a container with an entrypoint that must run, or must not, and returns it when it has ended.
    async fn run_as_entrypoint(&self, command: &[&str], runs: bool) -> Result<String> {
        let name = nonce("c");
        let volumes = self.kubelet.first();
        let spec = Spec { name: &name, command, volumes: &volumes, ..Spec::default() };
        let container = self.runtime.create(self.pod, &spec).await?;
        // The runtime may tell of an entrypoint that was refused.
        let started = self.runtime.start(&container).await;
        ensure!(!runs || started.is_ok(), "{started:?}");
        if started.is_ok() {
            let code = self.runtime.ended(&container).await?;
            ensure!((code == PAYLOAD_RAN) == runs, "{command:?} ended with {code}");
        }
        Ok(container)
    }

    /// A container that puts one of its volumes in the place of another before the agent comes gains nothing by it.
    async fn rebound_before(&self, gate: &Gate) -> Result<()> {
        gate.open().await?;
        let record = until("what it executed", async || {
            let records = events::query(self.node, &["--kind", "exec"])?;
            Ok(records.into_iter().find(|record| {
                events::has_argument(record, "rebound-before")
                    && record["exec"]["executable"] != "/usr/bin/attacker"
            }))
        })
        .await?;
        let exec = &record["exec"];
        ensure!(record["decision"]["verdict"] == "denied" && exec["origin"] == "volume:scratch", "{record}");
        ensure!(exec["executable"] == "/mnt/bin/tool", "{record}");
        Ok(())
    }

    async fn attested(&self, container: &str) -> Result<()> {
        let known = until("the volumes are attested", async || {
            let records = events::query(self.node, &["--kind", "coverage", "--container", container])?;
            Ok(records.into_iter().find(|record| record["coverage"]["volumes"][0].is_object()))
        })
        .await?;
        let volumes = known["coverage"]["volumes"].as_array().context("no volumes")?;
        for (name, place) in
            [("shared", "/tools"), ("shared", "/sub"), ("token", "/run/secrets"), ("/host", "/host")]
        {
            let found = volumes.iter().any(|volume| volume["name"] == name && volume["mount_point"] == place);
            ensure!(found, "{name} at {place} is not among {volumes:?}");
        }
        Ok(())
    }
}
