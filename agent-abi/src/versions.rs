//! The versions of the layouts. Each kind has its own, so that an upgrade that changes one of them loses nothing of the others.

/// Version of what the kernel knows of containers and processes ([`crate::state`]). An agent copies the state of a set of its own
/// version; else it finds out anew what it can.
pub const STATE_VERSION: u16 = if cfg!(feature = "another-state") { 13 } else { 12 };

/// Version of what containers may do ([`crate::policy`], and what of [`crate::codes`] it consists of). An agent copies the policies of a
/// set of its own version; else the old set stays in force until this one has compiled its own.
pub const POLICY_VERSION: u16 = if cfg!(feature = "another-policy") { 13 } else { 12 };

/// Version of records ([`crate::record`]). What is left in the ring of a set of another version is counted, and not read.
pub const RECORDS_VERSION: u16 = if cfg!(feature = "another-records") { 13 } else { 12 };

/// Version of what says how many records a set has made and what became of them ([`crate::ledger`]). The records of a set of another
/// version are not even counted, so it changes only for a reason that is worth that.
pub const LEDGER_VERSION: u16 = 3;

/// The versions of a set. First in its [`crate::ledger::SetMeta`], in every version of that.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Versions {
    pub state: u16,
    pub policy: u16,
    pub records: u16,
    pub ledger: u16,
}
layout!(Versions, 8);

/// Those of this build.
pub const VERSIONS: Versions = Versions {
    state: STATE_VERSION,
    policy: POLICY_VERSION,
    records: RECORDS_VERSION,
    ledger: LEDGER_VERSION,
};

impl core::fmt::Display for Versions {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let Self { state, policy, records, ledger } = self;
        write!(f, "state {state}, policy {policy}, records {records}, ledger {ledger}")
    }
}
