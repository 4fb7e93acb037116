//! Reading records out of the ring's bytes.

use super::{
    Header, TamperRecord,
    bytes::{DecodeError, fixed, of_this_version},
    code::DecodedCode,
    exec::DecodedExec,
    process::{ExitRecord, ForkRecord},
};
use crate::codes::kind;

/// The kinds of record: the code of each, its variant, and what reads it.
macro_rules! records {
    ($($(#[$meta:meta])* $kind:ident: $variant:ident($type:ty) = $read:expr,)*) => {
        /// A record whose lengths have all been checked against its bytes.
        #[expect(
            clippy::large_enum_variant,
            reason = "it lives on the stack for a moment; a box would be one more allocation a record"
        )]
        #[derive(Clone, Copy, Debug)]
        pub enum Decoded<'a> {
            $($(#[$meta])* $variant($type),)*
        }

        /// Reads one record out of the ring's bytes.
        ///
        /// # Errors
        ///
        /// When the bytes are not a whole record of this version; see [`DecodeError`].
        pub fn decode(bytes: &[u8]) -> Result<Decoded<'_>, DecodeError> {
            let header: Header = fixed(bytes)?;
            of_this_version(header.version)?;
            match header.kind {
                $(kind::$kind => $read(bytes).map(Decoded::$variant),)*
                other => Err(DecodeError::Kind(other)),
            }
        }
    };
}

records! {
    FORK: Fork(ForkRecord) = fixed,
    EXIT: Exit(ExitRecord) = fixed,
    EXEC: Exec(DecodedExec<'a>) = DecodedExec::decode,
    CODE: Code(DecodedCode<'a>) = DecodedCode::decode,
    TAMPER: Tamper(TamperRecord) = fixed,
}
