//! The volumes of a container: learned as soon as the runtime has mounted them, and before its policy where that speaks
//! of them.

use std::time::Duration;

use anyhow::Result;
use palisade_abi::codes::origin;

use super::{Agent, flow::Waiting};
use crate::{
    containers::{
        cgroups::Found,
        mounts::{self, Volume},
    },
    processes,
    records::{Exec, File, now_since_boot},
};

/// How long a policy that speaks of volumes waits for them. Afterwards it holds without them, and refuses what is on them.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);
/// What a held exec may be later than the first of its container, to be that one: nanoseconds.
const SAME_EXEC: u64 = 10_000_000;

impl Agent {
    /// Something has happened after which the mounts of a container may be there.
    pub(super) fn mounts_may_be_there(&mut self, slot: u64) {
        if self.containers.get(&slot).is_some_and(|container| container.volumes.is_none()) {
            self.learn_volumes(slot);
        }
        self.apply_if_mounted(slot);
    }

    /// Puts a container under a policy that has waited for its mounts.
    fn apply_if_mounted(&mut self, slot: u64) {
        let Some(since) = self.awaiting_mounts.get(&slot) else { return };
        let known = self.containers.get(&slot).is_some_and(|container| container.volumes.is_some());
        if known || since.elapsed() > PATIENCE {
            self.apply(slot, "identified");
        }
    }

    /// Puts those under their policy whose mounts became known while records were taken.
    pub(super) fn apply_due(&mut self) {
        for slot in std::mem::take(&mut self.due) {
            self.apply_if_mounted(slot);
        }
    }

    /// Tries again to put those under their policy that wait for their mounts.
    pub(super) fn look_for_mounts(&mut self) {
        for slot in self.awaiting_mounts.keys().copied().collect::<Vec<_>>() {
            self.mounts_may_be_there(slot);
        }
    }

    /// Tries again to open the mounts that could not be opened.
    pub(super) fn look_for_more_mounts(&mut self) {
        let open: Vec<u64> = self
            .containers
            .iter()
            .filter(|(_, container)| container.volumes_open)
            .map(|(slot, _)| *slot)
            .collect();
        for slot in open {
            self.learn_volumes(slot);
        }
    }

    /// Learns the mounts of an identified container; returns whether they are known.
    pub(super) fn learn_volumes(&mut self, slot: u64) -> bool {
        let Some(container) = self.containers.get(&slot) else { return false };
        if container.volumes.is_some() && !container.volumes_open {
            return true;
        }
        let Some(identity) = &container.identity else { return false };
        if identity.sandbox {
            return self.note_volumes(slot, Vec::new(), false);
        }
        let Some(pid) = self.process_in_its_root(slot) else {
            // One that runs on the host's root has nothing mounted that the host has not.
            let workload = self.kernel.maps.ledger.slot(slot).map_or(0, |slot| slot.workload_pid);
            return workload != 0
                && self.kernel.has_hosts_root(workload)
                && self.note_volumes(slot, Vec::new(), false);
        };
        let untouched = self.is_untouched(slot, pid);
        match self.read_volumes(slot, pid, untouched) {
            // If it has run meanwhile, what was read may be its own doing.
            Ok(_) if untouched && !self.is_untouched(slot, pid) => false,
            Ok((found, complete)) => self.note_volumes(slot, found, !complete),
            Err(error) => {
                tracing::debug!(slot, pid, error = format!("{error:#}"), "mounts cannot be read now");
                false
            }
        }
    }

    /// Whether nothing but the runtime has run in a container, as far as its process `pid` is concerned.
    pub(super) fn is_untouched(&self, slot: u64, pid: u32) -> bool {
        if self.containers.get(&slot).is_none_or(|container| container.found_running) {
            return false;
        }
        let first_exec = self.kernel.maps.ledger.slot(slot).map_or(0, |slot| slot.first_exec);
        let held = self.held.get(&slot).into_iter().flatten();
        first_exec == 0
            || held.into_iter().any(|exec| {
                let header = &exec.made.header;
                exec.made.process.0 == pid && header.time.saturating_sub(first_exec) < SAME_EXEC
            }) && self.kernel.maps.state.is_held(pid)
    }

    fn note_volumes(&mut self, slot: u64, found: Vec<Volume>, open: bool) -> bool {
        let Some(container) = self.containers.get_mut(&slot) else { return false };
        container.volumes_open = open;
        let known = container.volumes.get_or_insert_default();
        let before = known.len();
        for volume in found {
            if !known.iter().any(|other| other.mounted.point == volume.mounted.point) {
                known.push(volume);
            }
        }
        if known.len() == before {
            return true;
        }
        container.volumes_since = now_since_boot();
        self.name_waiting(slot);
        self.tell_coverage(slot, "volumes-known", 0);
        true
    }

    /// The oldest process of a container that has its root directory there already: by then everything is mounted.
    pub(super) fn process_in_its_root(&self, slot: u64) -> Option<u32> {
        let container = self.containers.get(&slot)?;
        let found = Found { slot, id: container.id.clone(), folder: container.cgroup.clone() };
        let mut inside = found.members();
        inside.retain(|pid| !self.kernel.has_hosts_root(*pid));
        processes::oldest(&inside)
    }

    /// Reads the mounts of the process `pid` and tells the kernel those that are volumes; whether that was all of them.
    fn read_volumes(&mut self, slot: u64, pid: u32, untouched: bool) -> Result<(Vec<Volume>, bool)> {
        let Self { containers, kernel, .. } = self;
        let Some(container) = containers.get(&slot) else { return Ok((Vec::new(), true)) };
        let Some(identity) = &container.identity else { return Ok((Vec::new(), true)) };
        let mut table = kernel.open_mounts(pid, identity.mounts.clone(), untouched)?;
        let mut found = Vec::new();
        for opened in &table.opened {
            let described = opened.described.as_ref();
            let volume = mounts::volume(&opened.mounted, described, &identity.pod_uid, untouched);
            let Some(volume) = volume else { continue };
            match kernel.learn_volume(slot, opened, &volume) {
                Ok(()) => found.push(volume),
                Err(error) => {
                    table.complete = false;
                    if !container.volumes_open {
                        tracing::warn!(
                            container = container.id,
                            volume = volume.name.as_str(),
                            error = format!("{error:#}"),
                            "files on this mount have no name; this is tried again"
                        );
                    }
                }
            }
        }
        Ok((found, table.complete))
    }

    /// Names what an exec recorded before the volumes of its container were known.
    pub(super) fn name_early(&self, slot: u64, time: u64, exec: &mut Exec) {
        let Some(container) = self.containers.get(&slot) else { return };
        if time < container.volumes_since
            && let Some(volumes) = &container.volumes
        {
            name_on(volumes, exec);
        }
    }

    /// The same for records that wait for their container's name, and for what is held.
    fn name_waiting(&mut self, slot: u64) {
        let Self { containers, waiting, held, .. } = self;
        let Some(volumes) = containers.get(&slot).and_then(|container| container.volumes.as_deref()) else {
            return;
        };
        let waiting = waiting.get_mut(&slot).into_iter().flat_map(Waiting::execs);
        let held = held.get_mut(&slot).into_iter().flatten().map(|held| &mut *held.exec);
        for exec in waiting.chain(held) {
            name_on(volumes, exec);
        }
    }
}

/// Names the executable and the script of a record by the volumes they are on.
fn name_on(volumes: &[Volume], exec: &mut Exec) {
    for file in std::iter::once(&mut exec.file).chain(&mut exec.script) {
        // What a file on a volume is for a kernel that does not know the volume.
        let may_be = matches!(file.origin, origin::HOST | origin::UNKNOWN | origin::MEMORY);
        let found = may_be.then(|| mounts::rename(volumes, &file.device_text(), &file.path)).flatten();
        if let Some(path) = found {
            *file = File { path, origin: origin::VOLUME, ..*file };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::Mounted;
    use palisade_profile::origin::VolumeName;

    /// A script on a volume was held with its interpreter before anybody knew the volume.
    #[test]
    fn what_is_held_is_named_before_it_is_judged() {
        let mounted = Mounted {
            id: 1,
            parent: 0,
            device: "8:1".to_owned(),
            root: "/v/tools".into(),
            point: "/tools".into(),
            filesystem: "ext4".to_owned(),
        };
        let volumes = [Volume { name: VolumeName::parse("shared").unwrap(), mounted, replaced_whole: false }];
        let file = |path: &[u8], origin, device| File { path: path.to_vec(), origin, device };
        let (root, disk) = (40, 8 << 20 | 1);
        let mut exec = Exec {
            file: file(b"/usr/bin/workload", origin::IMAGE, root),
            script: Some(file(b"/v/tools/start.sh", origin::HOST, disk)),
            ..Exec::default()
        };
        name_on(&volumes, &mut exec);
        assert_eq!(exec.script, Some(file(b":shared:/tools/start.sh", origin::VOLUME, disk)));
        assert_eq!(exec.file, file(b"/usr/bin/workload", origin::IMAGE, root));
        // The file itself, of another device, is not on it.
        exec.file = file(b"/v/tools/x", origin::HOST, root);
        name_on(&volumes, &mut exec);
        assert_eq!(exec.file.origin, origin::HOST);
        exec.file.device = disk;
        name_on(&volumes, &mut exec);
        assert_eq!(exec.file, file(b":shared:/tools/x", origin::VOLUME, disk));
    }
}
