//! Accounting for what did not arrive: counted by container and cause, and reported until it is said.

use std::collections::HashMap;

use palisade_proto::v1;

/// Why records are missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Cause {
    RingFull,
    QueueFull,
    Undecodable,
}

impl Cause {
    fn as_str(self) -> &'static str {
        match self {
            Self::RingFull => "ring-full",
            Self::QueueFull => "queue-full",
            Self::Undecodable => "undecodable",
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
    /// The kernel's counter of each slot when it was last read, and when that was.
    seen: HashMap<u64, (u64, u64)>,
}

impl Losses {
    /// The queue had no room for a record.
    pub fn turned_away(&mut self, slot: u64, time: u64) {
        self.one(slot, Cause::QueueFull, time);
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
        }
    }

    /// Offers every open loss to `say`; what is not taken stays open.
    pub fn report(&mut self, now: u64, mut say: impl FnMut(u64, v1::Gap) -> bool) {
        self.open.retain(|(slot, cause), loss| {
            let gap =
                v1::Gap { count: loss.count, cause: cause.as_str().to_owned(), from: loss.from, to: now };
            !say(*slot, gap)
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
        losses.turned_away(1, 30);
        losses.turned_away(1, 40);
        losses.report(50, |_, _| false);
        let mut said = Vec::new();
        losses.report(60, |slot, gap| {
            said.push((slot, gap.cause, gap.count, gap.from, gap.to));
            true
        });
        said.sort();
        assert_eq!(said, [(1, "queue-full".to_owned(), 2, 30, 60), (1, "ring-full".to_owned(), 5, 10, 60)]);
        losses.lost_in_kernel(1, 5, 70);
        losses.report(80, |_, _| panic!("nothing is open"));
    }
}
