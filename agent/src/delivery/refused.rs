//! What takes the place of a record that no collector will take: a gap record that counts it.

use bytes::Bytes;
use palisade_proto::v1::{Gap, Hello, Record, record::Event};
use prost::Message as _;

use super::row::Credit;

/// The cause in gap records: of what the kernel has numbered, and of what agents say themselves.
pub const CAUSE: &str = "refused-by-collector";
const OWN_CAUSE: &str = "own-refused-by-collector";

/// The gap record for `record`, whatever is wrong with it, and what the accounts make of it; `None` when it is one itself already.
pub fn replacement(record: &Bytes, hello: &Hello, now: u64) -> Option<(Bytes, Credit)> {
    let record = Record::decode(record.clone()).unwrap_or_else(|_| Record { time: now, ..Record::default() });
    let (of_kernel, count, from, to) = match &record.event {
        Some(Event::Gap(gap)) if [CAUSE, OWN_CAUSE].contains(&gap.cause.as_str()) => return None,
        Some(Event::Gap(gap)) => (!gap.cause.starts_with("own-"), gap.count, gap.from, gap.to),
        _ => (record.sequence > 0, 1, record.time, record.time),
    };
    let (epoch, slot) = (record.epoch, record.slot);
    // Booked when it was let in.
    let numbered = i64::from(record.sequence > 0);
    let gap = Record {
        node: hello.node.clone(),
        boot: if record.boot.is_empty() { hello.boot.clone() } else { record.boot },
        epoch,
        slot,
        // What the agent says itself is not numbered.
        lane: 0,
        sequence: 0,
        time: record.time,
        container: record.container,
        session_of: None,
        actor: None,
        decision: None,
        event: Some(Event::Gap(Gap {
            count,
            cause: if of_kernel { CAUSE } else { OWN_CAUSE }.to_owned(),
            from,
            to,
        })),
    };
    Some((
        gap.encode_to_vec().into(),
        Credit { epoch, slot, delivered: -numbered, reported: numbered, bytes: 0 },
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_counted_once_and_a_gap_as_often_as_it_counts() {
        let hello = Hello { node: "n".to_owned(), boot: "b".to_owned(), ..Hello::default() };
        let make = |record: &Bytes| {
            replacement(record, &hello, 55).map(|(gap, credit)| (Record::decode(gap).unwrap(), credit))
        };
        // As a collector refuses it: of another node.
        let record = Record {
            node: "other".to_owned(),
            epoch: 3,
            slot: 7,
            sequence: 5,
            time: 99,
            ..Record::default()
        };
        let (gap, credit) = make(&record.encode_to_vec().into()).unwrap();
        let counted = |count, from, to| Gap { count, cause: CAUSE.to_owned(), from, to };
        assert_eq!(gap.event, Some(Event::Gap(counted(1, 99, 99))));
        assert_eq!(
            (gap.node.as_str(), gap.boot.as_str(), gap.epoch, gap.slot, gap.sequence),
            ("n", "b", 3, 7, 0)
        );
        assert_eq!(credit, Credit { epoch: 3, slot: 7, delivered: -1, reported: 1, bytes: 0 });
        assert_eq!(make(&gap.encode_to_vec().into()), None, "it would go round for ever");
        let lost = Gap { count: 12, cause: "ring-full".to_owned(), from: 40, to: 99 };
        let lost = Record { event: Some(Event::Gap(lost)), sequence: 0, ..record };
        let (gap, credit) = make(&lost.encode_to_vec().into()).unwrap();
        assert_eq!(gap.event, Some(Event::Gap(counted(12, 40, 99))));
        assert_eq!((credit.delivered, credit.reported), (0, 0), "they are counted already");
        // And what is no record at all.
        let (gap, _) = make(&Bytes::from_static(b"\xff")).unwrap();
        let own = Gap { cause: OWN_CAUSE.to_owned(), ..counted(1, 55, 55) };
        assert_eq!(gap.event, Some(Event::Gap(own)), "it has no number");
        assert_eq!(make(&gap.encode_to_vec().into()), None);
        assert_eq!((gap.node.as_str(), gap.slot), ("n", 0));
    }
}
