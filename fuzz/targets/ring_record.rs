//! Bytes from the kernel's rings.

#![no_main]

use libfuzzer_sys::fuzz_target;
use palisade_abi::record::{Decoded, decode, decode_control};

fuzz_target!(|bytes: &[u8]| {
    // Whatever was decoded lies within the bytes.
    match decode(bytes) {
        Ok(Decoded::Exec(exec)) => {
            assert!(exec.path.len() + exec.cwd.len() + exec.script.len() + exec.argv.len() <= bytes.len());
        }
        Ok(Decoded::Code(code)) => assert!(code.path.len() <= bytes.len()),
        _ => {}
    }
    let _ = decode_control(bytes);
});
