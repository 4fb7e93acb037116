//! The folder in which Podman keeps its containers (containers/storage): no daemon needs to be asked. CRI-O keeps its
//! own there, too, but without the labels that profiles select by, so those are left to the runtime interface.

use std::path::Path;

use anyhow::{Context as _, Result};
use palisade_profile::selector::ContainerFacts;
use serde_json::Value;

use super::{Identity, mounts};

/// The list of containers below the storage's root, by storage driver.
const LIST: &str = "overlay-containers/containers.json";
/// Containers that came into being without a record on disk yet.
const VOLATILE: &str = "overlay-containers/volatile-containers.json";

/// What the storage at `root` says of the container `id`; `None` when it is not there, or a pod's.
pub fn ask(root: &Path, id: &str) -> Result<Option<Identity>> {
    for list in [LIST, VOLATILE] {
        let path = root.join(list);
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        };
        let containers: Value =
            serde_json::from_slice(&text).with_context(|| format!("{} is not JSON", path.display()))?;
        let found = containers.as_array().into_iter().flatten().find(|container| container["id"] == id);
        if let Some(container) = found {
            return Ok(identity(container).map(|found| Identity { mounts: mounts_of(root, id), ..found }));
        }
    }
    Ok(None)
}

/// What the container's runtime was told to mount; nothing when that is not there to read.
fn mounts_of(root: &Path, id: &str) -> Vec<mounts::Described> {
    let path = root.join("overlay-containers").join(id).join("userdata/config.json");
    let text = std::fs::read(path).unwrap_or_default();
    mounts::of_spec(&serde_json::from_slice(&text).unwrap_or(Value::Null))
}

/// The metadata is JSON in a text: Podman's, or CRI-O's, which names the pod.
fn identity(container: &Value) -> Option<Identity> {
    let metadata: Value = container["metadata"]
        .as_str()
        .and_then(|text| serde_json::from_str(text).ok())
        .unwrap_or(Value::Null);
    if metadata["pod-name"].is_string() {
        return None;
    }
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    Some(Identity {
        facts: ContainerFacts {
            name: text(&container["names"][0]),
            image: text(&metadata["image-name"]),
            ..ContainerFacts::default()
        },
        image_digest: text(&container["image"]),
        by: "podman",
        ..Identity::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Podman 5 writes it, shortened.
    #[test]
    fn podman_names_its_containers() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("overlay-containers")).unwrap();
        std::fs::write(
            folder.path().join(LIST),
            r#"[{"id":"0a","names":["web"],"image":"9f86d0","layer":"l","metadata":
                "{\"image-name\":\"localhost/web:1\",\"image-id\":\"9f86d0\",\"name\":\"web\",\"created-at\":1}"}]"#,
        )
        .unwrap();
        let found = ask(folder.path(), "0a").unwrap().unwrap();
        assert_eq!((found.facts.name.as_str(), found.facts.image.as_str()), ("web", "localhost/web:1"));
        assert!(found.facts.pod.is_empty() && !found.sandbox);
        assert_eq!(ask(folder.path(), "0b").unwrap(), None);
        assert_eq!(ask(&folder.path().join("none"), "0a").unwrap(), None);
    }

    /// As CRI-O's documentation of its metadata has it; no CRI-O is run in the tests.
    #[test]
    fn a_pods_container_is_left_to_who_knows_its_labels() {
        let container = serde_json::json!({
            "id": "0a", "names": ["k8s_nginx_web-1_shop_u1_0"], "image": "9f86d0",
            "metadata": r#"{"pod":false,"pod-name":"web-1","pod-id":"p","image-name":"registry.example/web:1",
                            "name":"k8s_nginx_web-1_shop_u1_0","metadata-name":"nginx"}"#,
        });
        assert_eq!(identity(&container), None);
    }
}
