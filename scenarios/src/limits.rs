//! A node at its limits: thousands of containers under a thousand profiles, maps that are full, an agent with little memory.
//! Verdicts stay right, which `profile` says independently; what is recorded is delivered or counted.
//!
//! The containers are cgroups with a container's name, and a runtime of the scenario's own tells what they are: only what is
//! executed in them is real.

#![expect(unsafe_code, reason = "what a child does between fork and exec")]

use std::{
    fs,
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use palisade_abi::codes::{origin, session, verdict};
use palisade_profile::{
    document::{self, Profile},
    exec::evaluate::{Execution, evaluate},
    image, policy,
    selector::ContainerFacts,
};
use rustix::mount::{MountFlags, UnmountFlags};

use crate::{
    attacks::{PAYLOAD_RAN, nonce},
    cri::until_within,
    events, fake_runtime,
    node::{AgentOptions, Interfaces, Node, cgroup_root, which},
    report::Report,
};

pub struct Options {
    pub containers: usize,
    pub profiles: usize,
    /// Executions that are compared.
    pub executions: usize,
    /// The agent's memory in MiB, kernel maps included.
    pub memory: u64,
}

/// How long thousands of containers may take to be identified.
const PATIENCE: Duration = Duration::from_secs(600);
const SIGKILL: i32 = 9;

pub async fn run(options: &Options) -> Result<ExitCode> {
    let mut report = Report::new();
    let scene = Scene::new(options)?;
    let mut node = Node::start(&scene.socket).await?;
    let runtime = fake_runtime::serve(&scene.socket, options.profiles)?;
    let mut profiles = Vec::new();
    for number in 0..options.profiles {
        let text = profile(number);
        node.write_profile(&format!("p-{number}.yaml"), &text)?;
        profiles.extend(document::parse("generated", &text).map_err(|problems| {
            anyhow::anyhow!(problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))
        })?);
    }
    // Half of them are found, half are seen to come.
    let half = options.containers / 2;
    scene.begin(0..half)?;
    let there = containers_below(&cgroup_root()?) - half;
    let settings = format!(
        "maps: {{slots: {}, rules: {}, globBytes: {}}}\n",
        // One is the self-probe's, and some may be there already.
        options.containers + 1 + there,
        options.profiles * 2,
        options.profiles * 2048,
    );
    let agent = AgentOptions {
        unidentified: Some("deny"),
        interfaces: Interfaces::WithoutNri,
        settings: settings.leak(),
        memory: scene.memory.clone(),
        ..AgentOptions::default()
    };
    let begun = Instant::now();
    node.start_agent(&agent).await?;
    println!("   {half} containers found, in force after {:.1} s", begun.elapsed().as_secs_f64());
    scene.begin(half..options.containers)?;
    report
        .case(
            &format!("{} containers are identified, under {} profiles", options.containers, options.profiles),
            async {
                let mut last = 0;
                until_within(PATIENCE, "every container is under its profile", async || {
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    last = node.identified()?;
                    Ok((last >= options.containers).then_some(()))
                })
                .await
                .with_context(|| format!("{last} were"))?;
                println!("   after {:.1} s", begun.elapsed().as_secs_f64());
                Ok(())
            },
        )
        .await;
    report
        .case(
            &format!("{} executions: verdicts are those of the profiles", options.executions),
            compared(&node, &scene, options, &profiles),
        )
        .await;
    report
        .case("a container for which there is no room is refused everything", beyond(&node, &scene, options))
        .await;
    report.case("the agent kept within its memory", async { scene.kept_within_memory(&node) }).await;
    report.case("the agent stops cleanly", async { node.stop_agent() }).await;
    if report.failed() > 0 {
        let log = node.log("agent");
        let lines: Vec<&str> = log.lines().collect();
        println!("--- the end of the agent's log\n{}", lines[lines.len().saturating_sub(60)..].join("\n"));
    }
    drop(runtime);
    Ok(report.close())
}

/// Allows one path exactly and some by a pattern.
fn profile(number: usize) -> String {
    format!(
        "apiVersion: palisade.dev/v1alpha1\nkind: ClusterProfile\nmetadata: {{name: p-{number}}}\nspec:\n  selector: \
         {{containers: [{{name: \"c-{number}-*\"}}]}}\n  mode: enforce\n  exec:\n    allow:\n      - path: \
         /usr/bin/p-{number}\n      - path: /usr/bin/*-{}\n",
        number / 2
    )
}

/// What the scenario has made on the node.
struct Scene {
    folder: tempfile::TempDir,
    socket: PathBuf,
    cgroups: PathBuf,
    memory: Option<PathBuf>,
}

impl Scene {
    fn new(options: &Options) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let lower = folder.path().join("lower/usr/bin");
        for path in
            [&lower, &folder.path().join("upper"), &folder.path().join("work"), &folder.path().join("root")]
        {
            fs::create_dir_all(path)?;
        }
        let fixture = lower.join("fixture");
        fs::copy(which("palisade-fixture")?, &fixture)?;
        for number in 0..options.profiles {
            fs::hard_link(&fixture, lower.join(format!("p-{number}")))?;
        }
        let place = |name: &str| folder.path().join(name).display().to_string();
        let layers =
            format!("lowerdir={},upperdir={},workdir={}", place("lower"), place("upper"), place("work"));
        rustix::mount::mount(
            "overlay",
            folder.path().join("root"),
            "overlay",
            MountFlags::empty(),
            Some(std::ffi::CString::new(layers)?.as_c_str()),
        )
        .context("cannot mount an overlay")?;
        let top = cgroup_root()?;
        let cgroups = top.join(nonce("palisade-limits"));
        fs::create_dir(&cgroups)?;
        let socket = folder.path().join("runtime.sock");
        Ok(Self { memory: limited(&top, options.memory), folder, socket, cgroups })
    }

    /// The containers' cgroups.
    fn begin(&self, numbers: std::ops::Range<usize>) -> Result<()> {
        for number in numbers {
            fs::create_dir(self.cgroups.join(fake_runtime::id(number)))?;
        }
        Ok(())
    }

    /// Executes `path` in a container as its runtime would; returns whether it ran.
    fn execute(&self, number: usize, path: &str, nonce: &str) -> Result<bool> {
        let procs = self.cgroups.join(fake_runtime::id(number)).join("cgroup.procs");
        let root = self.folder.path().join("root");
        let mut command = Command::new(path);
        command.args(["payload", nonce]).stdin(Stdio::null());
        // SAFETY: between fork and exec only system calls are made, with what was allocated before.
        unsafe {
            command.pre_exec(move || {
                fs::write(&procs, "0")?;
                rustix::process::chroot(&root)?;
                Ok(rustix::process::chdir("/")?)
            });
        }
        match command.status() {
            Ok(status) if status.code() == Some(PAYLOAD_RAN) => Ok(true),
            Ok(status) if status.signal() == Some(SIGKILL) => Ok(false),
            Ok(status) => bail!("{path} in container {number} ended with {status}"),
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => Ok(false),
            Err(error) => Err(error).with_context(|| format!("{path} in container {number}")),
        }
    }

    fn kept_within_memory(&self, node: &Node) -> Result<()> {
        let status = fs::read_to_string(format!("/proc/{}/status", node.agent_pid().context("no agent")?))?;
        let of_its_own = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or_default();
        println!("   the agent's own memory at most {}", of_its_own.trim());
        let Some(memory) = &self.memory else {
            println!("   this node has no memory controller in its unified hierarchy: not limited");
            return Ok(());
        };
        let peak = fs::read_to_string(memory.join("memory.peak")).unwrap_or_default();
        let events = fs::read_to_string(memory.join("memory.events"))?;
        let value = |name: &str| {
            events.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok()).unwrap_or(0)
        };
        println!(
            "   with its maps at most {:.1} MiB, at the limit {} times",
            peak.trim().parse::<f64>().unwrap_or(0.0) / f64::from(1 << 20),
            value("max ")
        );
        ensure!(value("oom_kill ") == 0, "it was killed for want of memory: {events}");
        Ok(())
    }
}

/// Cgroups with a container's name.
fn containers_below(folder: &Path) -> usize {
    let below = fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok);
    below
        .filter(|entry| entry.path().is_dir())
        .map(|entry| {
            let name = entry.file_name();
            let digits = name.as_encoded_bytes().iter().filter(|byte| byte.is_ascii_hexdigit()).count();
            if digits >= fake_runtime::id(0).len() { 1 } else { containers_below(&entry.path()) }
        })
        .sum()
}

/// A cgroup that limits the agent's memory, where the unified hierarchy can.
fn limited(top: &Path, mebibytes: u64) -> Option<PathBuf> {
    let controllers = fs::read_to_string(top.join("cgroup.controllers")).ok()?;
    if !controllers.split_whitespace().any(|controller| controller == "memory") {
        return None;
    }
    fs::write(top.join("cgroup.subtree_control"), "+memory").ok()?;
    let folder = top.join(nonce("palisade-memory"));
    fs::create_dir(&folder).ok()?;
    fs::write(folder.join("memory.max"), (mebibytes << 20).to_string()).ok()?;
    Some(folder)
}

impl Drop for Scene {
    fn drop(&mut self) {
        let made = fs::read_dir(&self.cgroups).into_iter().flatten().filter_map(Result::ok);
        for entry in made.filter(|entry| entry.path().is_dir()) {
            let _said_by_the_last = fs::remove_dir(entry.path());
        }
        for folder in self.memory.iter().chain([&self.cgroups]) {
            if let Err(error) = fs::remove_dir(folder) {
                eprintln!("{} stays: {error}", folder.display());
            }
        }
        if let Err(error) = rustix::mount::unmount(self.folder.path().join("root"), UnmountFlags::DETACH) {
            eprintln!("the overlay stays mounted: {error}");
        }
    }
}

/// Executions all over the containers, allowed and not; each outcome and record is what `profile` says.
async fn compared(node: &Node, scene: &Scene, options: &Options, profiles: &[Profile]) -> Result<()> {
    let (mut allowed, mut denied) = (0, 0);
    let mut expected = Vec::new();
    for turn in 0..options.executions {
        // Strides without a common factor reach every part.
        let number = turn * 7919 % options.containers;
        let own = number % options.profiles;
        let path = match turn % 4 {
            0 => format!("/usr/bin/p-{own}"),
            1 => format!("/usr/bin/p-{}", own / 2),
            2 => format!("/usr/bin/p-{}", (own + 1) % options.profiles),
            _ => "/usr/bin/fixture".to_owned(),
        };
        let facts = ContainerFacts {
            name: fake_runtime::name(number, options.profiles),
            ..ContainerFacts::default()
        };
        let policy = policy::unite(&profiles[own..=own], &facts).context("no profile names it")?;
        let execution = Execution {
            path: path.as_bytes(),
            origin: origin::IMAGE,
            session: session::WORKLOAD,
            failure: 0,
            caller: None,
            arguments: None,
        };
        let decision = evaluate(&image::compile(&policy)?, &execution);
        let nonce = format!("limits-{turn}");
        let ran = scene.execute(number, &path, &nonce)?;
        ensure!(
            ran == (decision.verdict == verdict::ALLOWED),
            "{path} in {}: it {}, and the profile says {:?}",
            facts.name,
            if ran { "ran" } else { "did not run" },
            verdict::name(decision.verdict)
        );
        *(if ran { &mut allowed } else { &mut denied }) += 1;
        expected.push((fake_runtime::id(number), nonce, verdict::name(decision.verdict).unwrap_or_default()));
    }
    ensure!(allowed > 0 && denied > 0, "{allowed} allowed, {denied} denied");
    println!("   {allowed} allowed, {denied} denied");
    until_within(PATIENCE, "every execution is on record", async || {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let records = events::query(node, &["--kind", "exec"])?;
        let missing = expected.iter().filter(|(id, nonce, verdict)| {
            !records.iter().any(|record| {
                events::has_argument(record, nonce)
                    && record["container"]["id"] == id.as_str()
                    && record["decision"]["verdict"] == *verdict
            })
        });
        Ok((missing.count() == 0).then_some(()))
    })
    .await
}

/// One more than there is room for: it is under the policy for what is not identified, and the agent says that there is no room.
async fn beyond(node: &Node, scene: &Scene, options: &Options) -> Result<()> {
    let number = options.containers;
    scene.begin(number..number + 1)?;
    let own = number % options.profiles;
    ensure!(!scene.execute(number, &format!("/usr/bin/p-{own}"), "limits-beyond")?, "it ran");
    until_within(PATIENCE, "the agent says that there is no room", async || {
        tokio::time::sleep(Duration::from_millis(200)).await;
        Ok(node.log("agent").contains("slot-map-full").then_some(()))
    })
    .await
}
