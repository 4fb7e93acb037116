//! The policies of a set: which revision a slot is under, and what each allows.

use std::{
    collections::HashMap as Table,
    ops::Range,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use aya::maps::{Array, HashMap, MapData};
use palisade_abi::{
    POLICY_VERSION,
    ledger::SetMeta,
    policy::{GLOB_CHUNK, GlobChunk, Revision, SectionHead, SlotPolicy, exec::RuleKey},
    section,
    state::PROBE_SLOT,
};
use palisade_profile::{automaton::Automaton, image::PolicyImage};

use super::{BPF_ANY, Ledger, ROOM_FOR_SLOTS, copy};
use crate::kernel::{pins::SetFolder, sets::pinned_map};

mod exec;

/// How long a revision outlives the last slot under it. A decision takes microseconds; a preempted one, scheduling
/// delays.
const GRACE: Duration = Duration::from_secs(10);

/// A revision that stands in the kernel.
struct Installed {
    /// Chunks of all its automata.
    automata: Range<u32>,
    exec: Vec<RuleKey>,
}

/// A policy image as the maps hold it, where its automata stand from the first chunk on.
struct Written {
    mode: u32,
    sections: [SectionHead; section::COUNT],
    exec: exec::Written,
    chunks: Vec<GlobChunk>,
}

impl Written {
    fn new(hash_key: [u64; 2], number: u32, image: &PolicyImage) -> Self {
        let PolicyImage { mode, exec } = image;
        let mut automata = Automata::default();
        let mut sections = [SectionHead::default(); section::COUNT];
        let exec = exec.as_ref().map(|image| exec::Written::new(hash_key, number, image, &mut automata));
        if let Some(exec) = &exec {
            sections[section::EXEC] = exec.head;
        }
        let exec = exec.unwrap_or_default();
        Self { mode: u32::from(mode.code()), sections, exec, chunks: automata.chunks }
    }

    /// With its automata from `base` on.
    fn at(mut self, base: u32) -> Self {
        for head in &mut self.sections {
            if head.automaton_chunks != 0 {
                head.automaton_base += base;
            }
        }
        self.exec.move_automata(base);
        self
    }
}

/// The automata of a revision, in one run.
#[derive(Default)]
struct Automata {
    chunks: Vec<GlobChunk>,
}

impl Automata {
    /// Adds one; returns its first chunk, and how many there are.
    fn add(&mut self, automaton: &Automaton) -> Range<u32> {
        let base = self.chunks.len() as u32;
        self.chunks.extend(automaton.words().chunks(GLOB_CHUNK).map(|words| {
            let mut chunk = GlobChunk { words: [0; GLOB_CHUNK] };
            chunk.words[..words.len()].copy_from_slice(words);
            chunk
        }));
        base..self.chunks.len() as u32
    }
}

/// The maps of policies.
pub struct Policies {
    slot_policies: HashMap<MapData, u64, SlotPolicy>,
    revisions: HashMap<MapData, u32, Revision>,
    exec: exec::Store,
    globs: Array<MapData, GlobChunk>,
    hash_key: [u64; 2],
    installed: Table<u32, Installed>,
    retired: Vec<(Instant, u32)>,
    next_revision: u32,
}

impl Policies {
    /// Opens those of a pinned set.
    ///
    /// # Errors
    ///
    /// When they have another layout.
    pub(in crate::kernel) fn open(folder: &SetFolder, meta: &SetMeta) -> Result<Self> {
        let version = meta.versions.policy;
        ensure!(
            version == POLICY_VERSION,
            "its policies are of version {version}, this build's of {POLICY_VERSION}"
        );
        let take = |name: &str| pinned_map(&folder.map(name));
        Ok(Self {
            slot_policies: take("SLOT_POLICIES")?.try_into()?,
            revisions: take("REVISIONS")?.try_into()?,
            exec: exec::Store::open(folder)?,
            globs: take("GLOBS")?.try_into()?,
            hash_key: meta.hash_key,
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
        let mut done = Installed { automata: 0..0, exec: Vec::new() };
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
        let written = Written::new(self.hash_key, number, image);
        done.automata = self.free_globs(written.chunks.len() as u32)?;
        let Written { mode, sections, exec, chunks } = written.at(done.automata.start);
        for (index, chunk) in done.automata.clone().zip(chunks) {
            self.globs.set(index, chunk, BPF_ANY).context("cannot write the automata")?;
        }
        self.exec.write(exec, &mut done.exec)?;
        let head = Revision {
            mode,
            automata_base: done.automata.start,
            automata_chunks: done.automata.len() as u32,
            reserved: 0,
            name,
            sections,
        };
        self.revisions
            .insert(number, head, BPF_ANY)
            .context("the map of revisions is full; raise maps.slots in the agent's configuration")
    }

    /// The lowest free run of `count` chunks.
    fn free_globs(&self, count: u32) -> Result<Range<u32>> {
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
        let mut exec = self.exec.read_back()?;
        let heads: Vec<(u32, Revision)> = self.revisions.iter().collect::<Result<_, _>>()?;
        let mut found = Vec::new();
        for (number, head) in heads {
            let automata = head.automata_base..head.automata_base + head.automata_chunks;
            let exec = exec.remove(&number).unwrap_or_default();
            self.installed.insert(number, Installed { automata, exec });
            self.next_revision = self.next_revision.max(number + 1);
            match slots.remove(&number) {
                Some(slots) => found.push((number, head.name, slots)),
                None => self.retire(number),
            }
        }
        // A head is written last, so rules without one belong to nobody.
        for (number, orphans) in exec {
            self.next_revision = self.next_revision.max(number + 1);
            self.exec.remove(orphans);
        }
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
        let (Ok(head), Some(installed)) = (self.revisions.get(&number, 0), self.installed.get(&number))
        else {
            return false;
        };
        let Written { mode, sections, exec, chunks } =
            Written::new(self.hash_key, number, image).at(installed.automata.start);
        let same_globs = installed.automata.len() == chunks.len()
            && installed
                .automata
                .clone()
                .zip(chunks)
                .all(|(index, chunk)| self.globs.get(&index, 0).is_ok_and(|found| found == chunk));
        head.mode == mode
            && head.sections == sections
            && same_globs
            && self.exec.holds(&exec, installed.exec.len())
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
        self.exec.remove(installed.exec);
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

    /// Since when a slot is under its revision, nanoseconds since boot; 0 when it is under none.
    pub fn in_force_since(&self, slot: u64) -> u64 {
        self.slot_policies.get(&slot, 0).map_or(0, |policy| policy.since)
    }

    /// Slots that are under a revision and have not ended.
    pub fn guarded(&self, ledger: &Ledger) -> Vec<u64> {
        let policies = self.slot_policies.iter().filter_map(Result::ok);
        policies
            .filter(|(slot, policy)| *slot != PROBE_SLOT && policy.revision != 0)
            .map(|(slot, _)| slot)
            .filter(|slot| ledger.slot(*slot).is_some_and(|slot| slot.ended == 0))
            .collect()
    }

    /// Forgets what a slot was under.
    pub(super) fn forget(&mut self, slot: u64) {
        let _gone_is_gone = self.slot_policies.remove(&slot);
    }

    /// Copies what can be decided by, where it is not there yet: rules before the heads that point to them.
    ///
    /// # Errors
    ///
    /// When paths are hashed with another key, or a map is full.
    pub(super) fn inherit_revisions(&mut self, old: &Self) -> Result<()> {
        ensure!(self.hash_key == old.hash_key, "its paths are hashed with another key");
        for revision in old.revisions.iter() {
            let (_, head) = revision?;
            for index in head.automata_base..head.automata_base + head.automata_chunks {
                let chunk = old.globs.get(&index, 0).context("an automaton is cut")?;
                self.globs
                    .set(index, chunk, BPF_ANY)
                    .context("no room for automata; raise maps.globBytes")?;
            }
        }
        self.exec.inherit(&old.exec)?;
        copy(&old.revisions, &mut self.revisions, |_, _| true).context(ROOM_FOR_SLOTS)
    }

    /// Copies which revision each slot is under.
    ///
    /// # Errors
    ///
    /// When the map is full.
    pub(super) fn inherit_slots(&mut self, old: &Self) -> Result<()> {
        copy(&old.slot_policies, &mut self.slot_policies, |slot, _| *slot != PROBE_SLOT)
            .context(ROOM_FOR_SLOTS)
    }
}
