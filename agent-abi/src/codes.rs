//! Enumerations of the kernel boundary, as the integers that travel.
//!
//! Numbers are stable: a number is never given a second meaning, and a new meaning takes a new number.

macro_rules! codes {
    ($(#[$outer:meta])* $module:ident: $repr:ty { $($(#[$inner:meta])* $name:ident = $value:literal => $text:literal,)* }) => {
        $(#[$outer])*
        pub mod $module {
            $($(#[$inner])* pub const $name: $repr = $value;)*

            /// Every code with the name that configuration, records and documentation use.
            pub const ALL: &[($repr, &str)] = &[$(($name, $text)),*];

            /// The name of a code, or `None` when this build does not know it.
            #[must_use]
            pub fn name(code: $repr) -> Option<&'static str> {
                ALL.iter().find(|(known, _)| *known == code).map(|(_, name)| *name)
            }
        }
    };
}

codes! {
    /// What a record reports: the family in the upper byte, from 1, and the event in the lower one.
    kind: u16 {
        FORK = 0x0101 => "fork",
        EXIT = 0x0102 => "exit",
        EXEC = 0x0201 => "exec",
        CODE = 0x0301 => "code",
        TAMPER = 0x0401 => "tampering",
    }
}

codes! {
    /// Changes of cgroups that the agent acts on; they travel in a ring of their own.
    control: u16 {
        CONTAINER_CREATED = 1 => "container-created",
        CONTAINER_REMOVED = 2 => "container-removed",
    }
}

codes! {
    /// The outcome of a decision.
    verdict: u8 {
        ALLOWED = 1 => "allowed",
        AUDITED = 2 => "audited",
        DENIED = 3 => "denied",
        /// Stopped before its first instruction, until the container is identified. The agent settles it: a stored
        /// record has one of the others.
        HELD = 4 => "held",
    }
}

codes! {
    /// What was done about a denial.
    action: u8 {
        NONE = 0 => "none",
        REFUSED = 1 => "refused",
        KILLED = 2 => "killed",
    }
}

codes! {
    /// What a revision demands on a mismatch.
    mode: u8 {
        AUDIT = 1 => "audit",
        ENFORCE = 2 => "enforce",
        /// Only for containers that are not identified: stop what is executed until they are.
        HOLD = 3 => "hold",
    }
}

codes! {
    /// How a process came into its container. What the agent calls a probe is `ENTERED` here.
    session: u8 {
        /// Not known: the process ran before the agent, or there was no room to note it.
        UNKNOWN = 0 => "unknown",
        /// Started by the container's entrypoint.
        WORKLOAD = 1 => "workload",
        /// Entered from outside.
        ENTERED = 2 => "entered",
    }
}

codes! {
    /// Where a file's bytes come from.
    origin: u8 {
        UNKNOWN = 0 => "unknown",
        IMAGE = 1 => "image",
        DRIFT = 2 => "drift",
        MEMORY = 3 => "memory",
        HOST = 4 => "host",
        /// A mount of the container; the path then names it, see [`crate::volume`].
        VOLUME = 5 => "volume",
    }
}

codes! {
    /// Why a verdict came out as it did.
    reason: u8 {
        RULE = 1 => "rule",
        NO_PROFILE = 2 => "no-profile",
        RUNTIME = 3 => "runtime-step",
        NO_RULE = 4 => "no-rule",
        ORIGIN = 5 => "origin-not-allowed",
        UNIDENTIFIED = 6 => "unidentified",
        PATH_TOO_LONG = 7 => "path-too-long",
        PATH_TOO_DEEP = 8 => "path-too-deep",
        WALK_INCOMPLETE = 9 => "path-outside-its-filesystem",
        READ_FAILED = 10 => "kernel-read-failed",
        LOOKUP_MISSED = 11 => "policy-lookup-missed",
        NO_SCRATCH = 12 => "no-scratch-memory",
        ORIGIN_UNKNOWN = 13 => "origin-unknown",
        /// The process is in the host's mount namespace or root directory: it left its container.
        ESCAPED = 14 => "escaped-to-host",
        /// The container is not identified, and the agent has not renewed its lease.
        AGENT_ABSENT = 15 => "agent-absent",
        /// Not identified, but one of the few executables that may start all the same.
        ADMITTED = 16 => "admitted",
        /// Rules name the file, but not for processes that came into the container as this one did.
        SESSION = 17 => "session-not-allowed",
        /// Code from a file without a place in any file system, or in memory alone, and the profile has no `memory: allow`.
        MEMORY = 18 => "memory-not-allowed",
        /// Code that is in no file, or differs from its file, and the profile has no `jit: allow`.
        JIT = 19 => "jit-not-allowed",
        /// The memory or registers of a running process, and the profile has no `trace: allow`.
        TRACE = 20 => "trace-not-allowed",
        /// The program that would load it (`PT_INTERP`) is not the unmodified file of the image to which that name leads in the
        /// image, and no rule allows to execute it.
        INTERPRETER = 21 => "interpreter-not-allowed",
        /// The file is an executable of the image that the profile allows: changed, it would not be the image's any more, and
        /// the workload could not run.
        PROTECTED = 22 => "allowed-executable",
        /// The program would have rights that its caller has not (set-user-id, set-group-id, file capabilities), and the profile
        /// has `elevation: deny`.
        ELEVATION = 23 => "elevation-not-allowed",
        /// Rules name the path, but not for the program that calls exec.
        PARENT = 24 => "parent-not-allowed",
        /// Rules name the path, but not with these arguments. Beside an allowed verdict before the arguments are known: it depends
        /// on them.
        ARGUMENTS = 25 => "arguments-not-allowed",
        /// Files are renamed beside the walk again and again, so that no moment has the whole path.
        PATH_CHANGES = 26 => "path-changes",
        /// The file is in a layer of an image, below the file systems of containers: changed there, it would pass for unmodified.
        LAYER = 27 => "image-layer",
    }
}

codes! {
    /// What a container tried on the agent. What `detail` of the record means stands with each.
    tampering: u8 {
        /// A signal; its number.
        SIGNAL = 1 => "signal",
        /// Attaching as a tracer, or to its memory (`/proc/PID/mem`, `process_vm_writev`, `pidfd_getfd`).
        TRACE = 2 => "trace",
        /// Its scheduling class, priority or processors.
        SCHEDULE = 3 => "schedule",
        /// A resource limit; its number.
        LIMIT = 4 => "limit",
        /// Opening a map.
        OPEN_MAP = 5 => "open-map",
        /// Opening a program.
        OPEN_PROGRAM = 6 => "open-program",
        /// Removing or renaming a pin or a folder of pins.
        REMOVE_PIN = 7 => "remove-pin",
        /// Unmounting the file system with the pins.
        UNMOUNT = 8 => "unmount",
    }
}

codes! {
    /// How code comes into a process other than by an exec.
    code_act: u8 {
        /// Memory is mapped executable.
        MAP = 1 => "map",
        /// Memory that is mapped is made executable.
        PROTECT = 2 => "protect",
        /// A process attaches to another as its tracer, or to its memory (`/proc/PID/mem`, `process_vm_writev`, `pidfd_getfd`).
        TRACE = 3 => "trace",
        /// A process asks its parent to be its tracer.
        BE_TRACED = 4 => "be-traced",
        /// `/proc/PID/mem` is opened to write, also that of the process itself.
        OPEN_MEMORY = 5 => "open-memory",
        /// An executable of the image is written to, linked, or given other attributes: overlayfs copies it into the container.
        CHANGE = 6 => "change",
        /// It is removed.
        REMOVE = 7 => "remove",
        /// It is renamed, or something is put in its place.
        RENAME = 8 => "rename",
        /// Something is mounted over it.
        MOUNT_OVER = 9 => "mount-over",
        /// A file of a layer of an image is opened to write, below the file systems of containers.
        OPEN_LAYER = 10 => "open-layer",
    }
}

codes! {
    /// Where the arguments of an exec were read.
    argv_source: u8 {
        NONE = 0 => "none",
        /// The new address space, after the exec: what the program itself sees.
        NEW_IMAGE = 1 => "new-image",
        /// The caller's memory, through the registers of the system call: another thread may have changed it since.
        SYSCALL = 2 => "syscall",
    }
}

codes! {
    /// Where in the kernel programs something went wrong: the index into the `ERRORS` map.
    error: u32 {
        SEQUENCE_MISSED = 0 => "sequence-missed",
        RECORD_RING_FULL = 1 => "record-ring-full",
        CONTROL_RING_FULL = 2 => "control-ring-full",
        PROCESS_MAP_FULL = 3 => "process-map-full",
        SLOT_MAP_FULL = 4 => "slot-map-full",
        CGROUP_MAP_FULL = 5 => "cgroup-map-full",
        ROOT_MAP_FULL = 6 => "root-map-full",
        SCRATCH_FULL = 7 => "scratch-full",
        SCRATCH_LOST = 8 => "scratch-lost",
        WALK_READ = 9 => "walk-read",
        WALK_DEEP = 10 => "walk-deep",
        WALK_LONG = 11 => "walk-long",
        ARGV_READ = 12 => "argv-read",
        ROOT_READ = 13 => "root-read",
        TASK_READ = 14 => "task-read",
        CGROUP_READ = 15 => "cgroup-read",
        KILL_FAILED = 16 => "kill-failed",
        HOST_ROOT_MISSING = 17 => "host-root-missing",
        REVISION_MISSED = 18 => "revision-missed",
        GLOB_WORD_MISSED = 19 => "glob-word-missed",
        ORIGIN_READ = 20 => "origin-read",
        ROOT_REFUSED = 21 => "root-refused",
        CGROUP_DEEP = 22 => "cgroup-deep",
        SCRIPT_MAP_FULL = 23 => "script-map-full",
        POLICY_MOVED = 24 => "policy-moved",
        STOP_FAILED = 25 => "stop-failed",
        VOLUME_MAP_FULL = 26 => "volume-map-full",
        VOLUME_NAME_MISSED = 27 => "volume-name-missed",
        /// A file descriptor was to send the agent a signal, which was refused; nobody can say who arranged for it.
        DESCRIPTOR_SIGNAL = 28 => "descriptor-signal",
        /// A slot had as much in the ring already as it may have.
        RECORD_SHARE_USED = 29 => "record-share-used",
        /// Renames beside a walk kept it from ever being of one moment.
        WALK_TORN = 30 => "walk-torn",
        INTERPRETER_MAP_FULL = 31 => "interpreter-map-full",
        /// A process that was held went on without having been let go, and was stopped again.
        HELD_WOKEN = 32 => "held-woken",
        /// A process of a container made a cgroup that is named like a container's.
        CGROUP_FORGED = 33 => "cgroup-forged",
        /// When the layer of a file of an image was seen first is not known, so it was not compared.
        LAYER_UNKNOWN = 34 => "layer-unknown",
        /// A child of a container's process could not be noted before it was made; if the tracepoint is skipped, it is the host's.
        FORK_MAP_FULL = 35 => "fork-map-full",
    }
}

/// Entries of the `ERRORS` map.
pub const ERROR_SITES: u32 = 48;

/// Bits of [`crate::record::ExecPart::flags`].
pub mod exec_flags {
    pub const PATH_TRUNCATED: u8 = 1 << 0;
    pub const ARGV_TRUNCATED: u8 = 1 << 1;
    pub const CWD_TRUNCATED: u8 = 1 << 2;
    /// An earlier pass of the binary format loop (a script) set the verdict, not the file that is named.
    pub const VERDICT_OF_SCRIPT: u8 = 1 << 3;
    /// The process is in the host's mount namespace or root directory.
    pub const ESCAPED: u8 = 1 << 4;
    /// It was executed while its container was not identified, and its interpreter is not the image's, or not known.
    pub const FOREIGN_INTERPRETER: u8 = 1 << 5;
    /// Nothing was to be executed: the caller asked whether it may (`AT_EXECVE_CHECK`).
    pub const ONLY_ASKED: u8 = 1 << 6;
    /// The program has rights that its caller had not: by its set-user-id or set-group-id bit, or by file capabilities.
    pub const ELEVATED: u8 = 1 << 7;
}

/// Bits of [`crate::record::CodePart::flags`], besides [`exec_flags::PATH_TRUNCATED`].
pub mod code_record_flags {
    /// The process is in an exec: the program is not the one that it executed last.
    pub const EXECUTING: u8 = 1 << 1;
}

/// Bits of [`crate::policy::SectionHead::flags`]: code that is not executed and not named by a rule.
pub mod code_flags {
    /// Every unmodified file of the image may be mapped executable.
    pub const LIBRARIES_OF_IMAGE: u32 = 1 << 0;
    /// So may memory files.
    pub const MEMORY: u32 = 1 << 1;
    /// So may memory that is in no file, or differs from it.
    pub const JIT: u32 = 1 << 2;
    /// Processes may trace others and write to their memory.
    pub const TRACE: u32 = 1 << 3;
    /// No program may have rights that its caller has not.
    pub const NO_ELEVATION: u32 = 1 << 4;
}

/// Bits of [`crate::policy::SlotPolicy::flags`].
pub mod slot_flags {
    /// The container's root filesystem is the host's own, so the root directory does not tell the runtime's steps
    /// from the workload: there are none.
    pub const ROOT_IS_HOSTS: u32 = 1 << 0;
    /// Every process that was there when the agent found the container has an entry.
    pub const MEMBERS_KNOWN: u32 = 1 << 1;
}

/// Bits of [`crate::ledger::SetMeta::state`].
pub mod set_state {
    /// It has made records, or is about to.
    pub const RECORDED: u32 = 1 << 0;
    /// It knows all that the sets before it knew, so they are not needed for a verdict.
    pub const WHOLE: u32 = 1 << 1;
}

/// Bits of [`crate::state::Volume::flags`].
pub mod volume_flags {
    /// The kubelet keeps its files in a folder that it replaces whole (`..2026_11_22_…`, to which `..data` and every name
    /// lead); no path has that folder. `AtomicWriter` in `pkg/volume/util/atomic_writer.go` of Kubernetes.
    pub const REPLACED_WHOLE: u32 = 1 << 0;
}

codes! {
    /// Bugs that can be planted in the programs, to see whether the tests notice them. They are in no build that is shipped.
    bug: u32 {
        ORIGIN_IGNORED = 1 => "origin-ignored",
        RING_UNSHARED = 2 => "ring-unshared",
        FAILED_WALK_ALLOWED = 3 => "failed-walk-allowed",
        ENFORCE_IS_AUDIT = 4 => "enforce-is-audit",
        DRIFT_IS_IMAGE = 5 => "drift-is-image",
        LATCH_STAYS = 6 => "latch-stays",
        SESSIONS_IGNORED = 7 => "sessions-ignored",
        CONDITIONS_PARENTS_IGNORED = 8 => "conditions-parents-ignored",
        CONDITIONS_ARGUMENTS_IGNORED = 9 => "conditions-arguments-ignored",
        SCRIPTS_UNJUDGED = 10 => "scripts-unjudged",
        CODE_MAPPED_UNJUDGED = 11 => "code-mapped-unjudged",
        CODE_PROTECT_UNJUDGED = 12 => "code-protect-unjudged",
        CODE_JIT_ALLOWED = 13 => "code-jit-allowed",
        CODE_MEMORY_ALLOWED = 14 => "code-memory-allowed",
        CODE_TRACE_ALLOWED = 15 => "code-trace-allowed",
        CODE_EXECUTABLES_UNPROTECTED = 16 => "code-executables-unprotected",
        INTERPRETER_UNJUDGED = 17 => "interpreter-unjudged",
        LAYER_CHANGE_UNSEEN = 18 => "layer-change-unseen",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_error_site_has_a_counter() {
        assert!(error::ALL.iter().all(|(code, _)| *code < ERROR_SITES));
    }

    #[test]
    fn codes_are_unique() {
        for (index, (code, _)) in reason::ALL.iter().enumerate() {
            assert_eq!(reason::ALL.iter().position(|(other, _)| other == code), Some(index));
        }
    }
}
