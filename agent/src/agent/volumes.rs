//! The volumes of a container: learned as soon as the runtime has mounted them, and before its policy where that speaks
//! of them.

use anyhow::Result;
use palisade_abi::codes::origin;
use palisade_proto::v1::{self, record::Event};

use super::Agent;
use crate::{
    containers::{
        cgroups::Found,
        mounts::{self, Volume},
    },
    kernel, processes,
    records::{self, Held},
};

impl Agent {
    /// Something has happened after which the mounts of a container may be there.
    pub(super) fn mounts_may_be_there(&mut self, slot: u64) {
        if self.containers.get(&slot).is_none_or(|container| container.volumes.is_some()) {
            return;
        }
        if self.learn_volumes(slot) && self.awaiting_mounts.remove(&slot) {
            self.apply(slot, "identified");
        }
    }

    /// Learns the mounts of an identified container; returns whether they are known.
    pub(super) fn learn_volumes(&mut self, slot: u64) -> bool {
        let Some(container) = self.containers.get(&slot) else { return false };
        if container.volumes.is_some() {
            return true;
        }
        let Some(identity) = &container.identity else { return false };
        let found = if identity.sandbox {
            Vec::new()
        } else {
            let workload = self.kernel.maps.slot(slot).map_or(0, |slot| slot.workload_pid);
            let Some(pid) = self.process_in_its_root(slot) else {
                // One that runs on the host's root has nothing mounted that the host has not.
                if workload == 0 || !self.kernel.has_hosts_root(workload) {
                    return false;
                }
                return self.note_volumes(slot, Vec::new());
            };
            let first_exec = self.kernel.maps.slot(slot).map_or(0, |slot| slot.first_exec);
            let untouched = !container.found_running && (first_exec == 0 || self.kernel.maps.is_held(pid));
            match self.read_volumes(slot, pid, untouched) {
                Ok(found) => found,
                // It ended meanwhile.
                Err(_) if self.kernel.maps.slot_of_process(pid) != Some(slot) => return false,
                Err(error) => {
                    tracing::error!(
                        slot,
                        error = format!("{error:#}"),
                        "the mounts of a container cannot be read, so files on its volumes have no names and an enforced profile refuses them"
                    );
                    Vec::new()
                }
            }
        };
        self.note_volumes(slot, found)
    }

    fn note_volumes(&mut self, slot: u64, found: Vec<Volume>) -> bool {
        let Some(container) = self.containers.get_mut(&slot) else { return false };
        let any = !found.is_empty();
        container.volumes = Some(found);
        container.volumes_since = records::now_since_boot();
        if any {
            self.name_waiting(slot);
            self.tell_coverage(slot, "volumes-known", 0);
        }
        true
    }

    /// The oldest process of a container that has its root directory there already: by then everything is mounted.
    fn process_in_its_root(&self, slot: u64) -> Option<u32> {
        let container = self.containers.get(&slot)?;
        let found = Found { slot, id: container.id.clone(), folder: container.cgroup.clone() };
        let inside: Vec<u32> = found
            .members()
            .into_iter()
            .filter(|pid| {
                self.kernel.maps.slot_of_process(*pid) == Some(slot) && !self.kernel.has_hosts_root(*pid)
            })
            .collect();
        processes::oldest(&inside)
    }

    /// Reads the mounts of the process `pid` and tells the kernel those that are volumes. `untouched` says that nothing but
    /// the runtime has run there.
    fn read_volumes(&mut self, slot: u64, pid: u32, untouched: bool) -> Result<Vec<Volume>> {
        let Self { containers, kernel, .. } = self;
        let Some(container) = containers.get(&slot) else { return Ok(Vec::new()) };
        let Some(identity) = &container.identity else { return Ok(Vec::new()) };
        let root = kernel::root_of(pid)?;
        let table = kernel::mounts_of(pid)?;
        // A destination may lead over links of the image. Once a container has run, its links are its own.
        let by_links: Vec<(i32, &mounts::Described)> = identity
            .mounts
            .iter()
            .filter(|described| {
                untouched && table.iter().all(|mounted| mounted.point != described.destination)
            })
            .filter_map(|described| Some((kernel::mount_at(&root, &described.destination).ok()?, described)))
            .collect();
        let mut found = Vec::new();
        for mounted in table {
            let described = identity
                .mounts
                .iter()
                .find(|described| described.destination == mounted.point)
                .or_else(|| Some(by_links.iter().find(|(id, _)| *id == mounted.id)?.1));
            let Some(name) = mounts::name(&mounted, described, &identity.pod_uid, untouched) else {
                continue;
            };
            let volume = Volume { name, mounted };
            match kernel.learn_volume(slot, &root, &volume) {
                Ok(()) => found.push(volume),
                Err(error) => tracing::warn!(
                    container = container.id,
                    volume = volume.name.as_str(),
                    error = format!("{error:#}"),
                    "files on this mount have no name"
                ),
            }
        }
        Ok(found)
    }

    /// Names what an exec recorded before the volumes of its container were known.
    pub(super) fn name_early(
        &self,
        slot: u64,
        time: u64,
        event: &mut v1::ProcessExec,
        held: Option<&mut Held>,
    ) {
        let Some(container) = self.containers.get(&slot) else { return };
        let Some(volumes) = container.volumes.as_deref().filter(|_| time < container.volumes_since) else {
            return;
        };
        name_on(volumes, event);
        let Some(held) = held else { return };
        if may_be_volume(held.origin)
            && held.failure == 0
            && let Some(text) = mounts::rename(volumes, &event.device, &held.path)
        {
            held.path = text;
            held.origin = origin::VOLUME;
        }
    }

    /// The same for records that wait for their container's name.
    fn name_waiting(&mut self, slot: u64) {
        let Self { containers, waiting, held, .. } = self;
        let Some(volumes) = containers.get(&slot).and_then(|container| container.volumes.as_deref()) else {
            return;
        };
        for event in waiting.get_mut(&slot).into_iter().flat_map(super::flow::Waiting::events) {
            if let Event::Exec(event) = event {
                name_on(volumes, event);
            }
        }
        let mut waiting_for_verdict = held.remove(&slot).unwrap_or_default();
        for exec in &mut waiting_for_verdict {
            self.name_early(slot, 0, &mut exec.event, Some(&mut exec.held));
        }
        if !waiting_for_verdict.is_empty() {
            self.held.insert(slot, waiting_for_verdict);
        }
    }
}

/// Origins that a file on a volume has for a kernel that does not know the volume.
fn may_be_volume(code: u8) -> bool {
    matches!(code, origin::HOST | origin::UNKNOWN | origin::MEMORY)
}

/// Names the executable of a record by the volume it is on.
fn name_on(volumes: &[Volume], event: &mut v1::ProcessExec) {
    let code = origin::ALL.iter().find(|(_, name)| *name == event.origin).map(|(code, _)| *code);
    if code.is_some_and(may_be_volume)
        && let Some(text) = mounts::rename(volumes, &event.device, event.executable.as_bytes())
    {
        (event.executable, event.origin) = records::named(&text, origin::VOLUME);
    }
}
