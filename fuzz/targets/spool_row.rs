//! A batch in the agent's spool as a broken disk may have left it.

#![no_main]

use libfuzzer_sys::fuzz_target;
use palisade_proto::{batch, v1::Batch};

#[path = "../../agent/src/delivery/row.rs"]
mod row;

fuzz_target!(|bytes: &[u8]| {
    let Ok(row) = row::Row::decode(bytes) else { return };
    assert_eq!(row.encode(), bytes, "a row that is read is the one that was written");
    let row::Row { count, size, compressed, .. } = row;
    let _ = batch::unpack(&Batch { compressed, count, size, ..Batch::default() });
});
