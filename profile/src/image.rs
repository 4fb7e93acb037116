//! Compiling a policy into the policy image: pure values for the kernel's maps.

use std::collections::{BTreeMap, BTreeSet};

use palisade_abi::maps::{GLOB_DEAD, GlobState};
use thiserror::Error;

use crate::{
    document::{Mode, Origin},
    glob::Piece,
    policy::Policy,
};

/// Most states of one revision's automaton.
pub const MOST_GLOB_STATES: usize = 2048;

/// The compiled form of a revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyImage {
    pub mode: Mode,
    pub restricts_exec: bool,
    /// Exact paths with the mask of `1 << origin` that each allows; on volumes as [`palisade_abi::volume`] has them.
    pub exact: BTreeMap<Vec<u8>, u32>,
    /// The automaton of all patterns with wildcards; empty when there are none. The first state is the start.
    pub globs: Vec<GlobState>,
}

/// Why a policy has no image.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CompileError {
    #[error(
        "the patterns with wildcards of {profiles} need more than {MOST_GLOB_STATES} automaton states; \
         use fewer of them, or exact paths"
    )]
    TooManyStates { profiles: String },
}

/// Compiles `policy`.
///
/// # Errors
///
/// When its wildcards exceed [`MOST_GLOB_STATES`].
pub fn compile(policy: &Policy) -> Result<PolicyImage, CompileError> {
    let Policy { profiles, mode, exec } = policy;
    let mut exact = BTreeMap::new();
    let mut patterns = Vec::new();
    for (pattern, origins) in exec.iter().flatten() {
        let mut plain = 0;
        for origin in origins {
            let bit = 1 << u32::from(origin.code());
            match origin {
                Origin::Volume(name) if pattern.is_exact() => {
                    exact.insert(pattern.text_on(name.as_str()).into_bytes(), bit);
                }
                Origin::Volume(name) => patterns.push((pattern.pieces_on(name.as_str()), bit)),
                _ => plain |= bit,
            }
        }
        if plain != 0 && pattern.is_exact() {
            exact.insert(pattern.as_str().as_bytes().to_vec(), plain);
        } else if plain != 0 {
            patterns.push((pattern.pieces(), plain));
        }
    }
    let globs =
        automaton(&patterns).ok_or_else(|| CompileError::TooManyStates { profiles: profiles.join(", ") })?;
    Ok(PolicyImage { mode: *mode, restricts_exec: exec.is_some(), exact, globs })
}

/// A place in a pattern: which pattern, before which piece, and whether inside a component of `**/`.
type Place = (usize, usize, bool);

/// The deterministic automaton over bytes that runs all patterns at once, by subset construction.
fn automaton(patterns: &[(Vec<Piece>, u32)]) -> Option<Vec<GlobState>> {
    if patterns.is_empty() {
        return Some(Vec::new());
    }
    let pieces: Vec<Vec<Piece>> = patterns.iter().map(|(pieces, _)| pieces.clone()).collect();
    let start = closure(&pieces, (0..pieces.len()).map(|pattern| (pattern, 0, false)));
    let mut numbers = BTreeMap::from([(start.clone(), 0_u16)]);
    let mut sets = vec![start];
    let mut states = Vec::new();
    while states.len() < sets.len() {
        let set = sets[states.len()].clone();
        let origins = set
            .iter()
            .filter(|(pattern, piece, _)| *piece == pieces[*pattern].len())
            .fold(0, |mask, (pattern, ..)| mask | patterns[*pattern].1);
        let mut number_of = |byte: u8| -> Option<u16> {
            let next = closure(&pieces, set.iter().flat_map(|place| step(&pieces, *place, byte)));
            if next.is_empty() {
                return Some(GLOB_DEAD);
            }
            if let Some(number) = numbers.get(&next) {
                return Some(*number);
            }
            let number =
                u16::try_from(sets.len()).ok().filter(|number| usize::from(*number) < MOST_GLOB_STATES)?;
            numbers.insert(next.clone(), number);
            sets.push(next);
            Some(number)
        };
        // Bytes that no pattern names here all lead to the same state; zero stands for them.
        let mut next = [number_of(0)?; 256];
        let mut named: BTreeSet<u8> = BTreeSet::from([b'/']);
        named.extend(set.iter().filter_map(|(pattern, piece, _)| match pieces[*pattern].get(*piece) {
            Some(Piece::Byte(byte)) => Some(*byte),
            _ => None,
        }));
        for byte in named {
            next[usize::from(byte)] = number_of(byte)?;
        }
        states.push(GlobState { next, origins, reserved: 0 });
    }
    Some(states)
}

/// All places reachable without reading a byte.
fn closure(pieces: &[Vec<Piece>], places: impl Iterator<Item = Place>) -> BTreeSet<Place> {
    let mut set = BTreeSet::new();
    let mut open: Vec<Place> = places.collect();
    while let Some(place) = open.pop() {
        if !set.insert(place) {
            continue;
        }
        let (pattern, piece, inside) = place;
        match pieces[pattern].get(piece) {
            Some(Piece::Star) => open.push((pattern, piece + 1, false)),
            Some(Piece::Rest) if inside => open.push((pattern, piece + 1, false)),
            Some(Piece::Components) if !inside => open.push((pattern, piece + 1, false)),
            _ => {}
        }
    }
    set
}

/// Where `byte` leads from one place.
fn step(pieces: &[Vec<Piece>], (pattern, piece, inside): Place, byte: u8) -> Option<Place> {
    match pieces[pattern].get(piece)? {
        Piece::Byte(wanted) => (*wanted == byte).then_some((pattern, piece + 1, false)),
        Piece::Star => (byte != b'/').then_some((pattern, piece, false)),
        Piece::Components => match (inside, byte == b'/') {
            (_, false) => Some((pattern, piece, true)),
            (true, true) => Some((pattern, piece, false)),
            (false, true) => None,
        },
        // `inside` marks that a byte was read: the rest may end there, or go on.
        Piece::Rest => Some((pattern, piece, true)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::glob::Pattern;

    fn run(globs: &[GlobState], path: &str) -> u32 {
        let mut state = 0;
        for byte in path.bytes() {
            let next = globs[state].next[usize::from(byte)];
            if next == GLOB_DEAD {
                return 0;
            }
            state = usize::from(next);
        }
        globs[state].origins
    }

    fn component() -> impl Strategy<Value = String> {
        prop_oneof![3 => "[ab]{1,3}", 2 => "[ab*]{1,3}".prop_filter("no **", |text| !text.contains("**")), 1 => Just("**".to_owned())]
    }

    proptest! {
        /// The automaton is the definition, for several patterns at once.
        #[test]
        fn the_automaton_agrees_with_the_definition(
            patterns in prop::collection::vec(prop::collection::vec(component(), 1..5), 1..4),
            paths in prop::collection::vec(prop::collection::vec("[abc]{1,3}", 1..6), 1..20),
        ) {
            let patterns: Vec<Pattern> =
                patterns.iter().map(|components| Pattern::parse(&format!("/{}", components.join("/"))).unwrap()).collect();
            let numbered: Vec<(&Pattern, u32)> =
                patterns.iter().enumerate().map(|(index, pattern)| (pattern, 1 << index)).collect();
            let pieces: Vec<(Vec<Piece>, u32)> =
                numbered.iter().map(|(pattern, bit)| (pattern.pieces(), *bit)).collect();
            let globs = automaton(&pieces).unwrap();
            for path in paths {
                let path = format!("/{}", path.join("/"));
                let expected = numbered
                    .iter()
                    .filter(|(pattern, _)| pattern.matches(&path))
                    .fold(0, |mask, (_, bit)| mask | bit);
                prop_assert_eq!(run(&globs, &path), expected, "{:?} on {}", &patterns, path);
            }
        }
    }

    #[test]
    fn too_many_states_are_an_error_that_names_the_profiles() {
        let mut exec = BTreeMap::new();
        for index in 0..12 {
            let text = format!("/*{}*x*y*z", "abcdefghijkl".chars().nth(index).unwrap());
            exec.insert(Pattern::parse(&text).unwrap(), BTreeSet::from([Origin::Image]));
        }
        let policy = Policy { profiles: vec!["shop/web".to_owned()], mode: Mode::Audit, exec: Some(exec) };
        assert!(compile(&policy).unwrap_err().to_string().contains("shop/web"));
    }
}
