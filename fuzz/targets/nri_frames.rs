//! What a runtime, or whoever stands in its place, sends to the plugin.

#![no_main]

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;

#[path = "../../agent/src/containers/nri/frames.rs"]
mod frames;

fuzz_target!(|bytes: &[u8]| {
    let mut whole = frames::Decoder::default();
    whole.push(bytes);
    let mut found = Vec::new();
    let end = loop {
        match whole.next() {
            Ok(Some(message)) => found.push(message),
            other => break other,
        }
    };
    // However the stream is cut, the same messages come out, and the same error ends it.
    let mut cut = frames::Decoder::default();
    let mut again = Vec::new();
    let mut failed = None;
    'parts: for part in bytes.chunks(3) {
        cut.push(part);
        loop {
            match cut.next() {
                Ok(Some(message)) => again.push(message),
                Ok(None) => break,
                Err(error) => {
                    failed = Some(error);
                    break 'parts;
                }
            }
        }
    }
    assert_eq!(end.err(), failed);
    let key = |message: &frames::Message| (message.connection, message.stream, message.payload.clone());
    let (mut one, mut other): (Vec<_>, Vec<_>) =
        (found.iter().map(key).collect(), again.iter().map(key).collect());
    one.sort();
    other.sort();
    assert_eq!(one, other);
    // What is written is read back.
    for message in &found {
        let mut out = BytesMut::new();
        frames::encode(message, &mut out);
        let mut decoder = frames::Decoder::default();
        decoder.push(&out);
        assert_eq!(decoder.next(), Ok(Some(message.clone())));
    }
});
