//! Asking the container runtime what a container is, over the Kubernetes runtime interface.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};
use hyper_util::rt::TokioIo;
use k8s_cri::v1::{
    ContainerFilter, ImageSpec, ImageStatusRequest, ListContainersRequest, PodSandboxStatusRequest,
    VersionRequest, image_service_client::ImageServiceClient, runtime_service_client::RuntimeServiceClient,
};
use palisade_profile::selector::ContainerFacts;
use tokio::{net::UnixStream, sync::mpsc};
use tonic::transport::{Channel, Endpoint, Uri};

use super::Identity;

/// Longest wait for one answer.
const DEADLINE: Duration = Duration::from_secs(10);
/// Waits between attempts: quick at first, since a container's entrypoint is near, then patient.
const FIRST_WAIT: Duration = Duration::from_millis(5);
const LONGEST_WAIT: Duration = Duration::from_secs(2);

/// Connects to the runtime at `socket`.
pub fn connect(socket: &Path) -> Channel {
    let path: PathBuf = socket.to_owned();
    // The URI is demanded by the interface and not used: the connector knows the socket.
    Endpoint::from_static("http://runtime")
        .connect_timeout(DEADLINE)
        .timeout(DEADLINE)
        .connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move { Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(path).await?)) }
        }))
}

/// Name and version of the runtime at `socket`.
pub async fn version(socket: &Path) -> Result<String> {
    let answer = RuntimeServiceClient::new(connect(socket))
        .version(VersionRequest { version: String::new() })
        .await
        .with_context(|| format!("{} does not answer", socket.display()))?
        .into_inner();
    Ok(format!("{} {}", answer.runtime_name, answer.runtime_version))
}

/// Asks until the runtime knows the container, then sends what it says. Ends by itself when nobody listens or the
/// handle is dropped.
pub async fn identify(channels: Vec<Channel>, slot: u64, id: String, found: mpsc::Sender<(u64, Identity)>) {
    let mut wait = FIRST_WAIT;
    loop {
        let mut said = "it knows no such container".to_owned();
        for channel in &channels {
            match ask(channel.clone(), &id).await {
                Ok(Some(identity)) => {
                    let _agent_stops = found.send((slot, identity)).await;
                    return;
                }
                Ok(None) => {}
                Err(error) => said = format!("{error:#}"),
            }
        }
        if found.is_closed() {
            return;
        }
        tokio::time::sleep(wait).await;
        if wait < LONGEST_WAIT && wait * 2 >= LONGEST_WAIT {
            tracing::warn!(container = id, error = said, "the runtime does not say what this is; asking on");
        }
        wait = (wait * 2).min(LONGEST_WAIT);
    }
}

/// One question. `None` when the runtime does not know the id.
async fn ask(channel: Channel, id: &str) -> Result<Option<Identity>> {
    let mut runtime = RuntimeServiceClient::new(channel.clone());
    let filter = ContainerFilter { id: id.to_owned(), ..Default::default() };
    let listed = runtime.list_containers(ListContainersRequest { filter: Some(filter) }).await?.into_inner();
    let Some(container) = listed.containers.into_iter().find(|container| container.id == id) else {
        return sandbox(&mut runtime, id).await;
    };
    // Without its pod a container would pass for one that no profile names.
    let Some(pod) = sandbox(&mut runtime, &container.pod_sandbox_id).await? else { return Ok(None) };
    let spec = container.image.unwrap_or_default();
    let image =
        if spec.user_specified_image.is_empty() { spec.image.clone() } else { spec.user_specified_image };
    let (name, digest) = image_names(channel, &container.image_ref, &image).await?;
    Ok(Some(Identity {
        facts: ContainerFacts {
            name: container.metadata.map(|metadata| metadata.name).unwrap_or_default(),
            image: name,
            ..pod.facts
        },
        pod_uid: pod.pod_uid,
        image_digest: digest,
        sandbox: false,
    }))
}

/// What the runtime says of the pod sandbox `id`; `None` when there is none.
async fn sandbox(runtime: &mut RuntimeServiceClient<Channel>, id: &str) -> Result<Option<Identity>> {
    let request = PodSandboxStatusRequest { pod_sandbox_id: id.to_owned(), verbose: false };
    let status = match runtime.pod_sandbox_status(request).await {
        Ok(answer) => answer.into_inner().status,
        Err(status) if status.code() == tonic::Code::NotFound => return Ok(None),
        Err(status) => return Err(status.into()),
    };
    let Some(status) = status else { return Ok(None) };
    let metadata = status.metadata.unwrap_or_default();
    let labels: BTreeMap<String, String> =
        status.labels.into_iter().filter(|(key, _)| !key.starts_with("io.kubernetes.")).collect();
    Ok(Some(Identity {
        facts: ContainerFacts {
            namespace: metadata.namespace,
            pod: metadata.name,
            labels,
            name: String::new(),
            image: String::new(),
        },
        pod_uid: metadata.uid,
        image_digest: String::new(),
        sandbox: true,
    }))
}

/// The image as people name it, and the digest of its manifest (of its configuration where the runtime knows no
/// better).
async fn image_names(channel: Channel, reference: &str, named: &str) -> Result<(String, String)> {
    let request = ImageStatusRequest {
        image: Some(ImageSpec { image: reference.to_owned(), ..Default::default() }),
        verbose: false,
    };
    let image =
        ImageServiceClient::new(channel).image_status(request).await?.into_inner().image.unwrap_or_default();
    let is_id = named.starts_with("sha256:") || named.is_empty();
    let name = if is_id { image.repo_tags.first().map_or(named, String::as_str) } else { named };
    let digest = image
        .repo_digests
        .first()
        .and_then(|digest| digest.rsplit_once('@'))
        .map_or(reference, |(_, digest)| digest);
    Ok((name.to_owned(), digest.to_owned()))
}
