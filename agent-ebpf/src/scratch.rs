//! What a task keeps of a judgement while it lasts: the layout of the memory in which it judges one execution, or one mapping, and of what
//! the loops in it carry from turn to turn.

use palisade_abi::{
    PATH_CAPACITY,
    hash::SipHasher,
    offsets::DENTRY_BYTES,
    record::{DecisionPart, SessionPart},
    state::{OpenedInterpreter, Process},
};

/// Slack behind a path, so that a component may be copied to any place.
const SLACK: usize = 256;
const AREA: usize = PATH_CAPACITY + SLACK;

/// A path, right-aligned at [`PATH_CAPACITY`]. Zero before it up to a multiple of eight; further before may be what an earlier one
/// has left.
pub type Area = [u8; AREA];

/// Which of the two paths.
pub const EXECUTABLE: u64 = 0;
pub const WORKING_DIRECTORY: u64 = 1;

/// Where a walk ended.
#[repr(C)]
pub struct Walk {
    pub superblock: u64,
    /// The path stands at `start..PATH_CAPACITY` of its area.
    pub start: u32,
    /// 0 when the walk reached the superblock's root; else a [`palisade_abi::codes::reason`].
    pub failure: u32,
    /// The mount of the container at which it ended instead: index of its name and one. 0 when there was none.
    pub volume: u32,
    /// 1 when the way leads through a folder of an image that was renamed since (`redirect_dir` of overlayfs): its files are
    /// unmodified, but not the image's by this name.
    pub renamed: u32,
}

impl Walk {
    /// Of one that has not begun.
    pub const NOTHING: Self =
        Self { superblock: 0, start: PATH_CAPACITY as u32, failure: 0, volume: 0, renamed: 0 };
}

/// Where an automaton stands in `GLOBS`: its first chunk, and the words of one of its states; 0 without one.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Automaton {
    pub base: u32,
    pub width: u32,
}

/// What loops carry from turn to turn; see [`crate::repeat`].
#[repr(C)]
pub struct Turns {
    /// Of a climb: where it is.
    pub current: u64,
    /// Of a climb, and of the second one that compares: the state of the folders so far.
    pub seal: u64,
    /// Of a climb: the fields of the dentry where it is.
    pub dentry: [u64; DENTRY_BYTES as usize / 8],
    /// Of a hash.
    pub hasher: SipHasher,
    /// The place in the area that comes next, or where the path so far begins, or the end of what was copied.
    pub at: u32,
    /// Of a climb: where the path began before its last component.
    pub outer: u32,
    /// Of an automaton: the state that it is in.
    pub state: u32,
    /// How it ended; what that says is the loop's own.
    pub outcome: u32,
    /// Of a climb: as in [`Walk`].
    pub volume: u32,
    pub renamed: u32,
}

/// Where the arguments are.
pub mod arguments {
    pub const UNAVAILABLE: u32 = 0;
    /// One run of strings in the new address space.
    pub const NEW_IMAGE: u32 = 1;
    /// An array of pointers in the caller's memory.
    pub const CALLER: u32 = 2;
}

/// An execution that is being judged. What stands before `turns` is cleared when it is claimed; what comes after is filled before it is read.
#[repr(C)]
pub struct Scratch {
    pub bprm: u64,
    pub slot: u64,
    pub dentry: u64,
    pub arguments_at: u64,
    pub arguments_length: u64,
    pub arguments_kind: u32,
    pub of_script: u8,
    pub origin: u8,
    pub argv_source: u8,
    /// [`palisade_abi::codes::exec_flags`].
    pub flags: u8,
    pub decision: DecisionPart,
    pub path_length: u16,
    pub cwd_length: u16,
    pub argv_length: u16,
    pub script_length: u16,
    /// Where the script's path starts in `SCRIPTS`; the capacity when there is none.
    pub script_start: u16,
    pub script_origin: u8,
    /// 1 when the process is in the host's mount namespace or root directory.
    pub escaped: u8,
    pub script_device: u32,
    /// Of other code than what is executed: [`palisade_abi::codes::code_act`], the protection of the memory, and the other
    /// process.
    pub protection: u32,
    pub target: u32,
    pub act: u8,
    /// 1 once the arguments of what is executed stand in the new address space.
    pub arguments_known: u8,
    pub interpreter_origin: u8,
    pub reserved: [u8; 5],
    /// What rules would grant with certain arguments, and the automata that read them: of the rule for anybody, and of the one
    /// for the program that calls exec.
    pub with_arguments: u32,
    pub reserved_too: u32,
    pub automata: [Automaton; 2],
    /// Hash of the path of the program that calls exec, or maps; 0 when it is not the image's.
    pub caller: [u64; 2],
    /// Those of [`palisade_abi::state::Process`].
    pub interpreter: [u64; 2],
    pub interpreter_name: [u64; 2],
    pub session: SessionPart,
    pub executable: Walk,
    pub working_directory: Walk,
    pub turns: Turns,
    /// What is known of the process.
    pub process: Process,
    pub opened: OpenedInterpreter,
    pub path: Area,
    pub cwd: Area,
}
