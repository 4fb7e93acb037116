//! The kinds of records: the one list of them beside the `.proto` file's.

use palisade_proto::v1::record::Event;

use crate::family::Says;

/// A row for each kind: its event, its name in queries, and whether it is shown to whoever asks for no kind.
macro_rules! kinds {
    ($($(#[$meta:meta])* $kind:ident = $name:literal, $shown:literal;)*) => {
        /// A kind of record.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Kind {
            $($(#[$meta])* $kind,)*
        }

        impl Kind {
            pub const ALL: &[Self] = &[$(Self::$kind),*];

            /// As queries name it.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$kind => $name,)*
                }
            }

            /// Whether it is shown to whoever asks for no kind: the others are many, and say little by themselves.
            #[must_use]
            pub fn is_shown(self) -> bool {
                match self {
                    $(Self::$kind => $shown,)*
                }
            }
        }

        /// The kind of an event, and what it has to say.
        pub(crate) fn of(event: &Event) -> (Kind, &dyn Says) {
            match event {
                $(Event::$kind(event) => (Kind::$kind, event),)*
            }
        }
    };
}

kinds! {
    Fork = "fork", false;
    Exec = "exec", true;
    Exit = "exit", false;
    Gap = "gap", true;
    Coverage = "coverage", true;
    Session = "session", true;
    NodeState = "node-state", true;
    Tampering = "tampering", true;
    Code = "code", true;
    /// A peer that the collector did not let in.
    Refusal = "refusal", true;
}

impl Kind {
    /// Names of the kinds that are shown to whoever asks for none.
    pub fn shown() -> impl Iterator<Item = &'static str> {
        Self::ALL.iter().filter(|kind| kind.is_shown()).map(|kind| kind.name())
    }
}

#[cfg(test)]
mod tests {
    use palisade_abi::codes;
    use palisade_proto::record_from_json;

    use super::*;
    use crate::View;

    /// As the `.proto` file calls the event, with `-` for `_`: so whoever knows the one knows the other.
    #[test]
    fn a_kind_is_called_as_its_event_is() {
        for kind in Kind::ALL {
            let json = serde_json::json!({kind.name().replace('-', "_"): {}}).to_string();
            let record = record_from_json(&json).unwrap();
            assert_eq!(View::new(&record).kind(), Some(*kind), "{json}");
        }
        assert_eq!(View::new(&record_from_json("{}").unwrap()).kind(), None);
    }

    #[test]
    fn the_kernels_records_are_called_as_they_are_there() {
        for (_, name) in codes::kind::ALL {
            assert!(Kind::ALL.iter().any(|kind| kind.name() == *name), "{name}");
        }
    }
}
