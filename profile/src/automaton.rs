//! All patterns of a policy as one deterministic automaton over bytes, laid out as the kernel reads it.

use std::collections::{BTreeMap, BTreeSet};

use palisade_abi::policy::{GLOB_BYTES, GLOB_DEAD, GLOB_GRANTS};

use crate::glob::Piece;

/// Most states of one automaton: how long compiling may take.
pub const MOST_STATES: usize = 4096;
/// Most words of one automaton, 512 KiB: two of them, the one in force and the one after it, fit into the default of `maps.globBytes`.
pub const MOST_WORDS: usize = 1 << 18;

/// The automaton: [`palisade_abi::policy::GlobChunk`] has the layout of its words. Without patterns it has none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Automaton {
    words: Vec<u16>,
    width: usize,
}

/// What the automaton reads.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Alphabet {
    /// Paths, whose components end with a slash.
    Paths,
    /// Arguments, which end with a zero byte.
    Arguments,
}

impl Alphabet {
    fn separator(self) -> u8 {
        match self {
            Self::Paths => b'/',
            Self::Arguments => 0,
        }
    }
}

/// Stands for all bytes that no pattern names: no text in UTF-8 has it.
const UNNAMED: u8 = 0xff;

/// A place in a pattern: which pattern, before which piece, and whether inside a component of `**/`.
type Place = (usize, usize, bool);

impl Automaton {
    /// By subset construction. `None` when it has more than [`MOST_STATES`] or [`MOST_WORDS`].
    pub(crate) fn build(patterns: &[(Vec<Piece>, u32)], alphabet: Alphabet) -> Option<Self> {
        if patterns.is_empty() {
            return Some(Self::default());
        }
        let pieces: Vec<&[Piece]> = patterns.iter().map(|(pieces, _)| pieces.as_slice()).collect();
        let separator = alphabet.separator();
        // Bytes that no pattern names lead to the same state everywhere.
        let mut named: BTreeSet<u8> = BTreeSet::from([UNNAMED, separator]);
        named.extend(pieces.iter().flat_map(|pieces| pieces.iter()).filter_map(|piece| match piece {
            Piece::Byte(byte) => Some(*byte),
            _ => None,
        }));
        let width = GLOB_GRANTS + named.len();
        // The last column is that of the unnamed.
        let mut words = vec![(width - 1) as u16; GLOB_BYTES];
        for (class, byte) in named.iter().enumerate() {
            words[usize::from(*byte)] = (GLOB_GRANTS + class) as u16;
        }
        let start = closure(&pieces, (0..pieces.len()).map(|pattern| (pattern, 0, false)));
        let mut numbers = BTreeMap::from([(start.clone(), 0)]);
        let mut sets = vec![start];
        let mut done = 0;
        while done < sets.len() {
            let set = sets[done].clone();
            done += 1;
            let ends = set.iter().filter(|(pattern, piece, _)| *piece == pieces[*pattern].len());
            let grants = ends.fold(0, |mask, (pattern, ..)| mask | patterns[*pattern].1);
            words.extend([grants as u16, (grants >> 16) as u16]);
            let after = |byte: u8| {
                closure(&pieces, set.iter().flat_map(|place| step(&pieces, *place, byte, separator)))
            };
            let otherwise = after(UNNAMED);
            let named_here: BTreeSet<u8> = set
                .iter()
                .filter_map(|(pattern, piece, _)| match pieces[*pattern].get(*piece) {
                    Some(Piece::Byte(byte)) => Some(*byte),
                    _ => None,
                })
                .collect();
            for byte in &named {
                let differs = *byte == separator || named_here.contains(byte);
                let next = if differs { after(*byte) } else { otherwise.clone() };
                if next.is_empty() {
                    words.push(GLOB_DEAD);
                    continue;
                }
                let number = *numbers.entry(next).or_insert_with_key(|next| {
                    sets.push(next.clone());
                    sets.len() - 1
                });
                words.push(number as u16);
            }
            if sets.len() > MOST_STATES || words.len() > MOST_WORDS {
                return None;
            }
        }
        Some(Self { words, width })
    }

    /// What the kernel's map holds.
    #[must_use]
    pub fn words(&self) -> &[u16] {
        &self.words
    }

    /// Words of one state.
    #[must_use]
    pub fn width(&self) -> usize {
        self.width
    }

    /// What `path` is allowed with (or arguments are), as a mask of [`palisade_abi::policy::exec::grant`]s: the same steps that the kernel takes.
    #[must_use]
    pub fn grants(&self, path: &[u8]) -> u32 {
        if self.words.is_empty() {
            return 0;
        }
        let word = |index: usize| self.words.get(index).copied();
        let row = |state: u16| GLOB_BYTES + usize::from(state) * self.width;
        let mut state = 0;
        for byte in path {
            let Some(column) = word(usize::from(*byte)) else { return 0 };
            match word(row(state) + usize::from(column)) {
                None | Some(GLOB_DEAD) => return 0,
                Some(next) => state = next,
            }
        }
        let half = |index| u32::from(word(row(state) + index).unwrap_or(0));
        half(0) | half(1) << 16
    }
}

/// All places reachable without reading a byte.
fn closure(pieces: &[&[Piece]], places: impl Iterator<Item = Place>) -> BTreeSet<Place> {
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
            Some(Piece::Components | Piece::Arguments) if !inside => open.push((pattern, piece + 1, false)),
            _ => {}
        }
    }
    set
}

/// Where `byte` leads from one place.
fn step(pieces: &[&[Piece]], (pattern, piece, inside): Place, byte: u8, separator: u8) -> Option<Place> {
    match pieces[pattern].get(piece)? {
        Piece::Byte(wanted) => (*wanted == byte).then_some((pattern, piece + 1, false)),
        Piece::Star => (byte != separator).then_some((pattern, piece, false)),
        Piece::Components => match (inside, byte == separator) {
            (_, false) => Some((pattern, piece, true)),
            (true, true) => Some((pattern, piece, false)),
            (false, true) => None,
        },
        Piece::Arguments => Some((pattern, piece, byte != separator)),
        // `inside` marks that a byte was read: the rest may end there, or go on.
        Piece::Rest => Some((pattern, piece, true)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::glob::Pattern;

    fn component() -> impl Strategy<Value = String> {
        let wild = r"[ab*\\]{1,3}".prop_filter("no **", |text| !crate::glob::has_partial_double_star(text));
        prop_oneof![3 => "[ab]{1,3}", 2 => wild, 1 => Just("**".to_owned())]
    }

    proptest! {
        /// The automaton is the definition, for several patterns at once.
        #[test]
        fn the_automaton_agrees_with_the_definition(
            patterns in prop::collection::vec(prop::collection::vec(component(), 1..5), 1..4),
            paths in prop::collection::vec(prop::collection::vec(r"[abc*\\]{1,3}", 1..6), 1..20),
        ) {
            let patterns: Vec<Pattern> =
                patterns.iter().map(|components| Pattern::parse(&format!("/{}", components.join("/"))).unwrap()).collect();
            // High bits too: a mask takes two words.
            let numbered: Vec<(&Pattern, u32)> =
                patterns.iter().enumerate().map(|(index, pattern)| (pattern, 1 << (index * 10))).collect();
            let pieces: Vec<(Vec<Piece>, u32)> =
                numbered.iter().map(|(pattern, bit)| (pattern.pieces(), *bit)).collect();
            let automaton = Automaton::build(&pieces, Alphabet::Paths).unwrap();
            for path in paths {
                let path = format!("/{}", path.join("/"));
                let expected = numbered
                    .iter()
                    .filter(|(pattern, _)| pattern.matches(&path))
                    .fold(0, |mask, (_, bit)| mask | bit);
                prop_assert_eq!(automaton.grants(path.as_bytes()), expected, "{:?} on {}", &patterns, path);
            }
        }
    }
}
