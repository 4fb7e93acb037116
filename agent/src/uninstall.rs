//! Stopping an agent for good, with or without what it put in force.

use std::{process::ExitCode, time::Duration};

use anyhow::{Context as _, Result};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::{
    config::Config,
    kernel::{self, Pins},
    processes,
};

/// How long a running agent may take to deliver what it has, beyond its own deadline.
const BEYOND_DRAIN: Duration = Duration::from_secs(5);

/// Stops the agent that runs with this configuration, and removes everything that any version pinned unless
/// `keep_enforcing`. Says what was done and what stays.
///
/// # Errors
///
/// When the agent does not end, or something cannot be removed.
pub fn run(config: &Config, keep_enforcing: bool) -> Result<ExitCode> {
    let Some(folder) = config.pins() else {
        println!("pins: none, so nothing outlives the agent and there is nothing to remove");
        return Ok(ExitCode::SUCCESS);
    };
    anyhow::ensure!(rustix::process::geteuid().is_root(), "uninstalling needs root on the host");
    if !folder.exists() {
        println!("{} is not there: nothing is in force", folder.display());
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(pid) = Pins::holder(folder)? {
        let patience = Duration::from_secs(config.drain_seconds) + BEYOND_DRAIN;
        stop(pid, patience).with_context(|| format!("cannot stop the agent, process {pid}"))?;
        println!("stopped the agent, process {pid}");
    }
    // Waits for the lock: an orchestrator may have started the agent again.
    let pins = Pins::open(folder)?;
    if keep_enforcing {
        for set in pins.sets()? {
            println!("stays in force: {}/{set}", folder.display());
        }
        println!("records wait in the kernel's ring until an agent reads them; `uninstall` ends it");
        return Ok(ExitCode::SUCCESS);
    }
    // Whom a killed agent has left stopped: once the programs are gone nobody objects to his going on.
    let held = kernel::held_processes(&pins)?;
    for set in pins.remove_all()? {
        println!("removed {}/{set}", folder.display());
    }
    for pid in held.into_iter().filter(|pid| processes::is_stopped(*pid)) {
        if let Some(number) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
            let _it_has_ended = rustix::process::kill_process(number, Signal::CONT);
            println!("let go process {pid}, which was held");
        }
    }
    println!("removed {}", folder.display());
    println!(
        "left: the configuration, {}, {} with what is not delivered, and what the collector stored",
        config.profiles.display(),
        config.spool.path.display()
    );
    Ok(ExitCode::SUCCESS)
}

/// Ends a process with SIGTERM and waits until it is gone.
fn stop(pid: u32, patience: Duration) -> Result<()> {
    let Some(number) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Ok(()) };
    let handle = match pidfd_open(number, PidfdFlags::empty()) {
        Ok(handle) => handle,
        Err(rustix::io::Errno::SRCH) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    pidfd_send_signal(&handle, Signal::TERM)?;
    // The handle is readable when the process has ended.
    let mut wanted = [rustix::event::PollFd::new(&handle, rustix::event::PollFlags::IN)];
    let timeout = rustix::event::Timespec::try_from(patience)?;
    anyhow::ensure!(rustix::event::poll(&mut wanted, Some(&timeout))? > 0, "it does not end");
    Ok(())
}
