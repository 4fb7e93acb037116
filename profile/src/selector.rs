//! Which containers a profile is for.

use std::collections::BTreeMap;

use crate::glob::text_matches;

/// What is known of a container when its profiles are chosen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ContainerFacts {
    pub namespace: String,
    pub pod: String,
    pub labels: BTreeMap<String, String>,
    /// The container's name within its pod.
    pub name: String,
    /// The image as the pod names it.
    pub image: String,
}

/// Selects containers by pod labels, container name and image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selector {
    /// Labels that the pod must have; none selects every pod.
    pub labels: BTreeMap<String, String>,
    /// Containers of such a pod; none selects every container.
    pub containers: Vec<ContainerSelector>,
}

/// A container of a pod. `*` in either field stands for any run of characters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerSelector {
    pub name: Option<String>,
    pub image: Option<String>,
}

impl Selector {
    /// Whether the container with these facts is meant.
    #[must_use]
    pub fn matches(&self, facts: &ContainerFacts) -> bool {
        let labels = self.labels.iter().all(|(key, value)| facts.labels.get(key) == Some(value));
        let matches = |pattern: &Option<String>, text: &str| {
            pattern.as_ref().is_none_or(|pattern| text_matches(pattern.as_bytes(), text.as_bytes()))
        };
        labels
            && (self.containers.is_empty()
                || self.containers.iter().any(|container| {
                    matches(&container.name, &facts.name) && matches(&container.image, &facts.image)
                }))
    }
}
