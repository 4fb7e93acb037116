//! Profiles from a directory, and the revisions they make.
//!
//! The directory is read whole, at start and whenever it changes. A file with a fault keeps its last good
//! profiles in force and is reported; one that never was good adds nothing. A revision stays in the kernel as
//! long as a slot is under it.

use std::{
    collections::{BTreeMap, HashMap},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result};
use palisade_profile::{
    document::{self, Profile, Scope},
    image,
    policy::{self, Policy},
    selector::ContainerFacts,
};

use crate::kernel::Maps;

/// The profiles of a directory.
pub struct Profiles {
    folder: PathBuf,
    /// Last content of each file.
    seen: Files,
    /// What the files looked like when they were read last; empty when they must be read again.
    stamps: Stamps,
    /// Last good profiles of each file.
    good: BTreeMap<PathBuf, Vec<Profile>>,
    /// What is wrong with files that are not in force as they stand.
    faulty: BTreeMap<PathBuf, Vec<String>>,
    /// Last listing error, so that it is reported once.
    unreadable: Option<String>,
}

impl Profiles {
    pub fn new(folder: &Path) -> Self {
        Self {
            folder: folder.to_owned(),
            seen: Files::new(),
            stamps: Stamps::new(),
            good: BTreeMap::new(),
            faulty: BTreeMap::new(),
            unreadable: None,
        }
    }

    /// Reads the directory for the first time.
    ///
    /// # Errors
    ///
    /// When it cannot be listed. A file with a fault is reported and adds nothing.
    pub fn load(&mut self) -> Result<()> {
        let (files, stamps) = read_folder(&self.folder).with_context(|| {
            format!(
                "the profiles in {} cannot be read; name the folder under profiles:",
                self.folder.display()
            )
        })?;
        self.stamps = stamps;
        self.take(files);
        Ok(())
    }

    /// Reads the directory again if it looks different; returns whether the profiles in force may have changed.
    pub fn refresh(&mut self) -> bool {
        if !self.stamps.is_empty() && look(&self.folder).is_ok_and(|now| now == self.stamps) {
            self.unreadable = None;
            return false;
        }
        match read_folder(&self.folder) {
            Ok((files, stamps)) => {
                self.stamps = stamps;
                self.unreadable = None;
                files != self.seen && self.take(files)
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
                false
            }
        }
    }

    fn take(&mut self, files: Files) -> bool {
        let mut changed = false;
        self.good.retain(|path, _| {
            let kept = files.contains_key(path);
            if !kept {
                tracing::info!(file = %path.display(), "a profile file is gone");
                changed = true;
            }
            kept
        });
        // A file may be refused for what another one holds, so whatever is open is looked at until nothing more
        // comes of it.
        let mut open: Vec<&PathBuf> = files
            .keys()
            .filter(|path| self.seen.get(*path) != files.get(*path) || self.faulty.contains_key(*path))
            .collect();
        let mut faulty = BTreeMap::new();
        loop {
            let before = open.len();
            faulty.clear();
            open.retain(|path| match self.check(path, &files[*path]) {
                Ok(profiles) => {
                    tracing::info!(file = %path.display(), profiles = profiles.len(), "profiles are read");
                    self.good.insert((*path).clone(), profiles);
                    changed = true;
                    false
                }
                Err(faults) => {
                    faulty.insert((*path).clone(), faults);
                    true
                }
            });
            if open.is_empty() || open.len() == before {
                break;
            }
        }
        for (path, faults) in &faulty {
            if self.faulty.get(path) == Some(faults) {
                continue;
            }
            for fault in faults {
                tracing::error!(fault, "a profile file has a fault");
            }
            let kept = self.good.contains_key(path);
            tracing::error!(
                file = %path.display(),
                "{}",
                if kept { "its last good version stays in force" } else { "nothing of it is in force" }
            );
        }
        self.faulty = faulty;
        self.seen = files;
        changed
    }

    /// The profiles of one file, or everything that is wrong with it.
    fn check(&self, path: &Path, content: &Result<Vec<u8>, String>) -> Result<Vec<Profile>, Vec<String>> {
        let content = content.as_ref().map_err(|error| vec![format!("{}: {error}", path.display())])?;
        let profiles = document::parse(&path.display().to_string(), &String::from_utf8_lossy(content))
            .map_err(|problems| problems.iter().map(ToString::to_string).collect::<Vec<_>>())?;
        let mut faults: Vec<String> = Vec::new();
        for profile in &profiles {
            if let Err(error) = image::compile(&policy::alone(profile).verified_whole()) {
                faults.push(format!("{}: {error}", path.display()));
            }
            let twin = self.good.iter().find(|(other, profiles)| {
                *other != path
                    && profiles.iter().any(|known| known.scope == profile.scope && known.name == profile.name)
            });
            if let Some((other, _)) = twin {
                faults.push(format!(
                    "{}: the profile {} is in {} already; remove one of the two",
                    path.display(),
                    profile.reference(),
                    other.display()
                ));
            }
        }
        if faults.is_empty() { Ok(profiles) } else { Err(faults) }
    }

    /// Whether a container's image, which these facts lack, decides what holds for it.
    pub fn waits_for_image(&self, facts: &ContainerFacts) -> bool {
        self.good.values().flatten().any(|profile| {
            let in_scope = match &profile.scope {
                Scope::Namespace(namespace) => *namespace == facts.namespace,
                Scope::Cluster => true,
            };
            in_scope && profile.selector.waits_for_image(facts)
        })
    }

    /// What holds for a container.
    pub fn policy_for(&self, facts: &ContainerFacts) -> Option<Policy> {
        policy::unite(self.good.values().flatten(), facts)
    }
}

/// Content of each profile file, or why it cannot be read.
type Files = BTreeMap<PathBuf, Result<Vec<u8>, String>>;

/// All files of the folder that are named as profiles. A file that is listed and cannot be read is not gone.
/// What tells without reading it that a file may be another, or have other content: a thousand files that are read each second cost
/// as much as a hundred executions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    /// When it was changed last, nanoseconds since the Unix epoch. Unlike the time of its last modification nobody sets it.
    changed: i128,
}

/// `None` for what cannot be looked at.
type Stamps = BTreeMap<PathBuf, Option<Stamp>>;

/// A file may be changed once more in the same tick of the file system's clock.
const TICK: i128 = 2_000_000_000;

/// Looks at the profiles, without reading them.
fn look(folder: &Path) -> std::io::Result<Stamps> {
    let mut stamps = Stamps::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let is_yaml = path.extension().is_some_and(|extension| extension == "yaml" || extension == "yml");
        if !is_yaml {
            continue;
        }
        // Of what a symbolic link leads to.
        let found = std::fs::metadata(&path).ok();
        if found.as_ref().is_some_and(std::fs::Metadata::is_dir) {
            continue;
        }
        let stamp = found.map(|found| Stamp {
            device: found.dev(),
            inode: found.ino(),
            size: found.size(),
            changed: i128::from(found.ctime()) * 1_000_000_000 + i128::from(found.ctime_nsec()),
        });
        stamps.insert(path, stamp);
    }
    Ok(stamps)
}

/// Reads the profiles. The stamps are those from before, and none when one does not tell whether its file was read to the end.
fn read_folder(folder: &Path) -> std::io::Result<(Files, Stamps)> {
    let stamps = look(folder)?;
    let files = stamps
        .keys()
        .map(|path| (path.clone(), std::fs::read(path).map_err(|error| error.to_string())))
        .collect();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos().cast_signed());
    let settled = stamps.values().all(|stamp| stamp.is_some_and(|stamp| stamp.changed + TICK < now));
    Ok((files, if settled { stamps } else { Stamps::new() }))
}

/// A revision in the kernel.
struct Revision {
    number: u32,
    slots: usize,
    /// Whether an agent before this one wrote it, and it has not been compared yet.
    read_back: bool,
}

/// The revisions in the kernel, shared by all slots with the same policy.
#[derive(Default)]
pub struct Revisions {
    by_name: HashMap<String, Revision>,
    of_slot: HashMap<u64, String>,
    /// Names of all revisions of this run: a record may be read long after its revision is gone.
    names: HashMap<u32, String>,
}

impl Revisions {
    /// Puts `slot` under `policy` (`None`: no profile names it). The switch is one write, after the whole revision
    /// stands in the kernel. Returns the revision's name and number.
    ///
    /// # Errors
    ///
    /// When the policy cannot be compiled or a map is full; the slot stays under what it was under.
    pub fn apply(
        &mut self,
        maps: &mut Maps,
        slot: u64,
        policy: Option<&Policy>,
        flags: u32,
    ) -> Result<String> {
        let Some(policy) = policy else {
            maps.policies.set_policy(slot, 0, flags)?;
            self.release(maps, slot);
            return Ok(String::new());
        };
        let name = policy.revision_name();
        self.compare(maps, &name, policy)?;
        if self.of_slot.get(&slot) == Some(&name)
            && let Some(revision) = self.by_name.get(&name)
        {
            maps.policies.set_policy(slot, revision.number, flags)?;
            return Ok(name);
        }
        let number = match self.by_name.get(&name) {
            Some(revision) => revision.number,
            None => {
                let number = maps.policies.install(number_of(&name), &image::compile(policy)?)?;
                self.by_name.insert(name.clone(), Revision { number, slots: 0, read_back: false });
                self.names.insert(number, name.clone());
                number
            }
        };
        if let Err(error) = maps.policies.set_policy(slot, number, flags) {
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

    /// Compares a revision that an agent before this one wrote with what it should be, once; a wrong one is written anew
    /// and all its slots are switched.
    fn compare(&mut self, maps: &mut Maps, name: &str, policy: &Policy) -> Result<()> {
        let Some(revision) = self.by_name.get_mut(name).filter(|revision| revision.read_back) else {
            return Ok(());
        };
        let image = image::compile(policy)?;
        if !maps.policies.holds(revision.number, &image) {
            tracing::error!(
                revision = name,
                "the kernel has other rules under this name than it should; writing them anew"
            );
            let number = maps.policies.install(number_of(name), &image)?;
            for (slot, _) in self.of_slot.iter().filter(|(_, other)| *other == name) {
                maps.policies.switch(*slot, number)?;
            }
            maps.policies.retire(revision.number);
            revision.number = number;
            self.names.insert(number, name.to_owned());
        }
        revision.read_back = false;
        Ok(())
    }

    /// Takes over what the kernel has of an agent before this one: number, name and slots of each revision.
    pub fn read_back(&mut self, found: Vec<(u32, u64, Vec<u64>)>) {
        for (number, name, slots) in found {
            let name = format!("{name:012x}");
            self.names.insert(number, name.clone());
            let revision = Revision { number, slots: slots.len(), read_back: true };
            self.by_name.insert(name.clone(), revision);
            for slot in slots {
                self.of_slot.insert(slot, name.clone());
            }
        }
    }

    /// The name of the revision that the kernel knows by `number`; empty for none.
    pub fn name(&self, number: u32) -> String {
        self.names.get(&number).cloned().unwrap_or_default()
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
            maps.policies.retire(revision.number);
            self.by_name.remove(name);
        }
    }
}

/// A revision's name as the kernel keeps it; its 12 hexadecimal digits always fit.
fn number_of(name: &str) -> u64 {
    u64::from_str_radix(name, 16).unwrap_or(0)
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
    fn what_was_read_is_read_again_when_it_has_changed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.yaml");
        let mut profiles = Profiles::new(folder.path());
        std::fs::write(&path, GOOD).unwrap();
        assert!(profiles.refresh());
        // Of the same size, and at once: the clock of the file system may not tell.
        std::fs::write(&path, GOOD.replace("/bin/a", "/bin/b")).unwrap();
        assert!(profiles.refresh());
        let begun = std::time::Instant::now();
        while profiles.stamps.is_empty() {
            assert!(begun.elapsed().as_secs() < 20, "it is read each time, for ever");
            assert!(!profiles.refresh());
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        assert!(!profiles.refresh());
        std::fs::write(&path, GOOD).unwrap();
        assert!(profiles.refresh());
    }

    #[test]
    fn one_bad_file_does_not_touch_the_others_and_a_twin_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let mut profiles = Profiles::new(folder.path());
        std::fs::write(folder.path().join("a.yaml"), GOOD).unwrap();
        std::os::unix::fs::symlink("/nowhere", folder.path().join("b.yaml")).unwrap();
        std::fs::write(folder.path().join("c.yaml"), GOOD.replace("/bin/a", "/bin/wider")).unwrap();
        profiles.load().unwrap();
        let policy = profiles.policy_for(&ContainerFacts::default()).unwrap();
        assert_eq!(
            policy.exec.unwrap().allowed.len(),
            1,
            "the twin in c.yaml must not widen the profile in a.yaml"
        );
        assert!(Profiles::new(&folder.path().join("none")).load().is_err());
    }

    #[test]
    fn a_profile_that_moves_to_another_file_stays_in_force() {
        let folder = tempfile::tempdir().unwrap();
        let (first, second) = (folder.path().join("a.yaml"), folder.path().join("b.yaml"));
        let mut profiles = Profiles::new(folder.path());
        std::fs::write(&second, GOOD).unwrap();
        profiles.load().unwrap();
        // Moved in one go, as a mounted configuration changes.
        std::fs::write(&first, GOOD).unwrap();
        std::fs::write(&second, GOOD.replace("name: a", "name: other")).unwrap();
        assert!(profiles.refresh());
        assert_eq!(profiles.policy_for(&ContainerFacts::default()).unwrap().profiles, ["a", "other"]);
        // A twin that was refused comes into force when the other is removed.
        std::fs::write(folder.path().join("c.yaml"), GOOD).unwrap();
        profiles.refresh();
        std::fs::remove_file(&first).unwrap();
        profiles.refresh();
        assert_eq!(profiles.policy_for(&ContainerFacts::default()).unwrap().profiles, ["a", "other"]);
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
