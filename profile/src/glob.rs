//! Path patterns: exact paths, `*` within a component, `**` for any number of components.
//!
//! | pattern | matches | does not match |
//! |---|---|---|
//! | `/usr/bin/python3*` | `/usr/bin/python3.13` | `/usr/bin/python3/x` |
//! | `/opt/*/bin/run` | `/opt/a/bin/run` | `/opt/a/b/bin/run` |
//! | `/opt/**` | `/opt/a`, `/opt/a/b/c` | `/opt` |
//! | `/opt/**/run` | `/opt/run`, `/opt/a/b/run` | `/opt/a/runner` |

use palisade_abi::{PATH_CAPACITY, volume::MARK};
use thiserror::Error;

/// Why a text is not a path pattern.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PatternError {
    #[error("{0:?} does not start with '/'")]
    Relative(String),
    #[error("{0:?} has an empty component")]
    EmptyComponent(String),
    #[error("{0:?} has the component {1:?}, which no canonical path has")]
    Dots(String, &'static str),
    #[error("{0:?} has '**' beside other characters")]
    PartialDoubleStar(String),
    #[error("the pattern has {0} bytes, and paths longer than {PATH_CAPACITY} are never allowed")]
    TooLong(usize),
    #[error("{0:?} contains a zero byte")]
    Zero(String),
}

impl PatternError {
    /// What would be right.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Relative(_) => "write the path from the root of the container's file system",
            Self::EmptyComponent(_) => "write each '/' once, and none at the end",
            Self::Dots(..) => "write the path without '.' and '..'",
            Self::PartialDoubleStar(_) => "'**' stands for whole components: /opt/** or /opt/**/run",
            Self::TooLong(_) => "use a shorter path",
            Self::Zero(_) => "remove it",
        }
    }
}

/// One piece of a pattern.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Piece {
    Byte(u8),
    /// `*`: any number of bytes other than `/`.
    Star,
    /// `**/`: nothing, or any number of whole components with their `/`.
    Components,
    /// `**` at the end: at least one byte.
    Rest,
    /// `**` among arguments: any number of whole ones, each with the zero that ends it.
    Arguments,
}

/// A valid pattern.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pattern {
    text: String,
}

impl Pattern {
    /// Checks a pattern.
    ///
    /// # Errors
    ///
    /// See [`PatternError`].
    pub fn parse(text: &str) -> Result<Self, PatternError> {
        let owned = || text.to_owned();
        if text.len() > PATH_CAPACITY {
            return Err(PatternError::TooLong(text.len()));
        }
        if text.contains('\0') {
            return Err(PatternError::Zero(owned()));
        }
        let Some(rest) = text.strip_prefix('/') else { return Err(PatternError::Relative(owned())) };
        for component in rest.split('/') {
            match component {
                "" => return Err(PatternError::EmptyComponent(owned())),
                "." => return Err(PatternError::Dots(owned(), ".")),
                ".." => return Err(PatternError::Dots(owned(), "..")),
                "**" => {}
                other if other.contains("**") => return Err(PatternError::PartialDoubleStar(owned())),
                _ => {}
            }
        }
        Ok(Self { text: owned() })
    }

    /// The pattern as written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether the pattern is a path without wildcards.
    #[must_use]
    pub fn is_exact(&self) -> bool {
        !self.text.contains('*')
    }

    /// The text of this pattern on the volume `name`; see [`palisade_abi::volume`].
    pub(crate) fn text_on(&self, name: &str) -> String {
        let mark = char::from(MARK);
        format!("{mark}{name}{mark}{}", self.text)
    }

    /// The pieces of this pattern on the volume `name`.
    pub(crate) fn pieces_on(&self, name: &str) -> Vec<Piece> {
        let prefix = std::iter::once(MARK).chain(name.bytes()).chain(std::iter::once(MARK));
        prefix.map(Piece::Byte).chain(self.pieces()).collect()
    }

    pub(crate) fn pieces(&self) -> Vec<Piece> {
        let components: Vec<&str> = self.text[1..].split('/').collect();
        let mut pieces = vec![Piece::Byte(b'/')];
        for (index, component) in components.iter().enumerate() {
            let last = index + 1 == components.len();
            match (*component, last) {
                ("**", true) => pieces.push(Piece::Rest),
                ("**", false) => pieces.push(Piece::Components),
                (text, last) => {
                    pieces.extend(
                        text.bytes().map(|byte| if byte == b'*' { Piece::Star } else { Piece::Byte(byte) }),
                    );
                    if !last {
                        pieces.push(Piece::Byte(b'/'));
                    }
                }
            }
        }
        pieces
    }

    /// Whether `path` matches, by plain recursion over components: the definition that the automaton is tested
    /// against, and what tools use where speed does not matter.
    #[must_use]
    pub fn matches(&self, path: &str) -> bool {
        let Some(path) = path.strip_prefix('/') else { return false };
        let pattern: Vec<&str> = self.text[1..].split('/').collect();
        let path: Vec<&str> = path.split('/').collect();
        if path.iter().any(|component| component.is_empty()) {
            return false;
        }
        components_match(&pattern, &path)
    }
}

fn components_match(pattern: &[&str], path: &[&str]) -> bool {
    match (pattern, path) {
        ([], []) => true,
        (["**"], rest) => !rest.is_empty(),
        (["**", pattern @ ..], path) => {
            components_match(pattern, path)
                || matches!(path, [_, rest @ ..] if components_match(&[&["**"], pattern].concat(), rest))
        }
        ([first, pattern @ ..], [component, path @ ..]) => {
            text_matches(first.as_bytes(), component.as_bytes()) && components_match(pattern, path)
        }
        _ => false,
    }
}

/// `*` in `pattern` stands for any run of characters.
#[must_use]
pub fn text_matches(pattern: &[u8], text: &[u8]) -> bool {
    match (pattern, text) {
        ([], []) => true,
        ([b'*', rest @ ..], text) => {
            text_matches(rest, text) || matches!(text, [_, tail @ ..] if text_matches(pattern, tail))
        }
        ([first, pattern @ ..], [byte, text @ ..]) if first == byte => text_matches(pattern, text),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_the_documentation_holds() {
        let matches = |pattern: &str, path: &str| Pattern::parse(pattern).unwrap().matches(path);
        assert!(matches("/usr/bin/python3*", "/usr/bin/python3.13"));
        assert!(!matches("/usr/bin/python3*", "/usr/bin/python3/x"));
        assert!(matches("/opt/*/bin/run", "/opt/a/bin/run"));
        assert!(!matches("/opt/*/bin/run", "/opt/a/b/bin/run"));
        assert!(matches("/opt/**", "/opt/a") && matches("/opt/**", "/opt/a/b/c"));
        assert!(!matches("/opt/**", "/opt"));
        assert!(matches("/opt/**/run", "/opt/run") && matches("/opt/**/run", "/opt/a/b/run"));
        assert!(!matches("/opt/**/run", "/opt/a/runner"));
    }

    #[test]
    fn what_no_canonical_path_can_match_is_refused() {
        for text in ["usr/bin", "/usr//bin", "/usr/", "/usr/../bin", "/a/b**", ""] {
            assert!(Pattern::parse(text).is_err(), "{text}");
        }
    }
}
