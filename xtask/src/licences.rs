//! What we depend on: only licences that may be shipped, and only the package registry as a source.

use std::process::Command;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::{paths, shell};

/// Licences that need no more than their text beside the program.
const ALLOWED: &[&str] = &[
    "MIT",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "ISC",
    "Zlib",
    "0BSD",
    "CC0-1.0",
    "Unlicense",
    "Unicode-3.0",
    "BSL-1.0",
    "MIT-0",
    "NCSA",
];

/// Packages with another licence, each with the reason why that is in order.
const EXCEPTIONS: &[(&str, &str)] =
    // Linked statically, which the LGPL allows as long as the sources to link anew are to be had: they are all here.
    &[("btf-rs", "LGPL-2.1-or-later"), ("btf-rs-derive", "LGPL-2.1-or-later")];

/// Checks every package that the workspace resolves to.
pub fn check() -> Result<()> {
    let text = shell::read(
        Command::new("cargo").args(["metadata", "--format-version", "1"]).current_dir(paths::repository()),
    )?;
    let metadata: Value = serde_json::from_str(&text)?;
    let mut faults = Vec::new();
    for package in metadata["packages"].as_array().context("cargo lists no packages")? {
        let name = package["name"].as_str().unwrap_or_default();
        let Some(source) = package["source"].as_str() else { continue };
        if !source.starts_with("registry+") {
            faults.push(format!("{name} comes from {source}"));
        }
        let licence = package["license"].as_str().unwrap_or("none");
        let excepted = EXCEPTIONS.iter().any(|(known, of)| *known == name && *of == licence);
        if !excepted && !allowed(licence) {
            faults.push(format!("{name} has the licence {licence}"));
        }
    }
    if !faults.is_empty() {
        bail!("{}; replace the package or state the exception in xtask/src/licences.rs", faults.join("; "));
    }
    Ok(())
}

/// Whether one of the alternatives of an SPDX expression is allowed in all its parts.
fn allowed(expression: &str) -> bool {
    let plain = expression.replace(['(', ')'], "").replace('/', " OR ");
    plain
        .split(" OR ")
        .any(|alternative| alternative.split(" AND ").all(|part| ALLOWED.contains(&part.trim())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_allowed_alternative_is_enough_and_every_part_of_it_counts() {
        assert!(allowed("MIT OR GPL-3.0-only"));
        assert!(allowed("MIT/Apache-2.0"));
        assert!(allowed("(MIT OR Apache-2.0) AND Unicode-3.0"));
        assert!(!allowed("MIT AND GPL-3.0-only"));
        assert!(!allowed("none"));
    }
}
