//! Whether the agent of this node enforces, as its own self-probe found it: read from what is pinned, so that it can be
//! asked without the agent's help.

use std::process::ExitCode;

use anyhow::Result;

use crate::{config::Config, kernel, records::now_since_boot};

/// Prints one line and exits accordingly.
///
/// # Errors
///
/// When what is pinned cannot be read.
pub fn run(config: &Config) -> Result<ExitCode> {
    let Some(folder) = config.pins() else {
        println!("not known: with pins: none only the agent itself can tell");
        return Ok(ExitCode::FAILURE);
    };
    let state = kernel::agent_state(folder)?;
    let (ready, why) = match state {
        None => (false, "nothing is in force"),
        Some(state) if state.lease_until < now_since_boot() => (false, "the agent gives no sign of life"),
        Some(state) if state.failing != 0 => {
            (false, "the agent's self-probe fails, or has not been made yet")
        }
        Some(_) => (true, "what profiles say is enforced"),
    };
    println!("{}: {why}", if ready { "ready" } else { "not ready" });
    Ok(if ready { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
