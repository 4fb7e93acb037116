//! Bytes from the kernel's rings.

#![no_main]

use libfuzzer_sys::fuzz_target;
use palisade_abi::record::{Decoded, decode, decode_control};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(Decoded::Exec(exec)) = decode(bytes) {
        // Whatever was decoded lies within the bytes.
        assert!(exec.path.len() + exec.cwd.len() + exec.script.len() + exec.argv.len() <= bytes.len());
    }
    let _ = decode_control(bytes);
});
