//! What became of the records that the kernel has numbered: booked in the kernel, where it outlives the agent, and compared with what
//! the spool says, which was changed together with the records themselves.

use std::collections::HashSet;

use palisade_abi::maps::Account;

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
    if found.lost > 0 {
        queue.rebase((epoch, slot), spooled);
    }
    found
}

impl Agent {
    /// Books what has become of records that were let in.
    pub(super) fn learn(&mut self, news: News) {
        let sum = |credit: Credit| credit.delivered + credit.reported;
        let (credit, change): (Credit, Box<dyn FnOnce(&mut Account)>) = match news {
            News::Spooled(credit) => {
                let gain = sum(credit);
                (
                    credit,
                    Box::new(move |account| account.spooled = account.spooled.saturating_add_signed(gain)),
                )
            }
            News::Delivered(credit) => {
                let gain = sum(credit);
                (
                    credit,
                    Box::new(move |account| {
                        account.delivered = account.delivered.saturating_add_signed(gain)
                    }),
                )
            }
            News::DeliveredFromMemory(credit) => {
                let gain = sum(credit);
                (
                    credit,
                    Box::new(move |account| {
                        account.from_memory = account.from_memory.saturating_add_signed(gain);
                    }),
                )
            }
            News::Lost(credit) => {
                let lost = sum(credit);
                let now = self.source.now();
                self.losses.gone_with_the_spool(credit.slot, lost.max(0).unsigned_abs(), now);
                (
                    credit,
                    Box::new(move |account| {
                        account.spooled = account.spooled.saturating_add_signed(-lost);
                    }),
                )
            }
        };
        if sum(credit) == 0 {
            return;
        }
        let Credit { epoch, slot, .. } = credit;
        let ledger = if epoch == self.kernel.meta.epoch {
            Some(&mut self.kernel.maps.ledger)
        } else if let Some(Others::Leaving(sets)) = &mut self.others {
            sets.iter_mut().find(|leaving| leaving.epoch() == epoch).map(|leaving| leaving.ledger_mut())
        } else {
            None
        };
        let Some(ledger) = ledger else { return };
        let settled = ledger.book(slot, change);
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
            known.extend(of(set.ledger(), set.meta.epoch));
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
