//! What a set knows of containers and their processes, apart from what they may do.

use std::{collections::HashMap as Table, path::Path};

use anyhow::{Context as _, Result, ensure};
use aya::maps::{HashMap, MapData};
use bytemuck::Zeroable as _;
use palisade_abi::{
    STATE_VERSION,
    codes::session,
    hash::hash_path,
    ledger::SetMeta,
    state::{HOST_ROOT, LayerKey, LinkKey, LinkTarget, PROBE_SLOT, Process, RootIdentity},
};

use super::{BPF_ANY, BPF_EXIST, BPF_NOEXIST, ROOM_FOR_SLOTS, copy};
use crate::kernel::{pins::SetFolder, sets::pinned_map, volumes::VolumeMaps};

/// The maps of state.
pub struct State {
    cgroups: HashMap<MapData, u64, u64>,
    processes: HashMap<MapData, u32, Process>,
    roots: HashMap<MapData, u64, RootIdentity>,
    root_slots: HashMap<MapData, u64, u64>,
    links: HashMap<MapData, LinkKey, LinkTarget>,
    layers: HashMap<MapData, LayerKey, u64>,
    pub(in crate::kernel) volumes: VolumeMaps,
    hash_key: [u64; 2],
    /// The names in `links`, by slot.
    links_of: Table<u64, Vec<[u64; 2]>>,
}

impl State {
    /// Opens that of a pinned set.
    ///
    /// # Errors
    ///
    /// When it has another layout.
    pub(in crate::kernel) fn open(folder: &SetFolder, meta: &SetMeta) -> Result<Self> {
        let version = meta.versions.state;
        ensure!(
            version == STATE_VERSION,
            "its state is of version {version}, this build's of {STATE_VERSION}"
        );
        let take = |name: &str| pinned_map(&folder.map(name));
        Ok(Self {
            cgroups: take("CGROUPS")?.try_into()?,
            processes: take("PROCESSES")?.try_into()?,
            roots: take("ROOTS")?.try_into()?,
            root_slots: take("ROOT_SLOTS")?.try_into()?,
            links: take("LINKS")?.try_into()?,
            layers: take("LAYERS")?.try_into()?,
            volumes: VolumeMaps::new(take("VOLUMES")?.try_into()?, take("VOLUME_NAMES")?.try_into()?),
            hash_key: meta.hash_key,
            links_of: Table::new(),
        })
    }

    /// Reads what an agent before this one has written.
    ///
    /// # Errors
    ///
    /// When the maps cannot be read.
    pub(super) fn read_back(&mut self) -> Result<()> {
        for link in self.links.keys() {
            let LinkKey { slot, name } = link?;
            self.links_of.entry(slot).or_default().push(name);
        }
        self.volumes.read_back()
    }

    /// Says that a cgroup belongs to a slot.
    pub fn add_cgroup(&mut self, cgroup: u64, slot: u64) -> Result<()> {
        self.cgroups.insert(cgroup, slot, BPF_ANY).context("the map of cgroups is full; raise maps.slots")
    }

    /// Gives a running process to a slot.
    pub fn add_process(&mut self, pid: u32, value: Process) -> Result<()> {
        match self.processes.insert(pid, value, BPF_NOEXIST) {
            Ok(()) => Ok(()),
            Err(_) if self.processes.get(&pid, 0).is_ok() => Ok(()),
            Err(error) => Err(error).context("the map of processes is full; raise maps.processes"),
        }
    }

    /// Gives a process to a slot, whatever it belonged to.
    pub fn put_process(&mut self, pid: u32, value: Process) -> Result<()> {
        self.processes
            .insert(pid, value, BPF_ANY)
            .context("the map of processes is full; raise maps.processes")
    }

    /// Forgets a process that ended while it was being added.
    pub fn remove_process(&mut self, pid: u32) {
        let _gone_is_gone = self.processes.remove(&pid);
    }

    /// Lets a process go that was held. The kernel's own writers of the entry are the process itself, which is
    /// stopped.
    pub fn let_go(&mut self, pid: u32) -> Result<()> {
        let Ok(value) = self.processes.get(&pid, 0) else { return Ok(()) };
        match self.processes.insert(pid, Process { held: 0, ..value }, BPF_EXIST) {
            Err(error) if self.processes.get(&pid, 0).is_ok() => {
                Err(error).context("cannot note that it is not held any more")
            }
            _ => Ok(()),
        }
    }

    /// The slot that a process belongs to.
    pub fn slot_of_process(&self, pid: u32) -> Option<u64> {
        self.processes.get(&pid, 0).ok().map(|process| process.slot)
    }

    /// Whether a process is stopped until its container is identified.
    pub fn is_held(&self, pid: u32) -> bool {
        self.processes.get(&pid, 0).is_ok_and(|process| process.held != 0)
    }

    /// Processes of all slots.
    pub fn processes(&self) -> Vec<(u32, Process)> {
        self.processes.iter().filter_map(Result::ok).collect()
    }

    /// Whether the slot's root file system is known.
    pub fn has_root(&self, slot: u64) -> bool {
        self.root_device(slot).is_some()
    }

    /// Device of the root filesystem of `slot`, in the kernel's encoding.
    pub fn root_device(&self, slot: u64) -> Option<u64> {
        let root = self.roots.get(&slot, 0).ok().filter(|root| root.superblock != 0);
        root.map(|root| u64::from(root.device))
    }

    /// Says that nothing is the root filesystem of `slot`. Else the kernel would take the first root for it that a process
    /// has which enters, and that may be one that the container has made.
    ///
    /// # Errors
    ///
    /// When the map is full.
    pub fn set_no_root(&mut self, slot: u64) -> Result<()> {
        self.roots
            .insert(slot, RootIdentity::zeroed(), BPF_ANY)
            .context("the map of root filesystems is full; raise maps.slots in the agent's configuration")
    }

    /// Whether a process of the slot still lives. One that an agent added just when it ended, and was killed before it saw
    /// that, is forgotten.
    pub fn has_processes(&mut self, slot: u64) -> bool {
        let of_slot = |found: &(u32, Process)| found.1.slot == slot;
        let (alive, dead): (Vec<u32>, Vec<u32>) = self
            .processes
            .iter()
            .filter_map(Result::ok)
            .filter(of_slot)
            .map(|(pid, _)| pid)
            .partition(|pid| Path::new("/proc").join(pid.to_string()).exists());
        for pid in dead {
            self.remove_process(pid);
        }
        !alive.is_empty()
    }

    /// Notes that `name` leads to the file at `path` in the image of `slot`, by links of the image.
    ///
    /// # Errors
    ///
    /// When the map is full.
    pub fn learn_link(&mut self, slot: u64, name: &str, path: &str) -> Result<()> {
        let [name, path] = [name, path].map(|path| hash_path(self.hash_key, path.as_bytes()));
        self.links
            .insert(LinkKey { slot, name }, LinkTarget { path }, BPF_ANY)
            .context("the map of links is full; raise maps.slots in the agent's configuration")?;
        self.links_of.entry(slot).or_default().push(name);
        Ok(())
    }

    /// Forgets a slot.
    pub(super) fn forget(&mut self, slot: u64) {
        if let Ok(root) = self.roots.get(&slot, 0)
            && self.root_slots.get(&root.superblock, 0).is_ok_and(|owner| owner == slot)
        {
            let _gone_is_gone = self.root_slots.remove(&root.superblock);
        }
        let _gone_is_gone = self.roots.remove(&slot);
        let _as_above = self.cgroups.remove(&slot);
        self.volumes.forget(slot);
        for name in self.links_of.remove(&slot).unwrap_or_default() {
            let _as_above = self.links.remove(&LinkKey { slot, name });
        }
    }

    /// Copies what is known of containers, where it is not there yet.
    ///
    /// # Errors
    ///
    /// When paths are hashed with another key, or a map is full.
    pub(super) fn inherit_containers(&mut self, old: &Self) -> Result<()> {
        ensure!(self.hash_key == old.hash_key, "its paths are hashed with another key");
        copy(&old.roots, &mut self.roots, |slot, _| *slot != HOST_ROOT).context(ROOM_FOR_SLOTS)?;
        copy(&old.root_slots, &mut self.root_slots, |_, _| true).context(ROOM_FOR_SLOTS)?;
        copy(&old.links, &mut self.links, |_, _| true).context(ROOM_FOR_SLOTS)?;
        copy(&old.layers, &mut self.layers, |_, _| true).context("cannot note the layers of images")?;
        self.volumes.inherit(&old.volumes)
    }

    /// Copies which cgroup belongs to which slot.
    ///
    /// # Errors
    ///
    /// When the map is full.
    pub(super) fn inherit_cgroups(&mut self, old: &Self) -> Result<()> {
        copy(&old.cgroups, &mut self.cgroups, |_, _| true).context(ROOM_FOR_SLOTS)
    }

    /// Copies the processes that are not here, or of which the old set knows better: one that forked while its parent had no
    /// entry here is of no known session, and one that executed something meanwhile may count as coming in. Returns whether
    /// there were any.
    pub(super) fn inherit_processes(&mut self, old: &Self) -> Result<bool> {
        let processes = old.processes();
        let mut copied = false;
        for (pid, process) in processes.iter().filter(|(_, process)| process.slot != PROBE_SLOT) {
            let known = self.processes.get(pid, 0).ok();
            let knows_less = |known: &Process| {
                let session = (known.session_kind, known.session_pid, known.session_start);
                let theirs = (process.session_kind, process.session_pid, process.session_start);
                known.slot == process.slot
                    && (session != theirs && process.session_kind != session::UNKNOWN
                        || known.entering > process.entering)
            };
            if known.as_ref().is_none_or(knows_less) {
                self.put_process(*pid, *process)?;
                copied = true;
            } else if known
                .is_some_and(|known| known.slot == process.slot && known.program != process.program)
            {
                // Both sets note what is executed, but the copy of a child may be older than its exec. No reason for another
                // round: somebody always executes something.
                self.inherit_program(old, *pid)?;
            }
        }
        // Whoever ended between the look at the old entry and the writing of the new one will not end again.
        for (pid, _) in processes {
            if old.processes.get(&pid, 0).is_err() {
                self.remove_process(pid);
            }
        }
        Ok(copied)
    }
    /// Takes over what a process executes, as it is now.
    fn inherit_program(&mut self, old: &Self, pid: u32) -> Result<()> {
        let (Ok(theirs), Ok(own)) = (old.processes.get(&pid, 0), self.processes.get(&pid, 0)) else {
            return Ok(());
        };
        if theirs.slot == own.slot && theirs.program != own.program {
            self.put_process(pid, Process { program: theirs.program, ..own })?;
        }
        Ok(())
    }
}
