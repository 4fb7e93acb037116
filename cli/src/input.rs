//! Files that are read, and records in them.

use std::{io::Read as _, path::Path};

use anyhow::{Context as _, Result};
use palisade_proto::{record_from_json, v1::Record};

/// Reads a file, or standard input for `-`; returns the name to show.
pub(crate) fn read(path: &Path) -> Result<(String, String)> {
    if path == Path::new("-") {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).context("cannot read standard input")?;
        return Ok(("<stdin>".to_owned(), text));
    }
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok((path.display().to_string(), text))
}

/// Takes one record after the other out of a file with one in JSON a line; returns the file's name.
pub(crate) fn records(path: &Path, mut take: impl FnMut(&Record)) -> Result<String> {
    let (name, text) = read(path)?;
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let record = record_from_json(line).with_context(|| {
            format!(
                "{name}:{}: this is not a JSON record; give the output of `palisade events --json`",
                number + 1
            )
        })?;
        take(&record);
    }
    Ok(name)
}
