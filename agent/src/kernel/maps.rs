//! Typed access to the maps that the agent writes and reads.

use anyhow::{Context as _, Result};
use aya::{
    Pod,
    maps::{Array, HashMap, MapData},
};
use palisade_abi::{
    codes,
    hash::hash_path,
    ledger::{SetMeta, Slot},
    state::{AdmittedKey, AgentState},
};

use super::{Pins, pins::SetFolder, sets::pinned_map};

mod inherit;
mod ledger;
mod policies;
mod state;

pub use ledger::Ledger;
pub use policies::Policies;
pub use state::State;

/// Capacities of the maps.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Containers at a time.
    pub slots: u32,
    /// Processes of containers at a time.
    pub processes: u32,
    /// Exact paths over all revisions in force.
    pub rules: u32,
    /// Bytes of glob automata over all revisions in force.
    pub glob_bytes: u32,
    /// Mounts of containers, at a time.
    pub volumes: u32,
    /// Different names of mounts, each with its place.
    pub volume_names: u32,
    /// Bytes of the record ring, a power of two.
    pub ring_bytes: u32,
}

const BPF_ANY: u64 = 0;
const BPF_NOEXIST: u64 = 1;
const BPF_EXIST: u64 = 2;

const ROOM_FOR_SLOTS: &str = "no room for all containers; raise maps.slots";

/// The maps after loading.
pub struct Maps {
    pub ledger: Ledger,
    pub state: State,
    pub policies: Policies,
    agent: Array<MapData, AgentState>,
    meta: Array<MapData, SetMeta>,
    active_epoch: Array<MapData, u64>,
    admitted: HashMap<MapData, AdmittedKey, u32>,
    protected: HashMap<MapData, u64, u32>,
    errors: Array<MapData, u64>,
    hash_key: [u64; 2],
}

impl Maps {
    /// Opens the maps of a pinned set; one of another layout is an error.
    pub(super) fn open(folder: &SetFolder, pins: &Pins) -> Result<Self> {
        let take = |name: &str| pinned_map(&folder.map(name));
        let head: Array<_, SetMeta> = take("META")?.try_into()?;
        let meta = head.get(&0, 0)?;
        Ok(Self {
            ledger: Ledger::open(folder, &meta)?,
            state: State::open(folder, &meta)?,
            policies: Policies::open(folder, &meta)?,
            agent: take("AGENT")?.try_into()?,
            hash_key: meta.hash_key,
            meta: head,
            active_epoch: pinned_map(&pins.active_epoch())?.try_into()?,
            admitted: take("ADMITTED")?.try_into()?,
            protected: take("PROTECTED")?.try_into()?,
            errors: take("ERRORS")?.try_into()?,
        })
    }

    /// Reads what an agent before this one has written. Returns the number, name and slots of each revision that stays.
    ///
    /// # Errors
    ///
    /// When the maps cannot be read.
    pub fn read_back(&mut self) -> Result<Vec<(u32, u64, Vec<u64>)>> {
        let found = self.policies.read_back()?;
        self.state.read_back()?;
        Ok(found)
    }

    /// Makes a slot for a container that ran before the programs did, with the process of its entrypoint (0 when
    /// unknown). Returns whether it is new.
    pub fn add_slot(&mut self, slot: u64, workload_pid: u32, id: &str) -> Result<bool> {
        self.ledger.set_name(slot, id)?;
        self.ledger.add(slot, Slot { workload_pid, ..Slot::default() })
    }

    /// Forgets a slot whose cgroup is gone and whose processes have ended.
    pub fn remove_slot(&mut self, slot: u64) {
        self.policies.forget(slot);
        self.ledger.remove(slot);
        self.state.forget(slot);
    }

    /// Says which set of programs makes the records.
    pub fn record_as(&mut self, epoch: u64) -> Result<()> {
        self.active_epoch.set(0, epoch, BPF_ANY).context("cannot say which programs record")
    }

    /// Adds to what is said of the set: [`codes::set_state`].
    pub fn note_state(&mut self, state: u32) -> Result<()> {
        let meta = self.meta.get(&0, 0)?;
        let meta = SetMeta { state: meta.state | state, ..meta };
        self.meta.set(0, meta, BPF_ANY).context("cannot describe the set")
    }

    /// What is said of the set: [`codes::set_state`].
    pub fn set_state(&self) -> u32 {
        self.meta.get(&0, 0).map_or(0, |meta| meta.state)
    }

    /// The epoch of the set that makes the records.
    pub fn recording(&self) -> Result<u64> {
        self.active_epoch.get(&0, 0).context("cannot read which programs record")
    }

    /// Says that the agent is there, until when, and what it wants of containers that are not identified.
    pub fn renew_lease(&mut self, state: AgentState) -> Result<()> {
        self.agent.set(0, state, BPF_ANY).context("cannot renew the agent's lease")
    }

    /// Says that containers may not open a map or a program: `act` is the [`codes::tampering`] that they would do.
    pub fn protect(&mut self, act: u8, id: u32) -> Result<()> {
        let key = u64::from(act) << 32 | u64::from(id);
        self.protected.insert(key, 1, BPF_ANY).context("the map of protected objects is full")
    }

    /// Lets a file of an image start in containers that are not identified.
    pub fn admit(&mut self, path: &[u8], inode: u64) -> Result<()> {
        let key = AdmittedKey { path_hash: hash_path(self.hash_key, path), inode };
        self.admitted.insert(key, 1, BPF_ANY).context("the map of admitted files is full")
    }

    /// Takes back everything that an agent before this one admitted.
    pub fn admit_nothing(&mut self) {
        for key in self.admitted.keys().filter_map(Result::ok).collect::<Vec<_>>() {
            let _gone_is_gone = self.admitted.remove(&key);
        }
    }

    /// Takes back what [`Maps::admit`] gave.
    pub fn admit_no_more(&mut self, path: &[u8], inode: u64) {
        let key = AdmittedKey { path_hash: hash_path(self.hash_key, path), inode };
        let _gone_is_gone = self.admitted.remove(&key);
    }

    /// Whether something went wrong at this place in the kernel programs, a [`codes::error`].
    pub fn has_counted(&self, code: u32) -> bool {
        self.errors.get(&code, 0).is_ok_and(|count| count > 0)
    }

    /// The kernel's error counters that are not zero, by name.
    pub fn errors(&self) -> Vec<(&'static str, u64)> {
        codes::error::ALL
            .iter()
            .filter_map(|(code, name)| {
                let count = self.errors.get(code, 0).ok()?;
                (count > 0).then_some((*name, count))
            })
            .collect()
    }
}

/// Copies the entries of a map that `wanted` takes and that the other has not.
fn copy<K: Pod, V: Pod>(
    from: &HashMap<MapData, K, V>,
    to: &mut HashMap<MapData, K, V>,
    wanted: impl Fn(&K, &V) -> bool,
) -> Result<()> {
    for entry in from.iter() {
        let (key, value) = entry?;
        if wanted(&key, &value) && to.get(&key, 0).is_err() {
            to.insert(key, value, BPF_ANY)?;
        }
    }
    Ok(())
}
