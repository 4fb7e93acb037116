//! How a slot stands under its profile: the one way from a slot to its revision, and to what that says for a family of rules.

use palisade_abi::codes::{error, mode};

use crate::{
    count,
    maps::{REVISIONS, SLOT_POLICIES, planted},
    processes, roots,
    slots::TOO_DEEP,
};

/// On what ground a slot stands.
pub mod ground {
    /// Nobody has said yet under which revision.
    pub const UNIDENTIFIED: u8 = 0;
    /// No profile names the container.
    pub const NO_PROFILE: u8 = 1;
    /// Its profile has nothing to say for the family.
    pub const UNRESTRICTED: u8 = 2;
    pub const RESTRICTED: u8 = 3;
    /// What its profile says is not to be found.
    pub const MISSED: u8 = 4;
    /// Nobody can say which container it is, so no profile can say that it only audits.
    pub const TOO_DEEP: u8 = 5;
}

/// How a slot stands for a family: the flags of the section in the first byte, the [`mode`] in the second, the [`ground`] in the third, and
/// the revision in the upper word. A number, so that the steps of a judgement can hand it on.
#[derive(Clone, Copy)]
pub struct Standing(pub u64);

impl Standing {
    #[inline(always)]
    fn new(ground: u8, mode: u8, revision: u32, flags: u32) -> Self {
        Self(
            u64::from(revision) << 32
                | u64::from(ground) << 16
                | u64::from(mode) << 8
                | u64::from(flags & 0xff),
        )
    }

    #[inline(always)]
    pub fn ground(self) -> u8 {
        (self.0 >> 16) as u8
    }

    #[inline(always)]
    pub fn mode(self) -> u8 {
        (self.0 >> 8) as u8
    }

    #[inline(always)]
    pub fn revision(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// Whether the section has the flag.
    #[inline(always)]
    pub fn has(self, flag: u32) -> bool {
        self.0 & u64::from(flag) != 0
    }

    /// Whether there is anything that the family may not do; so it is where that cannot be found.
    #[inline(always)]
    pub fn restricts(self) -> bool {
        self.ground() >= ground::RESTRICTED
    }

    /// Whether what is not allowed is refused. Anything but a clear `AUDIT` is.
    #[inline(always)]
    pub fn refuses(self) -> bool {
        self.mode() != mode::AUDIT
    }
}

/// How `slot` stands for the family `section` ([`palisade_abi::section`]).
#[inline(always)]
pub fn of(slot: u64, section: usize) -> Standing {
    Standing(palisade_standing(slot, section as u64))
}

/// The same as a number.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_standing(slot: u64, section: u64) -> u64 {
    if slot == TOO_DEEP {
        return Standing::new(ground::TOO_DEEP, mode::ENFORCE, 0, 0).0;
    }
    // SAFETY: one word, written by the agent in one map update; read once, so that one revision decides.
    let Some(policy) = (unsafe { SLOT_POLICIES.get(slot) }) else {
        return Standing::new(ground::UNIDENTIFIED, 0, 0, 0).0;
    };
    let number = policy.revision;
    if policy.slot != slot {
        count::error(error::POLICY_MOVED);
        return Standing::new(ground::MISSED, mode::ENFORCE, 0, 0).0;
    }
    if number == 0 {
        return Standing::new(ground::NO_PROFILE, 0, 0, 0).0;
    }
    // SAFETY: a revision is written before a slot points to it and removed after the last one left it.
    let Some(revision) = (unsafe { REVISIONS.get(number) }) else {
        count::error(error::REVISION_MISSED);
        return Standing::new(ground::MISSED, mode::ENFORCE, number, 0).0;
    };
    let mode = if planted!(ENFORCE_IS_AUDIT) { mode::AUDIT } else { revision.mode as u8 };
    match revision.sections.get(section as usize) {
        Some(head) if head.restricts != 0 => Standing::new(ground::RESTRICTED, mode, number, head.flags).0,
        Some(_) => Standing::new(ground::UNRESTRICTED, mode, number, 0).0,
        None => Standing::new(ground::MISSED, mode, number, 0).0,
    }
}

/// The slot whose profile the current process is under; 0 for none, and while it is the runtime's.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_slot_under_profile() -> u64 {
    let Some(process) = processes::current() else { return 0 };
    if process.entering != 0 && roots::has_hosts_root() {
        return 0;
    }
    process.slot
}
