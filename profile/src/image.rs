//! Compiling a policy into the policy image: pure values for the kernel's maps.

use std::collections::BTreeMap;

use palisade_abi::maps::grant;
use thiserror::Error;

use crate::{
    automaton::{Automaton, MOST_STATES},
    document::{Mode, Origin},
    policy::Policy,
};

/// The compiled form of a revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyImage {
    pub mode: Mode,
    pub restricts_exec: bool,
    /// Exact paths with the mask of [`grant`]s that each allows; on volumes as [`palisade_abi::volume`] has them.
    pub exact: BTreeMap<Vec<u8>, u32>,
    /// All patterns with wildcards.
    pub globs: Automaton,
}

/// Why a policy has no image.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CompileError {
    #[error(
        "the patterns with wildcards of {profiles} make an automaton of more than {MOST_STATES} states, or 512 KiB; \
         use fewer of them, or exact paths"
    )]
    TooManyStates { profiles: String },
}

/// Compiles `policy`.
///
/// # Errors
///
/// When its wildcards exceed its bounds.
pub fn compile(policy: &Policy) -> Result<PolicyImage, CompileError> {
    let Policy { profiles, mode, exec } = policy;
    let mut exact = BTreeMap::new();
    let mut patterns = Vec::new();
    for (pattern, origins) in exec.iter().flatten() {
        let mut plain = 0;
        for (origin, sessions) in origins {
            let bit = sessions.codes().fold(0, |mask, session| mask | grant(origin.code(), session));
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
    let globs = Automaton::build(&patterns)
        .ok_or_else(|| CompileError::TooManyStates { profiles: profiles.join(", ") })?;
    Ok(PolicyImage { mode: *mode, restricts_exec: exec.is_some(), exact, globs })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{glob::Pattern, session::Sessions};

    #[test]
    fn too_many_states_are_an_error_that_names_the_profiles() {
        let mut exec = BTreeMap::new();
        for index in 0..12 {
            let text = format!("/*{}*x*y*z", "abcdefghijkl".chars().nth(index).unwrap());
            exec.insert(Pattern::parse(&text).unwrap(), BTreeMap::from([(Origin::Image, Sessions::ANY)]));
        }
        let policy = Policy { profiles: vec!["shop/web".to_owned()], mode: Mode::Audit, exec: Some(exec) };
        assert!(compile(&policy).unwrap_err().to_string().contains("shop/web"));
    }
}
