//! Who makes the records: what all of them share, and the scale of their times.

use std::time::{SystemTime, UNIX_EPOCH};

use bytes::{BufMut as _, Bytes, BytesMut};
use palisade_abi::{hash::hash_path, ledger::SetMeta, record::Header};
use palisade_proto::v1;
use prost::Message as _;
use rustix::time::{ClockId, clock_gettime};

use super::Body;

/// Who makes the records.
pub struct Source {
    pub node: String,
    pub boot: String,
    /// Start of this run, nanoseconds since the Unix epoch.
    pub started: u64,
    /// The fields that all records share, encoded once.
    head: Bytes,
    /// Key of the path hash.
    hash_key: [u64; 2],
    /// What to add to a time since boot to get the time since the Unix epoch. Fixed for a set of programs, so that the
    /// order of records does not depend on somebody setting the clock, nor on the agent's restarts.
    boot_offset: u64,
}

impl Source {
    /// `set` is the set of programs that numbers the records.
    pub fn new(node: String, boot: String, set: &SetMeta) -> Self {
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64);
        let head =
            v1::Record { node: node.clone(), boot: boot.clone(), epoch: set.epoch, ..Default::default() };
        let head = head.encode_to_vec().into();
        let hash_key = set.hash_key;
        Self {
            node,
            boot,
            started: wall,
            head,
            hash_key,
            boot_offset: set.epoch.saturating_sub(set.epoch_since_boot),
        }
    }

    /// Nanoseconds since the Unix epoch of a kernel time; 0 stays 0.
    pub fn wall(&self, since_boot: u64) -> u64 {
        if since_boot == 0 { 0 } else { since_boot.saturating_add(self.boot_offset) }
    }

    /// The hash by which the kernel knows a path.
    pub fn hash(&self, path: &[u8]) -> [u64; 2] {
        hash_path(self.hash_key, path)
    }

    /// The present, on the scale of the records.
    pub fn now(&self) -> u64 {
        self.wall(now_since_boot())
    }

    /// Encodes a record with its container block, which is encoded already. Records that the agent makes have no
    /// header and are of no session.
    pub fn encode(
        &self,
        slot: u64,
        header: Option<&Header>,
        session: Option<v1::SessionReference>,
        container: &Bytes,
        body: impl Into<Body>,
    ) -> Bytes {
        let (actor, decision, event) = body.into().encode();
        let record = v1::Record {
            slot,
            lane: header.map_or(0, |header| header.lane),
            sequence: header.map_or(0, |header| header.sequence),
            time: header.map_or_else(|| self.now(), |header| self.wall(header.time)),
            session_of: session,
            actor,
            decision,
            event: Some(event),
            // The rest stands in the two blocks that are encoded already; the parts of a message may be in any order.
            ..Default::default()
        };
        let mut out = BytesMut::with_capacity(self.head.len() + container.len() + ROOM);
        out.put_slice(&self.head);
        // A BytesMut grows, so encoding into it cannot fail.
        let _ = record.encode(&mut out);
        prost::encoding::encode_key(CONTAINER_FIELD, prost::encoding::WireType::LengthDelimited, &mut out);
        prost::encoding::encode_varint(container.len() as u64, &mut out);
        out.put_slice(container);
        out.freeze()
    }
}

/// Room for the part of a record that is encoded anew; most need less.
const ROOM: usize = 512;

/// Number of `Record.container`.
const CONTAINER_FIELD: u32 = 8;

/// Nanoseconds since boot, suspend included.
pub fn now_since_boot() -> u64 {
    let time = clock_gettime(ClockId::Boottime);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use palisade_abi::codes;
    use palisade_proto::v1::record::Event;

    use super::*;
    use crate::records::{self, Decision};

    #[test]
    fn a_spliced_container_block_is_read_back() {
        let source = Source::new("n".to_owned(), "b".to_owned(), &SetMeta::default());
        let container = v1::Container { id: "c1".to_owned(), ..Default::default() };
        let container: Bytes = container.encode_to_vec().into();
        let bytes =
            source.encode(9, None, None, &container, Event::Gap(v1::Gap { count: 3, ..Default::default() }));
        let record = v1::Record::decode(bytes).unwrap();
        assert_eq!(record.container.unwrap().id, "c1");
        assert_eq!((record.node.as_str(), record.slot), ("n", 9));
        assert!(matches!(record.event, Some(Event::Gap(v1::Gap { count: 3, .. }))));
        let decision = Decision {
            verdict: codes::verdict::DENIED,
            action: codes::action::REFUSED,
            revision: "r".to_owned(),
            ..Decision::default()
        };
        let body = Body { actor: None, decision: Some(decision), event: records::Event::Fork };
        let record = v1::Record::decode(source.encode(9, None, None, &container, body)).unwrap();
        assert_eq!((record.container.unwrap().id, record.actor), ("c1".to_owned(), None));
        let expected = v1::Decision {
            verdict: "denied".to_owned(),
            action: "refused".to_owned(),
            revision: "r".to_owned(),
            ..Default::default()
        };
        assert_eq!(record.decision, Some(expected));
    }
}
