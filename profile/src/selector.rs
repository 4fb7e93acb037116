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
    /// Whether the image decides if the container with these facts is meant, and nobody has said yet which it is.
    #[must_use]
    pub fn waits_for_image(&self, facts: &ContainerFacts) -> bool {
        let mut by_name = self.containers.iter().filter(|container| {
            let name = container.name.as_deref();
            name.is_none_or(|name| text_matches(name.as_bytes(), facts.name.as_bytes()))
        });
        let is_chosen_by_image = by_name
            .next()
            .is_some_and(|first| first.image.is_some() && by_name.all(|container| container.image.is_some()));
        facts.image.is_empty()
            && self.labels.iter().all(|(key, value)| facts.labels.get(key) == Some(value))
            && is_chosen_by_image
    }

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

#[cfg(test)]
mod tests {
    use super::*;

    fn selector(containers: &[(Option<&str>, Option<&str>)]) -> Selector {
        let owned = |text: &Option<&str>| text.map(str::to_owned);
        let containers = containers
            .iter()
            .map(|(name, image)| ContainerSelector { name: owned(name), image: owned(image) })
            .collect();
        Selector { labels: BTreeMap::from([("app".to_owned(), "web".to_owned())]), containers }
    }

    fn facts(app: &str, image: &str) -> ContainerFacts {
        let labels = BTreeMap::from([("app".to_owned(), app.to_owned())]);
        ContainerFacts {
            labels,
            name: "main".to_owned(),
            image: image.to_owned(),
            ..ContainerFacts::default()
        }
    }

    #[test]
    fn an_image_is_waited_for_where_it_decides() {
        let by_image = selector(&[(None, Some("nginx:*"))]);
        assert!(by_image.waits_for_image(&facts("web", "")));
        assert!(selector(&[(Some("ma*"), Some("nginx:*"))]).waits_for_image(&facts("web", "")));
        // It is known, the pod or the container is another, or the name says enough.
        assert!(!by_image.waits_for_image(&facts("web", "redis:7")));
        assert!(!by_image.waits_for_image(&facts("other", "")));
        assert!(!selector(&[(Some("side"), Some("nginx:*"))]).waits_for_image(&facts("web", "")));
        assert!(
            !selector(&[(Some("main"), None), (None, Some("nginx:*"))]).waits_for_image(&facts("web", ""))
        );
        assert!(!selector(&[]).waits_for_image(&facts("web", "")));
    }
}
