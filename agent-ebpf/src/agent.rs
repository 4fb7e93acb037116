//! The agent, as far as the programs know it: its process, its settings, and the lease by which it shows that it is there.

use aya_ebpf::helpers::bpf_ktime_get_boot_ns;
use palisade_abi::state::AgentState;

use crate::maps::AGENT;

#[inline(always)]
/// What it has said of itself.
pub fn state() -> Option<&'static AgentState> {
    AGENT.get(0)
}

/// Whether the agent is there: its process has not ended, and it renews its lease.
#[inline(always)]
pub fn lives(agent: &AgentState) -> bool {
    // SAFETY: the helper has no preconditions.
    agent.gone == 0 && unsafe { bpf_ktime_get_boot_ns() } < agent.lease_until
}

/// The process `pid` has ended: if it was the agent, nothing waits for its lease.
#[inline(always)]
pub fn ended(pid: u32) {
    if let Some(agent) = AGENT.get_ptr_mut(0) {
        // SAFETY: the pointer comes from a map lookup; one word, which the agent writes as long as it lives.
        unsafe {
            if (&raw const (*agent).pid).read_volatile() == pid {
                (&raw mut (*agent).gone).write_volatile(1);
            }
        }
    }
}
