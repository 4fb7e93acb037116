//! Where things are: the repository, its build output, and the cache outside the tree.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use sha2::{Digest as _, Sha256};

/// The repository's root.
pub fn repository() -> &'static Path {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest)
}

/// Cargo's output folder.
pub fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| repository().join("target"), PathBuf::from)
}

/// A folder of the cache, which outlives clones: `$PALISADE_CACHE`, or `palisade` in the user's cache folder.
pub fn cache(part: &str) -> Result<PathBuf> {
    let root = match std::env::var_os("PALISADE_CACHE") {
        Some(path) => PathBuf::from(path),
        None => match std::env::var_os("XDG_CACHE_HOME") {
            Some(path) => PathBuf::from(path).join("palisade"),
            None => {
                PathBuf::from(std::env::var_os("HOME").context("neither PALISADE_CACHE nor HOME is set")?)
                    .join(".cache/palisade")
            }
        },
    };
    let path = root.join(part);
    std::fs::create_dir_all(&path)
        .with_context(|| format!("cannot create the cache folder {}", path.display()))?;
    Ok(path)
}

/// A short name for what `parts` determine together.
pub fn fingerprint(parts: &[&[u8]]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update(part.len().to_le_bytes());
        hash.update(part);
    }
    hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}
