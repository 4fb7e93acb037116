//! A segment of the collector's log as a broken disk may have left it.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../collector/src/log.rs"]
#[expect(dead_code, reason = "the collector uses the rest")]
mod log;

fuzz_target!(|bytes: &[u8]| {
    let bytes = bytes::Bytes::copy_from_slice(bytes);
    if let Ok(log::Read::Entry(entry, size)) = log::read(&bytes) {
        assert_eq!(entry.encode(), bytes.slice(..size), "an entry that is read is the one that was written");
    }
    let _ = log::reaches_end(&bytes);
    // The same with a right head, so that the inner lengths are reached.
    let mut whole = (bytes.len() as u32).to_le_bytes().to_vec();
    whole.extend(crc32fast::hash(&bytes).to_le_bytes());
    whole.extend(&bytes);
    let _ = log::read(&whole.into());
});
