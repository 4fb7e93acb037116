//! What a set of programs takes over from the one before it: everything that a decision or a record needs, so that both say the
//! same from the moment in which the new one records.

use anyhow::{Context as _, Result, ensure};
use aya::{
    Pod,
    maps::{HashMap, MapData},
};
use palisade_abi::{
    codes::session,
    maps::{HOST_ROOT, PROBE_SLOT, Process, Slot},
};

use super::{BPF_ANY, Maps};

impl Maps {
    /// Copies the state of `old` where there is none yet. The programs of both sets are attached, so what comes to be
    /// meanwhile has its entries here already. What points to something is written after what it points to.
    ///
    /// # Errors
    ///
    /// When paths are hashed with another key, or a map is full. What was copied then is read back, or replaced, like what an
    /// agent that was killed has left.
    pub fn inherit(&mut self, old: &Self) -> Result<()> {
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
        copy(&old.rules, &mut self.rules, |_, _| true).context("no room for rules; raise maps.rules")?;
        copy(&old.revisions, &mut self.revisions, |_, _| true).context(ROOM_FOR_SLOTS)?;
        copy(&old.roots, &mut self.roots, |slot, _| *slot != HOST_ROOT).context(ROOM_FOR_SLOTS)?;
        copy(&old.root_slots, &mut self.root_slots, |_, _| true).context(ROOM_FOR_SLOTS)?;
        copy(&old.links, &mut self.links, |_, _| true).context(ROOM_FOR_SLOTS)?;
        copy(&old.layers, &mut self.layers, |_, _| true).context("cannot note the layers of images")?;
        self.volumes.inherit(&old.volumes)?;
        copy(&old.ledger.names, &mut self.ledger.names, |slot, _| *slot != PROBE_SLOT)
            .context(ROOM_FOR_SLOTS)?;
        // Before their slots: a process without an entry whose slot is known counts as one that is coming in.
        self.inherit_processes(old)?;
        for slot in old.ledger.slots.iter() {
            let (number, slot) = slot?;
            if number != PROBE_SLOT {
                // It begins to count anew: records are numbered within a set.
                self.ledger.add(number, Slot { sequence: 0, lost: 0, ..slot })?;
            }
        }
        // After the slots, in which refusals are numbered: until then the old set judges alone.
        copy(&old.slot_policies, &mut self.slot_policies, |slot, _| *slot != PROBE_SLOT)
            .context(ROOM_FOR_SLOTS)?;
        copy(&old.cgroups, &mut self.cgroups, |_, _| true).context(ROOM_FOR_SLOTS)?;
        // Who forked or came in meanwhile, until both sets say the same.
        let mut rounds = 0;
        while self.inherit_processes(old)? {
            rounds += 1;
            ensure!(rounds < MOST_ROUNDS, "its processes come faster than they can be copied");
        }
        Ok(())
    }

    /// Copies the processes that are not here, or of which the old set knows better: one that forked while its parent had no
    /// entry here is of no known session, and one that executed something meanwhile may count as coming in. Returns whether
    /// there were any.
    fn inherit_processes(&mut self, old: &Self) -> Result<bool> {
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
}

impl Maps {
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

/// How often processes are compared; each round takes in what came during the one before.
const MOST_ROUNDS: u32 = 64;
const ROOM_FOR_SLOTS: &str = "no room for all containers; raise maps.slots";

/// Copies the entries of a map that `wanted` takes and that the other has not.
fn copy<K: Pod, V: Pod>(
    from: &HashMap<MapData, K, V>,
    to: &mut HashMap<MapData, K, V>,
    wanted: impl Fn(&K, &V) -> bool,
) -> Result<()> {
    for entry in from.iter() {
        let (key, value) = entry?;
        if wanted(&key, &value) && to.get(&key, 0).is_err() {
            to.insert(key, value, BPF_ANY)?;
        }
    }
    Ok(())
}
