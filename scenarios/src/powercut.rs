//! The collector's disk as it is after a power cut at any moment: every acknowledged record is there.
//!
//! The kernel's `log-writes` target (Documentation/admin-guide/device-mapper/log-writes.rst) notes every write to the store's disk in the order
//! in which the disk could have made it durable: what was not flushed is not there yet. The harness marks each acknowledgement in that log. Then
//! it makes the disk anew as it was at random places of the log, mounts it, and starts a collector on it.

use std::{
    fs::File,
    io::{Read as _, Seek as _, SeekFrom},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use crate::{
    cri::until,
    node::Node,
    peers::{Peer, stored},
    random::Random,
    report::Report,
};
use anyhow::{Context as _, Result, bail, ensure};

#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub cuts: usize,
    pub batches: u64,
    pub seed: Option<u64>,
}

/// The store's disk.
const DISK: u64 = 48 << 20;
/// The log of its writes.
const LOG: u64 = 512 << 20;
/// Small segments, of which few are kept: so that they are closed, begun and removed all the time.
const SETTINGS: &str = "segmentBytes: 131072\nretention: {bytes: 1048576}\n";
const NODE: &str = "cut";
const DEVICE: &str = "palisade-cut";

fn run_tool(program: &str, words: &[&str]) -> Result<String> {
    let output =
        Command::new(program).args(words).output().with_context(|| format!("cannot start {program}"))?;
    ensure!(
        output.status.success(),
        "{program} {words:?}: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// A file as a block device, until it is dropped.
struct Loop(String);

impl Loop {
    fn new(path: &Path) -> Result<Self> {
        let path = path.to_string_lossy();
        Ok(Self(run_tool("losetup", &["--find", "--show", &path])?))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _stays = run_tool("losetup", &["--detach", &self.0]);
    }
}

/// A mounted file system, until it is dropped.
struct Mounted(PathBuf);

impl Mounted {
    fn new(device: &str, point: &Path) -> Result<Self> {
        std::fs::create_dir_all(point)?;
        run_tool("mount", &["-t", "ext4", device, &point.to_string_lossy()])?;
        Ok(Self(point.to_owned()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _stays = run_tool("umount", &[&self.0.to_string_lossy()]);
    }
}

/// The mapping that notes all writes, until it is dropped.
struct Logged;

impl Logged {
    fn new(disk: &Loop, log: &Loop) -> Result<Self> {
        let table = format!("0 {} log-writes {} {}", DISK / 512, disk.0, log.0);
        run_tool("dmsetup", &["create", DEVICE, "--noudevsync", "--table", &table])?;
        run_tool("dmsetup", &["mknodes", DEVICE])?;
        Ok(Self)
    }

    fn path() -> String {
        format!("/dev/mapper/{DEVICE}")
    }

    /// Everything before `acknowledged` is acknowledged.
    fn mark(&self, acknowledged: u64) -> Result<()> {
        run_tool("dmsetup", &["message", DEVICE, "0", &format!("mark {acknowledged}")]).map(drop)
    }
}

impl Drop for Logged {
    fn drop(&mut self) {
        let _stays = run_tool("dmsetup", &["remove", DEVICE]);
    }
}

pub async fn run(cri: &Path, options: &Options) -> Result<ExitCode> {
    let mut report = Report::new();
    let mut random = Random::new(options.seed);
    // Not in memory: the log is large.
    let work = tempfile::tempdir_in("/var/tmp")?;
    let (disk, log) = (work.path().join("disk"), work.path().join("log"));
    File::create(&disk)?.set_len(DISK)?;
    File::create(&log)?.set_len(LOG)?;
    report
        .case(
            "a collector takes batches, is killed and started again",
            write(cri, &disk, &log, options, &mut random),
        )
        .await;
    if report.failed() == 0 {
        report
            .case(
                &format!("after {} power cuts all that was acknowledged is there", options.cuts),
                cuts(cri, work.path(), &log, options, &mut random),
            )
            .await;
    }
    Ok(report.close())
}

/// Has a collector take batches of all sizes, with every acknowledgement marked in the log.
async fn write(cri: &Path, disk: &Path, log: &Path, options: &Options, random: &mut Random) -> Result<()> {
    let (disk, log) = (Loop::new(disk)?, Loop::new(log)?);
    let logged = Logged::new(&disk, &log)?;
    run_tool("mkfs.ext4", &["-q", "-F", &Logged::path()])?;
    let mut node = Node::without_collector(cri)?;
    node.collector_settings = SETTINGS;
    let _mounted = Mounted::new(&Logged::path(), &node.folder.path().join("store"))?;
    node.start_collector().await?;
    let (mut peer, mut next) = Peer::greet(&node, NODE, 0).await?;
    for number in 0..options.batches {
        if number > 0 && random.happens(3) {
            node.kill_collector()?;
            node.start_collector().await?;
            let (again, found) = Peer::greet(&node, NODE, 0).await?;
            ensure!(found == next, "{found} instead of {next} after a restart");
            peer = again;
        }
        let count = 1 + random.below(60);
        let words: Vec<String> =
            (next..next + count).map(|number| format!("{number} {}", "x".repeat(400))).collect();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        next = peer.deliver(next, &words).await?;
        logged.mark(next)?;
    }
    node.kill_collector()?;
    println!("   {next} records in {} batches", options.batches);
    Ok(())
}

/// One write of the log.
struct Write {
    /// Where its data is in the log.
    data: u64,
    /// Where it went, and how much it is, in bytes. Nothing for a mark.
    offset: u64,
    length: u64,
    discard: bool,
    /// For a mark: what it says.
    mark: Option<u64>,
}

/// Reads a log of writes (drivers/md/dm-log-writes.c: `struct log_write_super` and `struct log_write_entry`).
fn read_log(path: &Path) -> Result<Vec<Write>> {
    const MAGIC: u64 = 0x006a_7366_7773_6872;
    const DISCARD: u64 = 1 << 2;
    const MARK: u64 = 1 << 3;
    let file = File::open(path)?;
    let word =
        |bytes: &[u8], at: usize| -> u64 { bytes[at..at + 8].try_into().map_or(0, u64::from_le_bytes) };
    let mut head = [0; 28];
    file.read_exact_at(&mut head, 0)?;
    ensure!(word(&head, 0) == MAGIC, "this is no log of writes");
    let entries = word(&head, 16);
    let sector = u64::from(u32::from_le_bytes([head[24], head[25], head[26], head[27]]));
    let mut writes = Vec::new();
    let mut at = sector;
    for _ in 0..entries {
        let mut bytes = vec![0; sector as usize];
        file.read_exact_at(&mut bytes, at)?;
        // In sectors of the log: dm-log-writes counts in the disk's logical blocks.
        let (offset, length, flags, data_length) =
            (word(&bytes, 0) * sector, word(&bytes, 8) * sector, word(&bytes, 16), word(&bytes, 24));
        let is_mark = flags & MARK != 0;
        let mut mark = None;
        if is_mark {
            let text = bytes.get(32..32 + data_length as usize).context("a mark is too long")?;
            let text = String::from_utf8_lossy(text);
            let text = text.trim_end_matches('\0');
            // The target's own, behind everything else.
            if text != "dm-log-writes-end" {
                mark = Some(text.trim().parse().with_context(|| format!("mark {text:?}"))?);
            }
        }
        let discard = flags & DISCARD != 0;
        let data = at + sector;
        at = data + if discard || is_mark { 0 } else { length };
        writes.push(Write { data, offset, length: if is_mark { 0 } else { length }, discard, mark });
    }
    Ok(writes)
}

/// Makes the disk anew as it was at random places, and looks what a collector finds there.
async fn cuts(cri: &Path, work: &Path, log: &Path, options: &Options, random: &mut Random) -> Result<()> {
    let writes = read_log(log)?;
    let first = writes.iter().position(|write| write.mark.is_some()).context("nothing was acknowledged")?;
    let mut places: Vec<usize> =
        (0..options.cuts).map(|_| first + 1 + random.below((writes.len() - first) as u64) as usize).collect();
    places.sort_unstable();
    let mut source = File::open(log)?;
    let image = work.join("image");
    let built = File::create(&image)?;
    built.set_len(DISK)?;
    let (mut done, mut acknowledged, mut unacknowledged) = (0, 0, 0_u64);
    for (number, place) in places.iter().enumerate() {
        for write in &writes[done..*place] {
            acknowledged = write.mark.unwrap_or(acknowledged);
            let mut data = vec![0; write.length as usize];
            if !write.discard {
                source.seek(SeekFrom::Start(write.data))?;
                source.read_exact(&mut data)?;
            }
            built.write_all_at(&data, write.offset)?;
        }
        done = *place;
        let cut = work.join("cut");
        run_tool("cp", &["--sparse=always", &image.to_string_lossy(), &cut.to_string_lossy()])?;
        let found = look(cri, &cut).await.with_context(|| {
            format!("cut {number}, after {place} of {} writes, {acknowledged} acknowledged", writes.len())
        })?;
        if found < acknowledged {
            bail!(
                "cut {number}, after {place} of {} writes: {acknowledged} records were acknowledged, and the store has {found}",
                writes.len()
            );
        }
        unacknowledged += found - acknowledged;
    }
    println!(
        "   {} writes; {unacknowledged} records were on the disk before their acknowledgement",
        writes.len()
    );
    Ok(())
}

/// Mounts a disk and starts a collector on it: returns how far the store has got. What is in it must be whole and in order.
async fn look(cri: &Path, disk: &Path) -> Result<u64> {
    let disk = Loop::new(disk)?;
    let mut node = Node::without_collector(cri)?;
    node.collector_settings = SETTINGS;
    let _mounted = Mounted::new(&disk.0, &node.folder.path().join("store"))?;
    node.start_collector().await?;
    let (mut peer, next) = Peer::greet(&node, NODE, 0).await?;
    let numbers = |node: &Node| -> Result<Vec<u64>> {
        stored(node, NODE)?
            .iter()
            .map(|word| {
                word.split(' ').next().unwrap_or_default().parse().context("a record is not what was sent")
            })
            .collect()
    };
    let found = numbers(&node)?;
    ensure!(
        found.last().is_none_or(|last| last + 1 == next),
        "the store says {next}, its last record is {:?}",
        found.last()
    );
    ensure!(next == 0 || !found.is_empty(), "the store says {next}, and has no record");
    ensure!(found.windows(2).all(|pair| pair[0] + 1 == pair[1]), "records are missing, or out of order");
    // And it goes on.
    let after = peer.deliver(next, &[&format!("{next} again")]).await?;
    ensure!(after == next + 1, "it does not go on: {after}");
    until("the record is stored", async || Ok((numbers(&node)?.last() == Some(&next)).then_some(()))).await?;
    node.kill_collector()?;
    Ok(next)
}
