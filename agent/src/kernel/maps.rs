//! Typed access to the maps that the agent writes and reads.

use std::{
    collections::HashMap as Table,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use aya::{
    Ebpf,
    maps::{Array, HashMap, MapData, PerCpuHashMap, PerCpuValues},
};
use palisade_abi::{
    codes,
    hash::hash_path,
    maps::{
        AdmittedKey, AgentState, GlobState, Process, Revision, RootIdentity, RuleKey, RuleValue, Slot,
        SlotPolicy,
    },
};
use palisade_profile::image::PolicyImage;

use super::volumes::VolumeMaps;

/// Capacities of the maps.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Containers at a time.
    pub slots: u32,
    /// Processes of containers at a time.
    pub processes: u32,
    /// Exact paths over all revisions in force.
    pub rules: u32,
    /// Automaton states over all revisions in force.
    pub glob_states: u32,
    /// Mounts of containers, at a time.
    pub volumes: u32,
    /// Different names of mounts, each with its place.
    pub volume_names: u32,
    /// Bytes of the record ring, a power of two.
    pub ring_bytes: u32,
}

const BPF_ANY: u64 = 0;
const BPF_NOEXIST: u64 = 1;
const BPF_EXIST: u64 = 2;

/// How long a revision outlives the last slot under it. A decision takes microseconds; a preempted one, scheduling
/// delays.
const GRACE: Duration = Duration::from_secs(10);

/// A revision that stands in the kernel.
struct Installed {
    globs: std::ops::Range<u32>,
    keys: Vec<RuleKey>,
}

/// The maps after loading.
pub struct Maps {
    slots: HashMap<MapData, u64, Slot>,
    slot_lanes: Option<PerCpuHashMap<MapData, u64, [u64; 4]>>,
    slot_policies: HashMap<MapData, u64, SlotPolicy>,
    cgroups: HashMap<MapData, u64, u64>,
    revisions: HashMap<MapData, u32, Revision>,
    rules: HashMap<MapData, RuleKey, RuleValue>,
    glob_states: Array<MapData, GlobState>,
    processes: HashMap<MapData, u32, Process>,
    roots: HashMap<MapData, u64, RootIdentity>,
    root_slots: HashMap<MapData, u64, u64>,
    pub(super) volumes: VolumeMaps,
    agent: Array<MapData, AgentState>,
    active_epoch: Array<MapData, u64>,
    admitted: HashMap<MapData, AdmittedKey, u32>,
    errors: Array<MapData, u64>,
    hash_key: [u64; 2],
    installed: Table<u32, Installed>,
    retired: Vec<(Instant, u32)>,
    next_revision: u32,
}

impl Maps {
    pub(super) fn take(ebpf: &mut Ebpf, hash_key: [u64; 2]) -> Result<Self> {
        let mut take =
            |name: &str| ebpf.take_map(name).with_context(|| format!("the object has no map {name}"));
        let slot_lanes = take("SLOT_LANES").ok().map(PerCpuHashMap::try_from).transpose()?;
        Ok(Self {
            slots: take("SLOTS")?.try_into()?,
            slot_lanes,
            slot_policies: take("SLOT_POLICIES")?.try_into()?,
            cgroups: take("CGROUPS")?.try_into()?,
            revisions: take("REVISIONS")?.try_into()?,
            rules: take("RULES")?.try_into()?,
            glob_states: take("GLOB_STATES")?.try_into()?,
            processes: take("PROCESSES")?.try_into()?,
            roots: take("ROOTS")?.try_into()?,
            root_slots: take("ROOT_SLOTS")?.try_into()?,
            volumes: VolumeMaps::new(take("VOLUMES")?.try_into()?, take("VOLUME_NAMES")?.try_into()?),
            agent: take("AGENT")?.try_into()?,
            active_epoch: take("ACTIVE_EPOCH")?.try_into()?,
            admitted: take("ADMITTED")?.try_into()?,
            errors: take("ERRORS")?.try_into()?,
            hash_key,
            installed: Table::new(),
            retired: Vec::new(),
            next_revision: 1,
        })
    }

    /// Writes a policy image under a number that was never used before. Nothing points to it yet, so no decision
    /// can see half of it.
    ///
    /// # Errors
    ///
    /// When a map is full; what was written is taken out again.
    pub fn install(&mut self, name: u64, image: &PolicyImage) -> Result<u32> {
        let number = self.next_revision;
        self.next_revision += 1;
        let mut done = Installed { globs: 0..0, keys: Vec::new() };
        match self.write_image(number, name, image, &mut done) {
            Ok(()) => {
                self.installed.insert(number, done);
                Ok(number)
            }
            Err(error) => {
                self.installed.insert(number, done);
                self.remove_revision(number);
                Err(error)
            }
        }
    }

    fn write_image(
        &mut self,
        number: u32,
        name: u64,
        image: &PolicyImage,
        done: &mut Installed,
    ) -> Result<()> {
        let PolicyImage { mode, restricts_exec, exact, globs } = image;
        done.globs = self.free_globs(globs.len() as u32)?;
        for (index, state) in done.globs.clone().zip(globs) {
            self.glob_states.set(index, state, BPF_ANY).context("cannot write the glob automaton")?;
        }
        for (path, origins) in exact {
            let key = RuleKey { path_hash: hash_path(self.hash_key, path), revision: number, reserved: 0 };
            self.rules
                .insert(key, RuleValue { origins: *origins }, BPF_ANY)
                .context("the map of rules is full; raise maps.rules in the agent's configuration")?;
            done.keys.push(key);
        }
        let head = Revision {
            mode: u32::from(mode.code()),
            restricts_exec: u32::from(*restricts_exec),
            glob_base: done.globs.start,
            glob_states: globs.len() as u32,
            name,
        };
        self.revisions
            .insert(number, head, BPF_ANY)
            .context("the map of revisions is full; raise maps.slots in the agent's configuration")
    }

    /// The lowest free run of `count` automaton rows.
    fn free_globs(&self, count: u32) -> Result<std::ops::Range<u32>> {
        let mut taken: Vec<_> = self.installed.values().map(|installed| installed.globs.clone()).collect();
        taken.sort_by_key(|range| range.start);
        let mut start = 0;
        for range in taken.iter().filter(|range| !range.is_empty()) {
            if range.start - start >= count {
                break;
            }
            start = range.end;
        }
        if start + count > self.glob_states.len() {
            bail!("no room for {count} automaton states; raise maps.globStates in the agent's configuration");
        }
        Ok(start..start + count)
    }

    /// Takes a revision out of use that no slot points to any more. Its entries stay until [`Maps::reap`].
    pub fn retire(&mut self, number: u32) {
        self.retired.push((Instant::now(), number));
    }

    /// Removes revisions that no program can still be reading: those retired [`GRACE`] ago, after an RCU grace period
    /// where the kernel grants one (`membarrier` refuses with `nohz_full` and does not wait on one processor).
    pub fn reap(&mut self) {
        let due: Vec<u32> = self
            .retired
            .iter()
            .filter(|(since, _)| since.elapsed() > GRACE)
            .map(|(_, number)| *number)
            .collect();
        if due.is_empty() {
            return;
        }
        // SAFETY: the call takes no pointers.
        unsafe { libc::syscall(libc::SYS_membarrier, libc::MEMBARRIER_CMD_GLOBAL, 0, 0) };
        self.retired.retain(|(_, number)| !due.contains(number));
        for number in due {
            self.remove_revision(number);
        }
    }

    fn remove_revision(&mut self, number: u32) {
        let Some(installed) = self.installed.remove(&number) else { return };
        let _may_never_have_been_written = self.revisions.remove(&number);
        for key in installed.keys {
            let _as_above = self.rules.remove(&key);
        }
    }

    /// Puts a slot under a revision; 0 is "no profile". `flags` are [`codes::slot_flags`].
    pub fn set_policy(&mut self, slot: u64, revision: u32, flags: u32) -> Result<()> {
        let since = match self.slot_policies.get(&slot, 0) {
            Ok(policy) if policy.revision == revision => policy.since,
            _ => crate::records::now_since_boot(),
        };
        self.slot_policies
            .insert(slot, SlotPolicy { slot, revision, flags, since }, BPF_ANY)
            .context("the map of slot policies is full; raise maps.slots in the agent's configuration")
    }

    /// Makes a slot for a container that ran before the programs did, with the process of its entrypoint (0 when
    /// unknown). Returns whether it is new.
    pub fn add_slot(&mut self, slot: u64, workload_pid: u32) -> Result<bool> {
        let value = Slot { workload_pid, ..Slot::default() };
        if self.slots.insert(slot, value, BPF_NOEXIST).is_err() {
            if self.slots.get(&slot, 0).is_ok() {
                return Ok(false);
            }
            bail!("the map of slots is full; raise maps.slots in the agent's configuration");
        }
        if let Some(lanes) = &mut self.slot_lanes {
            let zero = vec![[0; 4]; aya::util::nr_cpus().map_err(|(_, error)| error)?];
            lanes.insert(slot, PerCpuValues::try_from(zero)?, BPF_ANY)?;
        }
        Ok(true)
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

    /// Says which set of programs makes the records.
    pub fn record_as(&mut self, epoch: u64) -> Result<()> {
        self.active_epoch.set(0, epoch, BPF_ANY).context("cannot say which programs record")
    }

    /// Says that the agent is there, until when, and what it wants of containers that are not identified.
    pub fn renew_lease(&mut self, state: AgentState) -> Result<()> {
        self.agent.set(0, state, BPF_ANY).context("cannot renew the agent's lease")
    }

    /// Lets a file of an image start in containers that are not identified.
    pub fn admit(&mut self, path: &[u8], inode: u64) -> Result<()> {
        let key = AdmittedKey { path_hash: hash_path(self.hash_key, path), inode };
        self.admitted.insert(key, 1, BPF_ANY).context("the map of admitted files is full")
    }

    /// Takes back what [`Maps::admit`] gave.
    pub fn admit_no_more(&mut self, path: &[u8], inode: u64) {
        let key = AdmittedKey { path_hash: hash_path(self.hash_key, path), inode };
        let _gone_is_gone = self.admitted.remove(&key);
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
        self.roots.get(&slot, 0).is_ok()
    }

    pub fn slot(&self, slot: u64) -> Option<Slot> {
        self.slots.get(&slot, 0).ok()
    }

    /// All slots with what the kernel keeps about them.
    pub fn slots(&self) -> Vec<(u64, Slot)> {
        self.slots.iter().filter_map(Result::ok).collect()
    }

    /// Records that were numbered in a slot so far.
    pub fn records_made(&self, slot: u64) -> u64 {
        match &self.slot_lanes {
            Some(lanes) => lanes
                .get(&slot, 0)
                .map(|values| values.iter().flat_map(|lanes| lanes.iter()).sum())
                .unwrap_or(0),
            None => self.slots.get(&slot, 0).map(|slot| slot.sequence).unwrap_or(0),
        }
    }

    /// Whether a process of the slot still lives.
    pub fn has_processes(&self, slot: u64) -> bool {
        self.processes.iter().filter_map(Result::ok).any(|(_, process)| process.slot == slot)
    }

    /// Forgets a slot whose cgroup is gone and whose processes have ended.
    pub fn remove_slot(&mut self, slot: u64) {
        let _gone_is_gone = self.slot_policies.remove(&slot);
        let _as_above = self.slots.remove(&slot);
        if let Ok(root) = self.roots.get(&slot, 0)
            && self.root_slots.get(&root.superblock, 0).is_ok_and(|owner| owner == slot)
        {
            let _as_above = self.root_slots.remove(&root.superblock);
        }
        let _as_above = self.roots.remove(&slot);
        let _as_above = self.cgroups.remove(&slot);
        self.volumes.forget(slot);
        if let Some(lanes) = &mut self.slot_lanes {
            let _as_above = lanes.remove(&slot);
        }
    }

    /// The kernel's error counters that are not zero, by name.
    pub fn errors(&self) -> Vec<(&'static str, u64)> {
        codes::error::ALL
            .iter()
            .filter_map(|(code, name)| {
                let count = self.errors.get(code, 0).ok()?;
                (count > 0).then_some((*name, count))
            })
            .collect()
    }
}
