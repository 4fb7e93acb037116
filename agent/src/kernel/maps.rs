//! Typed access to the maps that the agent writes and reads.

use std::{
    collections::HashMap as Table,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use aya::maps::{Array, HashMap, MapData};
use bytemuck::Zeroable as _;
use palisade_abi::{
    codes,
    hash::hash_path,
    maps::{
        AdmittedKey, AgentState, GLOB_CHUNK, GlobChunk, LayerKey, LinkKey, LinkTarget, PROBE_SLOT, Process,
        Revision, RootIdentity, RuleKey, RuleValue, SetMeta, Slot, SlotPolicy,
    },
};
use palisade_profile::{
    automaton::Automaton,
    image::{Exact, PolicyImage},
};

use super::{Pins, pins::SetFolder, sets::pinned_map, volumes::VolumeMaps};

mod inherit;
mod ledger;

pub use ledger::Ledger;

/// Capacities of the maps.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Containers at a time.
    pub slots: u32,
    /// Processes of containers at a time.
    pub processes: u32,
    /// Exact paths over all revisions in force.
    pub rules: u32,
    /// Bytes of glob automata over all revisions in force.
    pub glob_bytes: u32,
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
    /// Chunks of all its automata.
    automata: std::ops::Range<u32>,
    keys: Vec<RuleKey>,
}

/// A policy image as the maps hold it, but for where its automata stand.
struct Written {
    rules: Vec<(RuleKey, RuleValue)>,
    /// The one for globs, and those for arguments behind it.
    chunks: Vec<GlobChunk>,
    glob_chunks: u32,
}

impl Written {
    fn new(hash_key: [u64; 2], number: u32, image: &PolicyImage) -> Self {
        let mut chunks = chunks(&image.globs);
        let glob_chunks = chunks.len() as u32;
        let rules = image.exact.iter().map(|(key, rule)| {
            let Exact { grants, with_arguments, arguments, any, parent } = rule;
            let base = chunks.len() as u32;
            chunks.extend(self::chunks(arguments));
            let value = RuleValue {
                grants: *grants,
                with_arguments: *with_arguments,
                arguments_base: base,
                arguments_width: arguments.width() as u32,
                any: *any,
                parent: *parent,
            };
            let path_hash = hash_path(hash_key, &key.path);
            (RuleKey { path_hash, revision: number, parent: key.parent }, value)
        });
        let rules = rules.collect();
        Self { rules, chunks, glob_chunks }
    }

    /// With its automata from `base` on.
    fn at(mut self, base: u32) -> Self {
        self.rules.iter_mut().for_each(|(_, rule)| rule.arguments_base += base);
        self
    }
}

/// An automaton as the map holds it.
fn chunks(automaton: &Automaton) -> Vec<GlobChunk> {
    let chunk = |words: &[u16]| {
        let mut chunk = GlobChunk { words: [0; GLOB_CHUNK] };
        chunk.words[..words.len()].copy_from_slice(words);
        chunk
    };
    automaton.words().chunks(GLOB_CHUNK).map(chunk).collect()
}

/// The maps after loading.
pub struct Maps {
    pub ledger: Ledger,
    slot_policies: HashMap<MapData, u64, SlotPolicy>,
    cgroups: HashMap<MapData, u64, u64>,
    revisions: HashMap<MapData, u32, Revision>,
    rules: HashMap<MapData, RuleKey, RuleValue>,
    globs: Array<MapData, GlobChunk>,
    processes: HashMap<MapData, u32, Process>,
    roots: HashMap<MapData, u64, RootIdentity>,
    root_slots: HashMap<MapData, u64, u64>,
    links: HashMap<MapData, LinkKey, LinkTarget>,
    layers: HashMap<MapData, LayerKey, u64>,
    pub(super) volumes: VolumeMaps,
    agent: Array<MapData, AgentState>,
    meta: Array<MapData, SetMeta>,
    active_epoch: Array<MapData, u64>,
    admitted: HashMap<MapData, AdmittedKey, u32>,
    protected: HashMap<MapData, u64, u32>,
    errors: Array<MapData, u64>,
    hash_key: [u64; 2],
    /// The names in `links`, by slot.
    links_of: Table<u64, Vec<[u64; 2]>>,
    installed: Table<u32, Installed>,
    retired: Vec<(Instant, u32)>,
    next_revision: u32,
}

impl Maps {
    /// Opens the maps of a pinned set; one of another layout is an error.
    pub(super) fn open(folder: &SetFolder, pins: &Pins) -> Result<Self> {
        let take = |name: &str| pinned_map(&folder.map(name));
        let meta: Array<_, SetMeta> = take("META")?.try_into()?;
        Ok(Self {
            ledger: Ledger::open(folder, &meta.get(&0, 0)?)?,
            slot_policies: take("SLOT_POLICIES")?.try_into()?,
            cgroups: take("CGROUPS")?.try_into()?,
            revisions: take("REVISIONS")?.try_into()?,
            rules: take("RULES")?.try_into()?,
            globs: take("GLOBS")?.try_into()?,
            processes: take("PROCESSES")?.try_into()?,
            roots: take("ROOTS")?.try_into()?,
            root_slots: take("ROOT_SLOTS")?.try_into()?,
            links: take("LINKS")?.try_into()?,
            layers: take("LAYERS")?.try_into()?,
            volumes: VolumeMaps::new(take("VOLUMES")?.try_into()?, take("VOLUME_NAMES")?.try_into()?),
            agent: take("AGENT")?.try_into()?,
            hash_key: meta.get(&0, 0)?.hash_key,
            meta,
            active_epoch: pinned_map(&pins.active_epoch())?.try_into()?,
            admitted: take("ADMITTED")?.try_into()?,
            protected: take("PROTECTED")?.try_into()?,
            errors: take("ERRORS")?.try_into()?,
            links_of: Table::new(),
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
        let mut done = Installed { automata: 0..0, keys: Vec::new() };
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
        let PolicyImage { mode, restricts_exec, code, exact: _, globs } = image;
        let written = Written::new(self.hash_key, number, image);
        done.automata = self.free_globs(written.chunks.len() as u32)?;
        let Written { rules, chunks, glob_chunks } = written.at(done.automata.start);
        for (index, chunk) in done.automata.clone().zip(chunks) {
            self.globs.set(index, chunk, BPF_ANY).context("cannot write the automata")?;
        }
        for (key, rule) in rules {
            self.rules
                .insert(key, rule, BPF_ANY)
                .context("the map of rules is full; raise maps.rules in the agent's configuration")?;
            done.keys.push(key);
        }
        let head = Revision {
            mode: u32::from(mode.code()),
            restricts_exec: u32::from(*restricts_exec),
            automata_base: done.automata.start,
            automata_chunks: done.automata.len() as u32,
            glob_chunks,
            glob_width: globs.width() as u32,
            code: *code,
            reserved: 0,
            name,
        };
        self.revisions
            .insert(number, head, BPF_ANY)
            .context("the map of revisions is full; raise maps.slots in the agent's configuration")
    }

    /// The lowest free run of `count` chunks.
    fn free_globs(&self, count: u32) -> Result<std::ops::Range<u32>> {
        let mut taken: Vec<_> = self.installed.values().map(|installed| installed.automata.clone()).collect();
        taken.sort_by_key(|range| range.start);
        let mut start = 0;
        for range in taken.iter().filter(|range| !range.is_empty()) {
            if range.start - start >= count {
                break;
            }
            start = range.end;
        }
        if start + count > self.globs.len() {
            bail!(
                "no room for automata of {} bytes; raise maps.globBytes in the agent's configuration",
                count as usize * size_of::<GlobChunk>()
            );
        }
        Ok(start..start + count)
    }

    /// Reads what an agent before this one installed. What it left half written is taken away; what no slot is under is
    /// retired. Returns the number, name and slots of each revision that stays.
    ///
    /// # Errors
    ///
    /// When the maps cannot be read.
    pub fn read_back(&mut self) -> Result<Vec<(u32, u64, Vec<u64>)>> {
        let mut slots: Table<u32, Vec<u64>> = Table::new();
        for policy in self.slot_policies.iter() {
            let (slot, policy) = policy?;
            if slot == PROBE_SLOT {
                // Every agent makes its own revision for that.
                continue;
            }
            slots.entry(policy.revision).or_default().push(slot);
        }
        let mut keys: Table<u32, Vec<RuleKey>> = Table::new();
        for key in self.rules.keys() {
            let key = key?;
            keys.entry(key.revision).or_default().push(key);
        }
        let heads: Vec<(u32, Revision)> = self.revisions.iter().collect::<Result<_, _>>()?;
        let mut found = Vec::new();
        for (number, head) in heads {
            let automata = head.automata_base..head.automata_base + head.automata_chunks;
            let keys = keys.remove(&number).unwrap_or_default();
            self.installed.insert(number, Installed { automata, keys });
            self.next_revision = self.next_revision.max(number + 1);
            match slots.remove(&number) {
                Some(slots) => found.push((number, head.name, slots)),
                None => self.retire(number),
            }
        }
        // A head is written last, so rules without one belong to nobody.
        for (number, orphans) in keys {
            self.next_revision = self.next_revision.max(number + 1);
            for key in orphans {
                let _gone_is_gone = self.rules.remove(&key);
            }
        }
        for link in self.links.keys() {
            let LinkKey { slot, name } = link?;
            self.links_of.entry(slot).or_default().push(name);
        }
        self.volumes.read_back()?;
        Ok(found)
    }

    /// The names of the revisions in the kernel, by number.
    pub fn revision_names(&self) -> Table<u32, String> {
        self.revisions
            .iter()
            .filter_map(Result::ok)
            .map(|(number, revision)| (number, format!("{:012x}", revision.name)))
            .collect()
    }

    /// Whether the kernel has exactly this image under `number`.
    pub fn holds(&self, number: u32, image: &PolicyImage) -> bool {
        let PolicyImage { mode, restricts_exec, code, exact: _, globs } = image;
        let (Ok(head), Some(installed)) = (self.revisions.get(&number, 0), self.installed.get(&number))
        else {
            return false;
        };
        let same_head = head.mode == u32::from(mode.code())
            && head.restricts_exec == u32::from(*restricts_exec)
            && head.code == *code
            && head.glob_width as usize == globs.width();
        let Written { rules, chunks, glob_chunks } =
            Written::new(self.hash_key, number, image).at(installed.automata.start);
        let same_rules = installed.keys.len() == rules.len()
            && rules.iter().all(|(key, rule)| self.rules.get(key, 0).is_ok_and(|found| found == *rule));
        let same_globs = head.glob_chunks == glob_chunks
            && installed.automata.len() == chunks.len()
            && installed
                .automata
                .clone()
                .zip(chunks)
                .all(|(index, chunk)| self.globs.get(&index, 0).is_ok_and(|found| found == chunk));
        same_head && same_rules && same_globs
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

    /// Puts a slot under another revision, and leaves the rest as it is.
    pub fn switch(&mut self, slot: u64, revision: u32) -> Result<()> {
        let flags = self.slot_policies.get(&slot, 0).map_or(0, |policy| policy.flags);
        self.set_policy(slot, revision, flags)
    }

    /// Makes a slot for a container that ran before the programs did, with the process of its entrypoint (0 when
    /// unknown). Returns whether it is new.
    pub fn add_slot(&mut self, slot: u64, workload_pid: u32, id: &str) -> Result<bool> {
        self.ledger.set_name(slot, id)?;
        self.ledger.add(slot, Slot { workload_pid, ..Slot::default() })
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

    /// Says which set of programs makes the records.
    pub fn record_as(&mut self, epoch: u64) -> Result<()> {
        self.active_epoch.set(0, epoch, BPF_ANY).context("cannot say which programs record")
    }

    /// Adds to what is said of the set: [`codes::set_state`].
    pub fn note_state(&mut self, state: u32) -> Result<()> {
        let meta = self.meta.get(&0, 0)?;
        let meta = SetMeta { state: meta.state | state, ..meta };
        self.meta.set(0, meta, BPF_ANY).context("cannot describe the set")
    }

    /// What is said of the set: [`codes::set_state`].
    pub fn state(&self) -> u32 {
        self.meta.get(&0, 0).map_or(0, |meta| meta.state)
    }

    /// The epoch of the set that makes the records.
    pub fn recording(&self) -> Result<u64> {
        self.active_epoch.get(&0, 0).context("cannot read which programs record")
    }

    /// Says that the agent is there, until when, and what it wants of containers that are not identified.
    pub fn renew_lease(&mut self, state: AgentState) -> Result<()> {
        self.agent.set(0, state, BPF_ANY).context("cannot renew the agent's lease")
    }

    /// Says that containers may not open a map or a program: `act` is the [`codes::tampering`] that they would do.
    pub fn protect(&mut self, act: u8, id: u32) -> Result<()> {
        let key = u64::from(act) << 32 | u64::from(id);
        self.protected.insert(key, 1, BPF_ANY).context("the map of protected objects is full")
    }

    /// Lets a file of an image start in containers that are not identified.
    pub fn admit(&mut self, path: &[u8], inode: u64) -> Result<()> {
        let key = AdmittedKey { path_hash: hash_path(self.hash_key, path), inode };
        self.admitted.insert(key, 1, BPF_ANY).context("the map of admitted files is full")
    }

    /// Takes back everything that an agent before this one admitted.
    pub fn admit_nothing(&mut self) {
        for key in self.admitted.keys().filter_map(Result::ok).collect::<Vec<_>>() {
            let _gone_is_gone = self.admitted.remove(&key);
        }
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

    /// Slots that are under a revision and have not ended.
    pub fn guarded(&self) -> Vec<u64> {
        let policies = self.slot_policies.iter().filter_map(Result::ok);
        policies
            .filter(|(slot, policy)| *slot != PROBE_SLOT && policy.revision != 0)
            .map(|(slot, _)| slot)
            .filter(|slot| self.ledger.slot(*slot).is_some_and(|slot| slot.ended == 0))
            .collect()
    }

    /// Since when a slot is under its revision, nanoseconds since boot; 0 when it is under none.
    pub fn in_force_since(&self, slot: u64) -> u64 {
        self.slot_policies.get(&slot, 0).map_or(0, |policy| policy.since)
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

    /// Forgets a slot whose cgroup is gone and whose processes have ended.
    pub fn remove_slot(&mut self, slot: u64) {
        let _gone_is_gone = self.slot_policies.remove(&slot);
        if let Ok(root) = self.roots.get(&slot, 0)
            && self.root_slots.get(&root.superblock, 0).is_ok_and(|owner| owner == slot)
        {
            let _as_above = self.root_slots.remove(&root.superblock);
        }
        let _as_above = self.roots.remove(&slot);
        self.ledger.remove(slot);
        let _as_above = self.cgroups.remove(&slot);
        self.volumes.forget(slot);
        for name in self.links_of.remove(&slot).unwrap_or_default() {
            let _as_above = self.links.remove(&LinkKey { slot, name });
        }
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

    /// Whether something went wrong at this place in the kernel programs, a [`codes::error`].
    pub fn has_counted(&self, code: u32) -> bool {
        self.errors.get(&code, 0).is_ok_and(|count| count > 0)
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
