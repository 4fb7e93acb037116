//! Sets of programs and maps as they are found pinned: whether one can be taken over, and what is done with those of other
//! builds and configurations.

use std::path::Path;

use anyhow::Context as _;
use aya::{
    maps::{Array, Map, MapData, RingBuf},
    programs::links::PinnedLink,
};
use palisade_abi::{
    LEDGER_VERSION, POLICY_VERSION, RECORDS_VERSION, STATE_VERSION, VERSIONS, Versions, codes::set_state,
    ledger::SetMeta, state::AgentState,
};

use super::{Kernel, Ledger, Maps, Pins, Policies, Ring, State, Tier, pins::SetFolder, programs};

/// A set that another agent left and that makes no records any more. What of it this build can read depends on its versions.
pub struct OldSet {
    pub name: String,
    pub meta: SetMeta,
    pub ledger: Ledger,
    /// `None` when its state has another layout.
    pub state: Option<State>,
    /// `None` when its policies or its state have another layout.
    pub policies: Option<Policies>,
    /// `None` when its records or its state have another layout: then it can only be said how many there were.
    pub records: Option<OldRecords>,
    /// Whether its programs still judge.
    pub in_force: bool,
}

/// What is left in the ring of an old set.
pub struct OldRecords {
    pub ring: Ring,
    /// Bytes of the ring.
    pub ring_bytes: usize,
}

impl OldRecords {
    fn open(folder: &SetFolder, meta: &SetMeta) -> anyhow::Result<Self> {
        let version = meta.versions.records;
        anyhow::ensure!(
            version == RECORDS_VERSION,
            "its records are of version {version}, this build's of {RECORDS_VERSION}"
        );
        let size = MapData::from_pin(folder.map("RECORDS"))?.info()?.max_entries();
        Ok(Self { ring: ring(folder, "RECORDS")?, ring_bytes: size as usize })
    }
}

impl OldSet {
    fn open(pins: &Pins, name: &str) -> anyhow::Result<Self> {
        let folder = pins.find(name).context("it is gone")?;
        let meta: Array<_, SetMeta> = pinned_map(&folder.map("META"))?.try_into()?;
        let meta = meta.get(&0, 0)?;
        let ledger = Ledger::open(&folder, &meta)?;
        let state = readable(name, State::open(&folder, &meta), "what it knows is found out anew");
        // Without its state nothing says whose the rest is.
        let (mut policies, mut records) = (None, None);
        if state.is_some() {
            let otherwise = "it stays in force until all is compiled anew";
            policies = readable(name, Policies::open(&folder, &meta), otherwise);
            let otherwise = "what is left in its ring is lost, and counted";
            records = readable(name, OldRecords::open(&folder, &meta), otherwise);
        }
        Ok(Self { name: name.to_owned(), meta, ledger, state, policies, records, in_force: true })
    }

    /// Whether this build can read what it knows, and by what it decides.
    pub fn can_be_copied(&self) -> bool {
        self.state.is_some() && self.policies.is_some()
    }
}

/// What can be read; else that is said, with what comes of it.
fn readable<T>(set: &str, part: anyhow::Result<T>, otherwise: &str) -> Option<T> {
    part.inspect_err(|error| {
        tracing::warn!(set, error = format!("{error:#}"), "an older set cannot be read whole: {otherwise}");
    })
    .ok()
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
            recording.unwrap_or_else(|| if active == self.meta.epoch { self.maps.set_state() } else { 0 });
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

    /// Copies the state of the set that records from among `others`, with its policies if this build can read them; `None` when it is not
    /// there, or its state has another layout. Returns whether this set then knows all that any knew: what the old one lacks, a copy lacks.
    ///
    /// # Errors
    ///
    /// When it cannot be copied whole.
    pub fn inherit(&mut self, others: &[OldSet]) -> anyhow::Result<Option<bool>> {
        let active = self.maps.recording()?;
        let Some(old) = others.iter().find(|set| set.meta.epoch == active) else { return Ok(None) };
        let Some(state) = &old.state else { return Ok(None) };
        self.maps
            .inherit(state, old.policies.as_ref(), &old.ledger)
            .with_context(|| format!("copying the state of {}", old.name))?;
        Ok(Some(old.policies.is_some() && old.meta.state & set_state::WHOLE != 0))
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

/// What the set is that records, where this build can read what it knows or by what it decides.
pub(super) fn recording(pins: &Pins) -> Option<SetMeta> {
    let active: Array<_, u64> = pinned_map(&pins.active_epoch()).ok()?.try_into().ok()?;
    let active = active.get(&0, 0).ok()?;
    let names = pins.sets().ok()?;
    names.iter().filter_map(|name| pins.find(name)).find_map(|folder| {
        let meta: Array<_, SetMeta> = pinned_map(&folder.map("META")).ok()?.try_into().ok()?;
        let same = |meta: &SetMeta| {
            let Versions { state, policy, ledger, .. } = meta.versions;
            ledger == LEDGER_VERSION && (state == STATE_VERSION || policy == POLICY_VERSION)
        };
        meta.get(&0, 0).ok().filter(|meta| same(meta) && meta.epoch == active)
    })
}

/// Processes that sets hold stopped whose state has this build's layout.
///
/// # Errors
///
/// When the folder cannot be read.
pub fn held_processes(pins: &Pins) -> anyhow::Result<Vec<u32>> {
    let mut held = Vec::new();
    for name in pins.sets()? {
        if let Ok(set) = OldSet::open(pins, &name)
            && let Some(state) = set.state
        {
            let processes = state.processes().into_iter();
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
        let meta = meta.get(&0, 0)?;
        if meta.epoch == active {
            anyhow::ensure!(
                meta.versions.state == STATE_VERSION,
                "the programs that record are of another version ({}), this build of {VERSIONS}: ask the agent that runs, with its own `palisade-agent ready`",
                meta.versions
            );
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
    anyhow::ensure!(
        meta.versions == VERSIONS,
        "it is of other versions ({}), this build of {VERSIONS}",
        meta.versions
    );
    let active: Array<_, u64> = pinned_map(&pins.active_epoch())?.try_into()?;
    let active = active.get(&0, 0)?;
    anyhow::ensure!(active == meta.epoch, "another set makes the records");
    // Opening them checks the types of all maps.
    Maps::open(folder, pins)?;
    let tier = if full { Tier::Full } else { Tier::Fallback };
    for name in programs::of(tier).map(|row| row.name) {
        anyhow::ensure!(folder.program(name).exists(), "the program {name} is not pinned any more");
    }
    for name in programs::attached(tier).map(|row| row.name) {
        PinnedLink::from_pin(folder.link(name))
            .with_context(|| format!("{name} is not attached any more"))?;
    }
    Ok(meta)
}

pub(super) fn pinned_map(path: &Path) -> anyhow::Result<Map> {
    let data = MapData::from_pin(path).with_context(|| format!("cannot open {}", path.display()))?;
    Map::from_map_data(data).with_context(|| format!("{} is of another type", path.display()))
}

pub(super) fn ring(folder: &SetFolder, name: &str) -> anyhow::Result<Ring> {
    Ring::new(RingBuf::try_from(pinned_map(&folder.map(name))?)?)
}
