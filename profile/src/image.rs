//! Compiling a policy into the policy image: pure values for the kernel's maps.

use thiserror::Error;

use crate::{automaton::MOST_STATES, exec, mode::Mode, policy::Policy};

/// The compiled form of a revision: a section that is absent restricts nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyImage {
    pub mode: Mode,
    pub exec: Option<exec::Image>,
}

impl PolicyImage {
    /// What allows nothing, in no family.
    #[must_use]
    pub fn nothing(mode: Mode) -> Self {
        Self { mode, exec: Some(exec::Image::default()) }
    }
}

/// Why a policy has no image.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CompileError {
    #[error(
        "the patterns with wildcards of {profiles} make an automaton of more than {MOST_STATES} states, or 512 KiB; \
         use fewer of them, or exact paths"
    )]
    TooManyStates { profiles: String },
    #[error(
        "the patterns of arguments that {profiles} have for {path} make an automaton of too many states; use fewer '*'"
    )]
    TooManyArguments { profiles: String, path: String },
    #[error(
        "the patterns of {profiles}, with wildcards and of arguments, make automata of more than 512 KiB together; use fewer of them"
    )]
    TooManyWords { profiles: String },
}

/// Compiles `policy`.
///
/// # Errors
///
/// When a section's wildcards exceed its bounds.
pub fn compile(policy: &Policy) -> Result<PolicyImage, CompileError> {
    let Policy { profiles, mode, exec } = policy;
    let profiles = || profiles.join(", ");
    let exec = exec.as_ref().map(|rules| exec::image::compile(rules, profiles)).transpose()?;
    Ok(PolicyImage { mode: *mode, exec })
}
