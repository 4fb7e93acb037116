//! The kernel's own counters, read without the agent: what it has numbered in a slot.

use std::path::Path;

use anyhow::{Context as _, Result};
use aya::maps::{HashMap, Map, MapData, PerCpuHashMap};
use palisade_abi::ledger::{LANES, Slot};

/// A map of the set of programs that is pinned in `set`.
pub fn map(set: &Path, name: &str) -> Result<Map> {
    let path = set.join("maps").join(name);
    let data = MapData::from_pin(&path).with_context(|| format!("cannot open {}", path.display()))?;
    Ok(Map::from_map_data(data)?)
}

/// Records that were numbered in a slot of the set of programs that is pinned in `set`.
pub fn made(set: &Path, slot: u64) -> Result<u64> {
    if set.join("maps/SLOT_LANES").exists() {
        let lanes: PerCpuHashMap<_, u64, [u64; LANES]> = map(set, "SLOT_LANES")?.try_into()?;
        return Ok(lanes.get(&slot, 0)?.iter().flatten().sum());
    }
    Ok(of_slot(set, slot)?.sequence)
}

/// What the kernel keeps about a container.
pub fn of_slot(set: &Path, slot: u64) -> Result<Slot> {
    let slots: HashMap<_, u64, Slot> = map(set, "SLOTS")?.try_into()?;
    slots.get(&slot, 0).with_context(|| format!("slot {slot} is not there"))
}
