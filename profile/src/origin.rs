//! Where a file's bytes come from, as profiles and records write it.

use std::collections::BTreeSet;

use marked_yaml::{Node, types::MarkedMappingNode};
use palisade_abi::{codes::origin, state::VOLUME_NAME_CAPACITY};

use crate::{
    glob::Pattern,
    read::{Reader, join},
};

/// Where a file's bytes may come from.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Origin {
    Image,
    Drift,
    Memory,
    Host,
    Volume(VolumeName),
}

/// The name of a volume: as the pod has it, or the path at which the mount stands in the container where nobody gives it
/// another name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VolumeName(String);

impl VolumeName {
    /// `None` for a text that is no volume's name: an empty or relative one, or one with a colon, which separates name
    /// and path, or with control characters, or a path with `*`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let is_path = !text.contains('*') && Pattern::of_path(text).is_ok();
        let is_name = !text.is_empty() && !text.contains('/');
        let plain = text.chars().all(|character| character != ':' && !character.is_control());
        ((is_path || is_name) && plain && text.len() < VOLUME_NAME_CAPACITY).then(|| Self(text.to_owned()))
    }

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// How volumes are written as origins.
pub(crate) const VOLUME: &str = "volume:";

impl Origin {
    /// Reads an origin as profiles and records have it.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        if let Some(name) = text.strip_prefix(VOLUME) {
            return VolumeName::parse(name).map(Self::Volume);
        }
        let plain = [Self::Image, Self::Drift, Self::Memory, Self::Host];
        plain.into_iter().find(|origin| origin.to_string() == text)
    }

    #[must_use]
    pub fn code(&self) -> u8 {
        match self {
            Self::Image => origin::IMAGE,
            Self::Drift => origin::DRIFT,
            Self::Memory => origin::MEMORY,
            Self::Host => origin::HOST,
            Self::Volume(_) => origin::VOLUME,
        }
    }
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Image => f.write_str("image"),
            Self::Drift => f.write_str("drift"),
            Self::Memory => f.write_str("memory"),
            Self::Host => f.write_str("host"),
            Self::Volume(name) => write!(f, "{VOLUME}{}", name.as_str()),
        }
    }
}

impl Reader<'_> {
    /// The path of a rule.
    pub(crate) fn path(&mut self, rule: &MarkedMappingNode, field: &str) -> Option<Pattern> {
        let path = self.required_text(rule, field, "path")?;
        match Pattern::parse(path.as_str()) {
            Ok(pattern) => Some(pattern),
            Err(error) => {
                self.problem(path.span(), &join(field, "path"), error.to_string(), error.remedy());
                None
            }
        }
    }

    /// The origins of a rule: the image's where none is named.
    pub(crate) fn from(&mut self, mapping: &MarkedMappingNode, field: &str) -> BTreeSet<Origin> {
        let mut from = BTreeSet::new();
        match mapping.get_node("from") {
            None => {
                from.insert(Origin::Image);
            }
            Some(Node::Sequence(list)) => {
                for (index, node) in list.iter().enumerate() {
                    from.extend(self.origin(node, &format!("{field}.from[{index}]")));
                }
            }
            Some(node) => from.extend(self.origin(node, &join(field, "from"))),
        }
        from
    }

    fn origin(&mut self, node: &Node, field: &str) -> Option<Origin> {
        let text = self.text(node, field)?;
        let found = Origin::parse(text.as_str());
        if found.is_none() {
            let remedy = if text.as_str().starts_with(VOLUME) {
                "write the volume's name as the pod has it (volume:plugins), or the path at which it is mounted where \
                 it has none (volume:/etc/hosts)"
            } else {
                "write image, drift, memory, host or volume:NAME"
            };
            self.problem(text.span(), field, format!("{:?} is not an origin", text.as_str()), remedy);
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[test]
    fn an_origin_is_one_of_the_five_kinds() {
        for good in ["volume:plugins", "volume:/etc/hosts", "volume:pvc-1.a", "host"] {
            let found = Origin::parse(good).map(|origin| origin.to_string());
            assert_eq!(found.as_deref(), Some(good));
        }
        for bad in [
            "volume:/a\\*",
            "volume:a:b",
            "volume:",
            "volume:a/b",
            "volume:/a//b",
            "volume:/a/../b",
            "volume:/*",
            "disk",
        ] {
            assert_eq!(Origin::parse(bad), None, "{bad}");
        }
    }
}
