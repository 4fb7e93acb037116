//! Delivery while everything fails that can: at the end every record that the kernel has numbered is stored once, in order, or
//! counted.
//!
//! What fails and when is drawn from a seed, which is printed. Containers make records all the time, now and then more than the ring
//! can hold. Nothing is checked until everything works again and all is delivered; then the harness reads the kernel's
//! counters itself.

use std::{
    collections::{BTreeMap, HashMap},
    io::BufRead as _,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::Signal;
use serde_json::Value;

use crate::{
    attacks::{nonce, profile},
    counters,
    cri::{Pod, Runtime, WORKLOAD_IMAGE, until_within},
    events,
    node::{AgentOptions, Node},
    proxy::Proxy,
    random::Random,
    report::Report,
    tls::Site,
};

#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub minutes: u64,
    pub seed: Option<u64>,
}

/// Bytes of the disks that fill up.
const SPOOL_DISK: &str = "size=96m";
const STORE_DISK: &str = "size=2g";
const SETTINGS: &str = "maps: {ringBytes: 1048576}\n";
/// Containers that live all the time.
const CONTAINERS: usize = 3;
/// Executions of a round, each of which is three records, of a container: few, or as many as the ring cannot hold.
const FEW: u64 = 60;
const MANY: u64 = 700;
/// How long agent and collector may take until all is delivered once everything works.
const CALM: Duration = Duration::from_secs(300);
/// How often it is said what happens.
const SAY: Duration = Duration::from_secs(30);

/// What can fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    CollectorKilled,
    AgentKilled,
    AgentStopped,
    ConnectionCut,
    NetworkSlow,
    NetworkSilent,
    StoreFull,
    SpoolFull,
    BothFull,
    CertificatesRotated,
    RingFlooded,
}

const FAULTS: &[Fault] = &[
    Fault::CollectorKilled,
    Fault::AgentKilled,
    Fault::AgentStopped,
    Fault::ConnectionCut,
    Fault::NetworkSlow,
    Fault::NetworkSilent,
    Fault::StoreFull,
    Fault::SpoolFull,
    Fault::BothFull,
    Fault::CertificatesRotated,
    Fault::RingFlooded,
];

/// A disk of its own that can be filled up; it is in memory.
struct Disk(PathBuf);

impl Disk {
    fn new(folder: PathBuf, size: &str) -> Result<Self> {
        std::fs::create_dir_all(&folder)?;
        let status = Command::new("mount").args(["-t", "tmpfs", "-o", size, "none"]).arg(&folder).status()?;
        ensure!(status.success(), "cannot mount {}", folder.display());
        Ok(Self(folder))
    }

    fn ballast(&self) -> PathBuf {
        self.0.join("ballast")
    }

    /// Takes all that is left.
    fn fill(&self) -> Result<()> {
        use std::io::Write as _;
        let mut file = std::fs::File::create(self.ballast())?;
        let chunk = vec![1; 1 << 16];
        while file.write_all(&chunk).is_ok() {}
        Ok(())
    }

    fn free(&self) -> Result<()> {
        Ok(std::fs::remove_file(self.ballast())?)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _stays = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// All that can fail, and what makes the records.
struct Soak {
    node: Node,
    site: Site,
    proxy: Proxy,
    store: Disk,
    spool: Disk,
    options: AgentOptions,
    happened: BTreeMap<Fault, u32>,
}

pub async fn run(cri: &Path, options: &Options) -> Result<ExitCode> {
    let mut report = Report::new();
    let runtime = Runtime::connect(cri);
    let mut random = Random::new(options.seed);
    let site = Site::new("test-node")?;
    let mut node = Node::without_collector(cri)?;
    node.tls = Some(site.folder.path().to_owned());
    node.write_profile("enforce.yaml", &profile("enforce", "enforce"))?;
    let store = Disk::new(node.folder.path().join("store"), STORE_DISK)?;
    let spool = Disk::new(node.folder.path().join("spool"), SPOOL_DISK)?;
    node.start_collector().await?;
    let proxy = Proxy::start(node.collector_address)?;
    node.proxy = Some(proxy.address);
    let agent = AgentOptions { settings: SETTINGS, ..AgentOptions::default() };
    let tier = node.start_agent(&agent).await?;
    println!("tier: {tier}");
    let mut soak = Soak { node, site, proxy, store, spool, options: agent, happened: BTreeMap::new() };
    let name = nonce("soak");
    let pod = runtime.pod(&name, "enforce", "").await?;
    let mut containers = Vec::new();
    for number in 0..CONTAINERS {
        containers.push(runtime.container(&pod, &format!("c-{number}"), WORKLOAD_IMAGE, &[]).await?);
    }
    for container in &containers {
        events::in_mode(&soak.node, container, "enforce").await?;
    }
    let mut ended = Vec::new();
    let worked = soak.work(options, &runtime, &pod, &containers, &mut ended, &mut random).await;
    report
        .case(&format!("{} minutes of faults", options.minutes), async {
            worked?;
            let missing: Vec<&Fault> =
                FAULTS.iter().filter(|fault| !soak.happened.contains_key(fault)).collect();
            ensure!(missing.is_empty() || options.minutes < 5, "never happened: {missing:?}");
            Ok(())
        })
        .await;
    println!("   {:?}", soak.happened);
    report.case("all is delivered once everything works", soak.calm(&containers)).await;
    report
        .case(
            "what the kernel has numbered is stored once and in order, or counted",
            soak.balance(&containers),
        )
        .await;
    report.case("so is what ended containers have made", soak.balance_of_ended(&ended)).await;
    report.case("the agent stops cleanly", async { soak.node.stop_agent() }).await;
    if report.failed() > 0 {
        println!(
            "--- the agent's log\n{}\n--- the collector's\n{}",
            soak.node.log("agent"),
            soak.node.log("collector")
        );
    }
    runtime.remove_pod(&pod).await?;
    Ok(report.close())
}

impl Soak {
    /// Lets things fail until the time is over, and everything work then.
    async fn work(
        &mut self,
        options: &Options,
        runtime: &Runtime,
        pod: &Pod,
        containers: &[String],
        ended: &mut Vec<String>,
        random: &mut Random,
    ) -> Result<()> {
        let begun = Instant::now();
        let mut said = begun;
        let mut faults = Vec::new();
        let mut round = 0_u32;
        while begun.elapsed() < Duration::from_secs(60 * options.minutes) {
            round += 1;
            if faults.is_empty() {
                // Each once before any comes again.
                faults = FAULTS.to_vec();
                random.shuffle(&mut faults);
            }
            let fault = faults.pop().context("no fault is left")?;
            let flood = fault == Fault::RingFlooded || random.happens(20);
            let count = if flood { MANY } else { 1 + random.below(FEW) };
            let load = async {
                let mut most: Vec<_> = containers.iter().collect();
                random_order(&mut most, round);
                for container in most {
                    let program =
                        if round.is_multiple_of(2) { "/usr/bin/workload" } else { "/usr/bin/third" };
                    let words =
                        ["/usr/bin/attacker", "generate", program, "soak", &count.to_string(), "1000000"];
                    let done = runtime.exec(container, &words).await?;
                    ensure!(done.code == 0, "{done:?}");
                }
                anyhow::Ok(())
            };
            let (failed, loaded) = tokio::join!(self.fail(fault, random), load);
            failed.with_context(|| format!("{fault:?}"))?;
            loaded?;
            *self.happened.entry(fault).or_default() += 1;
            if round.is_multiple_of(5) {
                let container =
                    runtime.container(pod, &format!("c-ends-{round}"), WORKLOAD_IMAGE, &[]).await?;
                let words = ["/usr/bin/attacker", "generate", "/usr/bin/workload", "ends", "20", "1000000"];
                runtime.exec(&container, &words).await?;
                runtime.remove_container(&container).await?;
                ended.push(container);
            }
            if said.elapsed() > SAY {
                said = Instant::now();
                println!("   {} s, {round} faults", begun.elapsed().as_secs());
            }
        }
        Ok(())
    }

    /// Lets something fail for a while.
    async fn fail(&mut self, fault: Fault, random: &mut Random) -> Result<()> {
        let mut wait = async |most: u64| {
            tokio::time::sleep(Duration::from_millis(100 + random.below(most))).await;
        };
        wait(500).await;
        match fault {
            Fault::CollectorKilled => {
                self.node.kill_collector()?;
                wait(4000).await;
                self.node.start_collector().await?;
            }
            Fault::AgentKilled => {
                self.node.kill_agent()?;
                wait(2000).await;
                self.node.start_agent(&self.options).await?;
            }
            Fault::AgentStopped => {
                self.node.stop_agent()?;
                wait(500).await;
                self.node.start_agent(&self.options).await?;
            }
            Fault::ConnectionCut => {
                for _ in 0..3 {
                    self.proxy.cut();
                    wait(500).await;
                }
            }
            Fault::NetworkSlow => {
                self.proxy.be_slow(150);
                wait(6000).await;
                self.proxy.be_slow(0);
            }
            Fault::NetworkSilent => {
                self.proxy.be_silent(true);
                wait(3000).await;
                self.proxy.cut();
                self.proxy.be_silent(false);
            }
            Fault::StoreFull => {
                self.store.fill()?;
                wait(4000).await;
                self.store.free()?;
            }
            Fault::SpoolFull => {
                self.spool.fill()?;
                wait(6000).await;
                self.spool.free()?;
                self.spool_works().await?;
            }
            Fault::BothFull => {
                self.store.fill()?;
                self.spool.fill()?;
                wait(4000).await;
                self.store.free()?;
                wait(1000).await;
                self.spool.free()?;
                self.spool_works().await?;
            }
            Fault::CertificatesRotated => {
                self.site.pki(&["collector", "127.0.0.1"])?;
                self.site.pki(&["node", "test-node"])?;
                self.site.pki(&["reader", "ana"])?;
                wait(1000).await;
            }
            Fault::RingFlooded => {
                self.node.signal_agent(Signal::STOP)?;
                wait(2000).await;
                self.node.signal_agent(Signal::CONT)?;
            }
        }
        Ok(())
    }

    /// Waits until the agent writes to its disk again. Until then what it has sent from memory and nobody has acknowledged would be
    /// counted by the next agent, should this one be killed, although it may have arrived: docs/delivery.md.
    async fn spool_works(&self) -> Result<()> {
        until_within(CALM, "the spool takes records again", async || {
            Ok((self.node.status()?["delivery"]["spool_problem"] == "").then_some(()))
        })
        .await
    }

    async fn calm(&self, containers: &[String]) -> Result<()> {
        until_within(CALM, "everything is delivered", async || {
            let status = self.node.status()?;
            let settled = |container: &&Value| {
                container["spooled"] == 0
                    && container["on_the_way"] == 0
                    && container["made"].as_u64() > Some(0)
            };
            let of_containers = status["containers"]
                .as_array()
                .into_iter()
                .flatten()
                .filter(|known| containers.iter().any(|container| known["id"] == **container))
                .filter(settled);
            let all = of_containers.count() == containers.len();
            Ok((all && status["delivery"]["waiting_records"] == 0).then_some(()))
        })
        .await
    }

    async fn balance(&self, containers: &[String]) -> Result<()> {
        let status = self.node.status()?;
        let set = self.node.sets()?.into_iter().next().context("no set of programs is pinned")?;
        let mut lost = 0;
        for container in containers {
            let known = status["containers"].as_array().into_iter().flatten();
            let slot = known
                .filter(|known| known["id"] == **container)
                .find_map(|known| known["slot"].as_u64())
                .context("the agent does not know the container")?;
            let made = counters::made(&set, slot)?;
            lost += Stored::of(&self.node, container)?.balances(container, made)?;
        }
        ensure!(lost > 0, "nothing was lost, so the ring was never flooded");
        Ok(())
    }

    async fn balance_of_ended(&self, ended: &[String]) -> Result<()> {
        ensure!(!ended.is_empty(), "no container has ended");
        for container in ended {
            let records = events::query(&self.node, &["--kind", "coverage", "--container", container])?;
            let last: Vec<&Value> =
                records.iter().filter(|record| record["coverage"]["change"] == "ended").collect();
            let [last] = last[..] else { bail!("{container} has ended {} times", last.len()) };
            let made = last["coverage"]["records_made"].as_u64().context("records_made")?;
            Stored::of(&self.node, container)?.balances(container, made)?;
        }
        Ok(())
    }
}

/// What the collector has of a container.
#[derive(Default)]
struct Stored {
    stored: u64,
    /// By cause.
    counted: BTreeMap<String, u64>,
}

impl Stored {
    /// Reads it, and looks whether it is in order: a number that is not larger than the one before in its lane is one that came
    /// twice, or late.
    fn of(node: &Node, container: &str) -> Result<Self> {
        let mut found = Self::default();
        let mut last: HashMap<(u64, u64), u64> = HashMap::new();
        let output = tempfile::tempfile()?;
        node.palisade_into(
            &["events", "--json", "--all", "--container", container],
            Stdio::from(output.try_clone()?),
        )?;
        let mut output = std::io::BufReader::new(output);
        std::io::Seek::rewind(&mut output)?;
        for line in output.lines() {
            let record: Value = serde_json::from_str(&line?)?;
            let number = |field: &str| record[field].as_u64().unwrap_or(0);
            if let Some(gap) = record["gap"].as_object() {
                let cause = gap["cause"].as_str().unwrap_or_default();
                // What agents say themselves has no number.
                if !cause.starts_with("own-") {
                    *found.counted.entry(cause.to_owned()).or_default() += gap["count"].as_u64().unwrap_or(0);
                }
                continue;
            }
            let sequence = number("sequence");
            if sequence == 0 {
                continue;
            }
            found.stored += 1;
            let before = last.insert((number("epoch"), number("lane")), sequence).unwrap_or(0);
            ensure!(sequence > before, "{container}: number {sequence} comes after {before}");
        }
        Ok(found)
    }

    /// Returns how many were counted.
    fn balances(&self, container: &str, made: u64) -> Result<u64> {
        let Self { stored, counted } = self;
        let sum: u64 = counted.values().sum();
        println!("   {made} records made, {stored} stored, counted {counted:?}");
        ensure!(
            stored + sum == made,
            "{container}: {made} records were made, {stored} are stored and {sum} counted"
        );
        Ok(sum)
    }
}

/// In another order each round.
fn random_order<T>(list: &mut [T], round: u32) {
    let length = list.len();
    list.rotate_left(round as usize % length);
}
