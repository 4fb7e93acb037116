//! How many records a second come from the kernel's ring onto the collector's disk without a gap, and what they cost: for
//! `cargo xtask bench delivery`.
//!
//! A program inside the kernel makes them, on the way that all records take. They have the shape of a shell's children: fork, exec with arguments
//! and a working directory, exit.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use aya::{
    maps::Array,
    programs::{RawTracePoint, RawTracePointRunOptions, TestRun as _},
};
use bytemuck::Zeroable as _;
use palisade_abi::{
    codes::{origin, verdict},
    record::{ExecHead, ExitRecord, ForkRecord, ProcessPart, SMALL_ARGV, SMALL_CWD, SMALL_PATH, SmallExec},
};
use serde::Serialize;

use crate::{
    attacks::{nonce, profile},
    counters,
    cri::{Runtime, WORKLOAD_IMAGE, until_within},
    events,
    node::{AgentOptions, Node},
    tls::Site,
};

#[derive(Clone, Debug)]
pub struct Options {
    /// An agent that loads the objects of the folder behind it.
    pub agent: PathBuf,
    pub objects: PathBuf,
    /// Records a second.
    pub rate: u64,
    pub seconds: u64,
    /// Whether no collector is there.
    pub down: bool,
}

/// Processes that are made at once, of three records each.
const AT_ONCE: u64 = 32;
/// How long the last records may take.
const CALM: Duration = Duration::from_secs(120);
/// Clock ticks a second of processor times (`USER_HZ`, which is part of the interface).
const TICKS: f64 = 100.0;

#[derive(Serialize)]
struct Measured {
    records_per_second: f64,
    seconds: f64,
    made: u64,
    /// Of which there was no room in the ring, or later, by cause.
    lost: serde_json::Value,
    delivered: u64,
    /// Processor seconds for a million records.
    agent_cpu: f64,
    collector_cpu: f64,
    agent_peak_mib: f64,
    collector_peak_mib: f64,
    wire_bytes_per_record: f64,
    store_bytes_per_record: f64,
    spool_bytes: u64,
    /// How long the last records took after the generator had ended.
    last_seconds: f64,
}

pub async fn run(cri: &Path, options: &Options) -> Result<ExitCode> {
    let runtime = Runtime::connect(cri);
    let site = Site::new("test-node")?;
    let mut node = Node::without_collector(cri)?;
    node.tls = Some(site.folder.path().to_owned());
    node.write_profile("enforce.yaml", &profile("enforce", "enforce"))?;
    node.start_collector().await?;
    let agent = AgentOptions {
        program: Some(options.agent.clone()),
        objects: Some(options.objects.clone()),
        ..AgentOptions::default()
    };
    node.start_agent(&agent).await?;
    let pod = runtime.pod(&nonce("bench"), "enforce", "").await?;
    let container = runtime.container(&pod, "c", WORKLOAD_IMAGE, &[]).await?;
    events::in_mode(&node, &container, "enforce").await?;
    let slot = slot(&node, &container)?;
    let set = node.sets()?.into_iter().next().context("no set of programs is pinned")?;
    let before = counters::made(&set, slot)?;
    let (collector, agent) =
        (node.collector_pid().context("no collector")?, node.agent_pid().context("no agent")?);
    let cpu_before = (cpu(agent)?, cpu(collector)?);
    if options.down {
        node.kill_collector()?;
    }
    let (rate, seconds) = (options.rate, options.seconds);
    let generated = {
        let set = set.clone();
        tokio::task::spawn_blocking(move || generate(&set, slot, rate, seconds)).await??
    };
    let ended = Instant::now();
    let status = node.status()?;
    if options.down {
        let spool_bytes = status["delivery"]["spool_bytes"].as_u64().unwrap_or(0);
        let peak = memory(agent, "VmHWM")?;
        println!("   the agent's memory was {peak:.1} MiB at most, its spool has {spool_bytes} bytes");
        node.start_collector().await?;
    }
    let settled = until_within(CALM, "everything is delivered", async || {
        let status = node.status()?;
        let known = status["containers"].as_array().into_iter().flatten();
        let settled = known.filter(|known| known["id"] == *container).any(|known| {
            known["on_the_way"] == 0
                && known["spooled"] == 0
                && known["made"].as_u64() >= Some(before + generated)
        });
        Ok(settled.then_some(status))
    })
    .await;
    let status = match settled {
        Ok(status) => status,
        Err(error) => {
            println!("{}\n--- the agent's log\n{}", node.status()?, node.log("agent"));
            return Err(error);
        }
    };
    let last_seconds = ended.elapsed().as_secs_f64();
    let made = counters::made(&set, slot)? - before;
    let lost = status["lost"].clone();
    let delivered = status["delivery"]["acknowledged"].as_u64().unwrap_or(0);
    let million = made as f64 / 1e6;
    let store = store_bytes(&node.folder.path().join("store"))?;
    let measured = Measured {
        records_per_second: generated as f64 / seconds as f64,
        seconds: seconds as f64,
        made,
        lost,
        delivered,
        agent_cpu: (cpu(agent)? - cpu_before.0) / million,
        collector_cpu: if options.down { f64::NAN } else { (cpu(collector)? - cpu_before.1) / million },
        agent_peak_mib: memory(agent, "VmHWM")?,
        collector_peak_mib: node.collector_pid().map_or(Ok(f64::NAN), |pid| memory(pid, "VmHWM"))?,
        wire_bytes_per_record: status["delivery"]["sent_bytes"].as_f64().unwrap_or(f64::NAN)
            / delivered as f64,
        store_bytes_per_record: store / delivered as f64,
        spool_bytes: status["delivery"]["spool_bytes"].as_u64().unwrap_or(0),
        last_seconds,
    };
    println!("{}", serde_json::to_string(&measured)?);
    runtime.remove_pod(&pod).await?;
    node.stop_agent()?;
    Ok(ExitCode::SUCCESS)
}

fn slot(node: &Node, container: &str) -> Result<u64> {
    let status = node.status()?;
    let known = status["containers"].as_array().into_iter().flatten();
    known
        .filter(|known| known["id"] == container)
        .find_map(|known| known["slot"].as_u64())
        .context("the agent does not know the container")
}

/// Makes `rate` records a second for so long; returns how many.
fn generate(set: &Path, slot: u64, rate: u64, seconds: u64) -> Result<u64> {
    write_templates(set)?;
    let program = RawTracePoint::from_pin(set.join("programs/generate_records"))?;
    let begun = Instant::now();
    let mut made = 0;
    while begun.elapsed() < Duration::from_secs(seconds) {
        let due = (begun.elapsed().as_secs_f64() * rate as f64) as u64;
        if due < made + 3 * AT_ONCE {
            std::thread::sleep(Duration::from_micros(500));
            continue;
        }
        // Beyond all real ones, and not soon the same again.
        let first = (1 << 23) + made % (1 << 22);
        let args = [slot, AT_ONCE, first, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        program.test_run(RawTracePointRunOptions { args, ..Default::default() })?;
        made += 3 * AT_ONCE;
    }
    Ok(made)
}

/// Tells the kernel what to make.
fn write_template<const LENGTH: usize>(set: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    let mut map: Array<_, [u8; LENGTH]> = counters::map(set, name)?.try_into()?;
    Ok(map.set(0, <[u8; LENGTH]>::try_from(bytes)?, 0)?)
}

/// A child of a shell.
fn write_templates(set: &Path) -> Result<()> {
    let mut process = ProcessPart::zeroed();
    process.namespace_pid = 4711;
    process.parent_pid = 1 << 22;
    process.comm[..4].copy_from_slice(b"curl");
    process.parent_comm[..2].copy_from_slice(b"sh");
    let fork = ForkRecord { process, ..ForkRecord::zeroed() };
    write_template::<{ size_of::<ForkRecord>() }>(set, "FORK_TEMPLATE", bytemuck::bytes_of(&fork))?;
    let exit = ExitRecord { process, ..ExitRecord::zeroed() };
    write_template::<{ size_of::<ExitRecord>() }>(set, "EXIT_TEMPLATE", bytemuck::bytes_of(&exit))?;
    let mut head = ExecHead { process, ..ExecHead::zeroed() };
    head.context.cgroup = 12_345;
    head.context.capabilities_permitted = 0xa804_25fb;
    head.context.capabilities_effective = 0xa804_25fb;
    head.context.capabilities_bounding = 0xa804_25fb;
    head.decision.verdict = verdict::ALLOWED;
    let part = &mut head.exec;
    part.origin = origin::IMAGE;
    (part.inode, part.file_mode, part.argc) = (654_321, 0o100_755, 4);
    // Each at the start of its room.
    let room = |text: &[u8], room: usize| [text, &vec![0; room - text.len()]].concat();
    let path = b"/usr/local/bin/curl";
    let cwd = b"/var/lib/app/jobs";
    let arguments =
        b"curl\0--silent\0--max-time=10\0http://api.shop.svc.cluster.local:8080/v1/orders/12345\0";
    part.path_length = path.len() as u16;
    part.cwd_length = cwd.len() as u16;
    part.argv_length = arguments.len() as u16;
    let exec = [
        bytemuck::bytes_of(&head).to_vec(),
        room(path, SMALL_PATH),
        room(cwd, SMALL_CWD),
        room(b"", SMALL_PATH),
        room(arguments, SMALL_ARGV),
    ]
    .concat();
    write_template::<{ size_of::<SmallExec>() }>(set, "EXEC_TEMPLATE", &exec)
}

/// Processor seconds that a process has used.
fn cpu(pid: u32) -> Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |index: usize| fields.get(index).and_then(|field| field.parse::<f64>().ok());
    Ok((ticks(11).context("utime")? + ticks(12).context("stime")?) / TICKS)
}

/// MiB that a process has, of one of the fields of its status.
fn memory(pid: u32, field: &str) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find(|line| line.starts_with(field)).context("the field is not there")?;
    let kib: f64 =
        line.split_whitespace().nth(1).and_then(|number| number.parse().ok()).context("no number")?;
    Ok(kib / 1024.0)
}

fn store_bytes(folder: &Path) -> Result<f64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(folder)? {
        bytes += entry?.metadata()?.len();
    }
    ensure!(bytes > 0, "the store is empty");
    Ok(bytes as f64)
}
