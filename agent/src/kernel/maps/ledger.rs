//! How many records a set has made of each slot, and how many of them are delivered or reported. Its layout is older and lasts
//! longer than the rest of a set ([`LEDGER_VERSION`]), so that an agent of another version can say what it cannot read.

use anyhow::{Context as _, Result, bail};
use aya::maps::{HashMap, MapData, PerCpuHashMap, PerCpuValues};
use palisade_abi::{
    LEDGER_VERSION,
    ledger::{Account, LANES, SetMeta, Slot},
    record::CGROUP_NAME,
    state::PROBE_SLOT,
};

use super::{BPF_ANY, BPF_NOEXIST, ROOM_FOR_SLOTS, copy};
use crate::kernel::{pins::SetFolder, sets::pinned_map};

/// The maps of a set that count.
pub struct Ledger {
    pub(super) slots: HashMap<MapData, u64, Slot>,
    pub(super) slot_lanes: Option<PerCpuHashMap<MapData, u64, [u64; LANES]>>,
    pub(super) names: HashMap<MapData, u64, [u8; CGROUP_NAME]>,
    accounts: HashMap<MapData, u64, Account>,
}

impl Ledger {
    /// Opens the ledger of a pinned set.
    ///
    /// # Errors
    ///
    /// When it has another layout.
    pub(in crate::kernel) fn open(folder: &SetFolder, meta: &SetMeta) -> Result<Self> {
        let version = meta.versions.ledger;
        if version != LEDGER_VERSION {
            bail!("its ledger is of version {version}, this build's of {LEDGER_VERSION}");
        }
        let take = |name: &str| pinned_map(&folder.map(name));
        let lanes = folder.map("SLOT_LANES");
        let slot_lanes =
            lanes.exists().then(|| anyhow::Ok(PerCpuHashMap::try_from(pinned_map(&lanes)?)?)).transpose()?;
        Ok(Self {
            slots: take("SLOTS")?.try_into()?,
            slot_lanes,
            names: take("NAMES")?.try_into()?,
            accounts: take("ACCOUNTS")?.try_into()?,
        })
    }

    /// Makes a slot unless it is there; returns whether it is new.
    ///
    /// # Errors
    ///
    /// When there is no room.
    pub(super) fn add(&mut self, number: u64, slot: Slot) -> Result<bool> {
        // The lanes first: who sees the slot numbers records in them.
        if let Some(lanes) = &mut self.slot_lanes {
            let zero = vec![[0; LANES]; aya::util::nr_cpus().map_err(|(_, error)| error)?];
            if lanes.insert(number, PerCpuValues::try_from(zero)?, BPF_NOEXIST).is_err()
                && lanes.get(&number, 0).is_err()
            {
                bail!("the map of lanes is full; raise maps.slots in the agent's configuration");
            }
        }
        if self.slots.insert(number, slot, BPF_NOEXIST).is_ok() {
            return Ok(true);
        }
        if self.slots.get(&number, 0).is_err() {
            bail!("the map of slots is full; raise maps.slots in the agent's configuration");
        }
        Ok(false)
    }

    /// Notes the name of a slot's cgroup, or of its container.
    ///
    /// # Errors
    ///
    /// When there is no room.
    pub(super) fn set_name(&mut self, slot: u64, id: &str) -> Result<()> {
        let mut name = [0; CGROUP_NAME];
        let length = id.len().min(CGROUP_NAME);
        name[..length].copy_from_slice(&id.as_bytes()[..length]);
        self.names.insert(slot, name, BPF_ANY).context("the map of names is full; raise maps.slots")
    }

    /// Copies the names of an old set's slots.
    ///
    /// # Errors
    ///
    /// When there is no room.
    pub(super) fn inherit_names(&mut self, old: &Self) -> Result<()> {
        copy(&old.names, &mut self.names, |slot, _| *slot != PROBE_SLOT).context(ROOM_FOR_SLOTS)
    }

    pub(super) fn remove(&mut self, slot: u64) {
        let _gone_is_gone = self.slots.remove(&slot);
        let _as_above = self.names.remove(&slot);
        if let Some(lanes) = &mut self.slot_lanes {
            let _as_above = lanes.remove(&slot);
        }
    }

    pub fn slot(&self, slot: u64) -> Option<Slot> {
        self.slots.get(&slot, 0).ok()
    }

    /// All slots with what the kernel keeps about them.
    pub fn slots(&self) -> Vec<(u64, Slot)> {
        self.slots.iter().filter_map(Result::ok).collect()
    }

    /// The name of a slot's cgroup, or of its container.
    pub fn name(&self, slot: u64) -> String {
        let name = self.names.get(&slot, 0).unwrap_or([0; CGROUP_NAME]);
        let used = name.split(|byte| *byte == 0).next().unwrap_or_default();
        String::from_utf8_lossy(used).into_owned()
    }

    /// Records that were lost of a slot so far.
    pub fn lost(&self, slot: u64) -> u64 {
        self.slots.get(&slot, 0).map_or(0, |slot| slot.lost)
    }

    /// The last numbers that were given in a slot, by lane.
    pub fn last_numbers(&self, slot: u64) -> Vec<(u32, u64)> {
        let Some(lanes) = &self.slot_lanes else {
            return vec![(0, self.slots.get(&slot, 0).map_or(0, |slot| slot.sequence))];
        };
        let Ok(values) = lanes.get(&slot, 0) else { return Vec::new() };
        let of_processor = |(cpu, lanes): (usize, &[u64; LANES])| {
            let numbered = |(context, last): (usize, &u64)| (((cpu << 4 | context) + 1) as u32, *last);
            lanes.iter().enumerate().map(numbered).collect::<Vec<_>>()
        };
        values.iter().enumerate().flat_map(of_processor).collect()
    }

    /// The account of a slot.
    pub fn account(&self, slot: u64) -> Account {
        self.accounts.get(&slot, 0).unwrap_or_default()
    }

    /// Slots whose account is not balanced or not closed.
    pub fn accounts(&self) -> Vec<(u64, Account)> {
        self.accounts.iter().filter_map(Result::ok).collect()
    }

    /// Changes the account of a slot. One that is closed and balanced is forgotten; returns whether it was.
    pub fn book(&mut self, slot: u64, change: impl FnOnce(&mut Account)) -> bool {
        let mut account = self.account(slot);
        change(&mut account);
        // At a collector: what is in the spool may be lost with it.
        let balanced = account.made != 0 && account.delivered + account.from_memory >= account.made;
        if balanced || account == Account::default() {
            let _may_never_have_been_written = self.accounts.remove(&slot);
        } else if let Err(error) = self.accounts.insert(slot, account, BPF_ANY) {
            tracing::warn!(
                slot,
                %error,
                "no room for the account of a slot; if the agent is killed now, its records are not counted"
            );
        }
        balanced
    }

    /// Records that were numbered in a slot so far.
    pub fn records_made(&self, slot: u64) -> u64 {
        match &self.slot_lanes {
            Some(lanes) => lanes
                .get(&slot, 0)
                .map(|values| values.iter().flat_map(|lanes| lanes.iter()).sum())
                .unwrap_or(0),
            None => self.slots.get(&slot, 0).map(|slot| slot.sequence).unwrap_or(0),
        }
    }
}
