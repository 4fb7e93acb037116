//! Loading and attaching the programs.

use std::{
    os::fd::{AsFd as _, AsRawFd as _},
    path::Path,
};

use anyhow::Context as _;
use aya::{
    EbpfLoader,
    maps::{Array, MapData, Stack},
    programs::{
        Program, RawTracePoint,
        links::{FdLink, PinnedLink},
    },
};
use palisade_abi::{
    POLICY_VERSION, RECORDS_VERSION, STATE_VERSION, VERSIONS,
    codes::{error, set_state, tampering, volume_flags},
    hash::hash_path,
    ledger::SetMeta,
    offsets::ABSENT,
    policy::GlobChunk,
    settings::{SCRATCH_ENTRIES, Settings},
    state::HOST_ROOT,
};
use thiserror::Error;

#[cfg(feature = "test-objects")]
use super::programs::GENERATOR;
use super::{
    BtfError, Features, Layout, Maps, Opened, Pins, Ring, Sizes, Table,
    btf::{OverlayLayout, lsm_hooks},
    pins::SetFolder,
    programs::{self, LEARN_ROOT, LEARN_VOLUME, PROBE_ORIGIN, ProgramReport},
    roots,
    sets::{adoptable, recording, ring},
    volumes,
};
use crate::{
    containers::mounts::{Described, Volume},
    records::now_since_boot,
};

static FETCH_ADD: &[u8] = aya::include_bytes_aligned!(env!("PALISADE_OBJECT_FETCH_ADD"));
static LANES: &[u8] = aya::include_bytes_aligned!(env!("PALISADE_OBJECT_LANES"));

/// Size of a kernel stack on x86-64 (`THREAD_SIZE` without KASAN). Only used where the helper for the registers is
/// missing, and what is read there must pass a check.
const THREAD_SIZE: u32 = 16384;

/// Ended containers whose records may still be on their way, for each that runs.
const ACCOUNTS_PER_SLOT: u32 = 4;

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
    /// With everything that led to it in one line, and therefore without a source.
    #[error("{0:#}")]
    Other(anyhow::Error),
}

impl From<anyhow::Error> for LoadError {
    fn from(error: anyhow::Error) -> Self {
        Self::Other(error)
    }
}

/// The programs and maps, pinned; after [`Kernel::attach`] in force.
pub struct Kernel {
    pub maps: Maps,
    pub records: Ring,
    pub control: Ring,
    pub tier: Tier,
    /// Why the tier is not full.
    pub tier_reason: Option<String>,
    /// Absent when the programs were found loaded.
    pub layout: Option<Layout>,
    pub programs: Vec<ProgramReport>,
    pub meta: SetMeta,
    /// Whether the set was in force already.
    pub adopted: bool,
    /// The process in procfs whose root and mount namespace are the host's.
    host: &'static Path,
    pub(super) pins: Pins,
    pub(super) set: String,
    folder: SetFolder,
    learn_root: RawTracePoint,
    learn_volume: RawTracePoint,
    probe_origin: RawTracePoint,
    /// Everything that is pinned, to pin it again.
    all_programs: Vec<(&'static str, Program)>,
    all_maps: Vec<(String, MapData)>,
    active_epoch: MapData,
    /// The links: as long as the agent holds them, no pin that is taken away ends enforcement.
    links: Vec<(&'static str, PinnedLink)>,
}

/// Tracepoints behind which the full tier has LSM programs: `bprm_check_security` and `bprm_committed_creds`, `task_alloc`, and
/// `task_free`. Those two are of no use where no tracepoint is skipped.
const SECOND_LINE: &[&str] =
    &["sched_process_exec", "sched_process_fork", "sched_process_exit", "task_alloc", "task_free"];
/// The first version of the kernel whose tracepoints may be preempted, and their programs then skipped.
const SKIPS_SINCE: u32 = 7;
/// The map that all sets share.
const ACTIVE_EPOCH: &str = "ACTIVE_EPOCH";

impl Kernel {
    /// Takes over the set that is pinned, if it is this build's and whole; else loads everything this kernel takes, and
    /// proves that origins can be told.
    ///
    /// `folder` is where the host's bpffs keeps what outlives the agent; without one, nothing does.
    ///
    /// # Errors
    ///
    /// Without rights, without BTF, or when the verifier refuses a program that every supported kernel takes.
    pub fn open(sizes: &Sizes, features: &Features, folder: Option<&Path>) -> Result<Self, LoadError> {
        if !rustix::process::geteuid().is_root() {
            return Err(LoadError::NotPermitted);
        }
        let pins = folder.map_or_else(Pins::private, Pins::open)?;
        let object = object(features)?;
        let set = set_name(&object, sizes);
        if let Some(folder) = pins.find(&set) {
            match adoptable(&pins, &folder, features.lsm_is_active().is_ok()) {
                Ok(meta) => return Self::assemble(pins, set, folder, meta, features),
                Err(error) => {
                    tracing::error!(
                        set,
                        error = format!("{error:#}"),
                        "what is pinned cannot be taken over; it stays in force until a new set is"
                    );
                    pins.set_aside(&set)?;
                }
            }
        }
        let fresh = load(sizes, features, &pins, &set, &object)?;
        let Fresh { folder, meta, layout, programs } = fresh;
        let mut kernel = Self::assemble(pins, set, folder, meta, features)?;
        kernel.adopted = false;
        kernel.programs = programs;
        // Before anything is attached, so that no decision is taken without it.
        kernel.learn_root(HOST_ROOT, &kernel.host.join("root"))?;
        if layout.offsets.ovl_inode_upper == ABSENT {
            return Err(LoadError::Overlay(anyhow::anyhow!("its inode's layout is not known")));
        }
        let probe = PROBE_ORIGIN.open_on_demand(&kernel.folder)?;
        roots::prove_overlay(&probe).map_err(LoadError::Overlay)?;
        if layout.overlay == OverlayLayout::Inferred {
            tracing::info!("the layout of overlayfs was inferred and proven on a scratch overlay");
        }
        kernel.layout = Some(layout);
        give_back_memory();
        Ok(kernel)
    }

    /// Opens everything of a pinned set.
    fn assemble(
        pins: Pins,
        set: String,
        folder: SetFolder,
        meta: SetMeta,
        features: &Features,
    ) -> Result<Self, LoadError> {
        let tier_reason = features.lsm_is_active().err();
        let tier = if tier_reason.is_none() { Tier::Full } else { Tier::Fallback };
        let mut all_programs = Vec::new();
        for row in programs::of(tier) {
            all_programs.push((row.name, row.open(&folder)?));
        }
        let mut all_maps = Vec::new();
        for name in folder.map_names()? {
            // What is no map, somebody else has put there; what is needed is opened below.
            match MapData::from_pin(folder.map(&name)) {
                Ok(map) => all_maps.push((name, map)),
                Err(error) => tracing::warn!(name, %error, "something among the pinned maps is none"),
            }
        }
        let active_epoch = MapData::from_pin(pins.active_epoch()).map_err(anyhow::Error::new)?;
        Ok(Self {
            maps: Maps::open(&folder, &pins)?,
            records: ring(&folder, "RECORDS")?,
            control: ring(&folder, "CONTROL")?,
            tier,
            tier_reason,
            layout: None,
            programs: Vec::new(),
            meta,
            adopted: true,
            host: host_process(),
            learn_root: LEARN_ROOT.open_on_demand(&folder)?,
            learn_volume: LEARN_VOLUME.open_on_demand(&folder)?,
            probe_origin: PROBE_ORIGIN.open_on_demand(&folder)?,
            all_programs,
            all_maps,
            active_epoch,
            links: Vec::new(),
            pins,
            set,
            folder,
        })
    }

    /// Puts the programs in force, as far as they are not.
    ///
    /// # Errors
    ///
    /// When the kernel refuses an attachment.
    pub fn attach(&mut self) -> Result<(), LoadError> {
        for row in programs::attached(self.tier) {
            let link = if self.adopted {
                PinnedLink::from_pin(self.folder.link(row.name)).map_err(anyhow::Error::new)?
            } else {
                row.attach(&self.folder)?
            };
            self.links.push((row.name, link));
        }
        if !self.adopted {
            self.folder = self.pins.finish(&self.set)?;
        }
        Ok(())
    }

    /// Says which maps and programs containers may not open.
    ///
    /// # Errors
    ///
    /// When the kernel cannot be told.
    pub fn protect(&mut self) -> anyhow::Result<()> {
        let maps = self.all_maps.iter().map(|(_, map)| map).chain([&self.active_epoch]);
        for map in maps {
            self.maps.protect(tampering::OPEN_MAP, map.info()?.id())?;
        }
        for (_, program) in &self.all_programs {
            self.maps.protect(tampering::OPEN_PROGRAM, program.info()?.id())?;
        }
        Ok(())
    }

    /// The folder of all pins: device number in the kernel's encoding, and inode. `None` where nobody else can reach it.
    pub fn place_of_pins(&self) -> Option<(u32, u64)> {
        self.pins.identity()
    }

    /// Makes this set the one that records, and gates what is not identified. `whole` says whether it knows all that the sets
    /// before it know.
    ///
    /// # Errors
    ///
    /// When the kernel cannot be told.
    pub fn activate(&mut self, whole: bool) -> anyhow::Result<()> {
        self.maps.note_state(set_state::RECORDED | if whole { set_state::WHOLE } else { 0 })?;
        self.maps.record_as(self.meta.epoch)
    }

    /// Leaves this set to be replaced: the next agent loads another beside it.
    ///
    /// # Errors
    ///
    /// When it cannot be renamed.
    pub fn give_up(&self) -> anyhow::Result<()> {
        self.pins.set_aside(&self.set)
    }

    /// Whether what is in force stays so without the agent.
    pub fn outlives_the_agent(&self) -> bool {
        self.pins.lasting
    }

    /// Looks whether everything is pinned that keeps enforcement up without the agent, and pins again what is not. Returns
    /// what was missing.
    ///
    /// # Errors
    ///
    /// When it cannot be pinned again.
    pub fn verify(&mut self) -> anyhow::Result<Vec<String>> {
        let mut missing = Vec::new();
        if !self.pins.is_in_place() {
            missing.push("the bpffs with the pins is gone".to_owned());
            self.pins.restore()?;
        }
        self.folder = self.pins.make(&self.set)?;
        for (name, map) in &self.all_maps {
            let path = self.folder.map(name);
            if !path.exists() {
                missing.push(format!("the pin of map {name} is gone"));
                map.pin(&path).with_context(|| format!("cannot pin the map {name} again"))?;
            }
        }
        if !self.pins.active_epoch().exists() {
            missing.push("the pin of map active_epoch is gone".to_owned());
            self.active_epoch.pin(self.pins.active_epoch()).context("cannot pin active_epoch again")?;
        }
        for (name, program) in &mut self.all_programs {
            let path = self.folder.program(name);
            if !path.exists() {
                missing.push(format!("the pin of program {name} is gone"));
                program.pin(&path).with_context(|| format!("cannot pin the program {name} again"))?;
            }
        }
        for (name, link) in std::mem::take(&mut self.links) {
            let path = self.folder.link(name);
            if path.exists() {
                self.links.push((name, link));
                continue;
            }
            missing.push(format!("the pin of the link of {name} is gone"));
            match FdLink::from(link).pin(&path) {
                Ok(link) => self.links.push((name, link)),
                // Then it is not attached any more; the others are.
                Err(error) => missing.push(format!("the link of {name} cannot be pinned: {error}")),
            }
        }
        for row in programs::attached(self.tier) {
            if !self.links.iter().any(|(held, _)| *held == row.name) {
                missing.push(format!("{} is not attached", row.name));
                match row.attach(&self.folder) {
                    Ok(link) => self.links.push((row.name, link)),
                    Err(error) => missing.push(error.to_string()),
                }
            }
        }
        Ok(missing)
    }

    /// Takes the programs out of force; records that are in the ring stay there to be read.
    pub fn detach(&mut self) {
        self.links.clear();
        if let Err(error) = self.pins.detach(&self.set) {
            tracing::error!(error = format!("{error:#}"), "not all programs are out of force");
        }
    }

    /// Tells the kernel which superblock is the root file system of `slot`, by a path that leads to it.
    ///
    /// # Errors
    ///
    /// When the path cannot be entered.
    pub fn learn_root(&mut self, slot: u64, path: &Path) -> anyhow::Result<()> {
        roots::learn(&self.learn_root, slot, path)
    }

    /// The origin of a file that is open on a container's root filesystem, as code of [`palisade_abi::codes::origin`].
    ///
    /// # Errors
    ///
    /// When the program cannot be run.
    pub fn origin_of(&self, file: std::os::fd::BorrowedFd) -> anyhow::Result<u8> {
        roots::origin_of(&self.probe_origin, file)
    }

    /// Opens the mounts of the process `pid` that may be volumes; see [`volumes::open_mounts`].
    ///
    /// # Errors
    ///
    /// When they cannot be read.
    pub fn open_mounts(&self, pid: u32, described: Vec<Described>, untouched: bool) -> anyhow::Result<Table> {
        volumes::open_mounts(pid, described, untouched, self.host)
    }

    /// Names and mount points of the volumes that the kernel knows of `slot`.
    pub fn volumes_of(&self, slot: u64) -> Vec<(String, String)> {
        self.maps.state.volumes.of(slot)
    }

    /// Tells the kernel that a mount is a volume of `slot`.
    ///
    /// # Errors
    ///
    /// When a map is full.
    pub fn learn_volume(&mut self, slot: u64, opened: &Opened, volume: &Volume) -> anyhow::Result<()> {
        let (text, mark) = volume.text().context("its name is too long")?;
        let name = self.maps.state.volumes.index(slot, &text, mark)?;
        let flags = if volume.replaced_whole { volume_flags::REPLACED_WHOLE } else { 0 };
        volumes::learn(&self.learn_volume, slot, opened, name, flags)
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
            self.maps.state.let_go(pid)?;
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
        let found = root_of(&std::path::PathBuf::from(format!("/proc/{pid}")));
        found.is_some() && found == root_of(self.host)
    }

    /// Whether the directory with this device number and inode is the host's own root.
    pub fn is_hosts_root(&self, directory: (u64, u64)) -> bool {
        root_of(self.host) == Some(directory)
    }

    /// Which programs the kernel has skipped because they were already running on that CPU, and how often (5.12 and later tell).
    pub fn skipped(&self) -> Vec<(&'static str, u64)> {
        let count = |program: &Program| {
            let path = format!("/proc/self/fdinfo/{}", program.fd().ok()?.as_fd().as_raw_fd());
            let text = std::fs::read_to_string(path).ok()?;
            text.lines().find_map(|line| line.strip_prefix("recursion_misses:")?.trim().parse::<u64>().ok())
        };
        self.all_programs
            .iter()
            .filter_map(|(name, program)| Some((*name, count(program)?)))
            .filter(|(_, misses)| *misses > 0)
            .collect()
    }

    /// Whether nothing passes that must not when `program` is skipped: another one that is never skipped does what it would have, and
    /// counts the record as lost.
    pub fn has_second_line(&self, program: &str) -> bool {
        self.tier == Tier::Full
            && SECOND_LINE.contains(&program)
            && !self.maps.has_counted(error::FORK_MAP_FULL)
    }
}

/// Whether this kernel skips the program on a tracepoint that is called while another task is in it.
fn skips_tracepoints() -> bool {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let major = release.split('.').next().and_then(|major| major.parse::<u32>().ok());
    // One that cannot be told costs a little more.
    major.is_none_or(|major| major >= SKIPS_SINCE)
}

/// Device number and inode of the root directory of the process at `process`.
fn root_of(process: &Path) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::metadata(process.join("root/.")).map(|metadata| (metadata.dev(), metadata.ino())).ok()
}

/// Parsing BTF takes tens of megabytes that are never needed again.
fn give_back_memory() {
    // SAFETY: the call takes no pointers; it gives free memory of the allocator back to the kernel.
    unsafe { libc::malloc_trim(0) };
}

/// What was loaded anew.
struct Fresh {
    folder: SetFolder,
    meta: SetMeta,
    layout: Layout,
    programs: Vec<ProgramReport>,
}

/// Loads the object into a set that is not complete yet: nothing of it is attached.
fn load(
    sizes: &Sizes,
    features: &Features,
    pins: &Pins,
    set: &str,
    object: &[u8],
) -> Result<Fresh, LoadError> {
    // Before 5.11 map memory counts against this limit.
    let unlimited = rustix::process::Rlimit { current: None, maximum: None };
    if let Err(error) = rustix::process::setrlimit(rustix::process::Resource::Memlock, unlimited) {
        tracing::debug!(%error, "the limit on locked memory stays; it matters before kernel 5.11");
    }
    let layout = Layout::of_running_kernel()?;
    // Before the maps are made, which count against the same limit.
    give_back_memory();
    let meta = SetMeta {
        versions: VERSIONS,
        state: 0,
        epoch: now(),
        epoch_since_boot: now_since_boot(),
        // That of the set before, whose rules can then be taken over as they are.
        hash_key: recording(pins).map_or_else(random_key, |before| Ok(before.hash_key))?,
        reserved: 0,
    };
    let settings = Settings {
        hash_key: meta.hash_key,
        epoch: meta.epoch,
        have_task_pt_regs: u32::from(layout.have_task_pt_regs),
        pt_regs_at: if layout.pt_regs_size == 0 { 0 } else { THREAD_SIZE - layout.pt_regs_size },
        host_mount_namespace: mount_namespace(host_process())?,
        have_loop: u32::from(layout.have_loop),
        skips_tracepoints: u32::from(skips_tracepoints()),
        dequeue_arguments: layout.dequeue_arguments,
    };
    let btf = lsm_hooks()?;
    let folder = pins.begin(set)?;
    let Sizes { slots, processes, rules, glob_bytes, volumes, volume_names, ring_bytes } = *sizes;
    let mut ebpf = EbpfLoader::new()
        .btf(Some(&btf))
        .override_global("OFFSETS", bytemuck::bytes_of(&layout.offsets), true)
        .override_global("SETTINGS", bytemuck::bytes_of(&settings), true)
        .map_max_entries("SLOTS", slots)
        .map_max_entries("NAMES", slots)
        .map_max_entries("ACCOUNTS", slots * ACCOUNTS_PER_SLOT)
        .map_max_entries("SLOT_LANES", slots)
        .map_max_entries("RING_SHARES", slots)
        .map_max_entries("SLOT_POLICIES", slots)
        .map_max_entries("ROOTS", slots + 1)
        .map_max_entries("ROOT_SLOTS", slots)
        .map_max_entries("REVISIONS", slots)
        .map_max_entries("CGROUPS", slots * 2)
        .map_max_entries("PROCESSES", processes)
        .map_max_entries("LINKS", slots * LINKS_PER_SLOT)
        .map_max_entries("RULES", rules)
        .map_max_entries("GLOBS", glob_bytes.div_ceil(size_of::<GlobChunk>() as u32))
        .map_max_entries("VOLUMES", volumes)
        .map_max_entries("VOLUME_NAMES", volume_names)
        .map_max_entries("RECORDS", ring_bytes)
        .map_pin_path(ACTIVE_EPOCH, pins.active_epoch())
        .load(object)
        .map_err(|error| LoadError::Other(anyhow::Error::new(error).context("cannot create the maps")))?;
    // Constants (`.rodata`) belong to the programs, which keep them.
    for (name, map) in ebpf.maps().filter(|(name, _)| *name != ACTIVE_EPOCH && !name.starts_with('.')) {
        map.pin(folder.map(name)).with_context(|| format!("cannot pin the map {name}"))?;
    }
    let mut head: Array<_, SetMeta> =
        ebpf.map_mut("META").context("the object has no map META")?.try_into().map_err(anyhow::Error::new)?;
    head.set(0, meta, 0).context("cannot describe the set")?;
    let mut free: Stack<_, u32> = ebpf
        .map_mut("FREE_SCRATCH")
        .context("the object has no map FREE_SCRATCH")?
        .try_into()
        .map_err(anyhow::Error::new)?;
    for entry in 0..SCRATCH_ENTRIES {
        free.push(entry, 0).context("cannot say which memory is free")?;
    }
    let tier = if features.lsm_is_active().is_ok() { Tier::Full } else { Tier::Fallback };
    let mut reports = Vec::new();
    for row in programs::of(tier) {
        reports.push(row.load(&mut ebpf, &btf, &folder)?);
    }
    #[cfg(feature = "test-objects")]
    if ebpf.program(GENERATOR.name).is_some() {
        GENERATOR.load(&mut ebpf, &btf, &folder)?;
    }
    // Passes on what the programs log in debug builds.
    #[cfg(debug_assertions)]
    if let Err(error) = aya_log::EbpfLogger::init(&mut ebpf) {
        tracing::debug!(%error, "the programs were built without debug messages");
    }
    Ok(Fresh { folder, meta, layout, programs: reports })
}

/// Names that lead to interpreters, for each container: most images have one or two.
const LINKS_PER_SLOT: u32 = 4;

/// Names a set by everything that makes it another: layout, programs and map sizes.
fn set_name(object: &[u8], sizes: &Sizes) -> String {
    let described = format!("{sizes:?}");
    let mut all = object.to_vec();
    all.extend(described.as_bytes());
    let [fingerprint, _] = hash_path([0, 0], &all);
    format!("v{STATE_VERSION}-{POLICY_VERSION}-{RECORDS_VERSION}-{fingerprint:016x}")
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
