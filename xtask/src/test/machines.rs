//! Virtual machines of the tests: what they share, and how one of them runs.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::Result;

use super::{
    Ring, Tally,
    parts::{Boot, Part, Work},
};
use crate::{
    build::{self, Another},
    images, kernels,
    matrix::{self, Row},
    rootfs,
    vm::{self, Machine, Processors, Stream},
};

/// How much longer than its budget a machine may run until it is given up.
const PATIENCE: u32 = 3;

/// What machines have besides the binaries.
pub struct Machines<'a> {
    binaries: &'a Path,
    extra: Vec<(&'static str, PathBuf)>,
    full: bool,
}

fn boots<'a>(parts: &'a [&'a Part]) -> impl Iterator<Item = &'a Boot> {
    parts.iter().filter_map(|part| if let Work::Boot(boot) = &part.work { Some(boot) } else { None })
}

/// Fetches what comes from Debian, for which nothing must be built.
pub fn fetch(parts: &[&Part]) -> Result<()> {
    for kernel in boots(parts).map(|boot| boot.kernel).collect::<std::collections::BTreeSet<_>>() {
        kernels::prepare(kernel)?;
    }
    rootfs::fetch()?;
    images::fetch()?;
    if boots(parts).any(|boot| boot.apps) {
        images::apps()?;
    }
    Ok(())
}

impl<'a> Machines<'a> {
    /// Builds what only the tests have, and makes the disks.
    pub fn prepare(binaries: &'a Path, parts: &[&Part], full: bool) -> Result<Self> {
        let mut extra = Vec::new();
        if boots(parts).any(|boot| boot.test_agent) {
            let kinds: &[Another] = if full { Another::ALL } else { &[Another::State] };
            for another in kinds {
                extra.push((another.place(), build::test_agent(*another, false)?));
            }
            extra.push(("objects", build::planted()?));
        }
        let kernels = boots(parts).map(|boot| boot.kernel);
        vm::prepare(binaries, kernels, boots(parts).any(|boot| boot.apps))?;
        Ok(Self { binaries, extra, full })
    }

    /// Boots the machine of a part, and counts what its scenarios say. Of the matrix: what it found.
    pub fn run(&self, part: &Part, tally: &Tally) -> Option<Row> {
        let Work::Boot(boot) = &part.work else { return None };
        let budget = part.budget(self.full).unwrap_or_default();
        let begun = Instant::now();
        let outcome =
            self.machine(boot, budget * PATIENCE).run(&self.command(part, boot), Stream::Named(part.name));
        println!("{} | ended after {} s", part.name, begun.elapsed().as_secs());
        tally.time(part.name, begun.elapsed(), Some(budget));
        if part.ring == Ring::Matrix {
            return tally.case(&format!("{}: every program loads", part.name), || matrix::judge(&outcome?));
        }
        tally.add(part.name, outcome.map(|outcome| (outcome.output, i32::from(outcome.code))));
        None
    }

    fn machine<'b>(&'b self, boot: &'b Boot, deadline: Duration) -> Machine<'b> {
        Machine {
            kernel: boot.kernel,
            processors: Processors::Turns(2),
            append: boot.append,
            deadline,
            containerd: true,
            binaries: self.binaries,
            host: None,
            apps: boot.apps,
            extra: if boot.test_agent {
                self.extra.iter().map(|(place, path)| (*place, path.as_path())).collect()
            } else {
                Vec::new()
            },
        }
    }

    /// Each scenario prints its counts, and the machine ends with a failure if one failed.
    fn command(&self, part: &Part, boot: &Boot) -> Vec<String> {
        let script = if part.ring == Ring::Matrix {
            matrix::SCRIPT.to_owned()
        } else {
            let mut script = "code=0".to_owned();
            for words in boot.scenarios.iter().filter_map(|scenario| scenario.words(self.full)) {
                script +=
                    &format!("; echo '-- {words}'; began=$(date +%s); palisade-scenarios {words} || code=1");
                script += "; echo \"   took $(($(date +%s) - began)) s\"";
            }
            script + "; exit $code"
        };
        ["sh", "-c", &script].map(str::to_owned).to_vec()
    }
}
