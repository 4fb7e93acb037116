//! What the agent says of its own accord: coverage, sessions, losses, and evidence against the programs.

use palisade_abi::state::PROBE_SLOT;
use palisade_proto::v1::{self, record::Event};

use super::Agent;
use crate::delivery::Credit;

impl Agent {
    pub(super) fn tell_coverage(&mut self, slot: u64, change: &str, records_made: u64) {
        let Some(container) = self.containers.get(&slot) else { return };
        let coverage = v1::Coverage {
            change: change.to_owned(),
            in_force_since: container.in_force_since,
            first_exec: self
                .source
                .wall(self.kernel.maps.ledger.slot(slot).map_or(0, |slot| slot.first_exec)),
            tier: self.kernel.tier.as_str().to_owned(),
            found_running: container.found_running,
            records_made,
            answered_in: container.answered_in,
            answer_deadline: container.answer_deadline,
            root_filesystem: container.root.as_str().to_owned(),
            objection: container.root.objection().unwrap_or_default().to_owned(),
            volumes: container
                .volumes
                .iter()
                .flatten()
                .map(|volume| v1::Volume {
                    name: volume.name.as_str().to_owned(),
                    mount_point: volume.mounted.point.display().to_string(),
                })
                .collect(),
        };
        self.tell(slot, Event::Coverage(coverage));
    }

    /// Queues a record that the agent makes; it waits for room.
    pub(super) fn tell(&mut self, slot: u64, event: Event) {
        let container = self.containers.get(&slot).unwrap_or(&self.unknown);
        let bytes = self.source.encode(slot, None, None, container.encoded(), event);
        self.unsaid.push_back(bytes);
        self.say();
    }

    /// Queues what has waited for room, in order.
    pub(super) fn say(&mut self) {
        while let Some(bytes) = self.unsaid.front() {
            if self.queue.push(bytes.clone(), true, Credit::default()).is_err() {
                break;
            }
            self.unsaid.pop_front();
        }
        self.queue.flush();
    }

    /// Completes the attestation of containers whose workload has begun.
    pub(super) fn report_first_execs(&mut self) {
        for (slot, value) in self.kernel.maps.ledger.slots() {
            if value.first_exec == 0 {
                continue;
            }
            if let Some(container) = self.containers.get_mut(&slot)
                && !std::mem::replace(&mut container.first_exec_told, true)
            {
                self.tell_coverage(slot, "first-exec", 0);
            }
        }
    }

    /// Says what speaks against the programs: skipped runs, and errors inside them.
    pub(super) fn report_evidence(&mut self) {
        let mut evidence: Vec<(String, u64)> =
            self.kernel.maps.errors().into_iter().map(|(site, count)| (site.to_owned(), count)).collect();
        let skipped = self.kernel.skipped();
        evidence.extend(skipped.iter().map(|(program, count)| (format!("skipped-{program}"), *count)));
        let grave = skipped.iter().filter(|(program, _)| !self.kernel.has_second_line(program));
        self.note_skipped(grave.map(|(_, count)| count).sum());
        for (site, count) in &evidence {
            if !self.evidence.iter().any(|(known, before)| known == site && before == count) {
                tracing::warn!(site, count, "errors in the kernel programs");
            }
        }
        self.evidence = evidence;
    }

    /// Turns what was lost since the last time into gap records.
    pub(super) fn report_losses(&mut self) {
        let now = self.source.now();
        for (slot, value) in
            self.kernel.maps.ledger.slots().into_iter().filter(|(slot, _)| *slot != PROBE_SLOT)
        {
            self.losses.lost_in_kernel(slot, value.lost, now);
        }
        let epoch = self.kernel.meta.epoch;
        let Self { losses, source, containers, unknown, queue, .. } = self;
        losses.report(now, |slot, gap, reported| {
            let container = containers.get(&slot).unwrap_or(unknown);
            let bytes = source.encode(slot, None, None, container.encoded(), Event::Gap(gap));
            let reported = i64::try_from(reported).unwrap_or(i64::MAX);
            queue.push(bytes, true, Credit { epoch, slot, reported, ..Credit::default() }).is_ok()
        });
        queue.flush();
    }
}
