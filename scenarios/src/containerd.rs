//! A containerd of this scenario's own: either version of the guest, with or without NRI, stopped and started at
//! will.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::{Context as _, Result, bail};
use k8s_cri::v1::{VersionRequest, runtime_service_client::RuntimeServiceClient};
use rustix::process::{Pid, Signal, kill_process};

use crate::cri::{channel, until};

/// The two that the guest has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// Debian's: 1.7.
    Stable,
    /// The newer one beside it: 2.x.
    Next,
}

impl Version {
    pub const ALL: [Self; 2] = [Self::Stable, Self::Next];

    fn folder(self) -> &'static str {
        match self {
            Self::Stable => "/usr/bin",
            Self::Next => "/opt/containerd-next/usr/bin",
        }
    }

    fn store(self) -> &'static str {
        match self {
            Self::Stable => "/var/lib/containerd",
            Self::Next => "/var/lib/containerd-next",
        }
    }

    /// Whether this machine has it, with the images of the scenarios.
    pub fn is_here(self) -> bool {
        Path::new(self.folder()).join("containerd").exists() && Path::new(self.store()).exists()
    }
}

/// A containerd in folders of its own, but on the store that has the images.
pub struct Containerd {
    version: Version,
    child: Option<Child>,
    folder: tempfile::TempDir,
    pub socket: PathBuf,
    /// Where plugins connect; absent without NRI.
    pub nri: Option<PathBuf>,
}

impl Containerd {
    /// Starts it; whoever holds the store must have ended.
    pub async fn start(version: Version, with_nri: bool) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let socket = folder.path().join("containerd.sock");
        let nri = with_nri.then(|| folder.path().join("nri.sock"));
        let mut containerd = Self { version, child: None, folder, socket, nri };
        containerd.configure()?;
        containerd.launch().await?;
        Ok(containerd)
    }

    fn configure(&self) -> Result<()> {
        let at = |name: &str| self.folder.path().join(name);
        let handler = |name: &str, program: &str| {
            format!(
                "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.{name}]\n  \
                 runtime_type = \"io.containerd.runc.v2\"\n  \
                 [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.{name}.options]\n    \
                 BinaryName = \"{program}\"\n    SystemdCgroup = false\n"
            )
        };
        let nri = match &self.nri {
            Some(socket) => format!("disable = false\n  socket_path = {socket:?}"),
            None => "disable = true".to_owned(),
        };
        let text = format!(
            "version = 2\nroot = {:?}\nstate = {:?}\n[grpc]\n  address = {:?}\n\
             [plugins.\"io.containerd.grpc.v1.cri\"]\n  sandbox_image = \"palisade.test/pause:1\"\n{}{}{}\
             [plugins.\"io.containerd.nri.v1.nri\"]\n  {nri}\n",
            self.version.store(),
            at("state"),
            self.socket,
            handler("runc", "/usr/sbin/runc"),
            handler("runc-next", "/opt/runc-next/usr/sbin/runc"),
            handler("crun", "/usr/bin/crun"),
        );
        Ok(std::fs::write(at("config.toml"), text)?)
    }

    /// Starts the daemon and waits until it answers.
    pub async fn launch(&mut self) -> Result<()> {
        let log = std::fs::File::options().create(true).append(true).open(self.folder.path().join("log"))?;
        let path = format!("{}:{}", self.version.folder(), std::env::var("PATH").unwrap_or_default());
        let child = Command::new(Path::new(self.version.folder()).join("containerd"))
            .arg("--config")
            .arg(self.folder.path().join("config.toml"))
            .env("PATH", path)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot start containerd")?;
        self.child = Some(child);
        until("containerd answers", async || {
            if let Some(status) = self.child.as_mut().and_then(|child| child.try_wait().ok().flatten()) {
                bail!("containerd ended with {status}: {}", self.log());
            }
            let request = VersionRequest { version: String::new() };
            let answer = RuntimeServiceClient::new(channel(&self.socket)).version(request).await;
            Ok(answer.ok().map(|answer| answer.into_inner()))
        })
        .await
        .map(|version| println!("   {} {}", version.runtime_name, version.runtime_version))
    }

    /// Ends the daemon; containers live on.
    pub fn stop(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            kill_process(Pid::from_child(&child), Signal::TERM)?;
            child.wait()?;
        }
        Ok(())
    }

    pub fn log(&self) -> String {
        let log = std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ended_already = self.stop();
    }
}

/// Ends the containerd that the guest's first process started, so that its store is free.
pub async fn stop_the_guests() -> Result<()> {
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        let name = std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        if name.trim() == "containerd"
            && let Some(process) = Pid::from_raw(pid)
        {
            kill_process(process, Signal::TERM)?;
            until("the guest's containerd ends", async || {
                Ok((!Path::new(&format!("/proc/{pid}/exe")).exists()).then_some(()))
            })
            .await?;
        }
    }
    Ok(())
}
