//! What others wrote, compiled: kept in the cache, so that a fresh clone compiles Palisade alone.
//!
//! Cargo takes over what it finds in a target folder as long as compiler, flags and features are the same, wherever the folder was
//! before; it looks at no file's time of a dependency from a registry. So a copy that does not fit costs its time and no more.

use std::{fs, path::Path, process::Command};

use anyhow::{Context as _, Result};

use crate::{paths, shell};

/// What a profile's folder has of compiled code: its libraries, what their build scripts made, and what cargo knows of both.
const PARTS: [&str; 3] = ["deps", "build", ".fingerprint"];
/// Sets that are kept, of all flags and versions together: a set takes up to a gigabyte.
const MOST_SETS: usize = 6;

/// Builds into `target`, whose `folders` hold one profile each. Dependencies come from the cache, and go there after a build that
/// found none. `flags` is what tells this build from others of the same folders.
pub fn cached(
    target: &Path,
    folders: &[&str],
    flags: &str,
    build: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let read =
        |name: &str| fs::read(paths::repository().join(name)).with_context(|| format!("cannot read {name}"));
    let compiler = shell::read(Command::new("rustc").arg("-vV"))?;
    let words = folders.join(" ");
    let key = paths::fingerprint(&[
        &read("Cargo.lock")?,
        &read("Cargo.toml")?,
        compiler.as_bytes(),
        words.as_bytes(),
        flags.as_bytes(),
    ]);
    let all = paths::cache("dependencies")?;
    let kept = all.join(key);
    let complete = kept.join("complete");
    if complete.exists() {
        copy(&kept, target, folders)?;
        // Which one was used last.
        fs::write(&complete, "")?;
        return build();
    }
    build()?;
    let _left_by_an_interrupted_run = fs::remove_dir_all(&kept);
    remove_oldest(&all)?;
    copy(target, &kept, folders)?;
    fs::write(complete, "").context("cannot write to the cache")
}

/// Copies compiled dependencies of one target folder to another, as far as that has none of the same name. What cargo knows of them
/// comes last, so that it does not believe in what an interrupted run left.
pub fn copy(from: &Path, to: &Path, folders: &[&str]) -> Result<()> {
    for folder in folders {
        for part in PARTS {
            let (from, to) = (from.join(folder).join(part), to.join(folder).join(part));
            if !from.exists() {
                continue;
            }
            fs::create_dir_all(&to)?;
            let mut missing = Vec::new();
            for entry in fs::read_dir(&from)? {
                let name = entry?.file_name();
                if !is_own(&name.to_string_lossy()) && !to.join(&name).exists() {
                    missing.push(from.join(name));
                }
            }
            for names in missing.chunks(256) {
                let mut command = Command::new("cp");
                command.args(["-a", "--reflink=auto"]).args(names).arg(&to);
                shell::read(&mut command)?;
            }
        }
    }
    Ok(())
}

/// Whether a file's or folder's name is that of a crate of this repository.
fn is_own(name: &str) -> bool {
    let name = name.strip_prefix("lib").unwrap_or(name);
    ["palisade", "xtask"].iter().any(|own| name.starts_with(own))
}

fn remove_oldest(all: &Path) -> Result<()> {
    let mut sets: Vec<_> = fs::read_dir(all)?
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let used = path.join("complete").metadata().and_then(|metadata| metadata.modified()).ok();
            Some((used, path))
        })
        .collect();
    sets.sort();
    let surplus = (sets.len() + 1).saturating_sub(MOST_SETS);
    for (_, path) in sets.into_iter().take(surplus) {
        fs::remove_dir_all(&path).with_context(|| format!("cannot remove {}", path.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_others_wrote_is_copied_and_only_where_it_is_missing() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for name in ["libserde-1.rlib", "libpalisade_abi-1.rlib", "palisade-2", "xtask-3", "tokio-4.d"] {
            fs::create_dir_all(from.path().join("release/deps")).unwrap();
            fs::write(from.path().join("release/deps").join(name), name).unwrap();
        }
        copy(from.path(), to.path(), &["release", "debug"]).unwrap();
        let mut names: Vec<_> = fs::read_dir(to.path().join("release/deps"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, ["libserde-1.rlib", "tokio-4.d"]);
        assert!(!to.path().join("debug").exists());
        fs::write(from.path().join("release/deps/libserde-1.rlib"), "another").unwrap();
        copy(from.path(), to.path(), &["release"]).unwrap();
        assert_eq!(
            fs::read_to_string(to.path().join("release/deps/libserde-1.rlib")).unwrap(),
            "libserde-1.rlib"
        );
    }

    #[test]
    fn a_set_is_taken_over_by_the_next_folder() {
        let cache = tempfile::tempdir().unwrap();
        let all = cache.path();
        for number in 0..MOST_SETS + 2 {
            let set = all.join(number.to_string());
            fs::create_dir(&set).unwrap();
            fs::write(set.join("complete"), "").unwrap();
            let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(number as u64);
            fs::File::options().write(true).open(set.join("complete")).unwrap().set_modified(time).unwrap();
        }
        fs::create_dir(all.join("interrupted")).unwrap();
        remove_oldest(all).unwrap();
        // Room for one more.
        assert_eq!(fs::read_dir(all).unwrap().count(), MOST_SETS - 1);
        assert!(!all.join("interrupted").exists() && all.join((MOST_SETS + 1).to_string()).exists());
    }
}
