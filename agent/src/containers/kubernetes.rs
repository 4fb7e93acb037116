//! What Kubernetes and its runtimes write into labels and annotations.

use std::collections::BTreeMap;

use palisade_profile::selector::ContainerFacts;
use palisade_proto::runtime::nri;
use serde_json::Value;

use super::{Identity, mounts, nri::Described};

/// Labels of the kubelet's and of containerd's own, which no author wrote.
const OWN_LABELS: &[&str] = &["io.kubernetes.", "io.cri-containerd."];
/// Annotations that name the image: containerd's and CRI-O's.
const IMAGE: &[&str] = &["io.kubernetes.cri.image-name", "io.kubernetes.cri-o.ImageName"];
/// A container's handler before its end, which the kubelet hands to the runtime.
const PRE_STOP: &str = "io.kubernetes.container.preStopHandler";
/// The manifest as `kubectl apply` keeps it, on pods that were applied themselves.
const APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";
/// The commands of a pod's probes, for pods that a controller made: `{"container": [["cmd", "arg"], …]}`.
const PROBES: &str = "palisade.dev/probes";

/// Labels without the machinery's own.
pub fn labels(all: impl IntoIterator<Item = (String, String)>) -> BTreeMap<String, String> {
    all.into_iter().filter(|(key, _)| !OWN_LABELS.iter().any(|own| key.starts_with(own))).collect()
}

/// A pod's sandbox as NRI describes it.
pub fn of_pod(pod: &nri::PodSandbox) -> Described {
    let facts = ContainerFacts {
        namespace: pod.namespace.clone(),
        pod: pod.name.clone(),
        labels: labels(pod.labels.clone()),
        name: String::new(),
        image: String::new(),
    };
    let identity =
        Identity { facts, pod_uid: pod.uid.clone(), sandbox: true, by: "nri", ..Identity::default() };
    Described { id: pod.id.clone(), identity }
}

/// A container as NRI describes it.
pub fn of_nri(pod: &nri::PodSandbox, container: &nri::Container) -> Described {
    let image = container.image.clone().unwrap_or_default();
    // The annotation has the name as the pod has it; the newer field may be spelt out.
    let annotated = image_of(&container.annotations);
    let name = if annotated.is_empty() { image.name } else { annotated };
    let mut identity = of_pod(pod).identity;
    identity.facts.name.clone_from(&container.name);
    identity.facts.image = name;
    identity.image_digest = image.digest;
    identity.sandbox = false;
    identity.probes = probes(&container.name, &pod.annotations, &container.annotations);
    identity.mounts = mounts::of_nri(&container.mounts);
    Described { id: container.id.clone(), identity }
}

/// The image that the annotations name; empty when none does.
pub fn image_of(annotations: &BTreeMap<String, String>) -> String {
    IMAGE.iter().find_map(|key| annotations.get(*key)).cloned().unwrap_or_default()
}

/// The commands that a pod declares as probes and lifecycle handlers of one of its containers.
pub fn probes(
    container: &str,
    pod: &BTreeMap<String, String>,
    own: &BTreeMap<String, String>,
) -> Vec<Vec<String>> {
    let parsed = |text: Option<&String>| text.and_then(|text| serde_json::from_str::<Value>(text).ok());
    let mut found: Vec<Vec<String>> = Vec::new();
    if let Some(handler) = parsed(own.get(PRE_STOP)) {
        found.extend(command(&handler));
    }
    if let Some(declared) = parsed(pod.get(PROBES)) {
        found.extend(declared[container].as_array().into_iter().flatten().filter_map(words));
    }
    if let Some(manifest) = parsed(pod.get(APPLIED)) {
        let of_pod = &manifest["spec"]["containers"];
        for spec in of_pod.as_array().into_iter().flatten().filter(|spec| spec["name"] == container) {
            for probe in ["livenessProbe", "readinessProbe", "startupProbe"] {
                found.extend(command(&spec[probe]));
            }
            for handler in ["postStart", "preStop"] {
                found.extend(command(&spec["lifecycle"][handler]));
            }
        }
    }
    found.retain(|command| !command.is_empty());
    found
}

fn command(handler: &Value) -> Option<Vec<String>> {
    words(&handler["exec"]["command"])
}

fn words(list: &Value) -> Option<Vec<String>> {
    list.as_array()?.iter().map(|word| word.as_str().map(str::to_owned)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(entries: &[(&str, &str)]) -> BTreeMap<String, String> {
        entries.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn probes_are_found_wherever_a_pod_declares_them() {
        let applied = r#"{"spec":{"containers":[
            {"name":"web","livenessProbe":{"exec":{"command":["cat","/tmp/healthy"]}},
             "lifecycle":{"postStart":{"exec":{"command":["touch","/x"]}}}},
            {"name":"other","readinessProbe":{"exec":{"command":["no"]}}}]}}"#;
        let pod = map(&[(APPLIED, applied), (PROBES, r#"{"web":[["/bin/ready","-q"]],"other":[["no"]]}"#)]);
        let own = map(&[(PRE_STOP, r#"{"exec":{"command":["nginx","-s","quit"]}}"#)]);
        assert_eq!(
            probes("web", &pod, &own),
            [
                vec!["nginx", "-s", "quit"],
                vec!["/bin/ready", "-q"],
                vec!["cat", "/tmp/healthy"],
                vec!["touch", "/x"]
            ]
        );
    }

    #[test]
    fn what_is_no_declaration_declares_nothing() {
        for text in ["", "{", "[]", r#"{"web":"sh"}"#, r#"{"web":[[]]}"#, r#"{"web":[["a",1]]}"#] {
            let annotations = map(&[(APPLIED, text), (PROBES, text), (PRE_STOP, text)]);
            assert!(probes("web", &annotations, &annotations).is_empty(), "{text}");
        }
    }

    #[test]
    fn a_container_of_nri_has_its_pods_facts() {
        let pod = nri::PodSandbox {
            name: "web-1".to_owned(),
            namespace: "shop".to_owned(),
            uid: "u1".to_owned(),
            labels: map(&[
                ("app", "web"),
                ("io.kubernetes.pod.uid", "u1"),
                ("io.cri-containerd.kind", "sandbox"),
            ]),
            ..Default::default()
        };
        let container = nri::Container {
            id: "c1".to_owned(),
            name: "nginx".to_owned(),
            annotations: map(&[(IMAGE[0], "docker.io/library/nginx:1")]),
            ..Default::default()
        };
        let found = of_nri(&pod, &container);
        assert_eq!((found.id.as_str(), found.identity.facts.name.as_str()), ("c1", "nginx"));
        assert_eq!(found.identity.facts.image, "docker.io/library/nginx:1");
        assert_eq!(found.identity.facts.labels, map(&[("app", "web")]));
        assert!(!found.identity.sandbox && of_pod(&pod).identity.sandbox);
    }
}
