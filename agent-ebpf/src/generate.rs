//! Records without anything having happened, on the way that all take: for measuring delivery. Never in a build that is shipped.

use aya_ebpf::{helpers::generated::bpf_probe_read_kernel, macros::map, maps::Array};
use palisade_abi::{
    codes::kind,
    record::{ExitRecord, ForkRecord, Header, ProcessPart, SmallExec},
};

use crate::record::{self, Lane};

/// What is generated: one process's fork, exec and exit, but for their numbers, times and process ids.
#[map]
pub static FORK_TEMPLATE: Array<ForkRecord> = Array::with_max_entries(1, 0);
#[map]
pub static EXEC_TEMPLATE: Array<SmallExec> = Array::with_max_entries(1, 0);
#[map]
pub static EXIT_TEMPLATE: Array<ExitRecord> = Array::with_max_entries(1, 0);

/// Most processes at once.
const MOST: u64 = 64;

/// Makes the records of `processes` processes of `slot`, which have ids from `first` on. Returns how many records there was room for.
pub fn generate(slot: u64, processes: u64, first: u64) -> i32 {
    let mut made = 0;
    let mut process = 0;
    while process < MOST && process < processes {
        let pid = (first + process) as u32;
        made += one(slot, pid, kind::FORK, Lane::Fork, &FORK_TEMPLATE);
        made += one(slot, pid, kind::EXEC, Lane::Exec, &EXEC_TEMPLATE);
        made += one(slot, pid, kind::EXIT, Lane::Exit, &EXIT_TEMPLATE);
        process += 1;
    }
    made
}

/// `T` begins with a header and the process.
#[inline(always)]
fn one<T: 'static>(slot: u64, pid: u32, kind: u16, lane: Lane, template: &'static Array<T>) -> i32 {
    let Some(template) = template.get_ptr(0) else { return 0 };
    let Some((mut entry, header)) = record::reserve::<T>(slot, kind, lane, false) else { return 0 };
    let place = entry.as_mut_ptr().cast::<u8>();
    // SAFETY: the place has the template's size, and begins with a header and the process, as all three records do.
    unsafe {
        bpf_probe_read_kernel(place.cast(), size_of::<T>() as u32, template.cast());
        let process = place.add(size_of::<Header>()).cast::<ProcessPart>();
        (&raw mut (*process).pid).write(pid);
        (&raw mut (*process).tid).write(pid);
        (&raw mut (*process).start_time).write(header.time);
        place.cast::<Header>().write(header);
    }
    record::submit(entry, false);
    1
}
