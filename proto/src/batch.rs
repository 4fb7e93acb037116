//! The records of a batch as they travel: one compressed block, whose size is known before it is opened.

use bytes::{Buf as _, BufMut as _, Bytes};
use thiserror::Error;

use crate::v1::Batch;

/// Most records of a batch, and most bytes of them before they are compressed.
pub const MOST_RECORDS: usize = 4096;
pub const MOST_BYTES: usize = 4 << 20;
/// Most bytes of one record: several times what any has.
pub const MOST_OF_RECORD: usize = 256 << 10;
/// Most bytes of a batch on the wire: what cannot be compressed grows a little.
pub const MOST_COMPRESSED: usize = MOST_BYTES + (64 << 10);
/// What a record adds to its own bytes: its length.
const FRAME: usize = size_of::<u32>();
/// The fastest of zstd's usual levels; the agent shares its node with what it guards.
const LEVEL: i32 = 1;

/// Why bytes are no batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum BatchError {
    #[error("it has no records")]
    Empty,
    #[error("it claims {0} records, more than {MOST_RECORDS}")]
    TooMany(u32),
    #[error("it claims {0} bytes, more than {MOST_BYTES}")]
    TooLarge(u32),
    #[error("it cannot be decompressed to the {0} bytes that it claims")]
    NotCompressed(u32),
    #[error("it does not hold the records that it claims")]
    Lengths,
    #[error("it cannot be compressed")]
    Compress,
}

/// Bytes that a record of `length` bytes takes in a batch before it is compressed.
#[must_use]
pub fn taken_by(length: usize) -> usize {
    length + FRAME
}

/// Makes a batch of `records`, of which the first has `first_position`.
///
/// # Errors
///
/// When they are none, too many, or together too large.
pub fn pack(first_position: u64, records: &[Bytes]) -> Result<Batch, BatchError> {
    let count = u32::try_from(records.len()).unwrap_or(u32::MAX);
    if records.is_empty() {
        return Err(BatchError::Empty);
    }
    if records.len() > MOST_RECORDS {
        return Err(BatchError::TooMany(count));
    }
    let bytes: usize = records.iter().map(|record| taken_by(record.len())).sum();
    let size = u32::try_from(bytes).unwrap_or(u32::MAX);
    if bytes > MOST_BYTES {
        return Err(BatchError::TooLarge(size));
    }
    let mut plain = Vec::with_capacity(bytes);
    for record in records {
        // Within MOST_BYTES.
        plain.put_u32_le(record.len() as u32);
        plain.put_slice(record);
    }
    let compressed = zstd::bulk::compress(&plain, LEVEL).map_err(|_| BatchError::Compress)?;
    Ok(Batch { first_position, compressed: compressed.into(), count, size, given_up: 0 })
}

/// Opens a batch of somebody who may be hostile: nothing larger than [`MOST_BYTES`] is ever made of it.
///
/// # Errors
///
/// When it is not what it claims to be.
pub fn unpack(batch: &Batch) -> Result<Vec<Bytes>, BatchError> {
    let Batch { compressed, count, size, .. } = batch;
    match (*count as usize, *size as usize) {
        (0, _) | (_, 0) => return Err(BatchError::Empty),
        (records, _) if records > MOST_RECORDS => return Err(BatchError::TooMany(*count)),
        (_, bytes) if bytes > MOST_BYTES => return Err(BatchError::TooLarge(*size)),
        _ => {}
    }
    let plain = zstd::bulk::decompress(compressed, *size as usize)
        .ok()
        .filter(|plain| plain.len() == *size as usize)
        .ok_or(BatchError::NotCompressed(*size))?;
    let mut plain = Bytes::from(plain);
    let mut records = Vec::with_capacity(*count as usize);
    for _ in 0..*count {
        let length = plain.try_get_u32_le().map_err(|_| BatchError::Lengths)? as usize;
        if length > plain.len() {
            return Err(BatchError::Lengths);
        }
        records.push(plain.split_to(length));
    }
    if plain.has_remaining() {
        return Err(BatchError::Lengths);
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn records(texts: &[&'static str]) -> Vec<Bytes> {
        texts.iter().map(|text| Bytes::from_static(text.as_bytes())).collect()
    }

    #[test]
    fn what_is_packed_comes_out_again_and_smaller() {
        let all = vec![Bytes::from(vec![b'x'; 1000]); 100];
        let batch = pack(7, &all).unwrap();
        assert!(batch.compressed.len() < 5000 && batch.first_position == 7);
        assert_eq!(unpack(&batch).unwrap(), all);
        assert_eq!(pack(0, &[]).unwrap_err(), BatchError::Empty);
        assert_eq!(unpack(&pack(0, &records(&["", "a"])).unwrap()).unwrap(), records(&["", "a"]));
    }

    #[test]
    fn the_largest_batch_passes_and_a_larger_one_does_not() {
        let record = Bytes::from(vec![1; MOST_BYTES / 4 - FRAME]);
        let batch = pack(0, &vec![record.clone(); 4]).unwrap();
        assert_eq!(unpack(&batch).unwrap().len(), 4);
        assert!(matches!(pack(0, &vec![record; 5]), Err(BatchError::TooLarge(_))));
        let many = vec![Bytes::new(); MOST_RECORDS + 1];
        assert!(matches!(pack(0, &many), Err(BatchError::TooMany(_))));
    }

    #[test]
    fn what_does_not_match_its_claims_is_refused() {
        let good = pack(0, &records(&["one", "two"])).unwrap();
        // A gigabyte of zeros in some ten thousand bytes, with an honest claim and with a false one.
        let zeros = zstd::bulk::compress(&vec![0; 1 << 30], LEVEL).unwrap();
        let bomb = Batch { compressed: zeros.into(), count: 2, ..Batch::default() };
        for (batch, error) in [
            (Batch { size: 1 << 30, ..bomb.clone() }, BatchError::TooLarge(1 << 30)),
            (Batch { size: 1 << 20, ..bomb }, BatchError::NotCompressed(1 << 20)),
            (Batch { size: good.size + 1, ..good.clone() }, BatchError::NotCompressed(good.size + 1)),
            (Batch { size: good.size - 1, ..good.clone() }, BatchError::NotCompressed(good.size - 1)),
            (Batch { count: 3, ..good.clone() }, BatchError::Lengths),
            (Batch { count: 1, ..good.clone() }, BatchError::Lengths),
            (Batch { count: 0, ..good.clone() }, BatchError::Empty),
            (Batch { count: u32::MAX, ..good }, BatchError::TooMany(u32::MAX)),
        ] {
            assert_eq!(unpack(&batch).unwrap_err(), error);
        }
        let noise = zstd::bulk::compress(b"\xff\xff\xff\xff", LEVEL).unwrap();
        let noise = Batch { compressed: noise.into(), size: 4, count: 1, ..Batch::default() };
        assert_eq!(unpack(&noise).unwrap_err(), BatchError::Lengths);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic_or_grow(compressed in prop::collection::vec(any::<u8>(), 0..300), count in 0..9_u32, size in 0..9999_u32) {
            let batch = Batch { compressed: compressed.into(), count, size, ..Batch::default() };
            if let Ok(records) = unpack(&batch) {
                prop_assert_eq!(records.len(), count as usize);
                prop_assert!(records.iter().map(Bytes::len).sum::<usize>() <= size as usize);
            }
        }

        #[test]
        fn any_records_come_out_again(all in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..99), 1..99)) {
            let all: Vec<Bytes> = all.into_iter().map(Bytes::from).collect();
            prop_assert_eq!(unpack(&pack(3, &all).unwrap()).unwrap(), all);
        }
    }
}
