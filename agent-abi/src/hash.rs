//! SipHash-2-4 with a 128-bit result: the name under which an exact path is looked up.
//!
//! The key is random per agent start, so nobody inside a container can search for two paths that collide, and
//! with 128 bits an accident is out of the question. Kernel and agent run this very code.
//!
//! Source: Aumasson and Bernstein, "SipHash: a fast short-input PRF" (2012), and the reference implementation's
//! double-length output.

/// A running SipHash-2-4-128. It takes whole words only; [`hash_path`] says how a path is padded.
#[derive(Clone, Copy)]
pub struct SipHasher {
    v0: u64,
    v1: u64,
    v2: u64,
    v3: u64,
}

impl SipHasher {
    #[inline(always)]
    #[must_use]
    pub const fn new(key: [u64; 2]) -> Self {
        Self {
            v0: key[0] ^ 0x736f_6d65_7073_6575,
            v1: key[1] ^ 0x646f_7261_6e64_6f6d ^ 0xee,
            v2: key[0] ^ 0x6c79_6765_6e65_7261,
            v3: key[1] ^ 0x7465_6462_7974_6573,
        }
    }

    #[inline(always)]
    fn round(&mut self) {
        self.v0 = self.v0.wrapping_add(self.v1);
        self.v1 = self.v1.rotate_left(13) ^ self.v0;
        self.v0 = self.v0.rotate_left(32);
        self.v2 = self.v2.wrapping_add(self.v3);
        self.v3 = self.v3.rotate_left(16) ^ self.v2;
        self.v0 = self.v0.wrapping_add(self.v3);
        self.v3 = self.v3.rotate_left(21) ^ self.v0;
        self.v2 = self.v2.wrapping_add(self.v1);
        self.v1 = self.v1.rotate_left(17) ^ self.v2;
        self.v2 = self.v2.rotate_left(32);
    }

    /// Takes eight bytes of the message, little endian.
    #[inline(always)]
    pub fn word(&mut self, word: u64) {
        self.v3 ^= word;
        self.round();
        self.round();
        self.v0 ^= word;
    }

    /// Ends a message of `length` bytes, a multiple of eight.
    #[inline(always)]
    #[must_use]
    pub fn finish(mut self, length: u64) -> [u64; 2] {
        self.word(length << 56);
        self.v2 ^= 0xee;
        let mut turn = 0;
        while turn < 4 {
            self.round();
            turn += 1;
        }
        let low = self.v0 ^ self.v1 ^ self.v2 ^ self.v3;
        self.v1 ^= 0xdd;
        turn = 0;
        while turn < 4 {
            self.round();
            turn += 1;
        }
        [low, self.v0 ^ self.v1 ^ self.v2 ^ self.v3]
    }
}

/// The name of a canonical path: SipHash-2-4-128 of the path, padded with zeros *in front* to a multiple of eight.
///
/// The kernel assembles a path from its end and finds it right-aligned in zeroed memory, so this padding lets it
/// load aligned words. No path contains a zero byte, hence no two paths share a padded form.
#[must_use]
pub fn hash_path(key: [u64; 2], path: &[u8]) -> [u64; 2] {
    let mut hasher = SipHasher::new(key);
    let (first, whole) = path.split_at(path.len() % 8);
    if !first.is_empty() {
        let mut bytes = [0; 8];
        bytes[8 - first.len()..].copy_from_slice(first);
        hasher.word(u64::from_le_bytes(bytes));
    }
    for word in whole.chunks_exact(8) {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(word);
        hasher.word(u64::from_le_bytes(bytes));
    }
    hasher.finish(path.len().next_multiple_of(8) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_the_reference_implementation_at_every_length() {
        use siphasher::sip128::{Hasher128, SipHasher24};
        use std::hash::Hasher;
        let key = [0x0706_0504_0302_0100, 0x0f0e_0d0c_0b0a_0908];
        let message: Vec<u8> = (0..=255).cycle().take(1024).collect();
        for length in 0..message.len() {
            let mut reference = SipHasher24::new_with_keys(key[0], key[1]);
            reference.write(&vec![0; length.next_multiple_of(8) - length]);
            reference.write(&message[..length]);
            let expected = reference.finish128();
            assert_eq!(hash_path(key, &message[..length]), [expected.h1, expected.h2], "length {length}");
        }
    }
}
