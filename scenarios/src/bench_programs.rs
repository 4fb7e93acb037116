//! Where the time inside the kernel goes: what each program took while something ran.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context as _, Result};
use aya::{
    programs::loaded_programs,
    sys::{Stats, enable_stats},
};
use serde::Serialize;

/// One program of the agent, per turn of the loop.
#[derive(Serialize)]
pub struct Program {
    name: String,
    runs: f64,
    nanoseconds: f64,
}

/// Runs `work`, a loop of `count` turns, and returns what the programs took meanwhile, those that took most first. It costs the loop two
/// readings of the clock for each run of a program, so it is not the loop whose time is compared.
pub async fn during<T>(
    agent: u32,
    count: u64,
    work: impl Future<Output = Result<T>>,
) -> Result<Vec<Program>> {
    let names = names(agent)?;
    let _counting = enable_stats(Stats::RunTime).context("the kernel does not count its programs' time")?;
    let before = taken()?;
    work.await?;
    let after = taken()?;
    let mut programs: Vec<Program> = after
        .into_iter()
        .filter_map(|(id, (short, runs, time))| {
            let (_, runs_before, time_before) = before.get(&id).cloned().unwrap_or_default();
            let runs = runs - runs_before;
            (runs > 0).then(|| Program {
                name: names.get(&id).cloned().unwrap_or(short),
                runs: runs as f64 / count as f64,
                nanoseconds: (time - time_before).as_nanos() as f64 / count as f64,
            })
        })
        .collect();
    programs.sort_by(|left, right| right.nanoseconds.total_cmp(&left.nanoseconds));
    Ok(programs)
}

/// All programs of the kernel by id: name, as far as the kernel keeps it, runs and their time.
fn taken() -> Result<BTreeMap<u32, (String, u64, Duration)>> {
    loaded_programs()
        .map(|info| {
            let info = info?;
            let name = info.name_as_str().unwrap_or_default().to_owned();
            Ok((info.id(), (name, info.run_count(), info.run_time())))
        })
        .collect()
}

/// The tracepoints of the agent's programs, by program: their own names would be cut after 15 bytes.
fn names(agent: u32) -> Result<BTreeMap<u32, String>> {
    let mut names = BTreeMap::new();
    for entry in std::fs::read_dir(format!("/proc/{agent}/fdinfo"))? {
        let text = std::fs::read_to_string(entry?.path())?;
        let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        if let (Some(id), Some(tracepoint)) = (field("prog_id:"), field("tp_name:")) {
            names.insert(id.parse()?, tracepoint.to_owned());
        }
    }
    Ok(names)
}
