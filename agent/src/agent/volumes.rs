//! The volumes of a container: learned as soon as the runtime has mounted them, and before its policy where that speaks
//! of them.

use std::time::Duration;

use anyhow::Result;
use palisade_abi::codes::origin;
use palisade_proto::v1::{self, record::Event};

use super::{Agent, flow::Waiting};
use crate::{
    containers::{
        cgroups::Found,
        mounts::{self, Volume},
    },
    processes,
    records::{self, Held, now_since_boot},
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
    pub(super) fn name_early(
        &self,
        slot: u64,
        time: u64,
        event: &mut v1::ProcessExec,
        held: Option<&mut Held>,
    ) {
        let Some(container) = self.containers.get(&slot) else { return };
        if time < container.volumes_since
            && let Some(volumes) = &container.volumes
        {
            name_on(volumes, event, held);
        }
    }

    /// The same for records that wait for their container's name, and for what is held.
    fn name_waiting(&mut self, slot: u64) {
        let Self { containers, waiting, held, .. } = self;
        let Some(volumes) = containers.get(&slot).and_then(|container| container.volumes.as_deref()) else {
            return;
        };
        for event in waiting.get_mut(&slot).into_iter().flat_map(Waiting::events) {
            if let Event::Exec(event) = event {
                name_on(volumes, event, None);
            }
        }
        for exec in held.get_mut(&slot).into_iter().flatten() {
            name_on(volumes, &mut exec.event, Some(&mut exec.held));
        }
    }
}

/// Names the executable and the script of a record by the volumes they are on.
fn name_on(volumes: &[Volume], event: &mut v1::ProcessExec, held: Option<&mut Held>) {
    let text = |path: &[u8], origin: &str, device: &str| {
        let code = origin::ALL.iter().find(|(_, name)| *name == origin).map(|(code, _)| *code);
        // What a file on a volume is for a kernel that does not know the volume.
        let may_be = matches!(code, Some(origin::HOST | origin::UNKNOWN | origin::MEMORY));
        may_be.then(|| mounts::rename(volumes, device, path)).flatten()
    };
    if let Some(found) = text(event.executable.as_bytes(), &event.origin, &event.device) {
        (event.executable, event.origin) = records::named(&found, origin::VOLUME);
    }
    if let Some(found) = text(event.script.as_bytes(), &event.script_origin, &event.script_device) {
        (event.script, event.script_origin) = records::named(&found, origin::VOLUME);
    }
    let Some(held) = held else { return };
    let name = |code| origin::name(code).unwrap_or_default();
    if held.failure == 0
        && let Some(found) = text(&held.path, name(held.origin), &event.device)
    {
        (held.path, held.origin) = (found, origin::VOLUME);
    }
    if let Some((path, code)) = &mut held.script
        && let Some(found) = text(path, name(*code), &event.script_device)
    {
        (*path, *code) = (found, origin::VOLUME);
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
        let mut event = v1::ProcessExec {
            executable: "/usr/bin/workload".to_owned(),
            origin: "image".to_owned(),
            device: "0:40".to_owned(),
            script: "/v/tools/start.sh".to_owned(),
            script_origin: "host".to_owned(),
            script_device: "8:1".to_owned(),
            ..Default::default()
        };
        let mut held = Held {
            path: b"/usr/bin/workload".to_vec(),
            origin: origin::IMAGE,
            session: palisade_abi::codes::session::WORKLOAD,
            failure: 0,
            script: Some((b"/v/tools/start.sh".to_vec(), origin::HOST)),
            escaped: false,
            foreign_interpreter: false,
            interpreter: None,
            elevated: false,
            caller: [0; 2],
            arguments: None,
        };
        name_on(&volumes, &mut event, Some(&mut held));
        assert_eq!(
            (event.script.as_str(), event.script_origin.as_str()),
            ("/tools/start.sh", "volume:shared")
        );
        assert_eq!((event.executable.as_str(), event.origin.as_str()), ("/usr/bin/workload", "image"));
        assert_eq!(held.script, Some((b":shared:/tools/start.sh".to_vec(), origin::VOLUME)));
        assert_eq!((held.path.as_slice(), held.origin), (&b"/usr/bin/workload"[..], origin::IMAGE));
        // The file itself, of another device, is not on it.
        (held.path, held.origin) = (b"/v/tools/x".to_vec(), origin::HOST);
        name_on(&volumes, &mut event, Some(&mut held));
        assert_eq!(held.origin, origin::HOST);
        event.device = "8:1".to_owned();
        name_on(&volumes, &mut event, Some(&mut held));
        assert_eq!((held.path.as_slice(), held.origin), (&b":shared:/tools/x"[..], origin::VOLUME));
    }
}
