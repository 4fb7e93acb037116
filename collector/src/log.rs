//! The format of a log segment, as pure functions over bytes.
//!
//! A segment starts with [`MAGIC`], whose last byte is the version: of this format, and of the records, which
//! nobody writes anew. Version 2: who acted and what was decided stand in the record, and no more in its event.
//!
//! Then come entries, each `length (u32) | CRC-32 of the payload (u32) | payload`, little endian. The payload is
//! one delivered batch: where it came from, and the records verbatim.
//!
//! ```text
//! node length (u16) | node | boot length (u16) | boot | epoch (u64) | first position (u64)
//! | received, nanoseconds since the Unix epoch (u64) | count (u32) | count × (length (u32) | record)
//! ```

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use thiserror::Error;

pub const MAGIC: &[u8; 8] = b"PALLOG\x00\x02";
/// Bytes before the payload of an entry.
pub const ENTRY_HEAD: usize = 8;
/// Largest payload that a reader accepts.
pub const LARGEST_PAYLOAD: usize = 16 << 20;

/// One delivered batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub node: String,
    pub boot: String,
    pub epoch: u64,
    pub first_position: u64,
    pub received: u64,
    pub records: Vec<Bytes>,
}

/// What stands at a place of a segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Read {
    /// An entry, and the bytes it takes.
    Entry(Entry, usize),
    /// The segment ends here.
    End,
    /// An entry begins here and is not whole: a write was cut off.
    Torn,
}

/// Why bytes are not a segment.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum FormatError {
    #[error("it does not start as a segment")]
    Magic,
    #[error(
        "it is of version {0}, and this build reads version {version}. Move the store's folder away to begin anew; the build that wrote it \
         reads it",
        version = MAGIC[7]
    )]
    Version(u8),
    #[error("an entry claims {0} bytes")]
    TooLarge(usize),
    #[error("an entry's checksum does not match its bytes")]
    Checksum,
    #[error("an entry's inner lengths do not fit its bytes")]
    Lengths,
}

impl Entry {
    /// The entry as it is appended.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let Self { node, boot, epoch, first_position, received, records } = self;
        let size: usize = records.iter().map(|record| record.len() + 4).sum();
        let mut out = BytesMut::with_capacity(size + node.len() + boot.len() + 64);
        out.put_bytes(0, ENTRY_HEAD);
        for text in [node, boot] {
            // Longer names are refused at Hello.
            out.put_u16_le(text.len() as u16);
            out.put_slice(text.as_bytes());
        }
        out.put_u64_le(*epoch);
        out.put_u64_le(*first_position);
        out.put_u64_le(*received);
        out.put_u32_le(records.len() as u32);
        for record in records {
            out.put_u32_le(record.len() as u32);
            out.put_slice(record);
        }
        let length = (out.len() - ENTRY_HEAD) as u32;
        let checksum = crc32fast::hash(&out[ENTRY_HEAD..]);
        out[..4].copy_from_slice(&length.to_le_bytes());
        out[4..8].copy_from_slice(&checksum.to_le_bytes());
        out.freeze()
    }
}

/// Whether `bytes` start as a segment that this build reads.
///
/// # Errors
///
/// When they do not; see [`FormatError`].
pub fn check_start(bytes: &[u8]) -> Result<(), FormatError> {
    let (name, version) = MAGIC.split_at(MAGIC.len() - 1);
    match bytes.strip_prefix(name).and_then(<[u8]>::first) {
        Some(found) if [*found] == version => Ok(()),
        Some(found) => Err(FormatError::Version(*found)),
        None => Err(FormatError::Magic),
    }
}

/// Reads the entry at the start of `bytes`, which is the rest of a segment.
///
/// # Errors
///
/// When the bytes were whole and are not an entry: the disk or somebody changed them.
pub fn read(bytes: &Bytes) -> Result<Read, FormatError> {
    if bytes.is_empty() {
        return Ok(Read::End);
    }
    if bytes.len() < ENTRY_HEAD {
        return Ok(Read::Torn);
    }
    let mut head = bytes.slice(..ENTRY_HEAD);
    let length = head.get_u32_le() as usize;
    let checksum = head.get_u32_le();
    if length > LARGEST_PAYLOAD {
        return Err(FormatError::TooLarge(length));
    }
    if bytes.len() < ENTRY_HEAD + length {
        return Ok(Read::Torn);
    }
    let payload = bytes.slice(ENTRY_HEAD..ENTRY_HEAD + length);
    if crc32fast::hash(&payload) != checksum {
        return Err(FormatError::Checksum);
    }
    Ok(Read::Entry(decode(payload)?, ENTRY_HEAD + length))
}

/// Whether the entry at the start of `bytes`, which cannot be read, is the last thing that was written: it claims to
/// reach the end, or there is nothing but zeros.
#[must_use]
pub fn reaches_end(bytes: &Bytes) -> bool {
    let claimed =
        bytes.get(..4).map_or(0, |head| u32::from_le_bytes([head[0], head[1], head[2], head[3]]) as usize);
    bytes.iter().all(|byte| *byte == 0) || ENTRY_HEAD.saturating_add(claimed) >= bytes.len()
}

fn decode(mut bytes: Bytes) -> Result<Entry, FormatError> {
    let node = text(&mut bytes)?;
    let boot = text(&mut bytes)?;
    let number = |bytes: &mut Bytes| bytes.try_get_u64_le().map_err(|_| FormatError::Lengths);
    let epoch = number(&mut bytes)?;
    let first_position = number(&mut bytes)?;
    let received = number(&mut bytes)?;
    let count = bytes.try_get_u32_le().map_err(|_| FormatError::Lengths)?;
    let mut records = Vec::new();
    for _ in 0..count {
        let length = bytes.try_get_u32_le().map_err(|_| FormatError::Lengths)? as usize;
        records.push(take(&mut bytes, length)?);
    }
    if bytes.has_remaining() {
        return Err(FormatError::Lengths);
    }
    Ok(Entry { node, boot, epoch, first_position, received, records })
}

fn take(bytes: &mut Bytes, length: usize) -> Result<Bytes, FormatError> {
    if bytes.len() < length {
        return Err(FormatError::Lengths);
    }
    Ok(bytes.split_to(length))
}

fn text(bytes: &mut Bytes) -> Result<String, FormatError> {
    let length = usize::from(bytes.try_get_u16_le().map_err(|_| FormatError::Lengths)?);
    let taken = take(bytes, length)?;
    String::from_utf8(taken.to_vec()).map_err(|_| FormatError::Lengths)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entry() -> Entry {
        Entry {
            node: "n1".to_owned(),
            boot: "b".to_owned(),
            epoch: 3,
            first_position: 4,
            received: 5,
            records: vec![Bytes::from_static(b"one"), Bytes::new(), Bytes::from_static(b"three")],
        }
    }

    #[test]
    fn a_segment_of_another_version_says_so() {
        assert_eq!(check_start(MAGIC), Ok(()));
        assert_eq!(check_start(b"PALLOG\x00\x01..."), Err(FormatError::Version(1)));
        let told = FormatError::Version(1).to_string();
        assert!(told.starts_with("it is of version 1, and this build reads version 2."), "{told}");
        for other in [&b""[..], b"PALLOG", b"\x7fELF.............."] {
            assert_eq!(check_start(other), Err(FormatError::Magic));
        }
    }

    #[test]
    fn an_entry_survives_the_way_to_disk() {
        let bytes = entry().encode();
        assert_eq!(read(&bytes).unwrap(), Read::Entry(entry(), bytes.len()));
    }

    #[test]
    fn every_cut_is_torn_and_every_changed_byte_is_noticed() {
        let bytes = entry().encode();
        for length in 1..bytes.len() {
            assert_eq!(read(&bytes.slice(..length)).unwrap(), Read::Torn, "{length}");
        }
        for index in 4..bytes.len() {
            let mut changed = bytes.to_vec();
            changed[index] ^= 1;
            assert!(read(&changed.into()).is_err(), "{index}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = read(&bytes.into());
        }

        /// Also with a right checksum, so that the inner lengths are reached.
        #[test]
        fn no_payload_makes_the_reader_panic(payload in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut bytes = (payload.len() as u32).to_le_bytes().to_vec();
            bytes.extend(crc32fast::hash(&payload).to_le_bytes());
            bytes.extend(payload);
            let _ = read(&bytes.into());
        }
    }
}
