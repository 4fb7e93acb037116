//! The process table: what each process of a container last executed.

use std::collections::HashMap;

/// Names a process on this boot.
pub type ProcessKey = (u32, u64);

/// Processes of containers, and what they execute.
#[derive(Default)]
pub struct Processes {
    executables: HashMap<u32, (u64, String)>,
}

/// Difference between the start times of procfs (in ticks of 10 ms) and of the kernel that is taken for equal.
const TICK_NANOSECONDS: u64 = 20_000_000;

impl Processes {
    /// Takes what runs already from procfs.
    pub fn seed(&mut self, pids: &[u32]) {
        for pid in pids {
            if let Some((start, executable)) = from_procfs(*pid) {
                self.executables.insert(*pid, (start, executable));
            }
        }
    }

    pub fn forked(&mut self, parent: ProcessKey, child: ProcessKey) {
        if let Some(executable) = self.known(parent).map(str::to_owned) {
            self.executables.insert(child.0, (child.1, executable));
        }
    }

    pub fn executed(&mut self, process: ProcessKey, executable: &str) {
        self.executables.insert(process.0, (process.1, executable.to_owned()));
    }

    /// Forgets a process and returns what it executed.
    pub fn exited(&mut self, process: ProcessKey) -> String {
        let executable = self.known(process).unwrap_or_default().to_owned();
        self.executables.remove(&process.0);
        executable
    }

    /// What a process executes, from the table or, for a process of the host, from procfs.
    pub fn executable(&self, process: ProcessKey) -> String {
        if let Some(known) = self.known(process) {
            return known.to_owned();
        }
        match from_procfs(process.0) {
            Some((start, executable)) if start.abs_diff(process.1) < TICK_NANOSECONDS => executable,
            _ => String::new(),
        }
    }

    fn known(&self, (pid, start): ProcessKey) -> Option<&str> {
        let (known, executable) = self.executables.get(&pid)?;
        (known.abs_diff(start) < TICK_NANOSECONDS).then_some(executable)
    }

    pub fn len(&self) -> usize {
        self.executables.len()
    }
}

/// The process that has run longest.
pub fn oldest(pids: &[u32]) -> Option<u32> {
    pids.iter().filter_map(|pid| Some((from_procfs(*pid)?.0, *pid))).min().map(|(_, pid)| pid)
}

/// Start in nanoseconds since boot, and executable as procfs shows it.
fn from_procfs(pid: u32) -> Option<(u64, String)> {
    let process = procfs::process::Process::new(i32::try_from(pid).ok()?).ok()?;
    let ticks = process.stat().ok()?.starttime;
    let start = ticks.saturating_mul(1_000_000_000 / procfs::ticks_per_second());
    let executable = process.exe().map(|path| path.to_string_lossy().into_owned()).unwrap_or_default();
    Some((start, executable))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reused_pid_is_another_process() {
        let mut processes = Processes::default();
        processes.executed((7, 1_000_000_000), "/bin/a");
        processes.forked((7, 1_000_000_000), (8, 2_000_000_000));
        assert_eq!(processes.executable((8, 2_000_000_000)), "/bin/a");
        assert_eq!(processes.exited((8, 2_000_000_000)), "/bin/a");
        assert_eq!(processes.known((7, 9_000_000_000)), None);
    }
}
