//! Finding out what a container is, from whoever knows.

use std::{path::PathBuf, time::Duration};

use tokio::sync::mpsc;
use tonic::transport::Channel;

use super::{Identity, containerd, cri, docker, storage};
use crate::config::Runtimes;

mod questions;

pub use questions::Questions;

/// How long a containerd that is gone is left alone.
const RECONNECT: Duration = Duration::from_secs(2);

/// Everybody that may know a container.
pub struct Sources {
    pub cri: Vec<Channel>,
    pub containerd: Vec<(PathBuf, Channel)>,
    docker: Vec<PathBuf>,
    storage: Vec<PathBuf>,
}

impl Sources {
    /// Connections are made when they are needed, so a runtime that starts later is found.
    pub fn new(runtimes: &Runtimes) -> Self {
        Self {
            cri: runtimes.cri.iter().map(|socket| cri::connect(socket)).collect(),
            containerd: runtimes
                .containerd
                .iter()
                .map(|socket| (socket.clone(), cri::connect(socket)))
                .collect(),
            docker: runtimes.docker.clone(),
            storage: runtimes.storage.clone(),
        }
    }

    /// Asks everybody once. Kubernetes' word counts most, and containerd's comes first: it knows a pod's sandbox
    /// before it runs. On failure the last complaint is in `said`.
    async fn ask(&self, id: &str, said: &mut String) -> Option<Identity> {
        let mut note = |result: anyhow::Result<Option<Identity>>| match result {
            Ok(found) => found,
            Err(error) => {
                *said = format!("{error:#}");
                None
            }
        };
        for channel in &self.cri {
            if let Some(identity) = note(cri::ask(channel.clone(), id).await) {
                return Some(identity);
            }
        }
        for (socket, channel) in &self.containerd {
            if socket.exists()
                && let Some(identity) = note(containerd::ask(channel.clone(), id).await)
            {
                return Some(identity);
            }
        }
        for socket in self.docker.iter().filter(|socket| socket.exists()) {
            if let Some(identity) = note(docker::ask(socket, id).await) {
                return Some(identity);
            }
        }
        self.storage.iter().find_map(|root| note(storage::ask(root, id)))
    }
}

/// Follows a containerd for ever.
pub async fn follow(socket: PathBuf, channel: Channel, events: mpsc::Sender<containerd::RuntimeEvent>) {
    while !events.is_closed() {
        if socket.exists()
            && let Err(error) =
                containerd::follow(cri::connect_patiently(&socket), channel.clone(), &events).await
        {
            tracing::debug!(socket = %socket.display(), error = format!("{error:#}"), "containerd's events end");
        }
        tokio::time::sleep(RECONNECT).await;
    }
}
