//! Loading and attaching the programs.

use std::{
    os::fd::{AsFd as _, AsRawFd as _},
    path::Path,
};

use anyhow::Context as _;
use aya::{
    Btf, Ebpf, EbpfLoader,
    maps::{Map, RingBuf},
    programs::{Lsm, Program, RawTracePoint},
};
use palisade_abi::{
    codes::volume_flags,
    maps::{HOST_ROOT, Settings},
    offsets::ABSENT,
};
use thiserror::Error;

use super::{
    BtfError, Features, Layout, Maps, Opened, Ring, Sizes, Table, btf::OverlayLayout, roots, volumes,
};
use crate::containers::mounts::{Described, Volume};

static FETCH_ADD: &[u8] = aya::include_bytes_aligned!(env!("PALISADE_OBJECT_FETCH_ADD"));
static LANES: &[u8] = aya::include_bytes_aligned!(env!("PALISADE_OBJECT_LANES"));

/// Size of a kernel stack on x86-64 (`THREAD_SIZE` without KASAN). Only used where the helper for the registers is
/// missing, and what is read there must pass a check.
const THREAD_SIZE: u32 = 16384;

/// How much of an exec denial this node can enforce.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tier {
    /// Refused with EPERM at the LSM hook.
    Full,
    /// Killed at the tracepoint, before the first instruction.
    Fallback,
}

impl Tier {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Fallback => "fallback",
        }
    }
}

/// The process whose root directory and mount namespace are the host's: the first one, or this one where a
/// sandbox keeps the first one out of reach.
fn host_process() -> &'static Path {
    let first = Path::new("/proc/1");
    match std::fs::metadata(first.join("ns/mnt")).and(std::fs::metadata(first.join("root/."))) {
        Ok(_) => first,
        Err(error) => {
            tracing::warn!(%error, "the first process is out of reach; taking this process's root for the host's");
            Path::new("/proc/self")
        }
    }
}

/// Why the programs do not run.
#[derive(Debug, Error)]
pub enum LoadError {
    #[error(
        "the agent needs root on the host (or CAP_BPF, CAP_PERFMON, CAP_SYS_ADMIN, CAP_SYS_CHROOT and CAP_SYS_PTRACE)"
    )]
    NotPermitted,
    #[error(transparent)]
    Btf(#[from] BtfError),
    #[error("program {name}: {message}")]
    Program { name: String, message: String },
    #[error(
        "overlayfs cannot be read on this kernel ({0:#}), so the origin of a file would be unknown and an enforced \
         profile would refuse everything"
    )]
    Overlay(anyhow::Error),
    #[error("{0:#}")]
    Other(#[from] anyhow::Error),
}

/// A loaded program.
#[derive(Clone, Debug)]
pub struct ProgramReport {
    pub name: String,
    /// Instructions that the verifier looked at; `None` before 5.16.
    pub verified_instructions: Option<u32>,
    /// Bytes of the translated program.
    pub translated_bytes: Option<u32>,
}

/// The programs, loaded; after [`Kernel::attach`] also in force.
pub struct Kernel {
    ebpf: Ebpf,
    pub maps: Maps,
    pub records: Ring,
    pub control: Ring,
    pub tier: Tier,
    /// Why the tier is not full.
    pub tier_reason: Option<String>,
    pub layout: Layout,
    pub programs: Vec<ProgramReport>,
    /// The process in procfs whose root and mount namespace are the host's.
    host: &'static Path,
    /// Names this set of programs and maps: the time it was made, nanoseconds since the Unix epoch.
    pub epoch: u64,
}

const TRACEPOINTS: &[&str] = &[
    "sched_process_fork",
    "sched_process_exec",
    "sched_process_exit",
    "cgroup_mkdir",
    "cgroup_rmdir",
    "cgroup_attach_task",
];
/// Run on demand, never attached.
const ON_DEMAND: &[&str] = &["learn_root", "learn_volume", "probe_origin"];
const LSM: &[&str] = &[
    "bprm_check_security",
    "bprm_committed_creds",
    "task_kill",
    "file_send_sigiotask",
    "ptrace_access_check",
];

impl Kernel {
    /// Loads everything this kernel takes, and proves that origins can be told.
    ///
    /// # Errors
    ///
    /// Without rights, without BTF, or when the verifier refuses a program that every supported kernel takes.
    pub fn load(sizes: &Sizes, features: &Features) -> Result<Self, LoadError> {
        if !rustix::process::geteuid().is_root() {
            return Err(LoadError::NotPermitted);
        }
        // Before 5.11 map memory counts against this limit.
        let unlimited = rustix::process::Rlimit { current: None, maximum: None };
        if let Err(error) = rustix::process::setrlimit(rustix::process::Resource::Memlock, unlimited) {
            tracing::debug!(%error, "the limit on locked memory stays; it matters before kernel 5.11");
        }
        let host = host_process();
        let layout = Layout::of_running_kernel()?;
        let hash_key = random_key()?;
        let epoch = now();
        let settings = Settings {
            hash_key,
            epoch,
            have_task_pt_regs: u32::from(layout.have_task_pt_regs),
            pt_regs_at: if layout.pt_regs_size == 0 { 0 } else { THREAD_SIZE - layout.pt_regs_size },
            host_mount_namespace: mount_namespace(host)?,
            reserved: 0,
        };
        let btf = Btf::from_sys_fs().map_err(|error| LoadError::Other(error.into()))?;
        let Sizes { slots, processes, rules, glob_states, volumes, volume_names, ring_bytes } = *sizes;
        let object = object(features)?;
        let mut ebpf = EbpfLoader::new()
            .btf(Some(&btf))
            .override_global("OFFSETS", bytemuck::bytes_of(&layout.offsets), true)
            .override_global("SETTINGS", bytemuck::bytes_of(&settings), true)
            .map_max_entries("SLOTS", slots)
            .map_max_entries("NAMES", slots)
            .map_max_entries("ACCOUNTS", slots)
            .map_max_entries("SLOT_LANES", slots)
            .map_max_entries("SLOT_POLICIES", slots)
            .map_max_entries("ROOTS", slots + 1)
            .map_max_entries("ROOT_SLOTS", slots)
            .map_max_entries("REVISIONS", slots)
            .map_max_entries("CGROUPS", slots * 2)
            .map_max_entries("PROCESSES", processes)
            .map_max_entries("RULES", rules)
            .map_max_entries("GLOB_STATES", glob_states)
            .map_max_entries("VOLUMES", volumes)
            .map_max_entries("VOLUME_NAMES", volume_names)
            .map_max_entries("RECORDS", ring_bytes)
            .load(&object)
            .map_err(|error| LoadError::Other(anyhow::Error::new(error).context("cannot create the maps")))?;
        let mut programs = Vec::new();
        for name in TRACEPOINTS.iter().chain(ON_DEMAND) {
            let program = raw_tracepoint(&mut ebpf, name)?;
            program.load().map_err(|error| refused(name, &error))?;
            programs.push(report(name, program.info()));
        }
        let tier_reason = match features.lsm_is_active() {
            Ok(()) => {
                for name in LSM {
                    let program = lsm(&mut ebpf, name)?;
                    program.load(name, &btf).map_err(|error| refused(name, &error))?;
                    programs.push(report(name, program.info()));
                }
                None
            }
            Err(reason) => Some(reason),
        };
        let tier = if tier_reason.is_none() { Tier::Full } else { Tier::Fallback };
        let records = ring(&mut ebpf, "RECORDS")?;
        let control = ring(&mut ebpf, "CONTROL")?;
        let maps = Maps::take(&mut ebpf, hash_key)?;
        let mut kernel =
            Self { ebpf, maps, records, control, tier, tier_reason, layout, programs, host, epoch };
        // Before anything is attached, so that no decision is taken without it.
        kernel.learn_root(HOST_ROOT, &host.join("root"))?;
        if kernel.layout.offsets.ovl_inode_upper == ABSENT {
            return Err(LoadError::Overlay(anyhow::anyhow!("its inode's layout is not known")));
        }
        let probe = raw_tracepoint(&mut kernel.ebpf, "probe_origin")?;
        roots::prove_overlay(probe).map_err(LoadError::Overlay)?;
        drop(btf);
        // Parsing BTF took tens of megabytes that are never needed again.
        // SAFETY: the call takes no pointers; it gives free memory of the allocator back to the kernel.
        unsafe { libc::malloc_trim(0) };
        if kernel.layout.overlay == OverlayLayout::Inferred {
            tracing::info!("the layout of overlayfs was inferred and proven on a scratch overlay");
        }
        Ok(kernel)
    }

    /// Puts the programs in force. Cgroups first, so that no task enters one that is not known.
    ///
    /// # Errors
    ///
    /// When the kernel refuses an attachment.
    pub fn attach(&mut self) -> Result<(), LoadError> {
        self.maps.record_as(self.epoch)?;
        for name in ["cgroup_mkdir", "cgroup_rmdir", "cgroup_attach_task"]
            .into_iter()
            .chain(TRACEPOINTS.iter().copied().filter(|name| name.starts_with("sched_")))
        {
            let program = raw_tracepoint(&mut self.ebpf, name)?;
            program.attach(name).map_err(|error| refused(name, &error))?;
        }
        if self.tier == Tier::Full {
            for name in LSM {
                lsm(&mut self.ebpf, name)?.attach().map_err(|error| refused(name, &error))?;
            }
        }
        Ok(())
    }

    /// Takes the programs out of force; records that are in the ring stay there to be read.
    pub fn detach(&mut self) {
        for (_, program) in self.ebpf.programs_mut() {
            let result = match program {
                Program::RawTracePoint(program) => program.unload(),
                Program::Lsm(program) => program.unload(),
                _ => Ok(()),
            };
            if let Err(error) = result {
                tracing::debug!(%error, "a program was not loaded");
            }
        }
    }

    /// Tells the kernel which superblock is the root file system of `slot`, by a path that leads to it.
    ///
    /// # Errors
    ///
    /// When the path cannot be entered.
    pub fn learn_root(&mut self, slot: u64, path: &Path) -> anyhow::Result<()> {
        let program = raw_tracepoint(&mut self.ebpf, "learn_root")?;
        roots::learn(program, slot, path)
    }

    /// Opens the mounts of the process `pid` that may be volumes; see [`volumes::open_mounts`].
    ///
    /// # Errors
    ///
    /// When they cannot be read.
    pub fn open_mounts(&self, pid: u32, described: Vec<Described>, untouched: bool) -> anyhow::Result<Table> {
        volumes::open_mounts(pid, described, untouched, self.host)
    }

    /// Tells the kernel that a mount is a volume of `slot`.
    ///
    /// # Errors
    ///
    /// When a map is full.
    pub fn learn_volume(&mut self, slot: u64, opened: &Opened, volume: &Volume) -> anyhow::Result<()> {
        let (text, mark) = volume.text().context("its name is too long")?;
        let name = self.maps.volumes.index(slot, &text, mark)?;
        let flags = if volume.replaced_whole { volume_flags::REPLACED_WHOLE } else { 0 };
        let program = raw_tracepoint(&mut self.ebpf, "learn_volume")?;
        volumes::learn(program, slot, opened, name, flags)
    }

    /// Lets a held process go, or kills it. One that has ended meanwhile is no error, nor is its number another's.
    ///
    /// # Errors
    ///
    /// When the kernel refuses the signal.
    pub fn let_go(&mut self, (pid, start): (u32, u64), kill: bool) -> anyhow::Result<()> {
        use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
        let Some(number) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Ok(()) };
        let handle = match pidfd_open(number, PidfdFlags::empty()) {
            Ok(handle) => handle,
            Err(rustix::io::Errno::SRCH) => return Ok(()),
            Err(error) => return Err(error).context("cannot open the process"),
        };
        // The handle names one process for ever; that it is the right one shows in its start.
        if !crate::processes::is_same((pid, start)) {
            return Ok(());
        }
        if !kill {
            // One that is to die stays held until it is dead: nobody may wake it before.
            self.maps.let_go(pid)?;
        }
        let signal = if kill { Signal::KILL } else { Signal::CONT };
        match pidfd_send_signal(handle, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error).context("cannot signal the process"),
        }
    }

    /// Whether a process has the host's own root directory and mount namespace.
    pub fn is_at_home(&self, pid: u32) -> bool {
        use std::os::unix::fs::MetadataExt as _;
        let namespace =
            |process: &Path| std::fs::metadata(process.join("ns/mnt")).map(|found| found.ino()).ok();
        let found = namespace(&std::path::PathBuf::from(format!("/proc/{pid}")));
        found.is_some() && found == namespace(self.host) && self.has_hosts_root(pid)
    }

    /// Whether a process has the host's own root directory, as the runtime has while it prepares a container.
    pub fn has_hosts_root(&self, pid: u32) -> bool {
        use std::os::unix::fs::MetadataExt as _;
        let root = |process: &Path| {
            std::fs::metadata(process.join("root/.")).map(|metadata| (metadata.dev(), metadata.ino())).ok()
        };
        let found = root(&std::path::PathBuf::from(format!("/proc/{pid}")));
        found.is_some() && found == root(self.host)
    }

    /// Passes on what the programs log in debug builds.
    #[cfg(debug_assertions)]
    pub fn forward_logs(&mut self) {
        if let Err(error) = aya_log::EbpfLogger::init(&mut self.ebpf) {
            tracing::debug!(%error, "the programs were built without debug messages");
        }
    }

    /// Times that the kernel skipped a program because it was already running on that CPU (5.12 and later tell).
    pub fn recursion_misses(&self) -> u64 {
        let mut sum = 0;
        for (_, program) in self.ebpf.programs() {
            let fd = match program {
                Program::Lsm(program) => program.fd(),
                Program::RawTracePoint(program) => program.fd(),
                _ => continue,
            };
            let Ok(fd) = fd else { continue };
            let path = format!("/proc/self/fdinfo/{}", fd.as_fd().as_raw_fd());
            let text = std::fs::read_to_string(path).unwrap_or_default();
            sum += text
                .lines()
                .find_map(|line| line.strip_prefix("recursion_misses:")?.trim().parse::<u64>().ok())
                .unwrap_or(0);
        }
        sum
    }
}

/// The object for this kernel.
fn object(features: &Features) -> anyhow::Result<std::borrow::Cow<'static, [u8]>> {
    #[cfg(feature = "test-objects")]
    if let Some(folder) = std::env::var_os("PALISADE_TEST_OBJECTS") {
        let name = if features.fetch_add { "fetch-add.o" } else { "lanes.o" };
        return Ok(std::fs::read(Path::new(&folder).join(name))?.into());
    }
    Ok(if features.fetch_add { FETCH_ADD } else { LANES }.into())
}

fn raw_tracepoint<'a>(ebpf: &'a mut Ebpf, name: &str) -> anyhow::Result<&'a mut RawTracePoint> {
    ebpf.program_mut(name)
        .and_then(|program| program.try_into().ok())
        .with_context(|| format!("the object has no program {name}"))
}

fn lsm<'a>(ebpf: &'a mut Ebpf, name: &str) -> anyhow::Result<&'a mut Lsm> {
    ebpf.program_mut(name)
        .and_then(|program| program.try_into().ok())
        .with_context(|| format!("the object has no program {name}"))
}

fn ring(ebpf: &mut Ebpf, name: &str) -> anyhow::Result<Ring> {
    let map: Map = ebpf.take_map(name).with_context(|| format!("the object has no ring {name}"))?;
    Ring::new(RingBuf::try_from(map)?)
}

/// The verifier's last words are the ones that matter.
fn refused(name: &str, error: &aya::programs::ProgramError) -> LoadError {
    let mut message = error.to_string();
    if let aya::programs::ProgramError::LoadError { io_error, verifier_log } = error {
        let log = verifier_log.to_string();
        let lines: Vec<&str> = log.lines().collect();
        message = format!("{io_error}\n{}", lines[lines.len().saturating_sub(40)..].join("\n"));
    }
    LoadError::Program { name: name.to_owned(), message }
}

fn report(
    name: &str,
    info: Result<aya::programs::ProgramInfo, aya::programs::ProgramError>,
) -> ProgramReport {
    let info = info.ok();
    ProgramReport {
        name: name.to_owned(),
        verified_instructions: info.as_ref().and_then(|info| info.verified_instruction_count()),
        translated_bytes: info.as_ref().and_then(|info| info.size_translated()),
    }
}

/// The present, nanoseconds since the Unix epoch.
fn now() -> u64 {
    let wall = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    wall.map_or(0, |time| time.as_nanos() as u64)
}

fn random_key() -> anyhow::Result<[u64; 2]> {
    use std::io::Read as _;
    let mut bytes = [0; 16];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .context("cannot read /dev/urandom")?;
    Ok(bytemuck::cast(bytes))
}

/// Inode number of the mount namespace of the process at `process`.
fn mount_namespace(process: &Path) -> anyhow::Result<u32> {
    use std::os::unix::fs::MetadataExt as _;
    let path = process.join("ns/mnt");
    let metadata = std::fs::metadata(&path).with_context(|| format!("cannot read {}", path.display()))?;
    u32::try_from(metadata.ino()).context("the mount namespace's number is out of range")
}
