//! Profiles from a directory, and the revisions they make.
//!
//! The directory is read whole, at start and whenever it changes. A file with a fault keeps its last good
//! profiles in force and is reported; one that never was good adds nothing. A revision stays in the kernel as
//! long as a slot is under it.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
};

use palisade_profile::{
    document::{self, Profile},
    image,
    policy::{self, Policy},
    selector::ContainerFacts,
};

use crate::kernel::Maps;

/// The profiles of a directory.
pub struct Profiles {
    folder: PathBuf,
    /// Last content of each file.
    seen: BTreeMap<PathBuf, Vec<u8>>,
    /// Last good profiles of each file.
    good: BTreeMap<PathBuf, Vec<Profile>>,
    /// Last listing error, so that it is reported once.
    unreadable: Option<String>,
}

impl Profiles {
    pub fn new(folder: &Path) -> Self {
        Self { folder: folder.to_owned(), seen: BTreeMap::new(), good: BTreeMap::new(), unreadable: None }
    }

    /// Reads the directory; returns whether the profiles in force may have changed.
    pub fn refresh(&mut self) -> bool {
        let files = match read_folder(&self.folder) {
            Ok(files) => {
                self.unreadable = None;
                files
            }
            Err(error) => {
                let message = error.to_string();
                if self.unreadable.as_ref() != Some(&message) {
                    tracing::error!(
                        folder = %self.folder.display(), error = message,
                        "profiles cannot be read; those that were read before stay in force"
                    );
                    self.unreadable = Some(message);
                }
                return false;
            }
        };
        if files == self.seen {
            return false;
        }
        let mut changed = false;
        self.good.retain(|path, _| {
            let kept = files.contains_key(path);
            if !kept {
                tracing::info!(file = %path.display(), "a profile file is gone");
                changed = true;
            }
            kept
        });
        for (path, content) in &files {
            if self.seen.get(path) == Some(content) {
                continue;
            }
            match document::parse(&path.display().to_string(), &String::from_utf8_lossy(content)) {
                Ok(profiles) => {
                    tracing::info!(file = %path.display(), profiles = profiles.len(), "profiles are read");
                    self.good.insert(path.clone(), profiles);
                    changed = true;
                }
                Err(problems) => {
                    for problem in problems {
                        tracing::error!(%problem, "a profile file has a fault");
                    }
                    let kept = self.good.contains_key(path);
                    tracing::error!(
                        file = %path.display(),
                        "{}",
                        if kept { "its last good version stays in force" } else { "nothing of it is in force" }
                    );
                }
            }
        }
        self.seen = files;
        changed
    }

    /// What holds for a container.
    pub fn policy_for(&self, facts: &ContainerFacts) -> Option<Policy> {
        let all: Vec<Profile> = self.good.values().flatten().cloned().collect();
        policy::unite(&all, facts)
    }
}

fn read_folder(folder: &Path) -> std::io::Result<BTreeMap<PathBuf, Vec<u8>>> {
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let is_yaml = path.extension().is_some_and(|extension| extension == "yaml" || extension == "yml");
        // Metadata of the target: mounted configuration is made of symbolic links.
        if is_yaml && path.metadata().is_ok_and(|metadata| metadata.is_file()) {
            let content = std::fs::read(&path)?;
            files.insert(path, content);
        }
    }
    Ok(files)
}

/// A revision in the kernel.
struct Revision {
    number: u32,
    slots: usize,
}

/// The revisions in the kernel, shared by all slots with the same policy.
#[derive(Default)]
pub struct Revisions {
    by_name: HashMap<String, Revision>,
    of_slot: HashMap<u64, String>,
}

impl Revisions {
    /// Puts `slot` under `policy` (`None`: no profile names it). The switch is one write, after the whole revision
    /// stands in the kernel. Returns the revision's name and number.
    ///
    /// # Errors
    ///
    /// When the policy cannot be compiled or a map is full; the slot stays under what it was under.
    pub fn apply(&mut self, maps: &mut Maps, slot: u64, policy: Option<&Policy>) -> anyhow::Result<String> {
        let Some(policy) = policy else {
            maps.set_policy(slot, 0)?;
            self.release(maps, slot);
            return Ok(String::new());
        };
        let name = policy.revision_name();
        if self.of_slot.get(&slot) == Some(&name) {
            return Ok(name);
        }
        let number = match self.by_name.get(&name) {
            Some(revision) => revision.number,
            None => {
                let number = maps.install(&image::compile(policy)?)?;
                self.by_name.insert(name.clone(), Revision { number, slots: 0 });
                number
            }
        };
        if let Err(error) = maps.set_policy(slot, number) {
            self.drop_unused(maps, &name);
            return Err(error);
        }
        if let Some(revision) = self.by_name.get_mut(&name) {
            revision.slots += 1;
        }
        self.release(maps, slot);
        self.of_slot.insert(slot, name.clone());
        Ok(name)
    }

    /// Forgets that a slot is under its revision.
    pub fn release(&mut self, maps: &mut Maps, slot: u64) {
        let Some(name) = self.of_slot.remove(&slot) else { return };
        if let Some(revision) = self.by_name.get_mut(&name) {
            revision.slots -= 1;
        }
        self.drop_unused(maps, &name);
    }

    fn drop_unused(&mut self, maps: &mut Maps, name: &str) {
        if let Some(revision) = self.by_name.get(name)
            && revision.slots == 0
        {
            maps.remove_revision(revision.number);
            self.by_name.remove(name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "apiVersion: palisade.dev/v1alpha1\nkind: ClusterProfile\nmetadata: {name: a}\n\
                        spec: {selector: {}, mode: enforce, exec: {allow: [{path: /bin/a}]}}\n";

    #[test]
    fn a_broken_file_keeps_its_last_good_profiles() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.yaml");
        let mut profiles = Profiles::new(folder.path());
        std::fs::write(&path, GOOD).unwrap();
        assert!(profiles.refresh());
        let before = profiles.policy_for(&ContainerFacts::default()).unwrap();
        std::fs::write(&path, "apiVersion: [").unwrap();
        assert!(!profiles.refresh());
        assert_eq!(profiles.policy_for(&ContainerFacts::default()), Some(before));
        std::fs::remove_file(&path).unwrap();
        assert!(profiles.refresh());
        assert_eq!(profiles.policy_for(&ContainerFacts::default()), None);
    }

    #[test]
    fn a_folder_that_cannot_be_read_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let inside = folder.path().join("profiles");
        std::fs::create_dir(&inside).unwrap();
        std::fs::write(inside.join("a.yaml"), GOOD).unwrap();
        let mut profiles = Profiles::new(&inside);
        profiles.refresh();
        std::fs::rename(&inside, folder.path().join("away")).unwrap();
        assert!(!profiles.refresh());
        assert!(profiles.policy_for(&ContainerFacts::default()).is_some());
    }
}
