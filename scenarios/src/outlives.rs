//! Enforcement that outlives its agent: killed at random moments under attack, stopped, taken over, uninstalled.

#![expect(unsafe_code, reason = "calls of bpf(2)")]

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::{
    attacks::{EPERM, KILLED, PAYLOAD_RAN, nonce, profile},
    cri::{Pod, Runtime, WORKLOAD_IMAGE, until, until_within},
    events,
    node::{AgentOptions, Node},
    random::Random,
    report::Report,
};

pub struct Options {
    /// Times that the agent is killed.
    pub kills: u32,
    /// The same while every agent has another configuration than the one before.
    pub turns: u32,
    /// Other builds of the agent.
    pub others: Vec<PathBuf>,
    /// Attacks that are tried meanwhile, at least.
    pub attacks: u64,
    /// Where the random moments come from; printed, so that they can be repeated.
    pub seed: Option<u64>,
    /// An agent is killed after two steps of an upgrade instead of each.
    pub short: bool,
}

/// A set of another layout stays for a minute where a container is not identified.
const UNREADABLE: Duration = Duration::from_secs(120);
/// Attacks of one run of the generator, and how many a second.
const AT_ONCE: u64 = 50;
const RATE: &str = "25";
/// The longest that an agent lives before it is killed: it is in force, or not yet.
const LONGEST_LIFE: Duration = Duration::from_millis(2500);
/// How long a starved agent does not run; less than its lease.
const AWAY: Duration = Duration::from_secs(3);

pub async fn run(cri: &Path, options: &Options) -> Result<ExitCode> {
    let mut report = Report::new();
    let runtime = Runtime::connect(cri);
    let before = kernel::objects()?;
    report
        .case("control: without pins the attack succeeds once the agent is killed", leaks(cri, &runtime))
        .await;
    let mut node = Node::start(cri).await?;
    node.write_profile("outlives.yaml", &profile("outlives", "enforce"))?;
    node.start_agent(&AgentOptions::default()).await?;
    let pod = runtime.pod("pod-outlives", "outlives", "").await?;
    report
        .case(
            "refused while no agent is there, and on record when one is again",
            away(&mut node, &runtime, &pod),
        )
        .await;
    report.case("a container that comes and goes meanwhile is on record", visitor(&mut node, &runtime)).await;
    report
        .case("a profile that changes meanwhile holds when the agent is back", changed(&mut node, &runtime))
        .await;
    let name = format!("{} kills with SIGKILL at random moments, {} attacks", options.kills, options.attacks);
    report.case(&name, killed(&mut node, &runtime, &pod, options, false)).await;
    if options.turns > 0 {
        let name = format!("the same while two configurations take turns, {} kills", options.turns);
        let options = Options { kills: options.turns, others: Vec::new(), ..*options };
        report.case(&name, killed(&mut node, &runtime, &pod, &options, true)).await;
    }
    report
        .case(
            "an agent that is starved of the processor loses records, and counts them",
            starved(&mut node, &runtime, &pod),
        )
        .await;
    let other = AgentOptions { settings: "maps: {rules: 8192}\n", ..AgentOptions::default() };
    let name = "killed after each step of an upgrade, and back";
    report.case(name, upgraded(&mut node, &runtime, &pod, &other, Shared::ALL, options.short)).await;
    for program in &options.others {
        let shared = Shared::with(program)?;
        let other = AgentOptions { program: Some(program.clone()), ..AgentOptions::default() };
        let name = format!("the same with {}: {shared}", program.display());
        report.case(&name, upgraded(&mut node, &runtime, &pod, &other, shared, options.short)).await;
    }
    report
        .case("--keep-enforcing stops the agent and leaves the verdicts", kept(&mut node, &runtime, &pod))
        .await;
    report.case("uninstall takes it out of force", uninstalled(&mut node, &runtime, &pod)).await;
    if report.failed() > 0 {
        println!("--- the agent's log\n{}", node.log("agent"));
    }
    // Runtimes have programs of their own for each container.
    runtime.remove_pod(&pod).await?;
    report.case("it leaves no program, map or link", nothing_left(&before)).await;
    Ok(report.close())
}

/// Runs what is not allowed in a container; returns whether it ran. Anything but a refusal or success is an error.
async fn attack(runtime: &Runtime, container: &str, nonce: &str) -> Result<bool> {
    let words = ["/usr/bin/attacker", "run", "/usr/bin/third", "payload", nonce];
    let ended = runtime.exec(container, &words).await?;
    match ended.code {
        PAYLOAD_RAN => Ok(true),
        EPERM | KILLED => Ok(false),
        _ => bail!("the attacker ended with {ended:?}"),
    }
}

/// The kernel lets go of programs a grace period after the last of their users.
async fn until_it_runs(runtime: &Runtime, container: &str) -> Result<()> {
    until("what was refused runs", async || Ok(attack(runtime, container, "unguarded").await?.then_some(())))
        .await
}

async fn leaks(cri: &Path, runtime: &Runtime) -> Result<()> {
    let mut node = Node::start(cri).await?;
    node.write_profile("leaks.yaml", &profile("leaks", "enforce"))?;
    node.start_agent(&AgentOptions { unpinned: true, ..AgentOptions::default() }).await?;
    let pod = runtime.pod("pod-leaks", "leaks", "").await?;
    let container = runtime.container(&pod, "c-leaks", WORKLOAD_IMAGE, &[]).await?;
    events::in_mode(&node, &container, "enforce").await?;
    ensure!(!attack(runtime, &container, "leaks-1").await?, "it ran although the agent was there");
    node.kill_agent()?;
    until_it_runs(runtime, &container).await?;
    runtime.remove_pod(&pod).await
}

/// The only record of a denial with `nonce`.
async fn denial(node: &Node, nonce: &str) -> Result<Value> {
    let record = until(&format!("the denial of {nonce}"), async || {
        let found = events::payloads(node, nonce)?;
        Ok(found.into_iter().find(|record| record["exec"]["executable"] == "/usr/bin/third"))
    })
    .await?;
    ensure!(record["decision"]["verdict"] == "denied", "{record}");
    ensure!(record["container"]["labels"]["app"] == "outlives", "whose it is is not said: {record}");
    Ok(record)
}

async fn away(node: &mut Node, runtime: &Runtime, pod: &Pod) -> Result<()> {
    let container = runtime.container(pod, "c-away", WORKLOAD_IMAGE, &[]).await?;
    let first = events::in_mode(node, &container, "enforce").await?;
    for how in ["killed", "stopped"] {
        if how == "killed" {
            node.kill_agent()?;
        } else {
            node.stop_agent()?;
        }
        let nonce = nonce(how);
        ensure!(!attack(runtime, &container, &nonce).await?, "it ran when the agent was {how}");
        let allowed = runtime.exec(&container, &["/usr/bin/workload", "payload"]).await?;
        ensure!(allowed.code == PAYLOAD_RAN, "what is allowed did not run: {allowed:?}");
        node.start_agent(&AgentOptions::default()).await?;
        let record = denial(node, &nonce).await?;
        ensure!(record["decision"]["revision"] == first["container"]["revision"], "{record}");
        let again = events::in_mode(node, &container, "enforce").await?;
        ensure!(
            again["coverage"]["in_force_since"] == first["coverage"]["in_force_since"],
            "the policy was not in force all the time: {first} {again}"
        );
    }
    runtime.remove_container(&container).await
}

async fn visitor(node: &mut Node, runtime: &Runtime) -> Result<()> {
    node.kill_agent()?;
    let pod = runtime.pod("pod-visitor", "outlives", "").await?;
    let nonce = nonce("visitor");
    let words = ["/usr/bin/workload", "payload", nonce.as_str()];
    let container = runtime.container(&pod, "c-visitor", WORKLOAD_IMAGE, &words).await?;
    let code = runtime.ended(&container).await?;
    ensure!(code == PAYLOAD_RAN, "it ended with {code}");
    node.start_agent(&AgentOptions::default()).await?;
    let record = events::exactly_one(node, &nonce).await?;
    ensure!(record["container"]["id"] == container.as_str(), "{record}");
    ensure!(record["decision"]["verdict"] == "audited", "{record}");
    let reason = record["decision"]["reason"].as_str().unwrap_or_default();
    ensure!(matches!(reason, "unidentified" | "agent-absent"), "{record}");
    runtime.remove_pod(&pod).await
}

async fn changed(node: &mut Node, runtime: &Runtime) -> Result<()> {
    node.write_profile("changing.yaml", &profile("changing", "audit"))?;
    let pod = runtime.pod("pod-changing", "changing", "").await?;
    let container = runtime.container(&pod, "c-changing", WORKLOAD_IMAGE, &[]).await?;
    events::in_mode(node, &container, "audit").await?;
    ensure!(attack(runtime, &container, "changing-1").await?, "audit refused");
    node.kill_agent()?;
    node.write_profile("changing.yaml", &profile("changing", "enforce"))?;
    ensure!(attack(runtime, &container, "changing-2").await?, "nobody has read the change yet");
    node.start_agent(&AgentOptions::default()).await?;
    events::in_mode(node, &container, "enforce").await?;
    ensure!(!attack(runtime, &container, "changing-3").await?, "it ran under enforce");
    runtime.remove_pod(&pod).await
}

async fn killed(
    node: &mut Node,
    runtime: &Runtime,
    pod: &Pod,
    options: &Options,
    taking_turns: bool,
) -> Result<()> {
    let mut moments = Random::new(options.seed);
    let name = if taking_turns { "c-turns" } else { "c-killed" };
    let container = runtime.container(pod, name, WORKLOAD_IMAGE, &[]).await?;
    events::in_mode(node, &container, "enforce").await?;
    let nonce = nonce("killed");
    // Other map sizes are another set of programs, which takes over from the one before.
    let other = AgentOptions { settings: "maps: {rules: 8192}\n", ..AgentOptions::default() };
    let over = std::cell::Cell::new(false);
    let attacks = attacks(runtime, &container, &nonce, options.attacks, &over);
    let kills = async {
        for kill in 0..options.kills {
            // Only the agent's age decides where in its work it is hit, not a condition of the scenario.
            let age = Duration::from_millis(moments.below(LONGEST_LIFE.as_millis() as u64));
            tokio::time::sleep(age).await;
            node.kill_agent()?;
            let turn = if taking_turns && kill % 2 == 0 { other.clone() } else { AgentOptions::default() };
            node.spawn_agent(&turn)?;
        }
        anyhow::Ok(())
    };
    let begun = Instant::now();
    let (attacked, killed) = tokio::join!(attacks, until_over(kills, &over));
    killed?;
    let (tried, ran) = attacked?;
    println!("   {tried} attacks in {:.0} s", begun.elapsed().as_secs_f64());
    ensure!(ran == 0, "{ran} of {tried} attacks succeeded");
    node.kill_agent()?;
    node.start_agent(&AgentOptions::default()).await?;
    runtime.remove_container(&container).await?;
    let ended = until("the container's last record", async || {
        let records = events::query(node, &["--kind", "coverage", "--container", &container])?;
        Ok(records.into_iter().find(|record| record["coverage"]["change"] == "ended"))
    })
    .await?;
    // Numbers of an earlier set are not among those of the last.
    let made = if taking_turns { 0 } else { ended["coverage"]["records_made"].as_u64().unwrap_or(0) };
    balance(node, &container, &nonce, tried, made, Shared::ALL).await?;
    Ok(())
}

/// The agent gets a fiftieth of its time, and its ring is small.
async fn starved(node: &mut Node, runtime: &Runtime, pod: &Pod) -> Result<()> {
    node.stop_agent()?;
    let small_ring = AgentOptions { settings: "maps: {ringBytes: 65536}\n", ..AgentOptions::default() };
    node.start_agent(&small_ring).await?;
    let container = runtime.container(pod, "c-starved", WORKLOAD_IMAGE, &[]).await?;
    events::in_mode(node, &container, "enforce").await?;
    let agent = node.agent_pid().and_then(|pid| Pid::from_raw(pid.cast_signed())).context("no agent runs")?;
    let nonce = nonce("starved");
    let over = std::cell::Cell::new(false);
    let attacks = attacks(runtime, &container, &nonce, 4 * AT_ONCE, &over);
    let starving = async {
        for _ in 0..4 {
            kill_process(agent, Signal::STOP)?;
            tokio::time::sleep(AWAY).await;
            kill_process(agent, Signal::CONT)?;
            tokio::time::sleep(AWAY / 50).await;
        }
        anyhow::Ok(())
    };
    let (attacked, starved) = tokio::join!(attacks, until_over(starving, &over));
    starved?;
    let (tried, ran) = attacked?;
    ensure!(ran == 0, "{ran} of {tried} attacks succeeded");
    runtime.remove_container(&container).await?;
    let ended = until("the container's last record", async || {
        let records = events::query(node, &["--kind", "coverage", "--container", &container])?;
        Ok(records.into_iter().find(|record| record["coverage"]["change"] == "ended"))
    })
    .await?;
    let made = ended["coverage"]["records_made"].as_u64().unwrap_or(0);
    let counted = balance(node, &container, &nonce, tried, made, Shared::ALL).await?;
    ensure!(counted > 0, "nothing was lost, so it was not starved");
    node.stop_agent()?;
    node.start_agent(&AgentOptions::default()).await?;
    Ok(())
}

/// What the log says of an upgrade, in this order. Between one set's last record and the next one's first nothing is refused
/// by both: the old programs go last.
const STEPS: [&str; 5] = [
    "the new programs are attached",
    COPIED,
    "this set records",
    "the old programs are out of force",
    "the old maps are gone",
];

const COPIED: &str = "the state is copied";
/// The steps after which most may go wrong.
const IN_SHORT: [&str; 2] = [COPIED, "this set records"];

/// Which layouts two builds of the agent share.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Shared {
    state: bool,
    policy: bool,
    records: bool,
}

impl Shared {
    const ALL: Self = Self { state: true, policy: true, records: true };

    /// Those that this build and another one say that they have in common.
    fn with(program: &Path) -> Result<Self> {
        let layouts = |program: &Path| -> Result<Vec<String>> {
            let output = Command::new(program).arg("--version").output()?;
            let text = String::from_utf8(output.stdout)?;
            let line = text.lines().find_map(|line| line.strip_prefix("layouts: "));
            let line = line.with_context(|| format!("{} --version: {text:?}", program.display()))?;
            Ok(line.split(", ").map(str::to_owned).collect())
        };
        let (own, other) = (layouts(Path::new("palisade-agent"))?, layouts(program)?);
        let same = |kind: &str| own.iter().any(|layout| layout.starts_with(kind) && other.contains(layout));
        let shared = Self { state: same("state "), policy: same("policy "), records: same("records ") };
        ensure!(shared != Self::ALL, "{} has the same layouts", program.display());
        Ok(shared)
    }
}

impl std::fmt::Display for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let layouts = [("state", self.state), ("policy", self.policy), ("records", self.records)];
        let other: Vec<&str> = layouts.into_iter().filter(|(_, same)| !same).map(|(name, _)| name).collect();
        write!(f, "another layout of {}", other.join(" and "))
    }
}

/// Two agents take turns, each under attack, and each is killed when it has said that it has taken a step; then it is begun
/// anew and finishes.
async fn upgraded(
    node: &mut Node,
    runtime: &Runtime,
    pod: &Pod,
    other: &AgentOptions,
    shared: Shared,
    short: bool,
) -> Result<()> {
    let container = runtime.container(pod, "c-upgraded", WORKLOAD_IMAGE, &[]).await?;
    events::in_mode(node, &container, "enforce").await?;
    let nonce = nonce("upgraded");
    let over = std::cell::Cell::new(false);
    let attacks = attacks(runtime, &container, &nonce, AT_ONCE, &over);
    let steps = async {
        let own = AgentOptions::default();
        let turns = [other, &own];
        // The state of another layout cannot be copied.
        for (step, agent, _) in STEPS
            .iter()
            .filter(|step| shared.state || **step != COPIED)
            .filter(|step| !short || IN_SHORT.contains(step))
            .enumerate()
            // Each step both ways, or in short one way and the next one back.
            .flat_map(|(index, step)| {
                turns.into_iter().enumerate().map(move |(turn, agent)| (*step, agent, index % 2 == turn))
            })
            .filter(|(_, _, is_its_turn)| !short || *is_its_turn)
        {
            node.kill_agent()?;
            node.spawn_agent(agent)?;
            // It loads its programs first.
            until_within(UNREADABLE, step, async || Ok(node.log("agent").contains(step).then_some(())))
                .await?;
            node.kill_agent()?;
            in_order(&node.log("agent"), step, shared.state)?;
            // Begun anew it goes all the way.
            node.start_agent(agent).await?;
            until_within(UNREADABLE, "one set is left", async || Ok((node.sets()?.len() == 1).then_some(())))
                .await?;
        }
        anyhow::Ok(())
    };
    let (attacked, stepped) = tokio::join!(attacks, until_over(steps, &over));
    stepped?;
    let (tried, ran) = attacked?;
    println!("   {tried} attacks");
    ensure!(ran == 0, "{ran} of {tried} attacks succeeded");
    runtime.remove_container(&container).await?;
    until("the container's last record", async || {
        let records = events::query(node, &["--kind", "coverage", "--container", &container])?;
        Ok(records.into_iter().find(|record| record["coverage"]["change"] == "ended"))
    })
    .await?;
    balance(node, &container, &nonce, tried, 0, shared).await?;
    Ok(())
}

/// Whether the log has every step up to `last`, in their order.
fn in_order(log: &str, last: &str, copied: bool) -> Result<()> {
    let mut from = 0;
    for step in STEPS.iter().filter(|step| copied || **step != COPIED) {
        let place =
            log[from..].find(step).with_context(|| format!("no step {step:?} in its place: {log}"))?;
        from += place;
        if *step == last {
            break;
        }
    }
    Ok(())
}

/// Says that it is over when `work` has ended, however it did.
async fn until_over(work: impl Future<Output = Result<()>>, over: &std::cell::Cell<bool>) -> Result<()> {
    let result = work.await;
    over.set(true);
    result
}

/// Attacks until it is over, and at least `least` times; returns how many there were, and how many succeeded.
async fn attacks(
    runtime: &Runtime,
    container: &str,
    nonce: &str,
    least: u64,
    over: &std::cell::Cell<bool>,
) -> Result<(u64, u64)> {
    let (mut tried, mut ran) = (0, 0);
    while tried < least || !over.get() {
        let name = format!("{nonce}-{tried}");
        let words = ["/usr/bin/attacker", "generate", "/usr/bin/third", &name, &AT_ONCE.to_string(), RATE];
        let ended = runtime.exec(container, &words).await?;
        ensure!(ended.code == 0, "the attacker could not try: {ended:?}");
        ran += ended.stdout.trim().parse::<u64>().context("the attacker says nothing")?;
        tried += AT_ONCE;
    }
    Ok((tried, ran))
}

/// Every record that was made is stored once or counted by a gap, and so is every attack. Returns how many were counted.
async fn balance(
    node: &Node,
    container: &str,
    nonce: &str,
    tried: u64,
    made: u64,
    shared: Shared,
) -> Result<u64> {
    // Where programs cannot refuse, each set judges: the one that records may not know the container yet when the other one,
    // whose state it could not copy, kills.
    let may_not_know = !(shared.state && shared.policy) && node.log("agent").contains("tier=\"fallback\"");
    let records = events::query(node, &["--all", "--container", container])?;
    let mut identities = BTreeSet::new();
    let (mut stored, mut gaps, mut denials) = (0_u64, 0_u64, 0_u64);
    for record in &records {
        if record["gap"]["cause"] != "own-queue-full" {
            gaps += record["gap"]["count"].as_u64().unwrap_or(0);
        }
        let number = |field: &str| record[field].as_u64().unwrap_or(0);
        if number("sequence") > 0 {
            stored += 1;
            identities.insert((number("epoch"), number("lane"), number("sequence")));
        }
        let of_attack = record["exec"]["arguments"]
            .as_array()
            .and_then(|words| words.last()?.as_str())
            .is_some_and(|word| word.starts_with(nonce));
        if record["exec"]["executable"] == "/usr/bin/third" && of_attack {
            let (verdict, reason) = (&record["decision"]["verdict"], &record["decision"]["reason"]);
            let does_not_know = may_not_know && verdict == "audited" && reason == "unidentified";
            ensure!(verdict == "denied" || does_not_know, "{record}");
            // One that is found anew has no session any more.
            let session = &record["session_of"]["kind"];
            let is_known = session.as_str().is_some_and(|kind| kind != "unknown");
            ensure!(!shared.state || is_known, "its session is lost: {record}");
            denials += 1;
        }
    }
    let all = if made == 0 { "records of several sets".to_owned() } else { format!("{made} records made") };
    println!("   {all}, {stored} stored, {gaps} counted by gaps; {denials} of {tried} denials stored");
    ensure!(
        identities.len() as u64 == stored,
        "{} records are stored twice",
        stored - identities.len() as u64
    );
    ensure!(made == 0 || stored + gaps == made, "{made} records were made");
    ensure!(denials + gaps >= tried, "{} attacks are neither stored nor counted", tried - denials - gaps);
    Ok(gaps)
}

async fn kept(node: &mut Node, runtime: &Runtime, pod: &Pod) -> Result<()> {
    let container = runtime.container(pod, "c-kept", WORKLOAD_IMAGE, &[]).await?;
    events::in_mode(node, &container, "enforce").await?;
    let said = node.uninstall(true)?;
    ensure!(said.contains("stopped the agent") && said.contains("stays in force"), "{said}");
    ensure!(!attack(runtime, &container, "kept").await?, "it ran");
    runtime.remove_container(&container).await
}

async fn uninstalled(node: &mut Node, runtime: &Runtime, pod: &Pod) -> Result<()> {
    node.start_agent(&AgentOptions::default()).await?;
    let container = runtime.container(pod, "c-uninstalled", WORKLOAD_IMAGE, &[]).await?;
    events::in_mode(node, &container, "enforce").await?;
    let said = node.uninstall(false)?;
    ensure!(said.contains("stopped the agent") && said.contains("removed"), "{said}");
    ensure!(!node.pins().exists(), "{} is still there", node.pins().display());
    until_it_runs(runtime, &container).await?;
    ensure!(node.uninstall(false)?.contains("nothing is in force"), "a second time is no error");
    runtime.remove_container(&container).await
}

/// The kernel frees programs and maps a moment after the last of their users.
async fn nothing_left(before: &[BTreeSet<u32>; 3]) -> Result<()> {
    until("programs, maps and links are gone", async || {
        let left = kernel::objects()?;
        let same = left.iter().zip(before).all(|(now, then)| now.difference(then).next().is_none());
        Ok(same.then_some(()))
    })
    .await
}

/// What the kernel has of eBPF.
mod kernel {
    use std::collections::BTreeSet;

    use anyhow::Result;

    // Commands of bpf(2), include/uapi/linux/bpf.h.
    const PROG_GET_NEXT_ID: libc::c_int = 11;
    const MAP_GET_NEXT_ID: libc::c_int = 12;
    const LINK_GET_NEXT_ID: libc::c_int = 31;

    /// Ids of all programs, maps and links.
    pub fn objects() -> Result<[BTreeSet<u32>; 3]> {
        Ok([all(PROG_GET_NEXT_ID)?, all(MAP_GET_NEXT_ID)?, all(LINK_GET_NEXT_ID)?])
    }

    fn all(command: libc::c_int) -> Result<BTreeSet<u32>> {
        let mut ids = BTreeSet::new();
        let mut last = 0;
        loop {
            // start id, next id, open flags
            let mut attributes = [last, 0_u32, 0];
            // SAFETY: the kernel reads and writes at most the size that is told, of memory that lives until it returns.
            let result = unsafe {
                libc::syscall(libc::SYS_bpf, command, attributes.as_mut_ptr(), size_of_val(&attributes))
            };
            if result != 0 {
                let error = std::io::Error::last_os_error();
                return if error.raw_os_error() == Some(libc::ENOENT) { Ok(ids) } else { Err(error.into()) };
            }
            last = attributes[1];
            ids.insert(last);
        }
    }
}
