//! Rules on what is executed, and on code that is mapped.

/// An exact path of a revision.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct RuleKey {
    pub path_hash: [u64; 2],
    pub revision: u32,
    /// For whom: the [`RuleValue::parent`] of the program that calls exec; 0 for what holds whoever does.
    pub parent: u32,
}
layout!(RuleKey, 24);

/// What an exact path allows.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct RuleValue {
    /// Mask of [`grant`]s and [`library_grant`]s: whatever the arguments are.
    pub grants: u32,
    /// Such a mask: with some arguments.
    pub with_arguments: u32,
    /// The first chunk in `GLOBS` of the automaton that reads the arguments, and the words of one of its states; 0 without one.
    pub arguments_base: u32,
    pub arguments_width: u32,
    /// Such a mask: under any condition, also where others execute it. Only in entries for anybody.
    pub any: u32,
    /// The number of this path as a parent; 0 when it is none. Only in entries for anybody.
    pub parent: u32,
}
layout!(RuleValue, 24);

/// The bit of a rule that allows processes of a session ([`crate::codes::session`]) to execute bytes of an origin
/// ([`crate::codes::origin`]): a byte for each session, a bit of it for each origin. No bit for what is neither.
#[inline(always)]
#[must_use]
pub const fn grant(origin: u8, session: u8) -> u32 {
    if origin > 7 || session > 2 { 0 } else { 1 << (origin as u32 | (session as u32) << 3) }
}

/// The bits that allow anybody to execute bytes of an origin.
#[inline(always)]
#[must_use]
pub const fn grant_to_any(origin: u8) -> u32 {
    if origin > 7 { 0 } else { 0x0001_0101 << origin }
}

/// The bit that allows anybody to map bytes of an origin executable, without executing them: the fourth byte.
#[inline(always)]
#[must_use]
pub const fn library_grant(origin: u8) -> u32 {
    if origin > 7 { 0 } else { 0x0100_0000 << origin }
}

/// All bits of [`grant`].
pub const EXEC_GRANTS: u32 = 0x00ff_ffff;
