//! Taking over what an agent before this one left in force: its containers, its revisions, and its debts.

use std::collections::HashMap;

use anyhow::Result;
use palisade_abi::{record::Header, state::PROBE_SLOT};
use palisade_profile::origin::VolumeName;

use super::{
    Agent,
    accounts::{Accounted, settle},
};
use crate::{
    containers::{
        Container,
        cgroups::{self, Found},
        mounts::Volume,
    },
    kernel::Mounted,
};

/// How often a slot's counters are read until they hold still.
const ATTEMPTS: usize = 16;

/// What the kernel had numbered when this agent came, and what of it is still in the ring.
#[derive(Default)]
pub(super) struct Settling {
    /// Last number by slot and lane.
    last: HashMap<(u64, u32), u64>,
    in_ring: HashMap<u64, u64>,
}

impl Settling {
    /// A record was read.
    pub(super) fn saw(&mut self, header: &Header) {
        let last = self.last.get(&(header.slot, header.lane)).copied().unwrap_or(0);
        if header.sequence <= last {
            *self.in_ring.entry(header.slot).or_default() += 1;
        }
    }
}

impl Agent {
    /// Takes over the kernel's containers, reads what is left in the ring, and counts what the agent before took with it.
    ///
    /// # Errors
    ///
    /// When the maps cannot be read.
    pub(super) fn adopt(&mut self) -> Result<()> {
        self.kernel.maps.admit_nothing();
        self.admitted.clear();
        self.admit_own_program();
        let found = self.kernel.maps.read_back()?;
        self.revisions.read_back(found);
        let folders: HashMap<u64, Found> =
            cgroups::scan(&self.cgroups).into_iter().map(|found| (found.slot, found)).collect();
        let mut slots = self.kernel.maps.ledger.slots();
        slots.retain(|(slot, _)| *slot != PROBE_SLOT);
        // What ran before any agent is taken over step by step, and the agent may have been killed between two of them.
        slots.retain(|(_, slot)| slot.created != 0);
        for (slot, _) in &slots {
            let name = self.kernel.maps.ledger.name(*slot);
            let id = cgroups::container_id(&name).unwrap_or(&name).to_owned();
            let folder = folders.get(slot).map(|found| found.folder.clone()).unwrap_or_default();
            let mut container = Container::new(id.clone(), folder, false);
            container.adopted = true;
            let volumes = self.kernel.volumes_of(*slot);
            container.volumes =
                (!volumes.is_empty()).then(|| volumes.into_iter().filter_map(known).collect());
            // Its mounts may not all have been noted.
            container.volumes_open = container.volumes.is_some();
            self.containers.insert(*slot, container);
            self.slots.insert(id, *slot);
            if let Some(found) = folders.get(slot) {
                self.processes.seed(*slot, &found.members());
            }
        }
        self.settle_accounts();
        // What it held and told nobody any more.
        self.settle_unrecorded();
        for (slot, _) in slots {
            self.tell_coverage(slot, "taken-over", 0);
            self.ask_about(slot);
        }
        let what = if self.kernel.adopted { "the pinned programs" } else { "the containers" };
        tracing::info!(containers = self.containers.len(), "took over {what} of an agent before this one");
        Ok(())
    }

    /// Balances what the kernel numbered against what was delivered, reported, and is still there to be read.
    fn settle_accounts(&mut self) {
        let mut made: HashMap<u64, (u64, u64)> = HashMap::new();
        let mut settling = Settling::default();
        for (slot, _) in self.kernel.maps.ledger.slots().into_iter().filter(|(slot, _)| *slot != PROBE_SLOT) {
            let (numbers, lost) = self.numbers_and_losses(slot);
            made.insert(slot, (numbers.iter().map(|(_, last)| last).sum(), lost));
            settling.last.extend(numbers.into_iter().map(|(lane, last)| ((slot, lane), last)));
        }
        // Of slots that are gone only the account is left.
        for (slot, account) in self.kernel.maps.ledger.accounts() {
            made.entry(slot).or_insert((account.made, 0));
        }
        // Before anything of the ring gets into the spool.
        let epoch = self.kernel.meta.epoch;
        let made: Vec<(u64, u64, u64, Accounted)> = made
            .into_iter()
            .map(|(slot, (made, lost))| {
                (slot, made, lost, settle(&mut self.kernel.maps.ledger, &self.queue, epoch, slot))
            })
            .collect();
        self.settling = Some(settling);
        self.empty_ring();
        let in_ring = self.settling.take().unwrap_or_default().in_ring;
        let now = self.source.now();
        for (slot, made, lost, Accounted { settled, lost: spooled }) in made {
            let here = in_ring.get(&slot).copied().unwrap_or(0);
            let missing = made.saturating_sub(settled + here);
            let spooled = spooled.min(missing);
            if missing > 0 {
                tracing::warn!(
                    slot,
                    missing,
                    "records went with the agent before this one; a gap record counts them"
                );
            }
            self.losses.gone_with_the_spool(slot, spooled, now);
            self.losses.gone_with_the_agent(slot, missing - spooled, lost, now);
        }
        self.report_losses();
    }

    /// The last numbers of a slot and its count of lost records, of one moment if a container that floods the ring lets
    /// it: a lost record has a number, too. Else the earlier count: what is lost in between is counted twice, not never.
    fn numbers_and_losses(&self, slot: u64) -> (Vec<(u32, u64)>, u64) {
        let lost = || self.kernel.maps.ledger.lost(slot);
        let mut before = lost();
        let mut numbers = self.kernel.maps.ledger.last_numbers(slot);
        for _ in 0..ATTEMPTS {
            let now = lost();
            if now == before {
                break;
            }
            before = now;
            numbers = self.kernel.maps.ledger.last_numbers(slot);
        }
        (numbers, before)
    }
}

/// A volume that the kernel knows, without what only its mount tells.
fn known((name, point): (String, String)) -> Option<Volume> {
    let mounted = Mounted {
        id: 0,
        parent: 0,
        device: String::new(),
        root: point.clone().into(),
        point: point.into(),
        filesystem: String::new(),
    };
    Some(Volume { name: VolumeName::parse(&name)?, mounted, replaced_whole: false })
}
