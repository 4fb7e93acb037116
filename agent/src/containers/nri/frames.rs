//! The two layers under NRI: frames of a multiplexer that share one socket, and the ttrpc messages inside.
//!
//! A frame is a connection's number and a length, each 32 bits big endian, and that many bytes. The bytes of a
//! connection's frames, one after the other, are a stream of ttrpc messages: a length and a stream number, 32 bits
//! big endian each, a kind, a byte of flags, and that many bytes.

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use thiserror::Error;

/// The connection on which the runtime calls the plugin.
pub const PLUGIN: u32 = 1;
/// The connection on which the plugin calls the runtime.
pub const RUNTIME: u32 = 2;

/// Kinds of ttrpc messages.
pub const REQUEST: u8 = 1;
pub const RESPONSE: u8 = 2;

const FRAME_HEAD: usize = 8;
const MESSAGE_HEAD: usize = 10;
/// Longest payload of a ttrpc message.
const LONGEST_MESSAGE: usize = 4 << 20;
const LONGEST_FRAME: usize = MESSAGE_HEAD + LONGEST_MESSAGE;
/// Longest frame that is sent: the runtime reads each into a buffer of this size.
const FRAME_SENT: usize = 4096;

/// Why bytes are not what a runtime sends.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum FrameError {
    #[error("a frame of {0} bytes, where {LONGEST_FRAME} are the most")]
    FrameTooLong(usize),
    #[error("a message of {0} bytes, where {LONGEST_MESSAGE} are the most")]
    MessageTooLong(usize),
    #[error("a frame for the connection {0}, which does not exist")]
    UnknownConnection(u32),
}

/// One ttrpc message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    pub connection: u32,
    pub stream: u32,
    pub kind: u8,
    pub payload: Bytes,
}

/// Takes bytes as they arrive and gives messages.
#[derive(Default)]
pub struct Decoder {
    input: BytesMut,
    plugin: BytesMut,
    runtime: BytesMut,
}

impl Decoder {
    pub fn push(&mut self, bytes: &[u8]) {
        self.input.extend_from_slice(bytes);
    }

    /// The next whole message, or `None` until more bytes are there.
    ///
    /// # Errors
    ///
    /// When the bytes cannot have come from a runtime; nothing after them can be understood.
    pub fn next(&mut self) -> Result<Option<Message>, FrameError> {
        loop {
            for (connection, stream) in [(PLUGIN, &mut self.plugin), (RUNTIME, &mut self.runtime)] {
                if let Some(message) = take_message(connection, stream)? {
                    return Ok(Some(message));
                }
            }
            let Some((connection, length)) = head(&self.input) else { return Ok(None) };
            if length > LONGEST_FRAME {
                return Err(FrameError::FrameTooLong(length));
            }
            let stream = match connection {
                PLUGIN => &mut self.plugin,
                RUNTIME => &mut self.runtime,
                other => return Err(FrameError::UnknownConnection(other)),
            };
            if self.input.len() < FRAME_HEAD + length {
                return Ok(None);
            }
            self.input.advance(FRAME_HEAD);
            stream.unsplit(self.input.split_to(length));
        }
    }
}

/// Two big-endian numbers at the start of `bytes`: what both layers begin with.
fn head(bytes: &[u8]) -> Option<(u32, usize)> {
    let number = |at: usize| bytes.get(at..at + 4)?.try_into().ok().map(u32::from_be_bytes);
    Some((number(0)?, number(4)? as usize))
}

fn take_message(connection: u32, stream: &mut BytesMut) -> Result<Option<Message>, FrameError> {
    let Some((length, number)) = head(stream) else { return Ok(None) };
    let (length, number) = (length as usize, number as u32);
    if length > LONGEST_MESSAGE {
        return Err(FrameError::MessageTooLong(length));
    }
    if stream.len() < MESSAGE_HEAD + length {
        return Ok(None);
    }
    let kind = stream[8];
    stream.advance(MESSAGE_HEAD);
    Ok(Some(Message { connection, stream: number, kind, payload: stream.split_to(length).freeze() }))
}

/// Writes one message as frames.
pub fn encode(message: &Message, out: &mut BytesMut) {
    let mut bytes = BytesMut::with_capacity(MESSAGE_HEAD + message.payload.len());
    bytes.put_u32(message.payload.len() as u32);
    bytes.put_u32(message.stream);
    bytes.put_u8(message.kind);
    bytes.put_u8(0);
    bytes.put_slice(&message.payload);
    for part in bytes.chunks(FRAME_SENT) {
        out.put_u32(message.connection);
        out.put_u32(part.len() as u32);
        out.put_slice(part);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(connection: u32, payload: &[u8]) -> Message {
        Message { connection, stream: 3, kind: REQUEST, payload: Bytes::copy_from_slice(payload) }
    }

    #[test]
    fn the_bytes_of_a_message_are_golden() {
        let mut out = BytesMut::new();
        encode(&message(RUNTIME, b"hi"), &mut out);
        assert_eq!(&out[..], b"\0\0\0\x02\0\0\0\x0c\0\0\0\x02\0\0\0\x03\x01\0hi");
    }

    #[test]
    fn messages_survive_any_cut_of_the_stream() {
        let large = vec![7_u8; 3 * FRAME_SENT];
        let all = [message(PLUGIN, b"one"), message(RUNTIME, b""), message(PLUGIN, &large)];
        let mut bytes = BytesMut::new();
        all.iter().for_each(|message| encode(message, &mut bytes));
        for step in [1, 7, 4096, bytes.len()] {
            let mut decoder = Decoder::default();
            let mut found = Vec::new();
            for part in bytes.chunks(step) {
                decoder.push(part);
                while let Some(message) = decoder.next().unwrap() {
                    found.push(message);
                }
            }
            found.sort_by_key(|message| (message.payload.len() != 3, message.payload.len()));
            assert_eq!(found, all, "in steps of {step}");
        }
    }

    #[test]
    fn what_no_runtime_sends_is_refused_before_memory_is_taken() {
        let refused = |bytes: &[u8]| {
            let mut decoder = Decoder::default();
            decoder.push(bytes);
            decoder.next().unwrap_err()
        };
        assert_eq!(refused(b"\0\0\0\x01\xff\xff\xff\xff"), FrameError::FrameTooLong(u32::MAX as usize));
        assert_eq!(refused(b"\0\0\0\x09\0\0\0\x01"), FrameError::UnknownConnection(9));
        assert_eq!(
            refused(b"\0\0\0\x01\0\0\0\x0a\x7f\xff\xff\xff\0\0\0\x01\x01\0"),
            FrameError::MessageTooLong(0x7fff_ffff)
        );
    }
}
