//! A batch as a hostile agent may send it.

#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use palisade_proto::{
    batch::{MOST_BYTES, MOST_RECORDS, pack, unpack},
    v1::Batch,
};

fuzz_target!(|bytes: &[u8]| {
    // The claims first, then what is to be decompressed.
    let Some((claims, compressed)) = bytes.split_first_chunk::<8>() else { return };
    let [a, b, c, d, e, f, g, h] = *claims;
    let count = u32::from_le_bytes([a, b, c, d]);
    let size = u32::from_le_bytes([e, f, g, h]);
    let batch = Batch { compressed: Bytes::copy_from_slice(compressed), count, size, ..Batch::default() };
    if let Ok(records) = unpack(&batch) {
        assert!(records.len() <= MOST_RECORDS && records.iter().map(Bytes::len).sum::<usize>() <= MOST_BYTES);
        let again = pack(0, &records).expect("what fits is packed");
        assert_eq!(unpack(&again).expect("what was packed is unpacked"), records);
    }
});
