//! Compiling the section: what its exact paths and its patterns are allowed.

use std::collections::BTreeMap;

use palisade_abi::codes::code_flags;
use palisade_abi::policy::exec::{grant, library_grant};
use palisade_abi::volume;

use super::{
    Rules,
    condition::{self, Arguments, Condition},
};
use crate::{
    automaton::{Alphabet, Automaton, MOST_WORDS},
    glob::Pattern,
    image::CompileError,
    origin::Origin,
};

/// The section of a policy image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Image {
    /// [`palisade_abi::codes::code_flags`].
    pub flags: u32,
    /// What exact paths are allowed; on volumes as [`palisade_abi::volume`] has them.
    pub exact: BTreeMap<ExactKey, Exact>,
    /// All patterns with wildcards.
    pub globs: Automaton,
}

/// An exact path, and who executes it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ExactKey {
    pub path: Vec<u8>,
    /// The [`Exact::parent`] of the program that calls exec; 0 for what holds whoever does.
    pub parent: u32,
}

impl ExactKey {
    /// What holds for `path` whoever executes it.
    #[must_use]
    pub fn anybody(path: &[u8]) -> Self {
        Self { path: path.to_vec(), parent: 0 }
    }
}

/// What an exact path is allowed, as masks of [`grant`]s and [`library_grant`]s.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exact {
    /// Whatever the arguments are.
    pub grants: u32,
    /// With some arguments.
    pub with_arguments: u32,
    /// With which, by these arguments.
    pub arguments: Automaton,
    /// Under any condition, also where others execute it. Only in entries for anybody.
    pub any: u32,
    /// The number of this path as a parent; 0 when it is none. Only in entries for anybody.
    pub parent: u32,
}

/// Compiles the section; `profiles` names where it comes from.
///
/// # Errors
///
/// When its wildcards exceed its bounds.
pub(crate) fn compile(rules: &Rules, profiles: impl Fn() -> String) -> Result<Image, CompileError> {
    // What is pinned is not verified here, so it allows nothing.
    let Rules { allowed, pinned: _, code } = rules;
    let mut grants: BTreeMap<&Pattern, BTreeMap<&Origin, BTreeMap<&Condition, u32>>> = BTreeMap::new();
    for (pattern, origins) in allowed {
        for (origin, who) in origins {
            for (condition, sessions) in who {
                let bits = sessions.codes().fold(0, |mask, session| mask | grant(origin.code(), session));
                let of_origin = grants.entry(pattern).or_default().entry(origin).or_default();
                *of_origin.entry(condition).or_default() |= bits;
            }
        }
    }
    let flags = code.flags();
    let always = Condition::default();
    for (pattern, origins) in code.libraries.iter().flatten() {
        for origin in origins {
            // That every file of the image may be mapped is a flag.
            if *origin != Origin::Image || flags & code_flags::LIBRARIES_OF_IMAGE == 0 {
                let of_origin = grants.entry(pattern).or_default().entry(origin).or_default();
                *of_origin.entry(&always).or_default() |= library_grant(origin.code());
            }
        }
    }
    let mut rules = ExactRules::default();
    let mut patterns = Vec::new();
    for (pattern, origins) in grants {
        let mut plain = 0;
        for (origin, conditions) in origins {
            let on_volume = match origin {
                Origin::Volume(name) => Some(name.as_str()),
                _ => None,
            };
            if let Some(exact) = pattern.exact() {
                let mark = char::from(volume::MARK);
                let path =
                    on_volume.map_or_else(|| exact.to_owned(), |name| format!("{mark}{name}{mark}{exact}"));
                conditions.into_iter().for_each(|(condition, bits)| rules.add(&path, condition, bits));
            } else {
                // A condition is for one file; a document with another is refused.
                let bits = conditions.get(&always).copied().unwrap_or(0);
                match on_volume {
                    Some(name) => patterns.push((pattern.pieces_on(name), bits)),
                    None => plain |= bits,
                }
            }
        }
        if plain != 0 {
            patterns.push((pattern.pieces(), plain));
        }
    }
    let globs = Automaton::build(&patterns, Alphabet::Paths)
        .ok_or_else(|| CompileError::TooManyStates { profiles: profiles() })?;
    let exact =
        rules.close().map_err(|path| CompileError::TooManyArguments { profiles: profiles(), path })?;
    let words = globs.words().len() + exact.values().map(|rule| rule.arguments.words().len()).sum::<usize>();
    if words > MOST_WORDS {
        return Err(CompileError::TooManyWords { profiles: profiles() });
    }
    Ok(Image { flags, exact, globs })
}

/// What is granted with which arguments.
type ByArguments<'a> = Vec<(&'a Arguments, u32)>;

/// The rules of exact paths while they are gathered.
#[derive(Default)]
struct ExactRules<'a> {
    /// Parents by their number, less one.
    parents: Vec<&'a str>,
    found: BTreeMap<ExactKey, (Exact, ByArguments<'a>)>,
}

impl<'a> ExactRules<'a> {
    fn add(&mut self, path: &str, condition: &'a Condition, bits: u32) {
        let parent =
            condition.parent.as_ref().and_then(Pattern::exact).map_or(0, |parent| self.number(parent));
        self.found.entry(ExactKey::anybody(path.as_bytes())).or_default().0.any |= bits;
        let key = ExactKey { path: path.as_bytes().to_vec(), parent };
        let (rule, patterns) = self.found.entry(key).or_default();
        match &condition.arguments {
            None => rule.grants |= bits,
            Some(arguments) => {
                rule.with_arguments |= bits;
                patterns.push((arguments, bits));
            }
        }
    }

    fn number(&mut self, parent: &'a str) -> u32 {
        let known = self.parents.iter().position(|known| *known == parent);
        let index = known.unwrap_or_else(|| {
            self.parents.push(parent);
            self.parents.len() - 1
        });
        index as u32 + 1
    }

    /// `Err` with the path whose patterns of arguments are too many.
    fn close(mut self) -> Result<BTreeMap<ExactKey, Exact>, String> {
        for (index, parent) in self.parents.iter().enumerate() {
            let (rule, _) = self.found.entry(ExactKey::anybody(parent.as_bytes())).or_default();
            rule.parent = index as u32 + 1;
        }
        self.found
            .into_iter()
            .map(|(key, (rule, patterns))| {
                let text = String::from_utf8_lossy(&key.path).into_owned();
                let path = volume::split(&key.path).map_or(&*key.path, |(_, path)| path);
                match condition::automaton(&String::from_utf8_lossy(path), &patterns) {
                    Some(arguments) => Ok((key, Exact { arguments, ..rule })),
                    None => Err(text),
                }
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::Sessions;

    #[test]
    fn too_many_states_are_an_error_that_names_the_profiles() {
        let mut allowed = BTreeMap::new();
        for index in 0..12 {
            let text = format!("/*{}*x*y*z", "abcdefghijkl".chars().nth(index).unwrap());
            allowed.insert(
                Pattern::parse(&text).unwrap(),
                BTreeMap::from([(Origin::Image, BTreeMap::from([(Condition::default(), Sessions::ANY)]))]),
            );
        }
        let rules = Rules { allowed, ..Rules::default() };
        assert!(compile(&rules, || "shop/web".to_owned()).unwrap_err().to_string().contains("shop/web"));
    }
}
