//! Path patterns: exact paths, `*` within a component, `**` for any number of components.
//!
//! A backslash before `*` or `\` takes its meaning away: `\*` is the character `*`, `\\` a backslash. Before anything else a
//! backslash stands for itself. The same holds wherever `*` is a wildcard: in arguments, names, selectors and queries.
//!
//! | pattern | matches | does not match |
//! |---|---|---|
//! | `/usr/bin/python3*` | `/usr/bin/python3.13` | `/usr/bin/python3/x` |
//! | `/opt/*/bin/run` | `/opt/a/bin/run` | `/opt/a/b/bin/run` |
//! | `/opt/**` | `/opt/a`, `/opt/a/b/c` | `/opt` |
//! | `/opt/**/run` | `/opt/run`, `/opt/a/b/run` | `/opt/a/runner` |
//! | `/opt/\*` | `/opt/*` | `/opt/a` |

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

/// The pieces of a text without separators, each [`Piece::Byte`] or [`Piece::Star`]: the one place that knows what a `*` and a
/// backslash before it mean.
pub(crate) fn pieces_of(text: &[u8]) -> impl Iterator<Item = Piece> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let (piece, length) = match rest {
            [] => return None,
            [b'*', ..] => (Piece::Star, 1),
            [b'\\', escaped @ (b'*' | b'\\'), ..] => (Piece::Byte(*escaped), 2),
            [byte, ..] => (Piece::Byte(*byte), 1),
        };
        rest = &rest[length..];
        Some(piece)
    })
}

/// The pattern that stands for `text` and nothing else.
#[must_use]
pub fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        if matches!(character, '*' | '\\') {
            out.push('\\');
        }
        out.push(character);
    }
    out
}

/// What a text is that has no wildcards.
fn unescaped(text: &str) -> Option<String> {
    let bytes = pieces_of(text.as_bytes()).map(|piece| match piece {
        Piece::Byte(byte) => Some(byte),
        _ => None,
    });
    // Only bytes of ASCII are taken out of a text, so the rest is one.
    String::from_utf8(bytes.collect::<Option<_>>()?).ok()
}

/// Whether a text has a run of `*` that is none of `**` by itself.
pub(crate) fn has_partial_double_star(text: &str) -> bool {
    let pieces: Vec<Piece> = pieces_of(text.as_bytes()).collect();
    text != "**" && pieces.windows(2).any(|two| two == [Piece::Star, Piece::Star])
}

/// A valid pattern.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pattern {
    text: String,
    /// The path that it stands for; `None` with wildcards.
    exact: Option<String>,
}

impl Pattern {
    /// Checks a pattern.
    ///
    /// # Errors
    ///
    /// See [`PatternError`].
    pub fn parse(text: &str) -> Result<Self, PatternError> {
        let owned = || text.to_owned();
        let length = pieces_of(text.as_bytes()).count();
        if length > PATH_CAPACITY {
            return Err(PatternError::TooLong(length));
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
                other if has_partial_double_star(other) => {
                    return Err(PatternError::PartialDoubleStar(owned()));
                }
                _ => {}
            }
        }
        Ok(Self { text: owned(), exact: unescaped(text) })
    }

    /// The pattern that stands for `path` and nothing else.
    ///
    /// # Errors
    ///
    /// Where no pattern does; see [`PatternError`].
    pub fn of_path(path: &str) -> Result<Self, PatternError> {
        Self::parse(&escaped(path))
    }

    /// The pattern as written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The one path that the pattern stands for; `None` with wildcards.
    #[must_use]
    pub fn exact(&self) -> Option<&str> {
        self.exact.as_deref()
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
                    pieces.extend(pieces_of(text.as_bytes()));
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

/// Whether `text` is what `pattern` stands for: `*` is any run of characters, and a backslash before `*` or `\` takes its meaning
/// away.
#[must_use]
pub fn text_matches(pattern: &[u8], text: &[u8]) -> bool {
    let pieces: Vec<Piece> = pieces_of(pattern).collect();
    let (mut piece, mut at) = (0, 0);
    // Behind the last star, and how far into the text it reaches: only that one ever has to reach further.
    let mut star = None;
    while at < text.len() {
        match pieces.get(piece) {
            Some(Piece::Star) => {
                piece += 1;
                star = Some((piece, at));
            }
            Some(Piece::Byte(byte)) if *byte == text[at] => {
                piece += 1;
                at += 1;
            }
            _ => {
                let Some((behind, reach)) = star else { return false };
                star = Some((behind, reach + 1));
                (piece, at) = (behind, reach + 1);
            }
        }
    }
    pieces[piece..].iter().all(|piece| *piece == Piece::Star)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

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
        for text in ["usr/bin", "/usr//bin", "/usr/", "/usr/../bin", "/a/b**", "/a/\\\\**", ""] {
            assert!(Pattern::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_backslash_takes_the_meaning_from_a_star() {
        let exact = |pattern: &str| Pattern::parse(pattern).unwrap().exact().map(str::to_owned);
        for (pattern, path) in [
            ("/a", "/a"),
            (r"/a\*", "/a*"),
            (r"/\*\*", "/**"),
            (r"/a\\b", r"/a\b"),
            (r"/a\\\*", r"/a\*"),
            // As it was before there were escapes.
            (r"/dev-a\x2db", r"/dev-a\x2db"),
            (r"/a\/b", r"/a\/b"),
            (r"/a\", r"/a\"),
            (r"/\.", r"/\."),
        ] {
            assert_eq!(exact(pattern).as_deref(), Some(path), "{pattern}");
        }
        let matches = |pattern: &str, path: &str| Pattern::parse(pattern).unwrap().matches(path);
        for (pattern, path) in [(r"/\**", "/*x"), (r"/\\*", r"/\x"), (r"/*\*", "/x*"), (r"/**/\*", "/a/*")] {
            assert_eq!(exact(pattern), None, "{pattern}");
            assert!(matches(pattern, path) && !matches(pattern, "/y"), "{pattern}");
        }
        assert!(text_matches(br"\*", b"*") && !text_matches(br"\*", b"x"));
    }

    #[test]
    fn a_path_of_escapes_may_be_as_long_as_any() {
        let path = format!("/{}", "*".repeat(PATH_CAPACITY - 1));
        assert_eq!(Pattern::of_path(&path).unwrap().exact(), Some(&*path));
        assert!(Pattern::of_path(&format!("{path}*")).is_err());
    }

    /// The definition.
    fn defined(pattern: &[Piece], text: &[u8]) -> bool {
        match (pattern, text) {
            ([], []) => true,
            ([Piece::Star, rest @ ..], text) => {
                defined(rest, text) || matches!(text, [_, tail @ ..] if defined(pattern, tail))
            }
            ([Piece::Byte(first), pattern @ ..], [byte, text @ ..]) if first == byte => {
                defined(pattern, text)
            }
            _ => false,
        }
    }

    proptest! {
        #[test]
        fn texts_match_as_defined(pattern in r"[ab*\\]{0,8}", text in r"[ab*\\]{0,10}") {
            let pieces: Vec<Piece> = pieces_of(pattern.as_bytes()).collect();
            prop_assert_eq!(text_matches(pattern.as_bytes(), text.as_bytes()), defined(&pieces, text.as_bytes()));
            prop_assert_eq!(text_matches(escaped(&text).as_bytes(), pattern.as_bytes()), text == pattern);
        }
    }
}
