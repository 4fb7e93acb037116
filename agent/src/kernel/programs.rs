//! The programs of a set, a row each. A hook may have several: each is verified by itself, so what one family needs of the verifier's
//! budget is no other's. The one that was attached last is called first, and the first that refuses ends the hook, so only what cannot be the
//! same act has a program of its own.

use std::path::Path;

use anyhow::Context as _;
use aya::{
    Btf, Ebpf,
    programs::{
        FExit, Lsm, Program, ProgramError, ProgramInfo, RawTracePoint,
        links::{FdLink, PinnedLink},
    },
};

use super::{LoadError, Tier, pins::SetFolder};

/// A loaded program.
#[derive(Clone, Debug)]
pub struct ProgramReport {
    pub name: String,
    /// Instructions that the verifier looked at; `None` before 5.16.
    pub verified_instructions: Option<u32>,
    /// Bytes of the translated program.
    pub translated_bytes: Option<u32>,
}

/// A program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Its function in the object, and its pins.
    pub name: &'static str,
    pub place: Place,
}

/// Where a program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// On a tracepoint, on both tiers.
    Tracepoint(&'static str),
    /// At a hook for security modules, on the full tier.
    Hook(&'static str),
    /// When a function of the kernel returns, on the full tier.
    Return(&'static str),
    /// Nowhere: it is run on demand.
    Demand,
}

pub const LEARN_ROOT: Row = Row { name: "learn_root", place: Place::Demand };
pub const LEARN_VOLUME: Row = Row { name: "learn_volume", place: Place::Demand };
pub const PROBE_ORIGIN: Row = Row { name: "probe_origin", place: Place::Demand };
/// A task that was stopped calls it on its way back to user space.
pub const AT_RETURN: &str = "dequeue_signal";
/// Makes records without anything having happened, in builds for measuring.
#[cfg(feature = "test-objects")]
pub const GENERATOR: Row = Row { name: "generate_records", place: Place::Demand };

/// One that has its place's name, being the only one there.
const fn tracepoint(name: &'static str) -> Row {
    Row { name, place: Place::Tracepoint(name) }
}

/// As above.
const fn hook(name: &'static str) -> Row {
    Row { name, place: Place::Hook(name) }
}

/// One of several.
const fn one_of(hook: &'static str, name: &'static str) -> Row {
    Row { name, place: Place::Hook(hook) }
}

/// All of them, attached in this order: cgroups first, so that no task enters one that is not known.
pub const PROGRAMS: &[Row] = &[
    tracepoint("cgroup_mkdir"),
    tracepoint("cgroup_rmdir"),
    tracepoint("cgroup_attach_task"),
    tracepoint("sched_process_fork"),
    tracepoint("sched_process_exec"),
    tracepoint("sched_process_exit"),
    hook("bprm_check_security"),
    hook("bprm_creds_for_exec"),
    hook("bprm_creds_from_file"),
    hook("bprm_committed_creds"),
    hook("task_alloc"),
    hook("task_free"),
    hook("task_kill"),
    hook("file_send_sigiotask"),
    hook("ptrace_access_check"),
    hook("ptrace_traceme"),
    hook("file_open"),
    hook("mmap_file"),
    hook("mmap_addr"),
    hook("file_mprotect"),
    hook("task_setscheduler"),
    hook("task_setnice"),
    hook("task_setrlimit"),
    hook("bpf_map"),
    hook("bpf_prog"),
    one_of("inode_unlink", "inode_unlink_tamper"),
    one_of("inode_unlink", "inode_unlink_code"),
    hook("inode_rmdir"),
    one_of("inode_rename", "inode_rename_tamper"),
    one_of("inode_rename", "inode_rename_code"),
    hook("inode_copy_up"),
    hook("sb_mount"),
    hook("move_mount"),
    hook("sb_umount"),
    Row { name: AT_RETURN, place: Place::Return(AT_RETURN) },
    LEARN_ROOT,
    LEARN_VOLUME,
    PROBE_ORIGIN,
];

/// Those that a tier has.
pub fn of(tier: Tier) -> impl Iterator<Item = Row> {
    PROGRAMS.iter().copied().filter(move |row| match row.place {
        Place::Tracepoint(_) | Place::Demand => true,
        Place::Hook(_) | Place::Return(_) => tier == Tier::Full,
    })
}

/// Those of them that are attached.
pub fn attached(tier: Tier) -> impl Iterator<Item = Row> {
    of(tier).filter(|row| row.place != Place::Demand)
}

impl Row {
    /// Has the kernel verify it, and pins it.
    pub(super) fn load(
        self,
        ebpf: &mut Ebpf,
        btf: &Btf,
        folder: &SetFolder,
    ) -> Result<ProgramReport, LoadError> {
        let name = self.name;
        let program = ebpf.program_mut(name).with_context(|| format!("the object has no program {name}"))?;
        let loaded = match self.place {
            Place::Tracepoint(_) | Place::Demand => {
                <&mut RawTracePoint>::try_from(&mut *program).and_then(RawTracePoint::load)
            }
            Place::Hook(hook) => {
                <&mut Lsm>::try_from(&mut *program).and_then(|program| program.load(hook, btf))
            }
            Place::Return(function) => {
                <&mut FExit>::try_from(&mut *program).and_then(|program| program.load(function, btf))
            }
        };
        loaded.map_err(|error| refused(name, &error))?;
        program.pin(folder.program(name)).with_context(|| format!("cannot pin {name}"))?;
        Ok(report(name, program.info()))
    }

    /// Opens it in a set that is pinned.
    pub(super) fn open(self, folder: &SetFolder) -> anyhow::Result<Program> {
        let path = folder.program(self.name);
        let program = match self.place {
            Place::Tracepoint(_) | Place::Demand => {
                RawTracePoint::from_pin(&path).map(Program::RawTracePoint)
            }
            Place::Hook(_) => Lsm::from_pin(&path).map(Program::Lsm),
            Place::Return(_) => FExit::from_pin(&path).map(Program::FExit),
        };
        program.with_context(|| format!("cannot open {}", path.display()))
    }

    /// Opens one that is run on demand.
    pub(super) fn open_on_demand(self, folder: &SetFolder) -> anyhow::Result<RawTracePoint> {
        let path = folder.program(self.name);
        RawTracePoint::from_pin(&path).with_context(|| format!("cannot open {}", path.display()))
    }

    /// Puts it in force for good, with a link that is pinned.
    pub(super) fn attach(self, folder: &SetFolder) -> Result<PinnedLink, LoadError> {
        let name = self.name;
        let refused = |error: ProgramError| refused(name, &error);
        let link: FdLink = match (self.place, self.open(folder)?) {
            (Place::Tracepoint(tracepoint), Program::RawTracePoint(mut program)) => {
                let link = program.attach(tracepoint).map_err(refused)?;
                program.take_link(link).map_err(refused)?.into()
            }
            (Place::Hook(_), Program::Lsm(mut program)) => {
                let link = program.attach().map_err(refused)?;
                program.take_link(link).map_err(refused)?.into()
            }
            (Place::Return(_), Program::FExit(mut program)) => {
                let link = program.attach().map_err(refused)?;
                program.take_link(link).map_err(refused)?.into()
            }
            _ => return Err(anyhow::anyhow!("{name} is not attached anywhere").into()),
        };
        let pin: &Path = &folder.link(name);
        Ok(link.pin(pin).with_context(|| format!("cannot pin the link of {name}"))?)
    }
}

/// The verifier's last words are the ones that matter.
fn refused(name: &str, error: &ProgramError) -> LoadError {
    let mut message = error.to_string();
    if let ProgramError::LoadError { io_error, verifier_log } = error {
        let log = verifier_log.to_string();
        let lines: Vec<&str> = log.lines().collect();
        message = format!("{io_error}\n{}", lines[lines.len().saturating_sub(40)..].join("\n"));
    }
    LoadError::Program { name: name.to_owned(), message }
}

fn report(name: &str, info: Result<ProgramInfo, ProgramError>) -> ProgramReport {
    let info = info.ok();
    ProgramReport {
        name: name.to_owned(),
        verified_instructions: info.as_ref().and_then(ProgramInfo::verified_instruction_count),
        translated_bytes: info.as_ref().and_then(ProgramInfo::size_translated),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_are_unique_and_say_the_place() {
        let names: BTreeSet<&str> = PROGRAMS.iter().map(|row| row.name).collect();
        assert_eq!(names.len(), PROGRAMS.len());
        for Row { name, place } in PROGRAMS {
            match place {
                Place::Tracepoint(place) | Place::Hook(place) | Place::Return(place) => {
                    assert!(name.starts_with(place), "{name}");
                }
                Place::Demand => {}
            }
        }
    }

    #[test]
    fn the_fallback_tier_has_tracepoints_alone() {
        let attached = attached(Tier::Fallback);
        assert!(attached.into_iter().all(|row| matches!(row.place, Place::Tracepoint(_))));
    }
}
