//! What became of the records that the kernel has numbered: booked in the kernel, where it outlives the agent, and compared with what
//! the spool says, which was changed together with the records themselves.

use std::collections::HashSet;

use palisade_abi::ledger::Account;

use super::{Agent, others::Others};
use crate::{
    delivery::{Credit, News, Queue},
    kernel::Ledger,
};

/// What of a slot's records is accounted for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Accounted {
    /// Delivered, in the spool, or counted.
    pub settled: u64,
    /// They were in a spool that is not there any more.
    pub lost: u64,
}

/// Of what the kernel remembers of a slot, and the spool: `booked` is what it says, `None` when it does not know the slot, `readable`
/// whether it can say at all.
fn accounted(account: Account, booked: Option<u64>, readable: bool) -> Accounted {
    let Account { spooled, delivered, from_memory, .. } = account;
    match booked {
        // An agent that was killed may not have booked its last change.
        Some(booked) => Accounted { settled: spooled.max(booked) + from_memory, lost: 0 },
        None if readable => {
            Accounted { settled: delivered + from_memory, lost: spooled.saturating_sub(delivered) }
        }
        // It will be delivered when it can be read.
        None => Accounted { settled: spooled + from_memory, lost: 0 },
    }
}

/// Compares the account of a slot with the spool; from then on they agree.
pub(super) fn settle(ledger: &mut Ledger, queue: &Queue, epoch: u64, slot: u64) -> Accounted {
    let account = ledger.account(slot);
    let found = accounted(account, queue.booked((epoch, slot)), queue.knows());
    let spooled = found.settled - account.from_memory;
    if spooled != account.spooled {
        ledger.book(slot, |account| account.spooled = spooled);
    }
    if spooled > 0 && queue.knows() && queue.booked((epoch, slot)).is_none() {
        queue.rebase((epoch, slot), spooled);
    }
    found
}

impl Agent {
    /// Books what has become of records that were let in.
    pub(super) fn learn(&mut self, news: News) {
        let sum = |credit: Credit| credit.delivered + credit.reported;
        let (News::Spooled(credit)
        | News::Delivered(credit)
        | News::DeliveredFromMemory(credit)
        | News::Lost(credit)) = news;
        let (Credit { epoch, slot, .. }, gain) = (credit, sum(credit));
        if gain == 0 {
            return;
        }
        if let News::Lost(_) = news {
            let lost = gain.max(0).unsigned_abs();
            if epoch == self.kernel.meta.epoch {
                let now = self.source.now();
                self.losses.gone_with_the_spool(slot, lost, now);
            } else if let Some(leaving) = self.others.as_mut().and_then(|others| others.leaving(epoch)) {
                leaving.misses(slot, lost);
            }
        }
        let ledger = if epoch == self.kernel.meta.epoch {
            Some(&mut self.kernel.maps.ledger)
        } else {
            self.others.as_mut().and_then(|others| others.ledger_mut(epoch))
        };
        let Some(ledger) = ledger else { return };
        let settled = ledger.book(slot, |account| {
            let (field, gain) = match news {
                News::Spooled(_) => (&mut account.spooled, gain),
                News::Lost(_) => (&mut account.spooled, -gain),
                News::Delivered(_) => (&mut account.delivered, gain),
                News::DeliveredFromMemory(_) => (&mut account.from_memory, gain),
            };
            *field = field.saturating_add_signed(gain);
        });
        if let News::Lost(_) = news {
            self.queue.rebase((epoch, slot), ledger.account(slot).spooled);
        }
        if settled {
            self.queue.settle((epoch, slot));
        }
    }

    /// Has the spool forget the slots of sets of programs that are gone.
    pub(super) fn forget_unknown_slots(&self) {
        let mut known = HashSet::new();
        let of = |ledger: &Ledger, epoch: u64| -> Vec<(u64, u64)> {
            let slots = ledger.slots().into_iter().map(|(slot, _)| slot);
            let accounts = ledger.accounts().into_iter().map(|(slot, _)| slot);
            slots.chain(accounts).map(|slot| (epoch, slot)).collect()
        };
        known.extend(of(&self.kernel.maps.ledger, self.kernel.meta.epoch));
        for set in self.others.iter().flat_map(Others::sets) {
            known.extend(of(&set.ledger, set.meta.epoch));
        }
        self.queue.settle_all_but(&known);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_spool_says_is_true_and_what_it_lost_is_counted() {
        let account = Account { spooled: 100, delivered: 60, from_memory: 7, made: 0 };
        let found = |booked, readable| {
            let Accounted { settled, lost } = accounted(account, booked, readable);
            (settled, lost)
        };
        assert_eq!(found(Some(103), true), (110, 0), "killed before it was booked");
        assert_eq!(found(Some(100), true), (107, 0));
        assert_eq!(found(None, true), (67, 40), "another spool");
        assert_eq!(found(None, false), (107, 0), "a spool that cannot be opened now");
    }
}
