//! The native tier: containerd on this machine's own kernel, in folders of its own, apart from any that runs here.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use clap::Args;

use crate::{
    build,
    images::{self, Image},
    paths, shell,
    vm::{Stream, copy},
};

#[derive(Args)]
pub struct Options {
    /// Arguments of palisade-scenarios
    #[arg(last = true, required = true)]
    arguments: Vec<String>,
}

pub fn run(options: &Options) -> Result<ExitCode> {
    let binaries = build::run(&build::Options { release: true })?;
    let containerd = Containerd::start(&images::make(&binaries)?)?;
    let mut words = vec!["palisade-scenarios"];
    words.extend(options.arguments.iter().map(String::as_str));
    let (code, _) = containerd.run(&binaries, &words, Stream::Plain)?;
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)))
}

/// A private containerd with the test images.
pub struct Containerd {
    child: Child,
    pub socket: PathBuf,
    state: tempfile::TempDir,
    _lock: std::fs::File,
}

impl Containerd {
    /// Starts it and imports what is not imported yet.
    pub fn start(images: &[Image]) -> Result<Self> {
        if !rustix::process::geteuid().is_root() {
            bail!("containers are started natively, which needs root; `--vm` does it in a virtual machine");
        }
        let state = tempfile::Builder::new().prefix("palisade-").tempdir_in("/run")?;
        let root = paths::cache("containerd")?;
        // Two of them on one folder would wait for each other's database without saying so.
        let lock = std::fs::File::create(root.join("palisade.lock"))?;
        if rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_err() {
            eprintln!("waiting for another native run to end");
            rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive)?;
        }
        let socket = state.path().join("containerd.sock");
        let config = state.path().join("config.toml");
        std::fs::write(
            &config,
            format!(
                "version = 2\nroot = {root:?}\nstate = {:?}\n[grpc]\n  address = {socket:?}\n\
                 [plugins.\"io.containerd.grpc.v1.cri\"]\n  sandbox_image = \"palisade.test/pause:1\"\n  \
                 restrict_oom_score_adj = true\n  \
                 [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\n    runtime_type = \"io.containerd.runc.v2\"\n",
                state.path().join("state")
            ),
        )?;
        mount_bpffs()?;
        let log = std::fs::File::create(state.path().join("log"))?;
        let child = Command::new("containerd")
            .arg("--config")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot start containerd")?;
        let mut containerd = Self { child, socket, state, _lock: lock };
        let begun = Instant::now();
        while shell::read(&mut containerd.ctr(&["version"])).is_err() {
            if begun.elapsed() > Duration::from_secs(60) || containerd.child.try_wait()?.is_some() {
                let log = std::fs::read_to_string(containerd.state.path().join("log")).unwrap_or_default();
                bail!("containerd does not answer:\n{log}");
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        let present = containerd.root_marker(&root);
        for image in images {
            let id =
                image.archive.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
            let marker = present.join(&id);
            if !marker.exists() {
                let archive = image.archive.display().to_string();
                shell::read(&mut containerd.ctr(&["images", "import", &archive]))
                    .with_context(|| format!("importing {}", image.name))?;
                std::fs::create_dir_all(&present)?;
                for other in std::fs::read_dir(&present)?.flatten() {
                    if std::fs::read_to_string(other.path()).is_ok_and(|name| name == image.name) {
                        std::fs::remove_file(other.path())?;
                    }
                }
                std::fs::write(marker, &image.name)?;
            }
        }
        Ok(containerd)
    }

    fn root_marker(&self, root: &Path) -> PathBuf {
        root.join("palisade-imported")
    }

    fn ctr(&self, words: &[&str]) -> Command {
        let mut command = Command::new("ctr");
        command
            .arg("--address")
            .arg(&self.socket)
            .args(["--namespace", "k8s.io", "--connect-timeout", "2s"])
            .args(words);
        command
    }

    /// Runs one of Palisade's binaries against it, with what it prints as `stream` says, and returns its exit code.
    pub fn run(&self, binaries: &Path, words: &[&str], stream: Stream) -> Result<(i32, String)> {
        let path = format!("{}:{}", binaries.display(), std::env::var("PATH").unwrap_or_default());
        let mut child = Command::new(binaries.join(words[0]))
            .args(&words[1..])
            .arg("--cri")
            .arg(&self.socket)
            .env("PATH", path)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", words[0]))?;
        let mut stdout = child.stdout.take().context("no output")?;
        let output = copy(&mut stdout, stream, &std::sync::atomic::AtomicBool::new(false))?;
        let status = child.wait()?;
        Ok((status.code().unwrap_or(1), String::from_utf8_lossy(&output).into_owned()))
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // Containers of an interrupted run; their shims outlive containerd otherwise.
        if let Ok(listed) = shell::read(&mut self.ctr(&["tasks", "ls", "-q"])) {
            for task in listed.lines() {
                let _best_effort =
                    shell::read(&mut self.ctr(&["tasks", "kill", "--signal", "SIGKILL", task]));
                let _as_above = shell::read(&mut self.ctr(&["tasks", "delete", "--force", task]));
            }
        }
        if let Ok(listed) = shell::read(&mut self.ctr(&["containers", "ls", "-q"])) {
            for container in listed.lines() {
                let _as_above = shell::read(&mut self.ctr(&["containers", "rm", container]));
            }
        }
        let _gone_already = rustix::process::kill_process(
            rustix::process::Pid::from_child(&self.child),
            rustix::process::Signal::TERM,
        );
        let _reaped = self.child.wait();
        // What the shims left mounted in the state folder.
        if let Ok(mounts) = std::fs::read_to_string("/proc/self/mounts") {
            let prefix = self.state.path().display().to_string();
            for line in mounts.lines().rev() {
                if let Some(place) = line.split(' ').nth(1).filter(|place| place.starts_with(&prefix)) {
                    let _best_effort = rustix::mount::unmount(place, rustix::mount::UnmountFlags::DETACH);
                }
            }
        }
    }
}

/// What outlives the agent is kept on a bpffs, which a machine without systemd may not have mounted.
fn mount_bpffs() -> Result<()> {
    const PLACE: &str = "/sys/fs/bpf";
    let mounts = std::fs::read_to_string("/proc/self/mounts").context("cannot read /proc/self/mounts")?;
    if mounts.lines().any(|line| line.split(' ').skip(1).take(2).eq([PLACE, "bpf"])) {
        return Ok(());
    }
    rustix::mount::mount("bpf", PLACE, "bpf", rustix::mount::MountFlags::empty(), None)
        .with_context(|| format!("cannot mount a bpffs at {PLACE}"))
}
