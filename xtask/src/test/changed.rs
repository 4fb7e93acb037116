//! Which files changed, for running only what they may break.

use std::process::Command;

use anyhow::{Context as _, Result};

use crate::{paths, shell};

/// The files that differ between the working tree and `commit`, those that git does not know yet among them.
///
/// # Errors
///
/// When git does not know the commit.
pub fn files(commit: &str) -> Result<Vec<String>> {
    let git = |words: &[&str]| shell::read(Command::new("git").args(words).current_dir(paths::repository()));
    let base = git(&["merge-base", commit, "HEAD"]).with_context(|| {
        format!("git finds no common history with {commit}; name a commit that it has: --changed HEAD~1")
    })?;
    let changed = git(&["diff", "--name-only", base.trim()])?;
    let added = git(&["ls-files", "--others", "--exclude-standard"])?;
    Ok(changed.lines().chain(added.lines()).map(str::to_owned).collect())
}
