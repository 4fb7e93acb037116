//! What waits for the collector.
//!
//! A record takes its position when it is let in, so positions have no holes, whatever is turned away. Telemetry
//! is turned away before denials are.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use palisade_proto::batch::{MOST_OF_RECORD, taken_by};
use tokio::sync::Notify;

/// The queue has no room; the caller counts the record as lost.
#[derive(Debug, PartialEq, Eq)]
pub struct Full;

/// Overhead that is counted for each record.
const OVERHEAD: usize = 64;
/// The share of the queue that only urgent records may use, as a divisor.
const RESERVED_SHARE: usize = 8;

/// What the account of a slot gains when a record is acknowledged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Credit {
    /// The set of programs that numbered it.
    pub epoch: u64,
    pub slot: u64,
    /// 1 for a record that the kernel has numbered.
    pub delivered: u64,
    /// How many numbered records a gap record counts.
    pub reported: u64,
}

/// What waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiting {
    pub records: usize,
    pub bytes: usize,
    /// Most bytes that may.
    pub limit: usize,
    /// How long the first has waited.
    pub oldest: Duration,
    /// Records that no collector would take, so far.
    pub given_up: u64,
}

struct Entry {
    record: Bytes,
    credit: Credit,
    since: Instant,
}

#[derive(Default)]
struct State {
    records: VecDeque<Entry>,
    bytes: usize,
    /// Position of the first record.
    first: u64,
    acknowledged: u64,
    given_up: u64,
}

/// Records between the agent and the collector.
pub struct Queue {
    state: Mutex<State>,
    limit: usize,
    filled: Notify,
    emptied: Notify,
}

impl Queue {
    pub fn new(limit: usize) -> Self {
        Self { state: Mutex::default(), limit, filled: Notify::new(), emptied: Notify::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change below is complete before anything can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets a record in.
    ///
    /// # Errors
    ///
    /// When there is no room for it, or it is larger than a record may be.
    pub fn push(&self, record: Bytes, urgent: bool, credit: Credit) -> Result<(), Full> {
        if record.len() > MOST_OF_RECORD {
            return Err(Full);
        }
        let mut state = self.state();
        let limit = if urgent { self.limit } else { self.limit - self.limit / RESERVED_SHARE };
        let size = record.len() + OVERHEAD;
        if state.bytes + size > limit {
            return Err(Full);
        }
        state.bytes += size;
        state.records.push_back(Entry { record, credit, since: Instant::now() });
        Ok(())
    }

    /// Tells the stream that there is something to send.
    pub fn flush(&self) {
        self.filled.notify_one();
    }

    /// Waits until there may be something at `position`.
    pub async fn filled(&self) {
        self.filled.notified().await;
    }

    /// Records from `position` on, up to `most` of them and together up to `bytes` in a batch, with the position of the first.
    pub fn batch(&self, position: u64, most: usize, bytes: usize) -> (u64, Vec<Bytes>) {
        let state = self.state();
        let position = position.max(state.first);
        let skip = (position - state.first) as usize;
        let mut taken = 0;
        let records = state
            .records
            .iter()
            .map(|entry| &entry.record)
            .skip(skip)
            .take(most)
            .take_while(|record| {
                let size = taken_by(record.len());
                let fits = taken == 0 || taken + size <= bytes;
                taken += size;
                fits
            })
            .cloned()
            .collect();
        (position, records)
    }

    /// Forgets every record before `next`, and returns what the accounts gain by it, one entry a slot.
    pub fn acknowledge(&self, next: u64) -> Vec<Credit> {
        let mut state = self.state();
        let mut gained: HashMap<(u64, u64), Credit> = HashMap::new();
        while state.first < next {
            let Some(Entry { record, credit, .. }) = state.records.pop_front() else { break };
            let Credit { epoch, slot, delivered, reported } = credit;
            if delivered + reported > 0 {
                let nothing = Credit { epoch, slot, ..Credit::default() };
                let sum = gained.entry((epoch, slot)).or_insert(nothing);
                sum.delivered += delivered;
                sum.reported += reported;
            }
            state.bytes -= record.len() + OVERHEAD;
            state.first += 1;
            state.acknowledged += 1;
        }
        if state.records.is_empty() {
            drop(state);
            self.emptied.notify_waiters();
        }
        gained.into_values().collect()
    }

    /// Takes out the record at `position`, which must be the first: it is never delivered. What `replacement` makes of it comes
    /// last, whatever room there is; the account counts it then as reported.
    pub fn give_up(&self, position: u64, replacement: impl FnOnce(&Bytes, Credit) -> Option<Bytes>) {
        let mut state = self.state();
        if state.first != position {
            return;
        }
        let Some(Entry { record, credit, since }) = state.records.pop_front() else { return };
        state.first += 1;
        state.bytes -= record.len() + OVERHEAD;
        state.given_up += 1;
        if let Some(replacement) = replacement(&record, credit) {
            let reported = credit.delivered + credit.reported;
            state.bytes += replacement.len() + OVERHEAD;
            let credit = Credit { delivered: 0, reported, ..credit };
            state.records.push_back(Entry { record: replacement, credit, since });
        }
        if state.records.is_empty() {
            drop(state);
            self.emptied.notify_waiters();
        }
    }

    /// The position of the first record that waits, and the next that will be given.
    pub fn positions(&self) -> (u64, u64) {
        let state = self.state();
        (state.first, state.first + state.records.len() as u64)
    }

    /// Records that wait, and records acknowledged so far.
    pub fn counts(&self) -> (usize, u64) {
        let state = self.state();
        (state.records.len(), state.acknowledged)
    }

    pub fn waiting(&self) -> Waiting {
        let state = self.state();
        Waiting {
            records: state.records.len(),
            bytes: state.bytes,
            limit: self.limit,
            given_up: state.given_up,
            oldest: state.records.front().map_or(Duration::ZERO, |first| first.since.elapsed()),
        }
    }

    /// Waits until everything is acknowledged.
    pub async fn drained(&self) {
        loop {
            let emptied = self.emptied.notified();
            if self.counts().0 == 0 {
                return;
            }
            emptied.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn telemetry_is_turned_away_before_denials() {
        let queue = Queue::new(8000);
        let record = Bytes::from(vec![0; 936]);
        while queue.push(record.clone(), false, Credit::default()).is_ok() {}
        assert_eq!(queue.counts().0, 7);
        assert_eq!(queue.push(record.clone(), true, Credit::default()), Ok(()));
        assert_eq!(queue.push(record, true, Credit::default()), Err(Full));
    }

    #[test]
    fn what_is_given_up_is_counted_by_what_comes_in_its_place() {
        let queue = Queue::new(1 << 20);
        let credit = Credit { epoch: 1, slot: 5, delivered: 1, reported: 0 };
        for text in ["a", "b"] {
            queue.push(Bytes::from_static(text.as_bytes()), false, credit).unwrap();
        }
        queue.give_up(1, |_, _| panic!("it is not the first"));
        queue.give_up(0, |record, of| {
            assert_eq!((record.as_ref(), of), (&b"a"[..], credit));
            Some(Bytes::from_static(b"gap"))
        });
        assert_eq!(queue.positions(), (1, 3));
        assert_eq!(queue.batch(0, 9, 99), (1, vec![Bytes::from_static(b"b"), Bytes::from_static(b"gap")]));
        assert_eq!(queue.acknowledge(3), [Credit { epoch: 1, slot: 5, delivered: 1, reported: 1 }]);
        queue.give_up(3, |_, _| panic!("nothing is there"));
        assert_eq!(queue.waiting().given_up, 1);
        let large = Bytes::from(vec![0; MOST_OF_RECORD + 1]);
        assert_eq!(queue.push(large, true, credit), Err(Full), "no collector would take it");
    }

    #[test]
    fn positions_follow_acknowledgements() {
        let queue = Queue::new(1 << 20);
        for text in ["a", "b", "c"] {
            let credit = Credit { epoch: 1, slot: 5, delivered: 1, reported: 0 };
            queue.push(Bytes::from_static(text.as_bytes()), false, credit).unwrap();
        }
        assert_eq!(queue.acknowledge(1), [Credit { epoch: 1, slot: 5, delivered: 1, reported: 0 }]);
        assert_eq!(queue.batch(0, 10, 100), (1, vec![Bytes::from_static(b"b"), Bytes::from_static(b"c")]));
        assert_eq!(queue.batch(2, 10, 100).1.len(), 1);
        assert_eq!(queue.acknowledge(9), [Credit { epoch: 1, slot: 5, delivered: 2, reported: 0 }]);
        assert_eq!(queue.counts(), (0, 3));
        let waiting = queue.waiting();
        assert_eq!((waiting.records, waiting.bytes, waiting.oldest), (0, 0, Duration::ZERO));
        queue.push(Bytes::from_static(b"d"), false, Credit::default()).unwrap();
        assert_eq!(queue.batch(3, 10, 100), (3, vec![Bytes::from_static(b"d")]));
    }
}
