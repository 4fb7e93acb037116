//! What must hold for an execution besides path, origin and session: who calls exec, and with which arguments.

use std::collections::BTreeSet;

use thiserror::Error;

use crate::{
    automaton::{Alphabet, Automaton},
    glob::{Pattern, Piece, has_partial_double_star, pieces_of},
};

/// Most bytes of arguments that are compared, each with the zero that ends it; longer ones match nothing.
pub const MOST_ARGUMENT_BYTES: usize = palisade_abi::PATH_CAPACITY;

/// A condition of a rule. The default is none.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Condition {
    /// The program of the process that calls exec, or the script that it runs: an exact path of the image.
    pub parent: Option<Pattern>,
    pub arguments: Option<Arguments>,
}

impl Condition {
    #[must_use]
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// One for each parent.
    pub(crate) fn each(parents: &BTreeSet<Pattern>, arguments: Option<&Arguments>) -> Vec<Self> {
        let with = |parent: Option<&Pattern>| Self { parent: parent.cloned(), arguments: arguments.cloned() };
        if parents.is_empty() { vec![with(None)] } else { parents.iter().map(Some).map(with).collect() }
    }
}

impl std::fmt::Display for Condition {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut separator = "";
        if let Some(parent) = &self.parent {
            write!(f, "when {} executes it", parent.as_str())?;
            separator = " ";
        }
        match &self.arguments {
            Some(arguments) if arguments.names.is_empty() => {
                write!(f, "{separator}with the arguments {:?}", arguments.patterns)
            }
            Some(arguments) => {
                write!(f, "{separator}as {:?} with the arguments {:?}", arguments.names, arguments.patterns)
            }
            None => Ok(()),
        }
    }
}

/// Why texts are not patterns of arguments.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ArgumentsError {
    #[error("{0:?} has '**' beside other characters")]
    PartialDoubleStar(String),
    #[error("an argument contains a zero byte")]
    Zero,
    #[error(
        "the patterns have {0} bytes, and arguments of more than {MOST_ARGUMENT_BYTES} are never allowed"
    )]
    TooLong(usize),
    #[error("the patterns make an automaton of too many states")]
    TooManyStates,
}

impl ArgumentsError {
    /// What would be right.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::PartialDoubleStar(_) => {
                "'**' as an argument of its own stands for any number of arguments; '*' for any characters of one"
            }
            Self::Zero => "remove it",
            Self::TooLong(_) => "use shorter patterns",
            Self::TooManyStates => "use fewer '*'",
        }
    }
}

/// What the arguments must be.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Arguments {
    /// What the program may be called, its argument 0: many do something else under another name. Patterns with `*`; none: its
    /// path, or the last component of that.
    names: Vec<String>,
    /// Patterns of the arguments after it, one for each: `*` stands for any characters of one argument, and `**` by itself for any
    /// number of arguments.
    patterns: Vec<String>,
}

impl Arguments {
    /// Checks names and patterns.
    ///
    /// # Errors
    ///
    /// See [`ArgumentsError`].
    pub fn parse(names: Vec<String>, patterns: Vec<String>) -> Result<Self, ArgumentsError> {
        if let Some(name) = names.iter().find(|name| *name == "**") {
            return Err(ArgumentsError::PartialDoubleStar(name.clone()));
        }
        for pattern in names.iter().chain(&patterns) {
            if pattern.contains('\0') {
                return Err(ArgumentsError::Zero);
            }
            if has_partial_double_star(pattern) {
                return Err(ArgumentsError::PartialDoubleStar(pattern.clone()));
            }
        }
        let bytes =
            names.iter().chain(&patterns).map(|pattern| pieces_of(pattern.as_bytes()).count() + 1).sum();
        if bytes > MOST_ARGUMENT_BYTES {
            return Err(ArgumentsError::TooLong(bytes));
        }
        let arguments = Self { names, patterns };
        automaton("", &[(&arguments, 1)]).ok_or(ArgumentsError::TooManyStates)?;
        Ok(arguments)
    }

    /// The names, as they are written.
    #[must_use]
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// The patterns, as they are written.
    #[must_use]
    pub fn patterns(&self) -> &[String] {
        &self.patterns
    }

    /// What the program at `path` may be called, as pieces.
    fn names_of(&self, path: &str) -> Vec<Vec<Piece>> {
        if self.names.is_empty() {
            // A path is no pattern.
            let plain = |name: &str| name.bytes().map(Piece::Byte).collect();
            return vec![plain(path), plain(path.rsplit('/').next().unwrap_or(path))];
        }
        self.names.iter().map(|name| pieces_of(name.as_bytes()).collect()).collect()
    }

    /// The pieces of a name and of all arguments.
    fn pieces(&self, name: Vec<Piece>) -> Vec<Piece> {
        let mut pieces = name;
        pieces.push(Piece::Byte(0));
        for pattern in &self.patterns {
            if pattern == "**" {
                pieces.push(Piece::Arguments);
                continue;
            }
            pieces.extend(pieces_of(pattern.as_bytes()));
            pieces.push(Piece::Byte(0));
        }
        pieces
    }
}

/// All of these as one automaton over the arguments of the program at `path`, its name first, as the kernel has them: each ended
/// by a zero byte. `None` when it has too many states.
pub(crate) fn automaton(path: &str, patterns: &[(&Arguments, u32)]) -> Option<Automaton> {
    let pieces: Vec<_> = patterns
        .iter()
        .flat_map(|(arguments, bits)| {
            arguments.names_of(path).into_iter().map(|name| (arguments.pieces(name), *bits))
        })
        .collect();
    Automaton::build(&pieces, Alphabet::Arguments)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::glob::text_matches;

    /// The definition.
    fn matches(patterns: &[String], arguments: &[String]) -> bool {
        match (patterns, arguments) {
            ([], []) => true,
            ([first, patterns @ ..], arguments) if first == "**" => {
                matches(patterns, arguments)
                    || matches!(arguments, [_, rest @ ..] if matches(&[&["**".to_owned()], patterns].concat(), rest))
            }
            ([first, patterns @ ..], [argument, rest @ ..]) => {
                text_matches(first.as_bytes(), argument.as_bytes()) && matches(patterns, rest)
            }
            _ => false,
        }
    }

    fn joined(arguments: &[String]) -> Vec<u8> {
        arguments.iter().flat_map(|argument| argument.bytes().chain([0])).collect()
    }

    proptest! {
        #[test]
        fn the_automaton_agrees_with_the_definition(
            lists in prop::collection::vec(
                prop::collection::vec(
                    prop_oneof![3 => "[ab/]{0,3}", 2 => r"[ab*\\]{1,3}".prop_filter("no **", |text| !has_partial_double_star(text)), 1 => Just("**".to_owned())],
                    0..4,
                ),
                1..4,
            ),
            calls in prop::collection::vec(prop::collection::vec("[abc/*\\\\\u{e9}]{0,3}", 0..5), 1..20),
        ) {
            let lists: Vec<Arguments> =
                lists.into_iter().map(|list| Arguments::parse(Vec::new(), list).unwrap()).collect();
            let numbered: Vec<(&Arguments, u32)> =
                lists.iter().enumerate().map(|(index, list)| (list, 1 << (index * 10))).collect();
            let automaton = automaton("/bin/a", &numbered).unwrap();
            for call in calls {
                let expected = numbered
                    .iter()
                    .filter(|(list, _)| matches(list.patterns(), &call))
                    .fold(0, |mask, (_, bit)| mask | bit);
                for name in ["a", "/bin/a"] {
                    let named = [&[name.to_owned()][..], &call].concat();
                    prop_assert_eq!(automaton.grants(&joined(&named)), expected, "{:?} on {:?}", &lists, call);
                }
                for other in ["", "b", "bin/a", "/bin/b", "a/"] {
                    let named = [&[other.to_owned()][..], &call].concat();
                    prop_assert_eq!(automaton.grants(&joined(&named)), 0, "as {:?}", other);
                }
            }
        }
    }

    #[test]
    fn a_star_in_a_path_is_no_wildcard_of_its_name() {
        let none = Arguments::parse(Vec::new(), Vec::new()).unwrap();
        let automaton = automaton("/opt/a*", &[(&none, 1)]).unwrap();
        assert_eq!(automaton.grants(b"/opt/a*\0"), 1);
        assert_eq!(automaton.grants(b"a*\0"), 1);
        assert_eq!(automaton.grants(b"ab\0"), 0);
        assert_eq!(automaton.grants(b"/opt/ab\0"), 0);
    }

    #[test]
    fn arguments_that_run_together_are_not_one() {
        let one = Arguments::parse(vec!["p*".to_owned()], vec!["-c".to_owned(), "id".to_owned()]).unwrap();
        let automaton = automaton("/bin/a", &[(&one, 1)]).unwrap();
        for name in ["p", "python", "p/q"] {
            assert_eq!(automaton.grants(format!("{name}\0-c\0id\0").as_bytes()), 1);
        }
        for other in [
            &b"p\0-cid\0"[..],
            b"p\0-c\0id",
            b"p\0-c\0id\0\0",
            b"p\0-c\0id\0x\0",
            b"",
            b"p\0\0-c\0id\0",
            b"/bin/a\0-c\0id\0",
            b"a\0-c\0id\0",
        ] {
            assert_eq!(automaton.grants(other), 0, "{other:?}");
        }
    }
}
