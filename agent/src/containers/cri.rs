//! Asking the container runtime what a container is, over the Kubernetes runtime interface.

use std::{collections::BTreeMap, path::Path, time::Duration};

use anyhow::{Context as _, Result};
use k8s_cri::v1::{
    ContainerFilter, ContainerStatusRequest, ImageSpec, ImageStatusRequest, ListContainersRequest,
    PodSandboxStatusRequest, VersionRequest, image_service_client::ImageServiceClient,
    runtime_service_client::RuntimeServiceClient,
};
use palisade_profile::selector::ContainerFacts;
use palisade_transport::local;
use serde_json::Value;
use tonic::transport::{Channel, Endpoint};

use super::{Identity, kubernetes, mounts};

/// Longest wait for one answer.
const DEADLINE: Duration = Duration::from_secs(10);

/// Connects to the runtime at `socket` when it is needed; every answer has a deadline.
pub fn connect(socket: &Path) -> Channel {
    lazily(Endpoint::from_static(local::ANY).timeout(DEADLINE), socket)
}

/// The same without a deadline for answers, for what is followed as it happens.
pub fn connect_patiently(socket: &Path) -> Channel {
    lazily(Endpoint::from_static(local::ANY), socket)
}

fn lazily(endpoint: Endpoint, socket: &Path) -> Channel {
    endpoint.connect_timeout(DEADLINE).connect_with_connector_lazy(local::Connector::new(socket))
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

/// One question. `None` when the runtime does not know the id.
pub async fn ask(channel: Channel, id: &str) -> Result<Option<Identity>> {
    let mut runtime = RuntimeServiceClient::new(channel.clone());
    let filter = ContainerFilter { id: id.to_owned(), ..Default::default() };
    let listed = runtime.list_containers(ListContainersRequest { filter: Some(filter) }).await?.into_inner();
    let Some(container) = listed.containers.into_iter().find(|container| container.id == id) else {
        return Ok(sandbox(&mut runtime, id).await?.map(|(identity, _)| identity));
    };
    // Without its pod a container would pass for one that no profile names.
    let Some((pod, annotations)) = sandbox(&mut runtime, &container.pod_sandbox_id).await? else {
        return Ok(None);
    };
    let request = ContainerStatusRequest { container_id: id.to_owned(), verbose: true };
    let status = runtime.container_status(request).await?.into_inner();
    let verbose: Value =
        status.info.get("info").and_then(|text| serde_json::from_str(text).ok()).unwrap_or(Value::Null);
    let mounts = mounts::of_spec(&verbose["runtimeSpec"]);
    let spec = container.image.unwrap_or_default();
    let image =
        if spec.user_specified_image.is_empty() { spec.image.clone() } else { spec.user_specified_image };
    let (name, digest) = image_names(channel, &container.image_ref, &image).await?;
    let own_name = container.metadata.map(|metadata| metadata.name).unwrap_or_default();
    let probes = kubernetes::probes(&own_name, &annotations, &container.annotations.into_iter().collect());
    Ok(Some(Identity {
        facts: ContainerFacts { name: own_name, image: name, ..pod.facts },
        pod_uid: pod.pod_uid,
        image_digest: digest,
        sandbox: false,
        by: "cri",
        probes,
        mounts,
    }))
}

/// What the runtime says of the pod sandbox `id`, and the pod's annotations; `None` when there is none.
async fn sandbox(
    runtime: &mut RuntimeServiceClient<Channel>,
    id: &str,
) -> Result<Option<(Identity, BTreeMap<String, String>)>> {
    let request = PodSandboxStatusRequest { pod_sandbox_id: id.to_owned(), verbose: false };
    let status = match runtime.pod_sandbox_status(request).await {
        Ok(answer) => answer.into_inner().status,
        Err(status) if status.code() == tonic::Code::NotFound => return Ok(None),
        Err(status) => return Err(status.into()),
    };
    let Some(status) = status else { return Ok(None) };
    let metadata = status.metadata.unwrap_or_default();
    let identity = Identity {
        facts: ContainerFacts {
            namespace: metadata.namespace,
            pod: metadata.name,
            labels: kubernetes::labels(status.labels),
            name: String::new(),
            image: String::new(),
        },
        pod_uid: metadata.uid,
        sandbox: true,
        by: "cri",
        ..Identity::default()
    };
    Ok(Some((identity, status.annotations.into_iter().collect())))
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
