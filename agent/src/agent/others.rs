//! Sets of programs that an agent of another build or configuration left in force: their records are delivered, what is
//! missing of them is counted, and they are taken away when this agent's own set covers everything.

use std::collections::HashMap;

use palisade_abi::{codes, maps::PROBE_SLOT, record::decode};
use palisade_proto::v1::{self, record::Event};

use super::{Agent, OTHERS_PATIENCE};
use crate::{
    containers::{Container, cgroups},
    delivery::Credit,
    kernel::OldSet,
    records::{self, Made, Source},
};

impl Agent {
    /// Reads what is left in the rings of other sets, which make no records any more.
    fn deliver_for_others(&mut self) {
        match self.kernel.old_sets() {
            Ok(sets) => {
                for set in sets {
                    self.deliver_for(set);
                }
            }
            Err(error) => tracing::warn!(
                error = format!("{error:#}"),
                "what is left in the ring of an older set of programs is lost, and not counted"
            ),
        }
        self.queue.flush();
    }

    fn deliver_for(&mut self, mut set: OldSet) {
        let source = Source::new(self.source.node.clone(), self.source.boot.clone(), &set.meta);
        let mut made: Vec<Made> = Vec::new();
        let Self { processes, kernel, .. } = self;
        let revisions = set.maps.revision_names();
        set.records.drain(usize::MAX, |bytes| match decode(bytes) {
            Ok(decoded) => made.push(records::make(
                &source,
                processes,
                |number| revisions.get(&number).cloned().unwrap_or_default(),
                |pid| kernel.maps.slot_of_process(pid),
                decoded,
            )),
            Err(error) => tracing::error!(%error, "a record of an older set cannot be read"),
        });
        let mut seen: HashMap<u64, u64> = HashMap::new();
        let read = made.len();
        for record in made.into_iter().filter(|record| record.header.slot != PROBE_SLOT) {
            let slot = record.header.slot;
            let gone = by_name(&set, slot);
            let container = self.containers.get(&slot).unwrap_or(&gone);
            let event = match record.event {
                // Nobody will judge it any more.
                Event::Exec(exec)
                    if exec.verdict == codes::verdict::name(codes::verdict::HELD).unwrap_or_default() =>
                {
                    Event::Exec(v1::ProcessExec { verdict: "audited".to_owned(), ..exec })
                }
                other => other,
            };
            let bytes = source.encode(slot, Some(&record.header), None, container.encoded(), event);
            if self.queue.push(bytes, true, Credit::default()).is_ok() {
                *seen.entry(slot).or_default() += 1;
            }
        }
        let accounts: HashMap<_, _> = set.maps.accounts().into_iter().collect();
        let mut missing_in_all = 0;
        for (slot, _) in set.maps.slots().into_iter().filter(|(slot, _)| *slot != PROBE_SLOT) {
            let made: u64 = set.maps.last_numbers(slot).iter().map(|(_, last)| last).sum();
            let account = accounts.get(&slot).copied().unwrap_or_default();
            let here = seen.get(&slot).copied().unwrap_or(0);
            let count = made.saturating_sub(account.delivered + account.reported + here);
            if count == 0 {
                continue;
            }
            missing_in_all += count;
            let now = self.source.now();
            let gap = v1::Gap { count, cause: "agent-killed".to_owned(), from: now, to: now };
            let gone = by_name(&set, slot);
            let container = self.containers.get(&slot).unwrap_or(&gone);
            let bytes = source.encode(slot, None, None, container.encoded(), Event::Gap(gap));
            if self.queue.push(bytes, true, Credit::default()).is_err() {
                tracing::error!(slot, count, "no room in the queue to say what an older set has lost");
            }
            // Whoever comes next must not count them again.
            set.maps.credit(slot, 0, count);
        }
        tracing::info!(
            set = set.name,
            records = read,
            missing = missing_in_all,
            "read what an older set has left"
        );
    }

    /// Takes sets of other builds and configurations out of force, once everything is under this agent's own: until then
    /// both refuse.
    pub(super) fn retire_others(&mut self) {
        let Some(since) = self.others_since else { return };
        let covered = self.containers.values().all(Container::is_under_policy);
        if !covered && since.elapsed() < OTHERS_PATIENCE {
            return;
        }
        self.deliver_for_others();
        match self.kernel.retire_others() {
            Ok(()) => self.others_since = None,
            Err(error) => tracing::error!(error = format!("{error:#}"), "older programs stay in force"),
        }
    }
}

/// A container that is gone, as far as the set knows it.
fn by_name(set: &OldSet, slot: u64) -> Container {
    let name = set.maps.name(slot);
    let id = cgroups::container_id(&name).unwrap_or(&name).to_owned();
    Container::new(id, std::path::PathBuf::new(), true)
}
