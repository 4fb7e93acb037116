//! The section `exec`: which files run, by whom and how.

pub mod code;
pub mod condition;
pub mod evaluate;
pub mod image;
pub mod policy;
mod read;

pub use image::Image;
pub use policy::Rules;

use std::collections::BTreeSet;

use crate::{digest::Digest, glob::Pattern, origin::Origin, session::Sessions};

use code::CodeRules;
use condition::Arguments;

/// The section as an author wrote it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Section {
    pub allow: Vec<ExecRule>,
    pub code: CodeRules,
}

/// One allowed executable.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ExecRule {
    pub path: Pattern,
    pub from: BTreeSet<Origin>,
    pub sessions: Sessions,
    /// What the file's bytes must be; only with an exact path, and for the image's files.
    pub sha256: Option<Digest>,
    /// Programs of the image that may execute it; any when empty. Only with an exact path.
    pub parents: BTreeSet<Pattern>,
    /// What its arguments must be; only with an exact path.
    pub arguments: Option<Arguments>,
}
