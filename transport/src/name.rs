//! Who a certificate is for: a URI among its alternative names, `spiffe://DOMAIN/palisade/ROLE[/NAME]`.

use std::fmt;

use thiserror::Error;
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

/// Longest name of a node or reader, in bytes.
pub const LONGEST: usize = 253;

/// Who somebody is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Name {
    Collector,
    /// The agent of this node.
    Node(String),
    /// Somebody who may ask the collector.
    Reader(String),
}

/// Why a certificate names nobody.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum NameError {
    #[error("it is no X.509 certificate")]
    NotX509,
    #[error("none of its alternative names is spiffe://DOMAIN/palisade/ROLE/NAME")]
    None,
    #[error("it has more than one such name")]
    Several,
}

impl Name {
    /// Reads the path of a URI.
    #[must_use]
    pub fn parse(uri: &str) -> Option<Self> {
        let (domain, path) = uri.strip_prefix("spiffe://")?.split_once('/')?;
        let words: Vec<&str> = path.split('/').collect();
        if domain.is_empty() {
            return None;
        }
        match words.as_slice() {
            ["palisade", "collector"] => Some(Self::Collector),
            ["palisade", "node", name] if is_name(name) => Some(Self::Node((*name).to_owned())),
            ["palisade", "reader", name] if is_name(name) => Some(Self::Reader((*name).to_owned())),
            _ => None,
        }
    }

    /// The URI in `domain`.
    #[must_use]
    pub fn uri(&self, domain: &str) -> String {
        format!("spiffe://{domain}/palisade/{self}")
    }

    /// The one that a certificate is for.
    ///
    /// # Errors
    ///
    /// See [`NameError`].
    pub fn of(certificate: &[u8]) -> Result<Self, NameError> {
        let (_, parsed) = X509Certificate::from_der(certificate).map_err(|_| NameError::NotX509)?;
        let alternatives = parsed.subject_alternative_name().map_err(|_| NameError::NotX509)?;
        let mut names =
            alternatives.into_iter().flat_map(|found| &found.value.general_names).filter_map(|general| {
                match general {
                    GeneralName::URI(uri) => Self::parse(uri),
                    _ => None,
                }
            });
        match (names.next(), names.next()) {
            (Some(name), None) => Ok(name),
            (None, _) => Err(NameError::None),
            (Some(_), Some(_)) => Err(NameError::Several),
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Collector => f.write_str("collector"),
            Self::Node(name) => write!(f, "node/{name}"),
            Self::Reader(name) => write!(f, "reader/{name}"),
        }
    }
}

/// Whether a text can be the name of a node or reader.
#[must_use]
pub fn is_name(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
    !text.is_empty() && text.len() <= LONGEST && text.bytes().all(allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_names_one_role() {
        let node = Name::Node("worker-1.example".to_owned());
        assert_eq!(Name::parse(&node.uri("prod")), Some(node));
        assert_eq!(Name::parse("spiffe://prod/palisade/collector"), Some(Name::Collector));
        for bad in [
            "spiffe://prod/palisade/node/",
            "spiffe://prod/palisade/node/a/b",
            "spiffe://prod/palisade/node/a b",
            "spiffe:///palisade/collector",
            "spiffe://prod/other/collector",
            "https://prod/palisade/collector",
            "spiffe://prod/palisade/collector/x",
        ] {
            assert_eq!(Name::parse(bad), None, "{bad}");
        }
    }
}
