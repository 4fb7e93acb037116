//! Revisions that are switched under load: every verdict is what `profile` says of the revision that its record names.

use std::{
    cell::Cell,
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use palisade_abi::codes::{origin, session, verdict};
use palisade_profile::{
    document,
    exec::evaluate::{Execution, evaluate},
    image::{PolicyImage, compile},
    policy::alone,
};
use serde_json::Value;

use crate::{
    attacks::{EPERM, KILLED, PAYLOAD_RAN, nonce},
    cri::{Runtime, Spec, until},
    events,
    node::{AgentOptions, Node},
    random::Random,
    report::Report,
};

pub struct Options {
    /// Changes of the profile; each switches every container.
    pub changes: usize,
    pub containers: usize,
    pub seed: Option<u64>,
}

/// Where containers are told what to execute.
const DESK: &str = "/desk";
/// Executions in one go.
const BATCH: usize = 60;
/// How often it is asked whether a change is in force: each answer reads the collector's whole log.
const PAUSE: Duration = Duration::from_millis(500);
const NAMES: [&str; 3] = ["one", "two", "three"];

pub async fn run(cri: &Path, options: &Options) -> Result<ExitCode> {
    let mut report = Report::new();
    let runtime = Runtime::connect(cri);
    let mut node = Node::start(cri).await?;
    let mut random = Random::new(options.seed);
    let versions: Vec<Version> =
        (0..8).map(|number| Version::new(number, &mut random)).collect::<Result<_>>()?;
    node.write_profile("switched.yaml", &versions[0].text)?;
    let tier = node.start_agent(&AgentOptions::default()).await?;
    println!("tier: {tier}");
    let name = format!("{} containers, the profile changes {} times", options.containers, options.changes);
    let denied = if tier == "full" { EPERM } else { KILLED };
    report.case(&name, switched(&node, &runtime, options, &versions, denied, &mut random)).await;
    report.case("the agent stops cleanly", async { node.stop_agent() }).await;
    if report.failed() > 0 {
        println!("--- the agent's log\n{}", node.log("agent"));
    }
    Ok(report.close())
}

/// A version of the profile, under the name that records have for it.
struct Version {
    text: String,
    revision: String,
    mode: &'static str,
    image: PolicyImage,
}

impl Version {
    fn new(number: usize, random: &mut Random) -> Result<Self> {
        let mode = if number % 3 == 2 { "audit" } else { "enforce" };
        let mut text = format!(
            "apiVersion: palisade.dev/v1alpha1\nkind: ClusterProfile\nmetadata: {{name: switched}}\nspec:\n  selector: \
             {{podSelector: {{matchLabels: {{app: switched}}}}}}\n  mode: {mode}\n  exec:\n    allow:\n      - path: /usr/bin/workload\n"
        );
        for path in paths() {
            if random.happens(40) {
                text += &format!("      - path: {path}\n");
            }
        }
        // Versions that allow the same would be one revision.
        text += &format!("      - path: /version/{number}/*\n");
        let profiles = document::parse("switched", &text).map_err(|problems| {
            anyhow::anyhow!(problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))
        })?;
        let policy = alone(profiles.first().context("no profile")?);
        Ok(Self { text, revision: policy.revision_name(), mode, image: compile(&policy)? })
    }
}

fn paths() -> impl Iterator<Item = String> {
    NAMES.into_iter().flat_map(|a| {
        NAMES.into_iter().flat_map(move |b| NAMES.map(|c| format!("/usr/libexec/tree/{a}/{b}/{c}")))
    })
}

async fn switched(
    node: &Node,
    runtime: &Runtime,
    options: &Options,
    versions: &[Version],
    denied: i32,
    random: &mut Random,
) -> Result<()> {
    let pod = runtime.pod("pod-switched", "switched", "").await?;
    let desk = tempfile::tempdir()?;
    let mounts = [(desk.path(), DESK)];
    let mut containers = Vec::new();
    for number in 0..options.containers {
        let name = format!("c-{number}");
        let container =
            runtime.create(&pod, &Spec { name: &name, mounts: &mounts, ..Spec::default() }).await?;
        runtime.start(&container).await?;
        events::in_mode(node, &container, versions[0].mode).await?;
        let all: Vec<String> = paths().collect();
        let drawn: Vec<String> = (0..BATCH).map(|_| random.pick(&all).clone()).collect();
        containers.push((container, name, drawn));
    }
    let over = Cell::new(false);
    let begun = Instant::now();
    let changes = async {
        // However it ends, the load must end with it.
        let _over = SetOnDrop(&over);
        for change in 1..=options.changes {
            let version = &versions[change % versions.len()];
            node.write_profile("switched.yaml", &version.text)?;
            let all: Vec<&str> = containers.iter().map(|(container, ..)| container.as_str()).collect();
            under(node, &all, &version.revision).await?;
        }
        anyhow::Ok(())
    };
    let load = async {
        let load = containers
            .iter()
            .map(|(container, name, drawn)| execute(runtime, container, name, drawn, desk.path(), &over));
        let mut all: HashMap<String, (String, i32)> = HashMap::new();
        for outcomes in futures_util::future::join_all(load).await {
            all.extend(outcomes?);
        }
        anyhow::Ok(all)
    };
    let (changed, outcomes) = tokio::join!(changes, load);
    changed?;
    let outcomes = outcomes?;
    println!("   {} executions, {:.1} s", outcomes.len(), begun.elapsed().as_secs_f64());
    let seen = compare(node, &outcomes, versions, denied).await?;
    println!("   revisions that decided: {seen:?}");
    ensure!(seen.len() > versions.len() / 2, "most revisions decided nothing: {seen:?}");
    runtime.remove_pod(&pod).await
}

struct SetOnDrop<'a>(&'a Cell<bool>);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.set(true);
    }
}

/// Waits until all containers are under a revision.
async fn under(node: &Node, containers: &[&str], revision: &str) -> Result<()> {
    until(&format!("all are under {revision}"), async || {
        tokio::time::sleep(PAUSE).await;
        let coverage = node.palisade(&["coverage", "--json"])?;
        let records = coverage.lines().map(serde_json::from_str::<Value>).collect::<Result<Vec<_>, _>>()?;
        let is_under = |container: &&str| {
            records.iter().any(|record| {
                record["container"]["id"] == **container && record["container"]["revision"] == revision
            })
        };
        Ok(containers.iter().all(is_under).then_some(()))
    })
    .await
}

/// Executes what was drawn, again and again until it is over. Returns the path and exit code of each.
async fn execute(
    runtime: &Runtime,
    container: &str,
    name: &str,
    drawn: &[String],
    desk: &Path,
    over: &Cell<bool>,
) -> Result<HashMap<String, (String, i32)>> {
    let mut outcomes = HashMap::new();
    let mut round = 0;
    while !over.get() {
        round += 1;
        let nonce = nonce(name);
        let list: String = drawn
            .iter()
            .enumerate()
            .map(|(number, path)| format!("exec {nonce}-{number} {path}\n"))
            .collect();
        fs::write(desk.join(name), list)?;
        let (list, out) = (format!("{DESK}/{name}"), format!("{DESK}/{name}.out"));
        let ended = runtime.exec(container, &["/usr/bin/workload", "batch", &list, &out]).await?;
        ensure!(ended.code == 0, "round {round}: {ended:?}");
        let place: PathBuf = desk.join(format!("{name}.out"));
        for line in fs::read_to_string(place)?.lines() {
            let words: Vec<&str> = line.split(' ').collect();
            let [id, _pid, code] = words.as_slice() else { anyhow::bail!("not an outcome: {line}") };
            let number: usize = id.rsplit('-').next().unwrap_or_default().parse()?;
            outcomes.insert((*id).to_owned(), (drawn[number].clone(), code.parse()?));
        }
    }
    Ok(outcomes)
}

/// Compares every outcome with its record, and both with what `profile` says of the revision. Returns how often each decided.
async fn compare(
    node: &Node,
    outcomes: &HashMap<String, (String, i32)>,
    versions: &[Version],
    denied: i32,
) -> Result<BTreeMap<String, usize>> {
    let records = until("a record of every execution", async || {
        let records = events::query(node, &["--kind", "exec"])?;
        let last =
            |record: &Value| Some(record["exec"]["arguments"].as_array()?.last()?.as_str()?.to_owned());
        let ours: Vec<(String, Value)> = records
            .into_iter()
            .filter_map(|record| Some((last(&record)?, record)))
            .filter(|(id, _)| outcomes.contains_key(id))
            .collect();
        Ok((ours.len() >= outcomes.len()).then_some(ours))
    })
    .await?;
    let ids: BTreeSet<&String> = records.iter().map(|(id, _)| id).collect();
    ensure!(ids.len() == records.len(), "{} records of {} executions", records.len(), ids.len());
    let mut seen = BTreeMap::new();
    for (id, record) in &records {
        let decision = &record["decision"];
        let revision = decision["revision"].as_str().unwrap_or_default();
        let version = versions.iter().find(|version| version.revision == revision);
        let version = version.with_context(|| format!("no version is called so: {record}"))?;
        *seen.entry(revision.to_owned()).or_default() += 1;
        let (path, code) = &outcomes[id];
        let execution = Execution {
            path: path.as_bytes(),
            origin: origin::IMAGE,
            session: session::ENTERED,
            failure: 0,
            caller: None,
            arguments: None,
        };
        let expected = evaluate(&version.image, &execution).verdict;
        let said = verdict::name(expected).unwrap_or_default();
        ensure!(decision["verdict"] == said, "profile says {said}: {record}");
        ensure!(decision["mode"] == version.mode, "its mode is {}: {record}", version.mode);
        // One that was allowed when it began, and not any more when it was past its point of no return, is killed.
        let wanted = match (expected, decision["action"].as_str()) {
            (verdict::DENIED, Some("killed")) => KILLED,
            (verdict::DENIED, _) => denied,
            _ => PAYLOAD_RAN,
        };
        ensure!(*code == wanted, "it ended with {code}, not {wanted}: {record}");
    }
    Ok(seen)
}
