//! The kernel's own counters, read without the agent: what it has numbered in a slot.

use std::{ffi::CString, os::unix::ffi::OsStrExt as _, path::Path};

use anyhow::{Context as _, Result, ensure};
use palisade_abi::maps::{LANES, Slot};

// Commands of bpf(2), include/uapi/linux/bpf.h.
const MAP_LOOKUP_ELEM: libc::c_int = 1;
const OBJ_GET: libc::c_int = 7;

/// Records that were numbered in a slot of the set of programs that is pinned in `set`.
pub fn made(set: &Path, slot: u64) -> Result<u64> {
    let words = |bytes: &[u8]| -> Vec<u64> {
        bytes.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().unwrap_or_default())).collect()
    };
    let lanes = set.join("maps/SLOT_LANES");
    if lanes.exists() {
        let value = lookup(&lanes, slot, LANES * size_of::<u64>() * possible_processors()?)?;
        return Ok(words(&value).into_iter().sum());
    }
    let value = lookup(&set.join("maps/SLOTS"), slot, size_of::<Slot>())?;
    Ok(words(&value)[std::mem::offset_of!(Slot, sequence) / size_of::<u64>()])
}

fn possible_processors() -> Result<usize> {
    let text = std::fs::read_to_string("/sys/devices/system/cpu/possible")?;
    let last = text.trim().rsplit(['-', ',']).next().and_then(|last| last.parse::<usize>().ok());
    Ok(last.with_context(|| format!("{text:?} is no list of processors"))? + 1)
}

/// The value of `key` in a pinned map.
fn lookup(path: &Path, key: u64, length: usize) -> Result<Vec<u8>> {
    use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
    let name = CString::new(path.as_os_str().as_bytes())?;
    // pathname, bpf_fd, file_flags
    let attributes = [name.as_ptr() as u64, 0];
    // SAFETY: the kernel reads the attributes and the name, which live until it returns.
    let map = unsafe { libc::syscall(libc::SYS_bpf, OBJ_GET, attributes.as_ptr(), size_of_val(&attributes)) };
    ensure!(map >= 0, "cannot open {}: {}", path.display(), std::io::Error::last_os_error());
    // SAFETY: the kernel has just made it for us.
    let map = unsafe { OwnedFd::from_raw_fd(i32::try_from(map)?) };
    let mut value = vec![0_u8; length];
    // map_fd, key, value, flags
    let attributes =
        [u64::try_from(map.as_raw_fd())?, std::ptr::from_ref(&key) as u64, value.as_mut_ptr() as u64, 0];
    // SAFETY: the value has the size that the map's values have, of all processors where it has one for each.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, MAP_LOOKUP_ELEM, attributes.as_ptr(), size_of_val(&attributes))
    };
    ensure!(result == 0, "slot {key} is not in {}: {}", path.display(), std::io::Error::last_os_error());
    Ok(value)
}
