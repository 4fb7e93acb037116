//! Which sessions a rule is for.

use palisade_abi::codes::session;

/// How a process came into its container, as a rule may ask for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Session {
    /// Started by the container's entrypoint.
    Workload,
    /// Entered from outside, by hand or as a probe: the kernel sees no difference between these two.
    Admin,
}

impl Session {
    pub const ALL: [Self; 2] = [Self::Workload, Self::Admin];

    /// As it is written in profiles.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Workload => "workload",
            Self::Admin => "admin",
        }
    }

    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|session| session.as_str() == text)
    }

    fn code(self) -> u8 {
        match self {
            Self::Workload => session::WORKLOAD,
            Self::Admin => session::ENTERED,
        }
    }
}

/// A set of sessions, as bits of [`palisade_abi::codes::session`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sessions(u8);

impl Sessions {
    /// Every session, and processes of which it is not known how they came in: what a rule is for that asks for none.
    pub const ANY: Self = Self(1 << session::UNKNOWN | 1 << session::WORKLOAD | 1 << session::ENTERED);

    /// Adds all of the other.
    pub fn add(&mut self, other: Self) {
        self.0 |= other.0;
    }

    /// The codes of the sessions in it.
    pub fn codes(self) -> impl Iterator<Item = u8> {
        (0..8).filter(move |code| self.0 & (1 << code) != 0)
    }

    #[must_use]
    pub fn has(self, session: Session) -> bool {
        self.0 & (1 << session.code()) != 0
    }

    /// Whether a process of every session may.
    #[must_use]
    pub fn is_any(self) -> bool {
        self == Self::ANY
    }
}

impl FromIterator<Session> for Sessions {
    fn from_iter<T: IntoIterator<Item = Session>>(sessions: T) -> Self {
        Self(sessions.into_iter().fold(0, |set, session| set | 1 << session.code()))
    }
}
