//! Signals to the current process: the one that ends it, and those that stop it until it is settled what it may do.

use aya_ebpf::helpers::bpf_send_signal;
use palisade_abi::{
    codes::{action, error, verdict},
    offsets::ABSENT,
    state::Process,
};

use crate::{
    count,
    maps::{PROCESSES, offset},
    scratch::Scratch,
    task,
};

const SIGKILL: u32 = 9;
const SIGCONT: u32 = 18;
const SIGSTOP: u32 = 19;

/// Ends the current process before it returns to user space.
#[inline(always)]
pub fn kill() -> bool {
    // SAFETY: the helper has no preconditions; the signal goes to the current process.
    let sent = unsafe { bpf_send_signal(SIGKILL) } == 0;
    if !sent {
        count::error(error::KILL_FAILED);
    }
    sent
}

/// Stops the current process before it returns to user space, until the agent has settled what it may do. One that
/// cannot be stopped dies; returns whether it is stopped.
#[inline(always)]
pub fn stop(entry: *mut Process) -> bool {
    // SAFETY: the pointer comes from a map lookup; the entry belongs to this process.
    unsafe { (&raw mut (*entry).held).write_volatile(1) };
    send_stop()
}

/// Sends the signal that stops the current process, or ends it; returns whether it is stopped.
#[inline(always)]
fn send_stop() -> bool {
    // SAFETY: the helper has no preconditions; the signal goes to the current process.
    if !task::is_traced() && unsafe { bpf_send_signal(SIGSTOP) } == 0 {
        return true;
    }
    count::error(error::STOP_FAILED);
    kill();
    false
}

/// A task that comes back from having been stopped: one that is held goes on being so, whatever let it go.
#[inline(always)]
pub fn woken() {
    let Some(entry) = PROCESSES.get_ptr_mut(task::current_pid()) else { return };
    // SAFETY: the pointer comes from a map lookup; the entry belongs to this process, and the agent changes it before it lets it go.
    if unsafe { (&raw const (*entry).held).read_volatile() } == 0 {
        return;
    }
    if offset!(mutex_owner) == ABSENT {
        // `PREEMPT_RT`, where the lock of the signals is held with interrupts on, and the signal would wait for it.
        return;
    }
    count::error(error::HELD_WOKEN);
    send_stop();
}

/// The same at the tracepoint, where it is recorded.
///
/// # Safety
///
/// `scratch` must be the current task's claimed memory.
#[inline(always)]
pub unsafe fn hold(scratch: *mut Scratch) {
    if let Some(entry) = PROCESSES.get_ptr_mut(task::current_pid())
        && stop(entry)
    {
        return;
    }
    // Without an entry nobody would know whom to let go.
    // SAFETY: the caller's promise.
    unsafe {
        (*scratch).decision.verdict = verdict::DENIED;
        if kill() {
            (*scratch).decision.action = action::KILLED;
        }
    }
}

/// Lets the current process go on, which was stopped until its arguments were judged: nothing has come of the signal yet, and
/// this one takes it back.
#[inline(always)]
pub fn go_on() {
    if let Some(entry) = PROCESSES.get_ptr_mut(task::current_pid()) {
        // SAFETY: the pointer comes from a map lookup; the entry belongs to this process.
        unsafe { (&raw mut (*entry).held).write_volatile(0) };
    }
    // SAFETY: the helper has no preconditions; the signal goes to the current process.
    if unsafe { bpf_send_signal(SIGCONT) } != 0 {
        count::error(error::STOP_FAILED);
        kill();
    }
}
