//! Accounting for what did not arrive: counted by container and cause, and reported until it is said.

use std::collections::{BTreeMap, HashMap};

use palisade_proto::v1;

use crate::delivery::Full;

/// Why records are missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Cause {
    RingFull,
    QueueFull,
    Undecodable,
    AgentKilled,
    SpoolLost,
    DiskFull,
    /// What the agent says itself, and the kernel has not numbered.
    OwnQueueFull,
}

impl Cause {
    fn as_str(self) -> &'static str {
        match self {
            Self::RingFull => "ring-full",
            Self::QueueFull => "queue-full",
            Self::Undecodable => "undecodable",
            Self::AgentKilled => "agent-killed",
            Self::SpoolLost => "spool-lost",
            Self::DiskFull => "spool-full",
            Self::OwnQueueFull => "own-queue-full",
        }
    }
}

#[derive(Default)]
struct Loss {
    count: u64,
    /// Time of the first, or the last moment at which nothing was missing.
    from: u64,
}

/// What is lost and not yet reported.
#[derive(Default)]
pub struct Losses {
    open: HashMap<(u64, Cause), Loss>,
    /// All that ever were, by cause.
    totals: BTreeMap<&'static str, u64>,
    /// The kernel's counter of each slot when it was last read, and when that was.
    seen: HashMap<u64, (u64, u64)>,
}

impl Losses {
    /// There was no room for a record, which the kernel has numbered or not.
    pub fn turned_away(&mut self, slot: u64, numbered: bool, why: Full, time: u64) {
        let cause = match why {
            _ if !numbered => Cause::OwnQueueFull,
            Full::Memory => Cause::QueueFull,
            Full::Disk => Cause::DiskFull,
        };
        self.one(slot, cause, time);
    }

    /// The spool had `count` records of a slot, and is damaged or gone.
    pub fn gone_with_the_spool(&mut self, slot: u64, count: u64, now: u64) {
        if count > 0 {
            let loss = self.open.entry((slot, Cause::SpoolLost)).or_default();
            loss.from = now;
            loss.count += count;
            self.count(Cause::SpoolLost, count);
        }
    }

    /// An agent before this one was killed with `count` records of a slot on their way, at the latest at `now`. Of the
    /// kernel's counter, which stands at `total`, they are a part.
    pub fn gone_with_the_agent(&mut self, slot: u64, count: u64, total: u64, now: u64) {
        self.seen.insert(slot, (total, now));
        if count > 0 {
            let loss = self.open.entry((slot, Cause::AgentKilled)).or_default();
            loss.from = now;
            loss.count += count;
            self.count(Cause::AgentKilled, count);
        }
    }

    /// A record's bytes could not be read.
    pub fn undecodable(&mut self, slot: u64, time: u64) {
        self.one(slot, Cause::Undecodable, time);
    }

    fn one(&mut self, slot: u64, cause: Cause, time: u64) {
        let loss = self.open.entry((slot, cause)).or_default();
        if loss.count == 0 {
            loss.from = time;
        }
        loss.count += 1;
        self.count(cause, 1);
    }

    fn count(&mut self, cause: Cause, count: u64) {
        *self.totals.entry(cause.as_str()).or_default() += count;
    }

    /// What was lost since the agent began, by cause.
    pub fn totals(&self) -> impl Iterator<Item = (&'static str, u64)> {
        self.totals.iter().map(|(cause, count)| (*cause, *count))
    }

    /// Records that are lost and not yet reported.
    pub fn unsaid(&self) -> u64 {
        self.open.values().map(|loss| loss.count).sum()
    }

    /// Whether a loss of this slot is not yet reported.
    pub fn concerns(&self, slot: u64) -> bool {
        self.open.keys().any(|(open, _)| *open == slot)
    }

    /// The kernel's loss counter of a slot stands at `total`.
    pub fn lost_in_kernel(&mut self, slot: u64, total: u64, now: u64) {
        let (before, since) = self.seen.insert(slot, (total, now)).unwrap_or((0, now));
        let new = total.saturating_sub(before);
        if new > 0 {
            let loss = self.open.entry((slot, Cause::RingFull)).or_default();
            if loss.count == 0 {
                loss.from = since;
            }
            loss.count += new;
            self.count(Cause::RingFull, new);
        }
    }

    /// Offers every open loss to `say`; what is not taken stays open.
    /// With it goes how many numbered records it counts.
    pub fn report(&mut self, now: u64, mut say: impl FnMut(u64, v1::Gap, u64) -> bool) {
        self.open.retain(|(slot, cause), loss| {
            let gap =
                v1::Gap { count: loss.count, cause: cause.as_str().to_owned(), from: loss.from, to: now };
            !say(*slot, gap, if *cause == Cause::OwnQueueFull { 0 } else { loss.count })
        });
    }

    /// A slot is gone; its number will not come back.
    pub fn forget(&mut self, slot: u64) {
        self.seen.remove(&slot);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loss_is_reported_once_and_only_when_taken() {
        let mut losses = Losses::default();
        losses.lost_in_kernel(1, 0, 10);
        losses.lost_in_kernel(1, 5, 20);
        losses.turned_away(1, true, Full::Memory, 30);
        losses.turned_away(1, true, Full::Memory, 40);
        losses.turned_away(1, false, Full::Disk, 45);
        losses.report(50, |_, _, _| false);
        let mut said = Vec::new();
        losses.report(60, |slot, gap, numbered| {
            said.push((slot, gap.cause, gap.count, numbered, gap.from, gap.to));
            true
        });
        said.sort();
        let expected = [
            (1, "own-queue-full".to_owned(), 1, 0, 45, 60),
            (1, "queue-full".to_owned(), 2, 2, 30, 60),
            (1, "ring-full".to_owned(), 5, 5, 10, 60),
        ];
        assert_eq!(said, expected);
        losses.lost_in_kernel(1, 5, 70);
        let totals: Vec<(&str, u64)> = losses.totals().collect();
        assert_eq!(totals, [("own-queue-full", 1), ("queue-full", 2), ("ring-full", 5)]);
        // What the kernel lost before is among what went with an agent that was killed.
        losses.gone_with_the_agent(2, 4, 3, 75);
        losses.lost_in_kernel(2, 4, 77);
        let mut said = Vec::new();
        losses.report(80, |slot, gap, _| {
            said.push((slot, gap.cause, gap.count));
            true
        });
        said.sort();
        assert_eq!(said, [(2, "agent-killed".to_owned(), 4), (2, "ring-full".to_owned(), 1)]);
    }
}
