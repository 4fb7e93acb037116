//! What happens where a profile does not allow something.

use palisade_abi::codes::mode;

/// What happens on a mismatch. Ordered from lenient to strict.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Mode {
    /// Record and allow.
    Audit,
    /// Record and refuse.
    Enforce,
}

impl Mode {
    /// As it is written in profiles and records.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Audit => "audit",
            Self::Enforce => "enforce",
        }
    }

    /// As it stands in a policy image.
    #[must_use]
    pub fn code(self) -> u8 {
        match self {
            Self::Audit => mode::AUDIT,
            Self::Enforce => mode::ENFORCE,
        }
    }
}
