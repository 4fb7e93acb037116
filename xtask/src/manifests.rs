//! The manifests that are shipped, checked against the types of Kubernetes: every field is one that Kubernetes
//! knows, and has the right type.

use k8s_openapi::{
    api::{
        apps::v1::DaemonSet,
        core::v1::{ConfigMap, Container, Namespace, ServiceAccount},
    },
    serde::de::DeserializeOwned,
};
use serde_json::Value;

const PALISADE: &str = include_str!("../../deploy/kubernetes/palisade.yaml");

/// Reads a document as `T`; returns it, or every field that `T` does not know.
fn typed<T: DeserializeOwned>(document: &Value) -> Result<T, String> {
    let mut unknown = Vec::new();
    let read = serde_ignored::deserialize(document, |path| unknown.push(path.to_string()));
    match read {
        Ok(value) if unknown.is_empty() => Ok(value),
        Ok(_) => Err(format!("unknown fields: {unknown:?}")),
        Err(error) => Err(error.to_string()),
    }
}

fn documents() -> Vec<Value> {
    serde_saphyr::from_multiple(PALISADE).unwrap()
}

fn daemonset() -> Value {
    documents().into_iter().find(|document| document["kind"] == "DaemonSet").unwrap()
}

#[test]
fn every_field_is_one_that_kubernetes_knows() {
    for document in documents() {
        let result = match document["kind"].as_str() {
            Some("Namespace") => typed::<Namespace>(&document).map(drop),
            Some("ServiceAccount") => typed::<ServiceAccount>(&document).map(drop),
            Some("ConfigMap") => typed::<ConfigMap>(&document).map(drop),
            Some("DaemonSet") => typed::<DaemonSet>(&document).map(drop),
            other => Err(format!("nobody checks {other:?}")),
        };
        assert_eq!(result, Ok(()), "{document}");
    }
}

/// The check itself: a misspelt field and a wrong type are found.
#[test]
fn what_kubernetes_would_refuse_is_found() {
    let mut misspelt = daemonset();
    misspelt["spec"]["template"]["spec"]["hostPid"] = Value::Bool(true);
    assert!(typed::<DaemonSet>(&misspelt).unwrap_err().contains("hostPid"));
    let mut wrong = daemonset();
    wrong["spec"]["template"]["spec"]["hostPID"] = Value::String("yes".to_owned());
    assert!(typed::<DaemonSet>(&wrong).is_err());
}

#[test]
fn no_container_is_privileged_and_every_right_is_explained() {
    let set: DaemonSet = typed(&daemonset()).unwrap();
    let pod = set.spec.unwrap().template.spec.unwrap();
    for Container { name, security_context, volume_mounts, .. } in pod.containers {
        let security = security_context.unwrap();
        assert_eq!(security.privileged, Some(false), "{name}");
        let capabilities = security.capabilities.unwrap();
        assert_eq!(capabilities.drop, Some(vec!["ALL".to_owned()]), "{name}");
        for capability in capabilities.add.into_iter().flatten() {
            let explained = PALISADE.lines().any(|line| line.starts_with('#') && line.contains(&capability));
            assert!(explained, "{capability} is asked for without a reason");
        }
        for mount in volume_mounts.into_iter().flatten() {
            let volumes = pod.volumes.iter().flatten();
            assert!(volumes.clone().any(|volume| volume.name == mount.name), "no volume {}", mount.name);
        }
    }
}

fn configuration(file: &str) -> String {
    let map = documents()
        .into_iter()
        .find(|document| document["kind"] == "ConfigMap" && document["metadata"]["name"] == "palisade")
        .unwrap();
    map["data"][file].as_str().unwrap().to_owned()
}

/// What the manifest configures is what agent and collector read: a field that they refuse keeps the pod from starting.
#[test]
fn the_configuration_in_the_manifest_has_known_fields_only() {
    for (file, example) in [
        ("agent.yaml", include_str!("../../deploy/examples/agent.yaml")),
        ("collector.yaml", include_str!("../../deploy/examples/collector.yaml")),
    ] {
        for line in configuration(file).lines() {
            let field = line.split(':').next().unwrap();
            let known =
                example.lines().any(|known| known.trim_start_matches("# ").starts_with(&format!("{field}:")));
            assert!(known, "{field} is not among the fields of deploy/examples/{file}");
        }
    }
}

/// Agent and collector meet in a folder that is in the pod and nowhere else: a hostPath would give it to whatever mounts that.
#[test]
fn agent_and_collector_share_the_folder_of_the_sockets() {
    const FOLDER: &str = "/run/palisade/collector";
    assert!(configuration("agent.yaml").contains(&format!("collector: unix://{FOLDER}/deliver.sock")));
    assert!(configuration("collector.yaml").contains(&format!("sockets: {{folder: {FOLDER}}}")));
    let set: DaemonSet = typed(&daemonset()).unwrap();
    let pod = set.spec.unwrap().template.spec.unwrap();
    let mounted = pod.containers.iter().map(|container| {
        let mounts = container.volume_mounts.iter().flatten();
        mounts.filter(|mount| mount.mount_path == FOLDER).map(|mount| mount.name.clone()).collect::<Vec<_>>()
    });
    let mounted: Vec<_> = mounted.collect();
    assert_eq!(mounted, [["sockets"], ["sockets"]]);
    let volume = pod.volumes.into_iter().flatten().find(|volume| volume.name == "sockets").unwrap();
    assert!(volume.empty_dir.is_some());
}
