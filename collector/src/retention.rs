//! How long the log is kept: which of its closed segments have to go, the oldest first.

use std::{collections::HashMap, time::Duration};

use serde::Deserialize;

use crate::store::StreamName;

/// Bounds of the log; 0 means none.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Retention {
    /// Of all segments together. A segment goes as a whole, so there may be one more than that for a moment.
    pub bytes: u64,
    pub days: u32,
}

impl Default for Retention {
    fn default() -> Self {
        Self { bytes: 10 << 30, days: 30 }
    }
}

/// Runs of a node's agent whose positions are kept: each run is a stream of its own, and a node decides how often its agent begins.
const MOST_OF_NODE: usize = 256;
/// How long the positions of a stream are kept for which nothing comes, at least.
const LONGEST_SILENCE: Duration = Duration::from_secs(30 * 24 * 3600);

impl Retention {
    /// The streams that can be forgotten, of all with when their last batch came: of a node all but the newest, and what has
    /// been silent for long. Should one of these go on after all, its agent says from where.
    pub fn forgotten(self, streams: &[(StreamName, u64)], now: u64) -> Vec<StreamName> {
        let age = LONGEST_SILENCE.max(DAY * self.days);
        let silent = now.saturating_sub(u64::try_from(age.as_nanos()).unwrap_or(u64::MAX));
        let mut newest_first: Vec<&(StreamName, u64)> = streams.iter().collect();
        newest_first.sort_by_key(|(_, received)| std::cmp::Reverse(*received));
        let mut of_node: HashMap<&str, usize> = HashMap::new();
        newest_first
            .into_iter()
            .filter(|((node, ..), received)| {
                let count = of_node.entry(node).or_default();
                *count += 1;
                *count > MOST_OF_NODE || *received < silent
            })
            .map(|(name, _)| name.clone())
            .collect()
    }
}

/// A segment that is not appended to any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Closed {
    pub number: u64,
    pub bytes: u64,
    /// When its last entry came, nanoseconds since the Unix epoch.
    pub received: u64,
}

const DAY: Duration = Duration::from_secs(24 * 3600);

impl Retention {
    /// How many of `closed` have to go. `open` is the size of the segment that is appended to.
    pub fn expired(self, closed: &[Closed], open: u64, now: u64) -> usize {
        let mut bytes = open + closed.iter().map(|segment| segment.bytes).sum::<u64>();
        let age = u64::try_from((DAY * self.days).as_nanos()).unwrap_or(u64::MAX);
        closed
            .iter()
            .take_while(|segment| {
                let too_many = self.bytes > 0 && bytes > self.bytes;
                let too_old = self.days > 0 && segment.received < now.saturating_sub(age);
                bytes -= segment.bytes;
                too_many || too_old
            })
            .count()
    }

    /// Whether a segment whose first entry came at `first` should be closed, so that it can go in time.
    pub fn closes(self, first: u64, now: u64) -> bool {
        self.days > 0 && first < now.saturating_sub(DAY.as_nanos() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_kept_of_what_still_streams() {
        let day = DAY.as_nanos() as u64;
        let name = |node: &str, epoch| (node.to_owned(), "b".to_owned(), epoch);
        let mut streams: Vec<(StreamName, u64)> =
            (0..300).map(|epoch| (name("many", epoch), 100 * day + epoch)).collect();
        streams.push((name("quiet", 1), 71 * day));
        streams.push((name("silent", 1), 69 * day));
        let retention = Retention { bytes: 0, days: 0 };
        let mut forgotten = retention.forgotten(&streams, 100 * day);
        forgotten.sort();
        let expected = (0..44).map(|epoch| name("many", epoch)).chain([name("silent", 1)]);
        assert_eq!(forgotten, expected.collect::<Vec<_>>());
        assert_eq!(Retention { bytes: 0, days: 40 }.forgotten(&streams, 100 * day).len(), 44);
    }

    #[test]
    fn the_oldest_go_first_by_size_and_by_age() {
        let day = DAY.as_nanos() as u64;
        let closed: Vec<Closed> =
            (0..5).map(|number| Closed { number, bytes: 10, received: (100 + number) * day }).collect();
        let expired = |bytes, days, now| Retention { bytes, days }.expired(&closed, 7, now);
        assert_eq!(expired(0, 0, u64::MAX), 0, "no bounds");
        assert_eq!(expired(57, 0, 0), 0);
        assert_eq!(expired(56, 0, 0), 1);
        assert_eq!(expired(1, 0, 0), 5, "the open one stays");
        assert_eq!(expired(0, 3, 103 * day), 0);
        assert_eq!(expired(0, 3, 105 * day), 2);
        assert_eq!(expired(30, 3, 105 * day), 3, "whichever is narrower");
        assert_eq!(expired(0, 3, 0), 0, "a clock that goes back keeps all");
        assert_eq!(expired(0, u32::MAX, u64::MAX), 0);
        assert!(Retention { bytes: 0, days: 3 }.closes(day, 2 * day + 1));
        assert!(!Retention { bytes: 0, days: 3 }.closes(day, 2 * day));
        assert!(!Retention { bytes: 1, days: 0 }.closes(0, u64::MAX));
    }
}
