//! Palisade on this node: a collector and an agent in a folder of their own.

#![expect(unsafe_code, reason = "what a child does between fork and exec")]

use std::{
    cell::RefCell,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use palisade_transport::local::Purpose;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::net::{TcpStream, UnixStream};

use crate::cri::{until, until_within};

/// How long an agent may take to be in force: the verifier looks at millions of instructions, on emulated processors that others
/// share.
const START: Duration = Duration::from_secs(240);

/// Where a program is found on the PATH.
pub fn which(program: &str) -> Result<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
        .map(|folder| folder.join(program))
        .find(|path| path.exists())
        .with_context(|| format!("{program} is not on the PATH"))
}

/// Where the unified cgroup hierarchy is mounted.
pub fn cgroup_root() -> Result<PathBuf> {
    std::fs::read_to_string("/proc/self/mounts")?
        .lines()
        .find_map(|line| {
            let fields: Vec<&str> = line.split(' ').collect();
            (fields.get(2) == Some(&"cgroup2")).then(|| PathBuf::from(fields[1]))
        })
        .context("no cgroup v2 is mounted")
}

/// A running collector, and an agent when one was started.
pub struct Node {
    pub folder: tempfile::TempDir,
    /// Where it listens under TLS.
    pub collector_address: SocketAddr,
    collector: Option<Child>,
    agent: Option<Child>,
    cri: PathBuf,
    /// Folder of certificates that `palisade pki` made; without one there is no TLS, but unix sockets.
    pub tls: Option<PathBuf>,
    /// What is between agent and collector under TLS, if anything is.
    pub proxy: Option<SocketAddr>,
    /// Further lines of the collector's configuration.
    pub collector_settings: &'static str,
    /// Further fields of its sockets, each behind a comma.
    pub socket_settings: &'static str,
    /// The records that [`crate::events::payloads`] asked for last.
    pub execs: RefCell<Vec<Value>>,
}

/// How to start the agent.
#[derive(Clone, Default)]
pub struct AgentOptions {
    /// Program to start instead of the one on the PATH.
    pub program: Option<PathBuf>,
    /// Folder of objects for a test build of the agent.
    pub objects: Option<PathBuf>,
    /// The policy for containers that are not identified; the default where there is none.
    pub unidentified: Option<&'static str>,
    /// Which of the runtime's interfaces the agent has.
    pub interfaces: Interfaces,
    /// Whether engines without Kubernetes are asked, too.
    pub engines: bool,
    /// Whether enforcement is to end with the agent.
    pub unpinned: bool,
    /// A cgroup to start it in, which limits its memory.
    pub memory: Option<PathBuf>,
    /// Further lines of its configuration.
    pub settings: &'static str,
}

/// The runtime's interfaces, as far as the agent may use them.
#[derive(Clone, Default)]
pub enum Interfaces {
    #[default]
    All,
    WithoutNri,
    /// NRI through another socket.
    NriAt(PathBuf),
    /// The same, and nobody is asked besides.
    NriAlone(PathBuf),
    /// No runtime ever answers.
    None,
}

/// Where a runtime that has NRI keeps its socket.
const NRI: &str = "/var/run/nri/nri.sock";

impl Node {
    /// Starts a collector with an empty store.
    pub async fn start(cri: &Path) -> Result<Self> {
        let mut node = Self::without_collector(cri)?;
        node.start_collector().await?;
        Ok(node)
    }

    /// A node whose collector is not there yet.
    pub fn without_collector(cri: &Path) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        std::fs::create_dir(folder.path().join("profiles"))?;
        std::fs::create_dir(folder.path().join("store"))?;
        // Free at this moment; nothing else on a test node opens ports.
        let collector_address =
            TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?.local_addr()?;
        let cri = cri.to_owned();
        Ok(Self {
            folder,
            collector_address,
            collector: None,
            agent: None,
            cri,
            tls: None,
            proxy: None,
            collector_settings: "",
            socket_settings: "",
            execs: RefCell::default(),
        })
    }

    /// Starts the collector on what is in the store.
    pub async fn start_collector(&mut self) -> Result<()> {
        let log = std::fs::File::create(self.folder.path().join("collector.log"))?;
        let config = self.folder.path().join("collector.yaml");
        let doors = if self.tls.is_some() {
            let tls = self.tls_settings("collector", ", revoked: {}/revoked.pem");
            format!("listen: {}\n{tls}", self.collector_address)
        } else {
            format!("sockets: {{folder: {}{}}}\n", self.sockets().display(), self.socket_settings)
        };
        std::fs::write(&config, doors + self.collector_settings)?;
        let collector = Command::new("palisade-collector")
            .arg("--config")
            .arg(&config)
            .arg("--store")
            .arg(self.folder.path().join("store"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .context("cannot start palisade-collector")?;
        self.collector = Some(collector);
        until("the collector listens", async || {
            if let Some(status) = self.collector.as_mut().and_then(|child| child.try_wait().ok().flatten()) {
                bail!("the collector ended with {status}: {}", self.log("collector"));
            }
            let listens = if self.tls.is_some() {
                TcpStream::connect(self.collector_address).await.is_ok()
            } else {
                UnixStream::connect(self.socket(Purpose::Deliver)).await.is_ok()
                    && UnixStream::connect(self.socket(Purpose::Ask)).await.is_ok()
            };
            Ok(listens.then_some(()))
        })
        .await?;
        Ok(())
    }

    /// The lines of a configuration about TLS; `more` is added with the folder of certificates in it.
    fn tls_settings(&self, name: &str, more: &str) -> String {
        let Some(folder) = self.tls.as_ref().map(|folder| folder.display().to_string()) else {
            return String::new();
        };
        let more = more.replace("{}", &folder);
        format!(
            "tls: {{ca: {folder}/ca.pem, certificate: {folder}/{name}.pem, key: {folder}/{name}-key.pem{more}}}\n"
        )
    }

    fn sockets(&self) -> PathBuf {
        self.folder.path().join("sockets")
    }

    /// A socket of the collector without TLS.
    pub fn socket(&self, purpose: Purpose) -> PathBuf {
        self.sockets().join(purpose.file())
    }

    /// How agents or readers find the collector.
    pub fn address(&self, purpose: Purpose) -> String {
        if self.tls.is_none() {
            return purpose.address(&self.sockets());
        }
        let proxy = self.proxy.filter(|_| purpose == Purpose::Deliver);
        format!("https://{}", proxy.unwrap_or(self.collector_address))
    }

    /// Kills the collector with SIGKILL.
    pub fn kill_collector(&mut self) -> Result<()> {
        if let Some(mut collector) = self.collector.take() {
            collector.kill()?;
            collector.wait()?;
        }
        Ok(())
    }

    /// Writes a profile; the agent takes it within a second.
    pub fn write_profile(&self, name: &str, text: &str) -> Result<()> {
        std::fs::write(self.folder.path().join("profiles").join(name), text)?;
        Ok(())
    }

    /// Starts the agent and waits until it is in force. Returns the tier.
    pub async fn start_agent(&mut self, options: &AgentOptions) -> Result<String> {
        self.spawn_agent(options)?;
        until_within(START, "the agent is in force", async || {
            let log = self.log("agent");
            if let Some(status) = self.agent.as_mut().and_then(|agent| agent.try_wait().ok().flatten()) {
                bail!("the agent ended with {status}: {log}");
            }
            let line = log.lines().find(|line| line.contains("in force"));
            Ok(line.map(|line| if line.contains("fallback") { "fallback" } else { "full" }.to_owned()))
        })
        .await
    }

    /// Starts the agent and does not wait for anything.
    pub fn spawn_agent(&mut self, options: &AgentOptions) -> Result<()> {
        let pins = if options.unpinned { PathBuf::from("none") } else { self.pins() };
        let folder = self.folder.path();
        let config = folder.join("agent.yaml");
        let socket = self.cri.display();
        let (nri, others) = match &options.interfaces {
            Interfaces::All => (NRI.to_owned(), socket.to_string()),
            Interfaces::WithoutNri => (String::new(), socket.to_string()),
            Interfaces::NriAt(path) => (path.display().to_string(), socket.to_string()),
            Interfaces::NriAlone(path) => (path.display().to_string(), "/nowhere/cri.sock".to_owned()),
            Interfaces::None => (String::new(), "/nowhere/cri.sock".to_owned()),
        };
        let engines = if options.engines { "" } else { ", docker: [], storage: []" };
        let runtime = format!(
            "runtimes: {{nri: [{nri}], cri: [{others}], containerd: [{others}]{engines}}}\nunidentified: {}\n{}",
            options.unidentified.unwrap_or("audit"),
            options.settings
        );
        let tls = self.tls_settings("node-test-node", "");
        std::fs::write(
            &config,
            format!(
                "node: test-node\ncollector: {}\nprofiles: {}\npins: {}\nsocket: {}\nspool: {{path: {}}}\n{runtime}{tls}",
                self.address(Purpose::Deliver),
                folder.join("profiles").display(),
                pins.display(),
                folder.join("agent.sock").display(),
                folder.join("spool").display(),
            ),
        )?;
        let log = std::fs::File::create(folder.join("agent.log"))?;
        let program = options.program.clone().unwrap_or_else(|| PathBuf::from("palisade-agent"));
        let mut command = Command::new(&program);
        command.arg("--config").arg(&config).arg("run").env("NO_COLOR", "1");
        if let Some(objects) = &options.objects {
            command.env("PALISADE_TEST_OBJECTS", objects);
        }
        if let Some(cgroup) = &options.memory {
            let procs = cgroup.join("cgroup.procs");
            // SAFETY: between fork and exec one file is written, whose name was allocated before.
            unsafe {
                command.pre_exec(move || std::fs::write(&procs, "0"));
            }
        }
        let agent = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        self.agent = Some(agent);
        Ok(())
    }

    /// What the agent says of itself.
    pub fn status(&self) -> Result<Value> {
        let output = Command::new("palisade-agent")
            .arg("--config")
            .arg(self.folder.path().join("agent.yaml"))
            .args(["status", "--json"])
            .stdin(Stdio::null())
            .output()
            .context("cannot start palisade-agent")?;
        ensure!(!output.stdout.is_empty(), "no status: {}", String::from_utf8_lossy(&output.stderr));
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// The folders of the sets that are pinned.
    pub fn sets(&self) -> Result<Vec<PathBuf>> {
        let mut sets: Vec<PathBuf> = std::fs::read_dir(self.pins())?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.is_dir())
            .collect();
        sets.sort();
        Ok(sets)
    }

    /// Where this node's agent keeps what outlives it: apart from every other node's.
    pub fn pins(&self) -> PathBuf {
        // A bpffs keeps names with dots for itself.
        let name = self.folder.path().file_name().unwrap_or_default().to_string_lossy().replace('.', "");
        Path::new("/sys/fs/bpf").join(format!("palisade-{name}"))
    }

    /// Stops the agent that runs, and takes everything out of force that this node's agents put there unless
    /// `keep_enforcing`.
    pub fn uninstall(&mut self, keep_enforcing: bool) -> Result<String> {
        let config = self.folder.path().join("agent.yaml");
        let output = Command::new("palisade-agent")
            .arg("--config")
            .arg(config)
            .arg("uninstall")
            .args(keep_enforcing.then_some("--keep-enforcing"))
            .stdin(Stdio::null())
            .output()
            .context("cannot start palisade-agent")?;
        if !output.status.success() {
            bail!("uninstall: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        if let Some(mut agent) = self.agent.take() {
            agent.wait()?;
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Stops the agent with SIGTERM and waits for it.
    pub fn stop_agent(&mut self) -> Result<()> {
        if let Some(mut agent) = self.agent.take() {
            kill_process(Pid::from_child(&agent), Signal::TERM)?;
            let status = agent.wait()?;
            if !status.success() {
                bail!("the agent ended with {status}: {}", self.log("agent"));
            }
        }
        Ok(())
    }

    /// Kills the agent with SIGKILL.
    pub fn kill_agent(&mut self) -> Result<()> {
        if let Some(mut agent) = self.agent.take() {
            agent.kill()?;
            agent.wait()?;
        }
        Ok(())
    }

    /// Whether the agent's process is stopped by a signal.
    pub fn agent_is_stopped(&self) -> Result<bool> {
        let pid = self.agent_pid().context("no agent runs")?;
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        Ok(status.lines().any(|line| line.starts_with("State:\tT")))
    }

    /// Takes leave of an agent that somebody else has killed.
    pub fn agent_was_killed(&mut self) -> Result<()> {
        use std::os::unix::process::ExitStatusExt as _;
        let status = self.agent.take().context("no agent runs")?.wait()?;
        anyhow::ensure!(status.signal() == Some(Signal::KILL.as_raw()), "the agent ended with {status}");
        Ok(())
    }

    /// Whether `palisade-agent ready` says `expected` and succeeds as it should; waits until it does. That of the build that runs: another
    /// one may not be able to read what it says.
    pub async fn says_of_itself(&self, expected: &str, ready: bool) -> Result<()> {
        let running = self.agent_pid().map(|pid| PathBuf::from(format!("/proc/{pid}/exe")));
        let program = running.unwrap_or_else(|| PathBuf::from("palisade-agent"));
        until(expected, async || {
            let output = Command::new(&program)
                .arg("--config")
                .arg(self.folder.path().join("agent.yaml"))
                .arg("ready")
                .stdin(Stdio::null())
                .output()?;
            let said = String::from_utf8_lossy(&output.stdout);
            Ok((said.starts_with(expected) && output.status.success() == ready).then_some(()))
        })
        .await
    }

    /// Waits until the agent claims that what profiles say is enforced.
    pub async fn is_ready(&self) -> Result<()> {
        self.says_of_itself("ready: what profiles say is enforced", true).await
    }

    /// Sends the agent a signal.
    pub fn signal_agent(&self, signal: Signal) -> Result<()> {
        let agent = self.agent.as_ref().context("no agent runs")?;
        Ok(kill_process(Pid::from_child(agent), signal)?)
    }

    pub fn agent_pid(&self) -> Option<u32> {
        self.agent.as_ref().map(Child::id)
    }

    pub fn collector_pid(&self) -> Option<u32> {
        self.collector.as_ref().map(Child::id)
    }

    /// How many containers are under a policy, or known to have none.
    pub fn identified(&self) -> Result<usize> {
        let records = self.palisade(&["coverage", "--json"])?;
        Ok(records.lines().filter(|line| line.contains("\"mode\":\"enforce\"")).count())
    }

    /// The log of "agent" or "collector".
    pub fn log(&self, name: &str) -> String {
        std::fs::read_to_string(self.folder.path().join(format!("{name}.log"))).unwrap_or_default()
    }

    /// Runs `palisade` against this collector and returns what it prints.
    pub fn palisade(&self, arguments: &[&str]) -> Result<String> {
        let output =
            self.palisade_command(arguments, Stdio::piped()).output().context("cannot start palisade")?;
        if !output.status.success() {
            bail!("palisade {arguments:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// The same for what is too much to be held: it goes to `output`.
    pub fn palisade_into(&self, arguments: &[&str], output: Stdio) -> Result<()> {
        let status = self.palisade_command(arguments, output).status().context("cannot start palisade")?;
        ensure!(status.success(), "palisade {arguments:?} failed");
        Ok(())
    }

    fn palisade_command(&self, arguments: &[&str], output: Stdio) -> Command {
        let mut command = Command::new("palisade");
        command.args(arguments);
        if let Some(folder) = &self.tls {
            command.arg("--ca").arg(folder.join("ca.pem"));
            command.arg("--certificate").arg(folder.join("reader-ana.pem"));
            command.arg("--key").arg(folder.join("reader-ana-key.pem"));
        }
        command.args(["--collector", &self.address(Purpose::Ask)]).stdin(Stdio::null()).stdout(output);
        command
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // No scenario but one expects that.
        for line in self.log("agent").lines().filter(|line| line.contains("self-probe fails")) {
            println!("   {line}");
        }
        if self.pins().exists()
            && let Err(error) = self.uninstall(false)
        {
            eprintln!("{error:#}");
        }
        for child in self.agent.iter_mut().chain(&mut self.collector) {
            let _gone_already = child.kill();
            let _reaped = child.wait();
        }
    }
}
