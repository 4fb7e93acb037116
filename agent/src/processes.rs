//! The process table: what each process of a container last executed, and who is above it.
//!
//! It follows the kernel's records. What they did not tell (the process is older than the agent, or a record was
//! lost) is asked of procfs when it is needed, and marked.

use std::collections::{HashMap, HashSet};

use palisade_proto::v1;

/// Names a process on this boot: process id, and start in nanoseconds since boot.
pub type ProcessKey = (u32, u64);

/// Nanoseconds of a clock tick, the unit in which procfs tells a start.
const TICK: u64 = 10_000_000;
/// Most processes that are named above one.
const MOST_ANCESTORS: usize = 16;
/// Digits of the boot's id that an exec id starts with.
const BOOT_DIGITS: usize = 8;

struct Known {
    start: u64,
    slot: u64,
    parent: ProcessKey,
    executable: String,
    /// Time of its exec, nanoseconds since boot; 0 when that was not seen.
    executed: u64,
    from_procfs: bool,
}

/// Processes of containers, and what they execute.
pub struct Processes {
    boot: String,
    known: HashMap<u32, Known>,
    /// Parents that belong to no container.
    outside: HashSet<ProcessKey>,
}

impl Processes {
    pub fn new(boot: &str) -> Self {
        Self {
            boot: boot.chars().take(BOOT_DIGITS).collect(),
            known: HashMap::new(),
            outside: HashSet::new(),
        }
    }

    /// Takes what runs already from procfs.
    pub fn seed(&mut self, slot: u64, pids: &[u32]) {
        for pid in pids {
            if let Some(found) = from_procfs(*pid) {
                self.known.insert(*pid, Known { slot, ..found });
            }
        }
    }

    pub fn forked(&mut self, slot: u64, parent: ProcessKey, child: ProcessKey) {
        let (executable, executed) = match self.find(parent) {
            Some(known) => (known.executable.clone(), known.executed),
            None => (String::new(), 0),
        };
        let from_procfs = false;
        self.known.insert(child.0, Known { start: child.1, slot, parent, executable, executed, from_procfs });
    }

    /// Notes an exec at `time`, nanoseconds since boot.
    pub fn executed(
        &mut self,
        slot: u64,
        process: ProcessKey,
        parent: ProcessKey,
        executable: &str,
        time: u64,
    ) {
        let known = Known {
            start: process.1,
            slot,
            parent,
            executable: executable.to_owned(),
            executed: time,
            from_procfs: false,
        };
        self.known.insert(process.0, known);
    }

    /// Forgets a process.
    pub fn exited(&mut self, process: ProcessKey) {
        if self.find(process).is_some() {
            self.known.remove(&process.0);
        }
    }

    /// What a process executes as the table knows it: after an exec, or an end, procfs tells something else.
    pub fn recorded(&self, process: ProcessKey) -> String {
        self.find(process).map(|known| known.executable.clone()).unwrap_or_default()
    }

    /// What a process executes, from the table or, for a process of the host, from procfs.
    pub fn executable(&self, process: ProcessKey) -> String {
        if let Some(known) = self.find(process) {
            return known.executable.clone();
        }
        match from_procfs(process.0) {
            Some(found) if same_start(found.start, process.1) => found.executable,
            _ => String::new(),
        }
    }

    /// Names what a process executes: boot, process, start and exec. The start is in clock ticks, which kernel and
    /// procfs tell alike.
    pub fn exec_id(&self, process: ProcessKey) -> String {
        if process.0 == 0 {
            return String::new();
        }
        let executed = self.find(process).map_or(0, |known| known.executed);
        format!("{}-{}-{}-{executed}", self.boot, process.0, process.1 / TICK)
    }

    /// Names a session by its root.
    pub fn session_id(&self, root: ProcessKey) -> String {
        format!("{}-{}-{}", self.boot, root.0, root.1 / TICK)
    }

    /// The processes of `slot` from `parent` upwards. `slot_of` tells the kernel's word on whose a process is.
    pub fn ancestors(
        &mut self,
        slot: u64,
        parent: ProcessKey,
        slot_of: impl Fn(u32) -> Option<u64>,
    ) -> Vec<v1::Ancestor> {
        let mut above = Vec::new();
        let mut process = parent;
        while above.len() < MOST_ANCESTORS && process.0 != 0 {
            if self.find(process).is_none() && !self.heal(slot, process, &slot_of) {
                break;
            }
            let Some(known) = self.find(process).filter(|known| known.slot == slot) else { break };
            above.push(v1::Ancestor {
                exec_id: self.exec_id(process),
                pid: process.0,
                start_time: known.start,
                executable: known.executable.clone(),
                from_procfs: known.from_procfs,
            });
            process = known.parent;
        }
        above
    }

    /// Takes a process of `slot` from procfs that no record told of: a lost record must not cut the tree. Most that are
    /// asked for are the runtime's, and asked for with every exec, so who is none of the slot's is remembered.
    fn heal(&mut self, slot: u64, process: ProcessKey, slot_of: impl Fn(u32) -> Option<u64>) -> bool {
        if self.outside.contains(&process) {
            return false;
        }
        let found = (slot_of(process.0) == Some(slot)).then(|| from_procfs(process.0)).flatten();
        match found.filter(|found| same_start(found.start, process.1)) {
            Some(found) => {
                self.known.insert(process.0, Known { slot, ..found });
                true
            }
            None => {
                self.outside.insert(process);
                false
            }
        }
    }

    /// Forgets processes whose end was not told.
    pub fn prune(&mut self, alive: &HashSet<u32>) {
        self.known.retain(|pid, _| alive.contains(pid));
        self.outside.clear();
    }

    fn find(&self, (pid, start): ProcessKey) -> Option<&Known> {
        self.known.get(&pid).filter(|known| same_start(known.start, start))
    }

    pub fn len(&self) -> usize {
        self.known.len()
    }
}

/// Whether two starts are the same, one of which may be procfs' and cut to ticks.
fn same_start(one: u64, other: u64) -> bool {
    one / TICK == other / TICK
}

/// The process that has run longest.
pub fn oldest(pids: &[u32]) -> Option<u32> {
    pids.iter().filter_map(|pid| Some((from_procfs(*pid)?.start, *pid))).min().map(|(_, pid)| pid)
}

/// Start of a process in nanoseconds since boot, cut to ticks, and its parent.
pub fn start_and_parent(pid: u32) -> Option<(u64, u32)> {
    from_procfs(pid).map(|known| (known.start, known.parent.0))
}

/// Whether the process with this number is still the one that started then.
pub fn is_same((pid, start): ProcessKey) -> bool {
    stat(pid).is_some_and(|stat| same_start(stat.starttime.saturating_mul(TICK), start))
}

/// Whether a process is stopped by a signal.
pub fn is_stopped(pid: u32) -> bool {
    stat(pid).is_some_and(|stat| stat.state == 'T')
}

fn stat(pid: u32) -> Option<procfs::process::Stat> {
    procfs::process::Process::new(i32::try_from(pid).ok()?).ok()?.stat().ok()
}

fn from_procfs(pid: u32) -> Option<Known> {
    let process = procfs::process::Process::new(i32::try_from(pid).ok()?).ok()?;
    let stat = process.stat().ok()?;
    let parent = u32::try_from(stat.ppid).unwrap_or(0);
    let executable = process.exe().map(|path| path.to_string_lossy().into_owned()).unwrap_or_default();
    let start = stat.starttime.saturating_mul(TICK);
    let parent_start = self::stat(parent).map_or(0, |stat| stat.starttime.saturating_mul(TICK));
    Some(Known { start, slot: 0, parent: (parent, parent_start), executable, executed: 0, from_procfs: true })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reused_pid_is_another_process() {
        let mut processes = Processes::new("0123456789");
        processes.executed(1, (7, 1_000_000_000), (1, 5), "/bin/a", 2_000);
        processes.forked(1, (7, 1_000_000_000), (8, 2_000_000_000));
        assert_eq!(processes.executable((8, 2_000_000_000)), "/bin/a");
        processes.exited((8, 2_000_000_000));
        assert_eq!(processes.recorded((8, 2_000_000_000)), "");
        processes.exited((7, 9_000_000_000));
        assert_eq!(processes.recorded((7, 9_000_000_000)), "");
        assert_eq!(processes.recorded((7, 1_000_000_000)), "/bin/a");
        assert_eq!(processes.exec_id((7, 1_000_000_000)), "01234567-7-100-2000");
        assert_eq!(processes.exec_id((7, 9_000_000_000)), "01234567-7-900-0");
    }

    #[test]
    fn ancestors_end_at_the_container() {
        let mut processes = Processes::new("b");
        let (shim, init, shell) = ((u32::MAX - 1, TICK), (u32::MAX - 2, 2 * TICK), (u32::MAX - 3, 3 * TICK));
        processes.executed(1, init, shim, "/init", 20);
        processes.forked(1, init, shell);
        processes.executed(1, shell, init, "/bin/sh", 30);
        let above = processes.ancestors(1, shell, |_| None);
        let names: Vec<_> = above.iter().map(|ancestor| ancestor.executable.as_str()).collect();
        assert_eq!(names, ["/bin/sh", "/init"]);
        assert!(
            processes.ancestors(2, shell, |_| None).is_empty(),
            "a process of another container is nobody's parent"
        );
        processes.prune(&HashSet::from([init.0]));
        assert_eq!(processes.len(), 1);
    }

    #[test]
    fn a_gap_in_the_tree_is_healed_from_procfs() {
        let me = std::process::id();
        let start = stat(me).unwrap().starttime * TICK;
        let mut processes = Processes::new("b");
        let above = processes.ancestors(9, (me, start + 3), |pid| (pid == me).then_some(9));
        assert_eq!((above.len(), above[0].from_procfs), (1, true));
        assert!(
            processes.ancestors(9, (me, start + TICK), |_| Some(9)).is_empty(),
            "another start, another process"
        );
    }
}
