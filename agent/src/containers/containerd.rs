//! containerd's own interface: it knows a container before Kubernetes' interface does, also one that is no pod's,
//! and tells who enters one.

use std::collections::BTreeMap;

use anyhow::Result;
use palisade_profile::selector::ContainerFacts;
use palisade_proto::runtime::{
    containers::{Container, GetContainerRequest, containers_client::ContainersClient},
    events::{SubscribeRequest, TaskCreate, TaskExecStarted, events_client::EventsClient},
    images::{GetImageRequest, images_client::ImagesClient},
    namespaces::{ListNamespacesRequest, namespaces_client::NamespacesClient},
    tasks::{ListTasksRequest, tasks_client::TasksClient},
};
use prost::Message as _;
use serde_json::Value;
use tokio::sync::mpsc;
use tonic::{Code, Request, metadata::MetadataValue, transport::Channel};

use super::{Identity, kubernetes, mounts};

/// containerd's namespace of pods.
const PODS: &str = "k8s.io";
/// containerd's namespace of Docker, which has a name of its own for each container.
const DOCKER: &str = "moby";

/// What the runtime tells while it happens.
#[derive(Debug, PartialEq, Eq)]
pub enum RuntimeEvent {
    /// A container's first process is made and waits for its start.
    Created { id: String, pid: u32 },
    /// Somebody entered; `pid` is the root of the session.
    Entered { exec_id: String, pid: u32 },
}

fn within<T>(namespace: &str, message: T) -> Result<Request<T>> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("containerd-namespace", MetadataValue::try_from(namespace)?);
    Ok(request)
}

/// Namespaces, Kubernetes' first.
async fn namespaces(channel: &Channel) -> Result<Vec<String>> {
    let answer = NamespacesClient::new(channel.clone()).list(ListNamespacesRequest {}).await?.into_inner();
    let mut names: Vec<String> = answer.namespaces.into_iter().map(|namespace| namespace.name).collect();
    names.sort_by_key(|name| name != PODS);
    Ok(names)
}

/// What containerd says of the container `id`. `None` when it has none, or Docker knows it better.
pub async fn ask(channel: Channel, id: &str) -> Result<Option<Identity>> {
    for namespace in namespaces(&channel).await? {
        if namespace == DOCKER {
            continue;
        }
        let Some(container) = get(&channel, &namespace, id).await? else { continue };
        let spec = container
            .spec
            .as_ref()
            .and_then(|spec| serde_json::from_slice(&spec.value).ok())
            .unwrap_or(Value::Null);
        let mut identity = identity(&container, &spec);
        // The pod's labels are in the metadata of its sandbox.
        let of_pod = spec["annotations"]["io.kubernetes.cri.sandbox-id"].as_str();
        if let Some(sandbox) = of_pod.filter(|_| !identity.sandbox) {
            let Some(sandbox) = get(&channel, &namespace, sandbox).await? else { return Ok(None) };
            let (labels, annotations) = pod_metadata(&sandbox);
            identity.facts.labels = kubernetes::labels(labels);
            identity.probes =
                kubernetes::probes(&identity.facts.name, &annotations, &texts(&spec["annotations"]));
        }
        identity.image_digest = digest(&channel, &namespace, &container.image).await.unwrap_or_default();
        return Ok(Some(identity));
    }
    Ok(None)
}

async fn get(channel: &Channel, namespace: &str, id: &str) -> Result<Option<Container>> {
    let request = within(namespace, GetContainerRequest { id: id.to_owned() })?;
    match ContainersClient::new(channel.clone()).get(request).await {
        Ok(answer) => Ok(answer.into_inner().container),
        Err(status) if status.code() == Code::NotFound || status.code() == Code::InvalidArgument => Ok(None),
        Err(status) => Err(status.into()),
    }
}

async fn digest(channel: &Channel, namespace: &str, image: &str) -> Option<String> {
    let request = within(namespace, GetImageRequest { name: image.to_owned() }).ok()?;
    let answer = ImagesClient::new(channel.clone()).get(request).await.ok()?.into_inner();
    Some(answer.image?.target?.digest)
}

/// A container by its own description alone.
fn identity(container: &Container, spec: &Value) -> Identity {
    let annotations = texts(&spec["annotations"]);
    let annotation = |key: &str| annotations.get(key).cloned().unwrap_or_default();
    let sandbox = annotation("io.kubernetes.cri.container-type") == "sandbox";
    let of_pod = annotations.contains_key("io.kubernetes.cri.sandbox-name");
    let name = if of_pod { annotation("io.kubernetes.cri.container-name") } else { container.id.clone() };
    let labels = if sandbox { pod_metadata(container).0 } else { container.labels.clone() };
    let named = kubernetes::image_of(&annotations);
    Identity {
        facts: ContainerFacts {
            namespace: annotation("io.kubernetes.cri.sandbox-namespace"),
            pod: annotation("io.kubernetes.cri.sandbox-name"),
            labels: kubernetes::labels(labels),
            name,
            image: if named.is_empty() && !sandbox { container.image.clone() } else { named },
        },
        pod_uid: annotation("io.kubernetes.cri.sandbox-uid"),
        sandbox,
        mounts: mounts::of_spec(spec),
        by: "containerd",
        ..Identity::default()
    }
}

/// Labels and annotations that Kubernetes gave the pod of a sandbox, from the metadata that containerd keeps with it.
fn pod_metadata(sandbox: &Container) -> (BTreeMap<String, String>, BTreeMap<String, String>) {
    let metadata: Value = sandbox
        .extensions
        .get("io.cri-containerd.sandbox.metadata")
        .and_then(|any| serde_json::from_slice(&any.value).ok())
        .unwrap_or(Value::Null);
    let config = &metadata["Metadata"]["Config"];
    (texts(&config["labels"]), texts(&config["annotations"]))
}

fn texts(object: &Value) -> BTreeMap<String, String> {
    let entries = object.as_object().into_iter().flatten();
    entries.filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned()))).collect()
}

/// Containers that have a process now, with its number.
pub async fn running(channel: Channel) -> Result<Vec<(String, u32)>> {
    let mut found = Vec::new();
    for namespace in namespaces(&channel).await? {
        let request = within(&namespace, ListTasksRequest { filter: String::new() })?;
        let answer = TasksClient::new(channel.clone()).list(request).await?.into_inner();
        found.extend(answer.tasks.into_iter().map(|task| (task.id, task.pid)));
    }
    Ok(found)
}

/// Passes on what the runtime tells until the connection ends or nobody listens. `patient` is a connection without a
/// deadline: the answer to a subscription begins with the first event.
pub async fn follow(patient: Channel, channel: Channel, events: &mpsc::Sender<RuntimeEvent>) -> Result<()> {
    let filters = ["topic==\"/tasks/create\"", "topic==\"/tasks/exec-started\""].map(str::to_owned).to_vec();
    let mut client = EventsClient::new(patient);
    let subscribed = async { anyhow::Ok(client.subscribe(SubscribeRequest { filters }).await?.into_inner()) };
    let listed = async {
        for (id, pid) in running(channel).await? {
            events.send(RuntimeEvent::Created { id, pid }).await?;
        }
        Ok(())
    };
    let (mut stream, ()) = tokio::try_join!(subscribed, listed)?;
    while let Some(envelope) = stream.message().await? {
        let Some(event) = envelope.event else { continue };
        let bytes = event.value.as_slice();
        let event = match envelope.topic.as_str() {
            "/tasks/create" => {
                let TaskCreate { container_id, pid } = TaskCreate::decode(bytes)?;
                RuntimeEvent::Created { id: container_id, pid }
            }
            "/tasks/exec-started" => {
                let TaskExecStarted { exec_id, pid, container_id: _ } = TaskExecStarted::decode(bytes)?;
                RuntimeEvent::Entered { exec_id, pid }
            }
            _ => continue,
        };
        events.send(event).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any(value: &str) -> prost_types::Any {
        prost_types::Any { type_url: String::new(), value: value.as_bytes().to_vec() }
    }

    #[test]
    fn a_sandbox_is_identified_before_it_runs() {
        let spec: Value = serde_json::from_str(
            r#"{"annotations":{"io.kubernetes.cri.container-type":"sandbox","io.kubernetes.cri.sandbox-name":"web-1",
                "io.kubernetes.cri.sandbox-namespace":"shop","io.kubernetes.cri.sandbox-uid":"u1"}}"#,
        )
        .unwrap();
        let metadata = r#"{"Version":"v1","Metadata":{"ID":"s1","Config":{"labels":{"app":"web","io.kubernetes.pod.name":"web-1"},
                          "annotations":{"palisade.dev/probes":"{}"}}}}"#;
        let container = Container {
            id: "s1".to_owned(),
            image: "registry.example/pause:1".to_owned(),
            extensions: BTreeMap::from([("io.cri-containerd.sandbox.metadata".to_owned(), any(metadata))]),
            ..Default::default()
        };
        let found = identity(&container, &spec);
        assert!(found.sandbox);
        assert_eq!((found.facts.namespace.as_str(), found.facts.pod.as_str()), ("shop", "web-1"));
        assert_eq!(found.facts.labels, BTreeMap::from([("app".to_owned(), "web".to_owned())]));
        assert_eq!(pod_metadata(&container).1.len(), 1);
    }

    #[test]
    fn a_container_without_a_pod_is_named_by_its_id() {
        let container = Container {
            id: "job".to_owned(),
            image: "docker.io/library/alpine:3".to_owned(),
            labels: BTreeMap::from([("team".to_owned(), "edge".to_owned())]),
            ..Default::default()
        };
        let found = identity(&container, &Value::Null);
        assert_eq!(found.facts.name, "job");
        assert_eq!(found.facts.image, "docker.io/library/alpine:3");
        assert_eq!(found.facts.labels.len(), 1);
        assert!(!found.sandbox && found.facts.pod.is_empty());
    }
}
