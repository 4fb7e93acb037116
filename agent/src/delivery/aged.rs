//! What takes the place of records that have waited for too long: gap records that count them, one for each container.

use std::collections::BTreeMap;

use anyhow::Result;
use bytes::Bytes;
use palisade_proto::{
    batch,
    v1::{Batch, Gap, Record, record::Event},
};
use prost::Message as _;

use super::row::{Credit, Row};

/// The cause in gap records: of what the kernel has numbered, and of what agents say themselves.
pub const CAUSE: &str = "spool-age";
const OWN_CAUSE: &str = "own-spool-age";

/// The gap records for `rows`, and what the accounts make of them. Gap records among them stay as they are.
///
/// # Errors
///
/// When a row is damaged.
pub fn replacements(rows: &[(u64, Row)]) -> Result<Vec<(Bytes, Credit)>> {
    let mut instead = Vec::new();
    let mut gaps: BTreeMap<(u64, u64, bool), Record> = BTreeMap::new();
    for (first, row) in rows {
        let batch = Batch {
            first_position: *first,
            compressed: row.compressed.clone(),
            count: row.count,
            size: row.size,
            given_up: 0,
        };
        for bytes in batch::unpack(&batch)? {
            let record = Record::decode(bytes.clone())?;
            let (epoch, slot) = (record.epoch, record.slot);
            if matches!(record.event, Some(Event::Gap(_))) {
                instead.push((bytes, Credit { epoch, slot, ..Credit::default() }));
                continue;
            }
            let numbered = record.sequence > 0;
            let time = record.time;
            let gap = gaps.entry((epoch, slot, numbered)).or_insert_with(|| {
                let cause = if numbered { CAUSE } else { OWN_CAUSE }.to_owned();
                let gap = Gap { count: 0, cause, from: time, to: time };
                Record {
                    lane: 0,
                    sequence: 0,
                    session_of: None,
                    actor: None,
                    decision: None,
                    event: Some(Event::Gap(gap)),
                    ..record
                }
            });
            if let Some(Event::Gap(counted)) = &mut gap.event {
                counted.count += 1;
                counted.from = counted.from.min(time);
                counted.to = counted.to.max(time);
                gap.time = counted.to;
            }
        }
    }
    for ((epoch, slot, numbered), record) in gaps {
        let count = match &record.event {
            Some(Event::Gap(gap)) if numbered => i64::try_from(gap.count).unwrap_or(i64::MAX),
            _ => 0,
        };
        let credit = Credit { epoch, slot, delivered: -count, reported: count, bytes: 0 };
        instead.push((record.encode_to_vec().into(), credit));
    }
    Ok(instead)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_container_has_its_gap_and_gaps_stay() {
        let record = |slot, sequence, time| Record {
            node: "n".to_owned(),
            boot: "b".to_owned(),
            epoch: 3,
            slot,
            sequence,
            time,
            actor: Some(Default::default()),
            decision: Some(Default::default()),
            event: Some(Event::Exit(Default::default())),
            ..Record::default()
        };
        let known = Gap { count: 12, cause: "ring-full".to_owned(), from: 40, to: 99 };
        let gap = Record { event: Some(Event::Gap(known)), actor: None, decision: None, ..record(7, 0, 99) };
        let all = [record(7, 1, 50), record(8, 5, 51), record(7, 2, 60), record(7, 0, 61), gap];
        let records: Vec<Bytes> = all.iter().map(|record| record.encode_to_vec().into()).collect();
        let packed = batch::pack(4, &records).unwrap();
        let row =
            Row { count: packed.count, size: packed.size, compressed: packed.compressed, ..Row::default() };
        let instead = replacements(&[(4, row)]).unwrap();
        let found: Vec<(u64, Gap, (i64, i64))> = instead
            .into_iter()
            .map(|(bytes, credit)| {
                let record = Record::decode(bytes).unwrap();
                assert_eq!((record.node.as_str(), record.sequence, record.epoch), ("n", 0, 3));
                assert_eq!((record.actor, record.decision), (None, None), "nobody acted in a gap");
                let Some(Event::Gap(gap)) = record.event else { panic!("it is no gap") };
                (record.slot, gap, (credit.delivered, credit.reported))
            })
            .collect();
        let counted = |count, cause: &str, from, to| Gap { count, cause: cause.to_owned(), from, to };
        assert_eq!(
            found,
            [
                (7, counted(12, "ring-full", 40, 99), (0, 0)),
                (7, counted(1, "own-spool-age", 61, 61), (0, 0)),
                (7, counted(2, "spool-age", 50, 60), (-2, 2)),
                (8, counted(1, "spool-age", 51, 51), (-1, 1)),
            ]
        );
    }
}
