//! A batch as the spool keeps it, as pure functions over bytes: the records, compressed as they travel, and what they mean for the
//! accounts of their slots, so that nobody has to open them for that.
//!
//! ```text
//! lived (u64) | count (u32) | size (u32) | credits (u32) | credits × (epoch (u64) | slot (u64) | delivered (i64)
//! | reported (i64) | bytes (u64)) | compressed
//! ```

use bytes::{Buf as _, BufMut as _, Bytes};
use thiserror::Error;

/// What the account of a slot gains by records.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Credit {
    /// The set of programs that numbered them.
    pub epoch: u64,
    pub slot: u64,
    /// How many of them the kernel has numbered. Negative where they take the place of such.
    pub delivered: i64,
    /// How many numbered records they count as lost.
    pub reported: i64,
    /// What they take of the room that there is.
    pub bytes: u64,
}

/// Records that follow each other, in one block.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Row {
    /// Milliseconds that the spool had been in use when it was made. No clock that anybody can set.
    pub lived: u64,
    /// Its records, and their bytes before they were compressed.
    pub count: u32,
    pub size: u32,
    /// One for each slot.
    pub credits: Vec<Credit>,
    pub compressed: Bytes,
}

const HEAD: usize = 8 + 4 + 4 + 4;
const CREDIT: usize = 5 * 8;

/// The bytes are no row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("a batch in the spool cannot be read")]
pub struct NoRow;

impl Row {
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let Self { lived, count, size, credits, compressed } = self;
        let mut out = Vec::with_capacity(self.length());
        out.put_u64_le(*lived);
        out.put_u32_le(*count);
        out.put_u32_le(*size);
        // Not more than records.
        out.put_u32_le(credits.len() as u32);
        for Credit { epoch, slot, delivered, reported, bytes } in credits {
            out.put_u64_le(*epoch);
            out.put_u64_le(*slot);
            out.put_i64_le(*delivered);
            out.put_i64_le(*reported);
            out.put_u64_le(*bytes);
        }
        out.put_slice(compressed);
        out
    }

    /// Bytes that it takes.
    #[must_use]
    pub fn length(&self) -> usize {
        HEAD + self.credits.len() * CREDIT + self.compressed.len()
    }

    /// # Errors
    ///
    /// When the bytes are none.
    pub fn decode(bytes: &[u8]) -> Result<Self, NoRow> {
        let mut rest = bytes;
        let lived = rest.try_get_u64_le().map_err(|_| NoRow)?;
        let count = rest.try_get_u32_le().map_err(|_| NoRow)?;
        let size = rest.try_get_u32_le().map_err(|_| NoRow)?;
        let claimed = rest.try_get_u32_le().map_err(|_| NoRow)? as usize;
        if count == 0 || claimed.checked_mul(CREDIT).is_none_or(|needed| needed > rest.len()) {
            return Err(NoRow);
        }
        let credit = |_| Credit {
            epoch: rest.get_u64_le(),
            slot: rest.get_u64_le(),
            delivered: rest.get_i64_le(),
            reported: rest.get_i64_le(),
            bytes: rest.get_u64_le(),
        };
        let credits = (0..claimed).map(credit).collect();
        Ok(Self { lived, count, size, credits, compressed: Bytes::copy_from_slice(rest) })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_row_comes_back_and_a_part_of_one_does_not(
            (lived, count, size) in (any::<u64>(), 1..9_u32, any::<u32>()),
            credits in prop::collection::vec(any::<(u64, u64, i64, i64, u64)>(), 0..9),
            compressed in prop::collection::vec(any::<u8>(), 0..99),
        ) {
            let credit = |(epoch, slot, delivered, reported, bytes)| Credit { epoch, slot, delivered, reported, bytes };
            let credits: Vec<Credit> = credits.into_iter().map(credit).collect();
            let row = Row { lived, count, size, credits, compressed: compressed.into() };
            let bytes = row.encode();
            prop_assert_eq!(bytes.len(), row.length());
            prop_assert_eq!(Row::decode(&bytes), Ok(row.clone()));
            let cut = &bytes[..HEAD + row.credits.len() * CREDIT - usize::from(!row.credits.is_empty())];
            prop_assert_eq!(Row::decode(cut).is_err(), !row.credits.is_empty());
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _no_row = Row::decode(&bytes);
        }
    }
}
