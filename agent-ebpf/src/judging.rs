//! The memory in which one task judges: taken from what is free, and given back. So no other task can overwrite it, whatever preempts
//! what. It also carries what the steps of a judgement hand to each other: they are functions that the verifier checks one by one (global
//! functions), which can only take and return numbers: that of the claim is one.

use palisade_abi::{PATH_CAPACITY, codes::error};

use crate::{
    count,
    maps::{FREE_SCRATCH, SCRATCH},
    scratch::{Scratch, Walk},
};

/// Words of what is cleared when memory is claimed: all before what its users fill themselves.
const CLEARED: usize = core::mem::offset_of!(Scratch, turns) / 8;

/// Memory that belongs to the current task for as long as this stands.
pub struct Claim {
    /// By it the steps of a judgement find the memory.
    pub number: u64,
    pub scratch: *mut Scratch,
}

/// Claims memory for the current task. `None` is counted.
#[inline(always)]
pub fn claim() -> Option<Claim> {
    let Ok(Some(free)) = FREE_SCRATCH.pop() else {
        count::error(error::SCRATCH_FULL);
        return None;
    };
    let number = u64::from(free);
    let scratch = of(number)?;
    // SAFETY: the memory is claimed by nobody else; what is cleared is a prefix of it, of whole words.
    unsafe {
        let mut word = 0;
        while word < CLEARED {
            scratch.cast::<u64>().add(word).write_volatile(0);
            word += 1;
        }
        (&raw mut (*scratch).script_start).write(PATH_CAPACITY as u16);
        (&raw mut (*scratch).executable).write(Walk::NOTHING);
        (&raw mut (*scratch).working_directory).write(Walk::NOTHING);
    }
    Some(Claim { number, scratch })
}

/// The memory of a claim.
#[inline(always)]
pub fn of(claim: u64) -> Option<*mut Scratch> {
    SCRATCH.get_ptr_mut(claim as u32)
}

/// Times that it is tried to give memory back: in newer kernels a map's lock (`rqspinlock`) may not be had in time.
const ATTEMPTS: u32 = 4;

/// Gives it back. What cannot be is never claimed again, and counted.
impl Drop for Claim {
    #[inline(always)]
    fn drop(&mut self) {
        let mut attempt = 0;
        while attempt < ATTEMPTS {
            if FREE_SCRATCH.push(&(self.number as u32), 0).is_ok() {
                return;
            }
            attempt += 1;
        }
        count::error(error::SCRATCH_LOST);
    }
}
