//! What containers may do, as the kernel reads it. A change raises [`crate::POLICY_VERSION`].

pub mod exec;

/// Which revision a slot is under. Written by the agent alone; one write switches everything.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct SlotPolicy {
    /// The slot itself. An update moves an entry to other memory, and the old one may be given to another slot while a
    /// decision looks at it; this tells.
    pub slot: u64,
    /// Key into `REVISIONS`; 0 means that no profile names the container.
    pub revision: u32,
    /// [`crate::codes::slot_flags`].
    pub flags: u32,
    /// Boot time since when the slot is under this revision, nanoseconds.
    pub since: u64,
}
layout!(SlotPolicy, 24);

/// What a section of a policy says, but for its rules.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct SectionHead {
    /// 1 when a profile has the section; without one nothing of the family is restricted.
    pub restricts: u32,
    /// Flags of the family: of exec [`crate::codes::code_flags`].
    pub flags: u32,
    /// The first chunk in `GLOBS` of the automaton for patterns, and the words of one of its states.
    pub automaton_base: u32,
    pub automaton_width: u32,
    /// Its chunks; 0 when the section has no patterns.
    pub automaton_chunks: u32,
    pub reserved: u32,
}
layout!(SectionHead, 24);

/// The head of a policy image in the kernel.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Revision {
    /// [`crate::codes::mode`].
    pub mode: u32,
    /// The first chunk in `GLOBS` of all automata of the revision.
    pub automata_base: u32,
    /// Their chunks.
    pub automata_chunks: u32,
    pub reserved: u32,
    /// The revision's name: its 12 hexadecimal digits as a number. The kernel does not read it.
    pub name: u64,
    /// By [`crate::section`].
    pub sections: [SectionHead; crate::section::COUNT],
}
layout!(Revision, 24 + 24 * crate::section::COUNT);

/// A piece of a glob automaton, which is a sequence of words:
///
/// - for each byte, the column of its class ([`GLOB_BYTES`] words);
/// - for each state, the mask of [`exec::grant`]s for a path that ends there, low half first ([`GLOB_GRANTS`] words),
///   and the next state by class; [`GLOB_DEAD`] when nothing can match any more.
///
/// A column counts from the state's first word. A step is two loads, and a state takes as many words as its patterns have
/// different bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct GlobChunk {
    pub words: [u16; GLOB_CHUNK],
}
layout!(GlobChunk, 2 * GLOB_CHUNK);

/// Words of a chunk.
pub const GLOB_CHUNK: usize = if cfg!(feature = "another-policy") { 16 } else { 32 };

/// Words that map bytes to columns.
pub const GLOB_BYTES: usize = 256;

/// Words before a state's transitions.
pub const GLOB_GRANTS: usize = 2;

/// The transition that leads nowhere.
pub const GLOB_DEAD: u16 = u16::MAX;
