//! Finding out what a container is, from whoever knows.

use std::{path::PathBuf, sync::Arc, time::Duration};

use tokio::sync::{Semaphore, mpsc};
use tonic::transport::Channel;

use super::{Identity, containerd, cri, docker, storage};
use crate::config::Runtimes;

/// Waits between attempts: quick at first, since a container's entrypoint is near, then patient.
const FIRST_WAIT: Duration = Duration::from_millis(5);
const LONGEST_WAIT: Duration = Duration::from_secs(2);
/// Containers that runtimes are asked about at a time.
const AT_ONCE: usize = 64;

/// Everybody that may know a container.
pub struct Sources {
    pub cri: Vec<Channel>,
    pub containerd: Vec<(PathBuf, Channel)>,
    docker: Vec<PathBuf>,
    storage: Vec<PathBuf>,
    /// Questions at a time.
    permits: Semaphore,
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
            permits: Semaphore::new(AT_ONCE),
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

/// Asks after `first` and then until somebody knows the container, and sends what he says. Ends by itself when nobody listens or the
/// handle is dropped.
pub async fn identify(
    sources: Arc<Sources>,
    slot: u64,
    id: String,
    found: mpsc::Sender<(u64, Identity)>,
    first: Duration,
) {
    tokio::time::sleep(first).await;
    let mut wait = FIRST_WAIT;
    loop {
        let mut said = "nobody knows such a container".to_owned();
        let answer = {
            // Thousands of containers wait here when the agent starts; a question takes much more memory than its wait.
            let _permit = sources.permits.acquire().await;
            Box::pin(sources.ask(&id, &mut said)).await
        };
        if let Some(identity) = answer {
            let _agent_stops = found.send((slot, identity)).await;
            return;
        }
        if found.is_closed() {
            return;
        }
        tokio::time::sleep(wait).await;
        if wait < LONGEST_WAIT && wait * 2 >= LONGEST_WAIT {
            tracing::warn!(container = id, error = said, "no runtime says what this is; asking on");
        }
        wait = (wait * 2).min(LONGEST_WAIT);
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
        tokio::time::sleep(LONGEST_WAIT).await;
    }
}
