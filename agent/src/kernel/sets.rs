//! Sets of programs and maps as they are found pinned: whether one can be taken over, and what is done with those of other
//! builds and configurations.

use std::path::Path;

use anyhow::Context as _;
use aya::{
    maps::{Array, Map, MapData, RingBuf},
    programs::{FExit, Lsm, RawTracePoint, links::PinnedLink},
};
use palisade_abi::{
    ABI_VERSION,
    codes::set_state,
    maps::{AgentState, SetMeta},
};

use super::{
    Kernel, Ledger, Maps, Pins, Ring,
    load::{AT_RETURN, LSM, ON_DEMAND, TRACEPOINTS},
    pins::SetFolder,
};

/// A set that another agent left and that makes no records any more.
pub struct OldSet {
    pub name: String,
    pub meta: SetMeta,
    content: Content,
    /// Whether its programs still judge.
    pub in_force: bool,
}

/// What this build can read of it.
enum Content {
    /// It has this build's layout.
    Whole(Box<Whole>),
    /// It has another one: it can only be said how many records it made.
    Ledger(Box<Ledger>),
}

/// A set of this build's layout.
pub struct Whole {
    pub maps: Maps,
    pub records: Ring,
    /// Bytes of its ring.
    pub ring_bytes: usize,
}

impl Whole {
    fn open(folder: &SetFolder, pins: &Pins) -> anyhow::Result<Self> {
        let size = MapData::from_pin(folder.map("RECORDS"))?.info()?.max_entries();
        Ok(Self {
            maps: Maps::open(folder, pins)?,
            records: ring(folder, "RECORDS")?,
            ring_bytes: size as usize,
        })
    }
}

impl OldSet {
    fn open(pins: &Pins, name: &str) -> anyhow::Result<Self> {
        let folder = pins.find(name).context("it is gone")?;
        let meta: Array<_, SetMeta> = pinned_map(&folder.map("META"))?.try_into()?;
        let meta = meta.get(&0, 0)?;
        let whole = if meta.abi == ABI_VERSION {
            Whole::open(&folder, pins)
        } else {
            Err(anyhow::anyhow!("its ABI is {}, this build's {ABI_VERSION}", meta.abi))
        };
        let content = match whole {
            Ok(whole) => Content::Whole(Box::new(whole)),
            Err(error) => {
                tracing::warn!(
                    set = name,
                    error = format!("{error:#}"),
                    "an older set cannot be read whole: what is left in its ring is lost, and counted"
                );
                Content::Ledger(Box::new(Ledger::open(&folder, &meta)?))
            }
        };
        Ok(Self { meta, content, name: name.to_owned(), in_force: true })
    }

    /// `None` when it has another layout.
    pub fn whole(&self) -> Option<&Whole> {
        match &self.content {
            Content::Whole(whole) => Some(whole),
            Content::Ledger(_) => None,
        }
    }

    /// `None` when it has another layout.
    pub fn whole_mut(&mut self) -> Option<&mut Whole> {
        match &mut self.content {
            Content::Whole(whole) => Some(whole),
            Content::Ledger(_) => None,
        }
    }

    pub fn ledger(&self) -> &Ledger {
        match &self.content {
            Content::Whole(whole) => &whole.maps.ledger,
            Content::Ledger(ledger) => ledger,
        }
    }

    pub fn ledger_mut(&mut self) -> &mut Ledger {
        match &mut self.content {
            Content::Whole(whole) => &mut whole.maps.ledger,
            Content::Ledger(ledger) => ledger,
        }
    }
}

impl Kernel {
    /// How many complete sets of other builds or configurations there are.
    ///
    /// # Errors
    ///
    /// When the folder of pins cannot be read.
    pub fn other_sets(&self) -> anyhow::Result<usize> {
        let others =
            self.pins.sets()?.into_iter().filter(|name| *name != self.set && !Pins::is_unfinished(name));
        Ok(others.count())
    }

    /// Opens the complete sets of other builds and configurations. Of one whose ledger has another layout nothing can be
    /// read, and that is said.
    ///
    /// # Errors
    ///
    /// When the folder of pins cannot be read.
    pub fn old_sets(&self) -> anyhow::Result<Vec<OldSet>> {
        let others =
            self.pins.sets()?.into_iter().filter(|name| *name != self.set && !Pins::is_unfinished(name));
        Ok(others
            .filter_map(|name| match OldSet::open(&self.pins, &name) {
                Ok(set) => Some(set),
                Err(error) => {
                    tracing::warn!(
                        set = name,
                        error = format!("{error:#}"),
                        "an older set cannot be read: what is left in its ring is lost, and not counted"
                    );
                    None
                }
            })
            .collect())
    }

    /// Takes sets out of force that the recording one has replaced, since what they knew was copied, and those that never recorded,
    /// which an agent left that was killed during an upgrade.
    ///
    /// # Errors
    ///
    /// When something stays.
    pub fn clear_away(&self, others: Vec<OldSet>) -> anyhow::Result<Vec<OldSet>> {
        let active = self.maps.recording()?;
        let recording = others.iter().find(|set| set.meta.epoch == active).map(|set| set.meta.state);
        let state =
            recording.unwrap_or_else(|| if active == self.meta.epoch { self.maps.state() } else { 0 });
        if state & set_state::WHOLE == 0 {
            return Ok(others);
        }
        let mut left = Vec::new();
        for mut set in others {
            if set.meta.epoch != active {
                self.pins.detach(&set.name)?;
                set.in_force = false;
            }
            left.push(set);
        }
        Ok(left)
    }

    /// Copies the state of the set that records from among `others`; `None` when it is not there. Returns whether that set knew
    /// all that those before it knew: what it lacks, a copy lacks.
    ///
    /// # Errors
    ///
    /// When it cannot be copied whole.
    pub fn inherit(&mut self, others: &[OldSet]) -> anyhow::Result<Option<bool>> {
        let active = self.maps.recording()?;
        let Some(old) = others.iter().find(|set| set.meta.epoch == active) else { return Ok(None) };
        let Some(whole) = old.whole() else { return Ok(None) };
        self.maps.inherit(&whole.maps).with_context(|| format!("copying the state of {}", old.name))?;
        Ok(Some(old.meta.state & set_state::WHOLE != 0))
    }

    /// Takes the programs of all other sets out of force; their maps stay until [`Kernel::forget_others`].
    ///
    /// # Errors
    ///
    /// When one stays.
    pub fn retire_others(&mut self) -> anyhow::Result<()> {
        self.maps.note_state(set_state::WHOLE)?;
        for other in self.pins.sets()?.iter().filter(|name| **name != self.set) {
            tracing::info!(set = other, "an older set of programs is out of force");
            self.pins.detach(other)?;
        }
        Ok(())
    }

    /// Takes away what is left of sets that are out of force, but for those in `but`.
    ///
    /// # Errors
    ///
    /// When something of one stays.
    pub fn forget_others(&self, but: &[String]) -> anyhow::Result<()> {
        for other in self.pins.sets()?.iter().filter(|name| **name != self.set && !but.contains(name)) {
            self.pins.remove(other)?;
        }
        Ok(())
    }
}

/// What the set is that records, where one of this build's layout does.
pub(super) fn recording(pins: &Pins) -> Option<SetMeta> {
    let active: Array<_, u64> = pinned_map(&pins.active_epoch()).ok()?.try_into().ok()?;
    let active = active.get(&0, 0).ok()?;
    let names = pins.sets().ok()?;
    names.iter().filter_map(|name| pins.find(name)).find_map(|folder| {
        let meta: Array<_, SetMeta> = pinned_map(&folder.map("META")).ok()?.try_into().ok()?;
        meta.get(&0, 0).ok().filter(|meta| meta.abi == ABI_VERSION && meta.epoch == active)
    })
}

/// Processes that sets of this build's layout hold stopped.
///
/// # Errors
///
/// When the folder cannot be read.
pub fn held_processes(pins: &Pins) -> anyhow::Result<Vec<u32>> {
    let mut held = Vec::new();
    for name in pins.sets()? {
        if let Ok(set) = OldSet::open(pins, &name)
            && let Some(whole) = set.whole()
        {
            let processes = whole.maps.processes().into_iter();
            held.extend(processes.filter(|(_, process)| process.held != 0).map(|(pid, _)| pid));
        }
    }
    Ok(held)
}

/// What the agent last told the kernel of the set that records; `None` when there is none below `folder`.
///
/// # Errors
///
/// When what is pinned cannot be read.
pub fn agent_state(folder: &Path) -> anyhow::Result<Option<AgentState>> {
    let (sets, active) = Pins::complete(folder)?;
    if sets.is_empty() {
        return Ok(None);
    }
    let active: Array<_, u64> = pinned_map(&active)?.try_into()?;
    let active = active.get(&0, 0)?;
    for set in sets {
        // What is no set, somebody else has put there.
        let Ok(map) = pinned_map(&set.map("META")) else { continue };
        let Ok(meta) = Array::<_, SetMeta>::try_from(map) else { continue };
        if meta.get(&0, 0)?.epoch == active {
            let agent: Array<_, AgentState> = pinned_map(&set.map("AGENT"))?.try_into()?;
            return Ok(Some(agent.get(&0, 0)?));
        }
    }
    Ok(None)
}

/// Whether a complete set is one to take over: of this layout, the one that records, and whole. Returns what it is.
pub(super) fn adoptable(pins: &Pins, folder: &SetFolder, full: bool) -> anyhow::Result<SetMeta> {
    let meta: Array<_, SetMeta> = pinned_map(&folder.map("META"))?.try_into()?;
    let meta = meta.get(&0, 0)?;
    anyhow::ensure!(meta.abi == ABI_VERSION, "its ABI is {}, this build's {ABI_VERSION}", meta.abi);
    let active: Array<_, u64> = pinned_map(&pins.active_epoch())?.try_into()?;
    let active = active.get(&0, 0)?;
    anyhow::ensure!(active == meta.epoch, "another set makes the records");
    // Opening them checks the types of all maps.
    Maps::open(folder, pins)?;
    for name in TRACEPOINTS.iter().chain(LSM.iter().chain([&AT_RETURN]).filter(|_| full)) {
        anyhow::ensure!(folder.program(name).exists(), "the program {name} is not pinned any more");
        PinnedLink::from_pin(folder.link(name))
            .with_context(|| format!("{name} is not attached any more"))?;
    }
    for name in ON_DEMAND {
        anyhow::ensure!(folder.program(name).exists(), "the program {name} is not pinned any more");
    }
    Ok(meta)
}

pub(super) fn pinned_map(path: &Path) -> anyhow::Result<Map> {
    let data = MapData::from_pin(path).with_context(|| format!("cannot open {}", path.display()))?;
    Map::from_map_data(data).with_context(|| format!("{} is of another type", path.display()))
}

pub(super) fn pinned_tracepoint(folder: &SetFolder, name: &str) -> anyhow::Result<RawTracePoint> {
    let path = folder.program(name);
    RawTracePoint::from_pin(&path).with_context(|| format!("cannot open {}", path.display()))
}

pub(super) fn pinned_lsm(folder: &SetFolder, name: &str) -> anyhow::Result<Lsm> {
    let path = folder.program(name);
    Lsm::from_pin(&path).with_context(|| format!("cannot open {}", path.display()))
}

/// One that runs when a function of the kernel returns.
pub(super) fn pinned_at_return(folder: &SetFolder, name: &str) -> anyhow::Result<FExit> {
    let path = folder.program(name);
    FExit::from_pin(&path).with_context(|| format!("cannot open {}", path.display()))
}

pub(super) fn ring(folder: &SetFolder, name: &str) -> anyhow::Result<Ring> {
    Ring::new(RingBuf::try_from(pinned_map(&folder.map(name))?)?)
}
