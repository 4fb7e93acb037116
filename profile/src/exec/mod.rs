//! The section `exec`: which files run, by whom and how.

mod read;

use std::collections::BTreeSet;

use crate::{condition::Arguments, digest::Digest, glob::Pattern, origin::Origin, session::Sessions};

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
