//! What a set of programs takes over from the one before it: everything that a decision or a record needs, so that both say the
//! same from the moment in which the new one records.

use anyhow::{Result, ensure};
use palisade_abi::{ledger::Slot, state::PROBE_SLOT};

use super::{Ledger, Maps, Policies, State};

impl Maps {
    /// Copies the state of an old set where there is none yet, and its policies where this build can read them. The programs of both sets
    /// are attached, so what comes to be meanwhile has its entries here already. What points to something is written after what it points
    /// to.
    ///
    /// # Errors
    ///
    /// When paths are hashed with another key, or a map is full. What was copied then is read back, or replaced, like what an
    /// agent that was killed has left.
    pub fn inherit(&mut self, old: &State, policies: Option<&Policies>, ledger: &Ledger) -> Result<()> {
        if let Some(policies) = policies {
            self.policies.inherit_revisions(policies)?;
        }
        self.state.inherit_containers(old)?;
        self.ledger.inherit_names(ledger)?;
        // Before their slots: a process without an entry whose slot is known counts as one that is coming in.
        self.state.inherit_processes(old)?;
        for slot in ledger.slots.iter() {
            let (number, slot) = slot?;
            if number != PROBE_SLOT {
                // It begins to count anew: records are numbered within a set.
                self.ledger.add(number, Slot { sequence: 0, lost: 0, ..slot })?;
            }
        }
        // After the slots, in which refusals are numbered: until then the old set judges alone.
        if let Some(policies) = policies {
            self.policies.inherit_slots(policies)?;
        }
        self.state.inherit_cgroups(old)?;
        // Who forked or came in meanwhile, until both sets say the same.
        let mut rounds = 0;
        while self.state.inherit_processes(old)? {
            rounds += 1;
            ensure!(rounds < MOST_ROUNDS, "its processes come faster than they can be copied");
        }
        Ok(())
    }
}

/// How often processes are compared; each round takes in what came during the one before.
const MOST_ROUNDS: u32 = 64;
