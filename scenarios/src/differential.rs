//! The kernel's decision and `profile`'s evaluation on the same profiles and files: no difference.
//!
//! Profiles are drawn at random; real containers execute and map files of every origin, as workload and as somebody who entered.
//! What happened, and what the record says, is compared with what `profile` says.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};
use k8s_cri::v1::NamespaceMode;
use palisade_abi::codes::{origin, reason, session, verdict};
use palisade_profile::{
    document,
    exec::evaluate::{Decision, Execution, evaluate, evaluate_mapping},
    image::{PolicyImage, compile},
    policy::alone,
};
use serde_json::Value;

use crate::{
    attacks::{EPERM, KILLED, PAYLOAD_RAN},
    cri::{Runtime, Spec, until},
    events,
    gate::Gate,
    node::{AgentOptions, Node},
    random::Random,
    report::Report,
};

pub struct Options {
    /// Acts of one kind on files of one origin with one verdict, over all containers.
    pub per_cell: usize,
    pub seed: Option<u64>,
}

/// Most containers, each under a profile of its own, until every verdict of every origin has come up often enough.
const MOST_CONTAINERS: usize = 48;
/// So many at least have a part in every kind of act.
const VARIED: usize = 8;

/// Where containers see the volume, and the folder through which they are told what to do.
const VOLUME: &str = "/vol";
const DESK: &str = "/desk";

/// Paths at the bounds of what is judged, and far beyond: with why they are not known, or 0.
fn odd_paths() -> [(String, u8); 4] {
    let folders = |name: &str, count: usize| format!("/srv{}/one", format!("/{name}").repeat(count));
    let long = "l".repeat(200);
    [
        (folders("d", 58), 0),
        (folders("d", 80), reason::PATH_TOO_DEEP),
        (folders(&long, 4), 0),
        (folders(&long, 30), reason::PATH_TOO_LONG),
    ]
}

pub async fn run(cri: &Path, options: &Options) -> Result<ExitCode> {
    let mut report = Report::new();
    let runtime = Runtime::connect(cri);
    let mut node = Node::start(cri).await?;
    let mut random = Random::new(options.seed);
    let tier = node.start_agent(&AgentOptions::default()).await?;
    println!("tier: {tier}");
    let full = tier == "full";
    let plans = draw(options.per_cell, full, &mut random)?;
    for plan in &plans {
        node.write_profile(&format!("{}.yaml", plan.drawn.app), &plan.drawn.text)?;
    }
    let volume = tempfile::tempdir()?;
    let mut stage =
        Stage { node: &node, runtime: &runtime, volume: volume.path(), full, tally: Tally::default() };
    for plan in &plans {
        let Drawn { app, rules, mode, .. } = &plan.drawn;
        report.case(&format!("{app}, {rules} rules, mode {mode}"), stage.compare(plan)).await;
    }
    let _never_made = fs::remove_dir_all(HOST_FOLDER);
    let tally = std::mem::take(&mut stage.tally);
    println!("{}", tally.table());
    let kinds = if full { Act::ALL.len() } else { 1 };
    report
        .case("every origin has every verdict, in equal shares", async {
            tally.is_equal(options.per_cell * kinds)
        })
        .await;
    report.case("the agent stops cleanly", async { node.stop_agent() }).await;
    if report.failed() > 0 {
        println!("--- the agent's log\n{}", node.log("agent"));
    }
    Ok(report.close())
}

/// A profile, as text and compiled.
struct Drawn {
    app: String,
    mode: &'static str,
    rules: usize,
    text: String,
    image: PolicyImage,
    /// What carries the acts out: of those who enter, and of the workload.
    callers: [&'static str; 2],
}

/// Programs that can carry acts out.
const CALLERS: [&str; 2] = ["/usr/bin/workload", "/usr/bin/attacker"];
/// What every act has for its first argument; its id follows.
const FIRST_ARGUMENT: &str = "/dev/null";

impl Drawn {
    fn new(number: usize, random: &mut Random) -> Result<Self> {
        let app = format!("drawn-{number}");
        let mode = if number.is_multiple_of(2) { "enforce" } else { "audit" };
        let rules = 4 + random.below(28) as usize;
        let mut text = format!(
            "apiVersion: palisade.dev/v1alpha1\nkind: Profile\nmetadata: {{name: {app}, namespace: scenarios}}\nspec:\n  \
             selector: {{podSelector: {{matchLabels: {{app: {app}}}}}}}\n  mode: {mode}\n  exec:\n"
        );
        for field in ["memory", "jit"] {
            if random.happens(50) {
                let _ = writeln!(text, "    {field}: allow");
            }
        }
        if random.happens(60) {
            let _ = writeln!(text, "    libraries:\n      - path: /usr/bin/*");
            for _ in 0..rules {
                let _ = writeln!(text, "      - {{path: {}, from: {}}}", path(random), from(random));
            }
        }
        // What carries the acts out.
        text += "    allow:\n";
        for caller in CALLERS {
            let _ = writeln!(text, "      - path: {caller}");
        }
        for _ in 0..rules {
            let sessions = ["", ", sessions: workload", ", sessions: admin", ", sessions: [workload, admin]"];
            let (path, from, sessions) = (path(random), from(random), random.pick(&sessions));
            // Conditions are for one file.
            let conditions = if path.contains('*') { String::new() } else { conditions(random) };
            let _ = writeln!(text, "      - {{path: {path}, from: {from}{sessions}{conditions}}}");
        }
        let parsed = document::parse(&app, &text).map_err(|problems| {
            let problems: Vec<String> = problems.iter().map(ToString::to_string).collect();
            anyhow::anyhow!("{}: {text}", problems.join("; "))
        })?;
        let image = compile(&alone(parsed.first().context("no profile")?))?;
        let callers = [*random.pick(&CALLERS), *random.pick(&CALLERS)];
        Ok(Self { app, mode, rules, text, image, callers })
    }
}

/// What is done under one profile.
struct Plan {
    drawn: Drawn,
    /// By those who enter, and by the workload.
    acts: [Vec<Case>; 2],
}

/// The verdicts that files of an origin can have in any mode: nothing allows what is unknown.
fn verdicts(origin: u8) -> &'static [u8] {
    if origin == origin::UNKNOWN {
        &[verdict::AUDITED, verdict::DENIED]
    } else {
        &[verdict::ALLOWED, verdict::AUDITED, verdict::DENIED]
    }
}

/// Draws profiles and acts until there are `per_cell` of each kind, origin and verdict, and no more than that.
fn draw(per_cell: usize, full: bool, random: &mut Random) -> Result<Vec<Plan>> {
    let kinds = if full { &Act::ALL[..] } else { &[Act::Exec] };
    let mut missing: BTreeMap<(Act, u8, u8), usize> = BTreeMap::new();
    for &kind in kinds {
        for place in PLACES {
            for &verdict in verdicts(place.origin) {
                missing.insert((kind, place.origin, verdict), per_cell);
            }
        }
    }
    let mut plans = Vec::new();
    while missing.values().any(|&count| count > 0) {
        ensure!(
            plans.len() < MOST_CONTAINERS,
            "{MOST_CONTAINERS} containers are too few for {per_cell} of each"
        );
        let drawn = Drawn::new(plans.len(), random)?;
        let acts = [session::ENTERED, session::WORKLOAD].map(|session| {
            let mut all = cases(&drawn, session, full);
            random.shuffle(&mut all);
            all.retain(|case| {
                let cell = (case.act, case.origin, case.expected.verdict);
                // One that must not be, as of what is unknown and allowed, is carried out, and fails the shares.
                let missing = missing.entry(cell).or_insert(1);
                if !case.odd {
                    // Some are left for other profiles, as long as there are many.
                    if *missing == 0 || (plans.len() < VARIED && random.happens(70)) {
                        return false;
                    }
                    *missing -= 1;
                }
                true
            });
            all
        });
        plans.push(Plan { drawn, acts });
    }
    Ok(plans)
}

/// A folder with the same tree of files in each place, and the origin of what is there.
struct Place {
    origin: u8,
    /// As the container opens it.
    folder: &'static str,
    /// As rules name it.
    named: &'static str,
    /// What stands before that in the kernel's text.
    mark: &'static str,
}

/// On the host's root filesystem, which a privileged container that sees the host's processes reaches.
const HOST_FOLDER: &str = "/var/tmp/palisade-differential";
/// Where the container mounts a filesystem that nobody told the agent about.
const MOUNTED: &str = "/srv/mounted";
/// What that shows: a folder in memory.
const MOUNTED_LAYER: &str = "/dev/layer";

const PLACES: &[Place] = &[
    Place { origin: origin::IMAGE, folder: "/usr/libexec/tree", named: "/usr/libexec/tree", mark: "" },
    Place { origin: origin::DRIFT, folder: "/srv/tree", named: "/srv/tree", mark: "" },
    Place { origin: origin::MEMORY, folder: "/dev/tree", named: "/tree", mark: "" },
    Place { origin: origin::VOLUME, folder: "/vol/tree", named: "/vol/tree", mark: ":/vol:" },
    Place {
        origin: origin::HOST,
        folder: "/proc/1/root/var/tmp/palisade-differential/tree",
        named: "/var/tmp/palisade-differential/tree",
        mark: "",
    },
    Place { origin: origin::UNKNOWN, folder: "/srv/mounted/tree", named: "/tree", mark: "" },
];
const NAMES: [&str; 3] = ["one", "two", "three"];

/// The path of a rule: of a file in one of the places, or a pattern that comes of it.
fn path(random: &mut Random) -> String {
    let place = random.pick(PLACES).named;
    let mut components: Vec<String> = place[1..].split('/').map(str::to_owned).collect();
    let begin = components.len();
    components.extend((0..3).map(|_| (*random.pick(&NAMES)).to_owned()));
    for component in &mut components[begin..] {
        match random.below(6) {
            0 => "*".clone_into(component),
            1 => component.replace_range(1.., "*"),
            2 => *component = format!("*{}", &component[component.len() - 1..]),
            _ => {}
        }
    }
    if random.happens(15) {
        let from = random.below(components.len() as u64) as usize;
        let to = from + random.below((components.len() - from) as u64) as usize;
        components.splice(from..=to, ["**".to_owned()]);
    }
    format!("\"/{}\"", components.join("/"))
}

fn from(random: &mut Random) -> String {
    let all = ["image", "drift", "memory", "host", "\"volume:/vol\"", "\"volume:/other\""];
    let count = 1 + random.below(3);
    let chosen: BTreeSet<&str> = (0..count).map(|_| *random.pick(&all)).collect();
    format!("[{}]", chosen.into_iter().collect::<Vec<_>>().join(", "))
}

/// What a program is called that is executed by `path`: the fixture goes to the folder of one that is too long for a call.
fn called(path: &str) -> &str {
    if path.len() < 4096 { path } else { path.rsplit('/').next().unwrap_or(path) }
}

/// What else a rule may ask for.
fn conditions(random: &mut Random) -> String {
    let parents = [
        "",
        ", parents: /usr/bin/workload",
        ", parents: [/usr/bin/attacker]",
        ", parents: [/usr/bin/third, /usr/bin/workload]",
        ", parents: [/usr/bin/attacker, /usr/bin/workload]",
    ];
    let arguments = [
        "",
        ", args: []",
        ", args: [/dev/null, \"*\"]",
        ", args: [\"**\"]",
        ", args: [\"/dev/*\", \"drawn-*7\"]",
        ", args: [\"**\", \"*3*\"]",
        ", args: [/dev/nul, \"**\"]",
    ];
    let parents = if random.happens(40) { *random.pick(&parents) } else { "" };
    let names = ["", ", names: [\"/*\"]", ", names: [one, \"/srv/*\"]", ", names: \"/dev/tree/*\""];
    let arguments = if random.happens(40) { *random.pick(&arguments) } else { "" };
    let names = if arguments.is_empty() { "" } else { *random.pick(&names) };
    format!("{parents}{arguments}{names}")
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Act {
    Exec,
    Map,
    /// Mapped so that it can be written to as well.
    Generate,
}

impl Act {
    const ALL: [Self; 3] = [Self::Exec, Self::Map, Self::Generate];

    fn word(self) -> &'static str {
        match self {
            Self::Exec => "exec",
            Self::Map => "map",
            Self::Generate => "generate",
        }
    }
}

/// One act on one file, and what `profile` says about it.
struct Case {
    id: String,
    act: Act,
    path: String,
    origin: u8,
    expected: Decision,
    /// At the bounds of what is judged: beside the shares.
    odd: bool,
}

/// Every act on every file.
fn cases(drawn: &Drawn, session: u8, full: bool) -> Vec<Case> {
    let mut all: Vec<Case> = Vec::new();
    let caller = drawn.callers[usize::from(session == session::WORKLOAD)];
    let mut add = |path: String, canonical: String, origin, failure, odd| {
        for act in Act::ALL {
            let id = format!("{}-{session}-{}", drawn.app, all.len());
            let arguments = format!("{}\0{FIRST_ARGUMENT}\0{id}\0", called(&path));
            let file = Execution {
                path: canonical.as_bytes(),
                origin,
                session,
                failure,
                caller: Some(caller.as_bytes()),
                // Nothing has arguments when it is mapped.
                arguments: (act == Act::Exec).then_some(arguments.as_bytes()),
            };
            let expected = match act {
                Act::Exec => evaluate(&drawn.image, &file),
                Act::Map => evaluate_mapping(&drawn.image, Some(&file), false),
                Act::Generate => evaluate_mapping(&drawn.image, Some(&file), true),
            };
            // Without LSM programs only what is executed is judged.
            if full || act == Act::Exec {
                all.push(Case { id, act, path: path.clone(), origin, expected, odd });
            }
        }
    };
    for place in PLACES {
        for a in NAMES {
            for b in NAMES {
                for c in NAMES {
                    let below = format!("/{a}/{b}/{c}");
                    add(
                        format!("{}{below}", place.folder),
                        format!("{}{}{below}", place.mark, place.named),
                        place.origin,
                        0,
                        false,
                    );
                }
            }
        }
    }
    for (path, failure) in odd_paths() {
        add(path.clone(), path, origin::DRIFT, failure, true);
    }
    all
}

struct Stage<'a> {
    node: &'a Node,
    runtime: &'a Runtime,
    volume: &'a Path,
    full: bool,
    tally: Tally,
}

impl Stage<'_> {
    async fn compare(&mut self, plan: &Plan) -> Result<()> {
        let begun = Instant::now();
        let Plan { drawn, acts: [entered, workload] } = plan;
        let pod = self
            .runtime
            .pod_with(&format!("pod-{}", drawn.app), &drawn.app, "", NamespaceMode::Node, &[])
            .await?;
        let desk = tempfile::tempdir()?;
        let gate = Gate::new(&desk.path().join("gate"))?;
        let (list, out) = (format!("{DESK}/workload"), format!("{DESK}/workload.out"));
        let place = format!("{DESK}/gate");
        let command = ["/usr/bin/workload", "after", &place, drawn.callers[1], "batch", &list, &out];
        let mounts = [(desk.path(), DESK), (self.volume, VOLUME)];
        let spec =
            Spec { name: "c", command: &command, mounts: &mounts, privileged: true, ..Spec::default() };
        let container = self.runtime.create(&pod, &spec).await?;
        self.runtime.start(&container).await?;
        events::in_mode(self.node, &container, drawn.mode).await?;
        write_list(&desk.path().join("entered"), entered, true)?;
        write_list(&desk.path().join("workload"), workload, false)?;
        let ended = self
            .runtime
            .exec(
                &container,
                &[drawn.callers[0], "batch", &format!("{DESK}/entered"), &format!("{DESK}/entered.out")],
            )
            .await?;
        ensure!(ended.code == 0, "{ended:?}");
        gate.open().await?;
        let code = self.runtime.ended(&container).await?;
        ensure!(code == 0, "the workload ended with {code}");
        let outcomes =
            [outcomes(&desk.path().join("entered.out"))?, outcomes(&desk.path().join("workload.out"))?];
        let records = self.records(&container, entered, workload).await?;
        self.runtime.remove_pod(&pod).await?;
        let mut different = Vec::new();
        for (cases, outcomes) in [(entered, &outcomes[0]), (workload, &outcomes[1])] {
            ensure!(cases.len() == outcomes.len(), "{} outcomes of {} acts", outcomes.len(), cases.len());
            for case in cases {
                self.tally.count(case);
                if let Err(error) = self.check(case, outcomes, &records) {
                    different.push(format!("{} {}: {error:#}", case.act.word(), case.path));
                }
            }
        }
        println!("   {} acts, {:.1} s", entered.len() + workload.len(), begun.elapsed().as_secs_f64());
        ensure!(
            different.is_empty(),
            "{} differences: {}; the profile:\n{}",
            different.len(),
            different[..different.len().min(5)].join("; "),
            drawn.text
        );
        Ok(())
    }

    fn check(&self, case: &Case, outcomes: &HashMap<String, (u64, i32)>, records: &Records) -> Result<()> {
        let (pid, code) = *outcomes.get(&case.id).context("it has no outcome")?;
        let Decision { verdict, reason } = case.expected;
        let wanted = match verdict {
            // Arguments are known when it is too late to refuse.
            verdict::DENIED if self.full && reason != reason::ARGUMENTS || case.act != Act::Exec => EPERM,
            verdict::DENIED => KILLED,
            _ => PAYLOAD_RAN,
        };
        let name = |code| reason::name(code).unwrap_or_default();
        let said = verdict::name(verdict).unwrap_or_default();
        ensure!(code == wanted, "exit code {code}; profile says {said}, {}", name(reason));
        let record = match case.act {
            Act::Exec => records.execs.get(&case.id),
            _ => records.code.get(&pid),
        };
        if case.act != Act::Exec && verdict == verdict::ALLOWED {
            ensure!(record.is_none(), "it was allowed, and a record objects: {record:?}");
            return Ok(());
        }
        let record = record.context("it has no record")?;
        ensure!(
            record["decision"]["verdict"] == said && record["decision"]["reason"] == name(reason),
            "profile says {said}, {}: {record}",
            name(reason)
        );
        let event = if case.act == Act::Exec { "exec" } else { "code" };
        let origin = record[event]["origin"].as_str().unwrap_or_default();
        let kind = origin::name(case.origin).unwrap_or_default();
        ensure!(origin.split(':').next() == Some(kind), "origin {origin}, not {kind}: {record}");
        Ok(())
    }

    /// Every record of the acts; waits until the container's last one has come.
    async fn records(&self, container: &str, entered: &[Case], workload: &[Case]) -> Result<Records> {
        until("the container's end is recorded", async || {
            let coverage = events::query(self.node, &["--kind", "coverage", "--container", container])?;
            Ok(coverage.iter().any(|record| record["coverage"]["change"] == "ended").then_some(()))
        })
        .await?;
        let ids: BTreeSet<&str> = entered.iter().chain(workload).map(|case| case.id.as_str()).collect();
        let mut records = Records::default();
        for record in
            events::query(self.node, &["--kind", "exec", "--kind", "code", "--container", container])?
        {
            let pid = record["actor"]["namespace_pid"].as_u64();
            if let Some(pid) = pid.filter(|_| record["code"].is_object()) {
                ensure!(records.code.insert(pid, record).is_none(), "two records of one process, {pid}");
                continue;
            }
            let last = record["exec"]["arguments"].as_array().and_then(|words| words.last()?.as_str());
            if let Some(id) = last.filter(|id| ids.contains(id)).map(str::to_owned) {
                ensure!(records.execs.insert(id.clone(), record).is_none(), "two records of {id}");
            }
        }
        Ok(records)
    }
}

/// Of execs by what the act is called, of other code by the process, as its container counts.
#[derive(Default)]
struct Records {
    execs: HashMap<String, Value>,
    code: HashMap<u64, Value>,
}

/// What the fixture is to do: first the files that are not there yet.
fn write_list(file: &Path, cases: &[Case], make: bool) -> Result<()> {
    let mut text = String::new();
    if make {
        let mut paths: Vec<String> = PLACES
            .iter()
            .filter(|place| place.origin != origin::IMAGE)
            .flat_map(|place| {
                let all = NAMES
                    .iter()
                    .flat_map(|a| NAMES.iter().flat_map(move |b| NAMES.map(|c| format!("{a}/{b}/{c}"))));
                let folder = place.folder.replace(MOUNTED, MOUNTED_LAYER);
                all.map(move |below| format!("{folder}/{below}"))
            })
            .collect();
        paths.extend(odd_paths().map(|(path, _)| path));
        for path in paths {
            let _ = writeln!(text, "make {path}");
        }
        let _ = writeln!(text, "overlay {MOUNTED} {MOUNTED_LAYER}:/dev/tree");
    }
    for case in cases {
        let _ = writeln!(text, "{} {} {}", case.act.word(), case.id, case.path);
    }
    fs::write(file, text)?;
    Ok(())
}

fn outcomes(file: &PathBuf) -> Result<HashMap<String, (u64, i32)>> {
    let text = fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    let parsed = text.lines().map(|line| {
        let mut words = line.split(' ');
        Some((words.next()?.to_owned(), (words.next()?.parse().ok()?, words.next()?.parse().ok()?)))
    });
    parsed.collect::<Option<_>>().context("a line of the fixture is not an outcome")
}

/// How many acts of each origin had each verdict.
#[derive(Default)]
struct Tally(BTreeMap<(u8, u8), usize>);

impl Tally {
    fn count(&mut self, case: &Case) {
        if case.odd {
            return;
        }
        *self.0.entry((case.origin, case.expected.verdict)).or_default() += 1;
    }

    fn table(&self) -> String {
        let verdicts = [verdict::ALLOWED, verdict::AUDITED, verdict::DENIED];
        let mut text = format!("   {:<8}", "origin");
        for code in verdicts {
            let _ = write!(text, "{:>9}", verdict::name(code).unwrap_or_default());
        }
        for place in PLACES {
            let _ = write!(text, "\n   {:<8}", origin::name(place.origin).unwrap_or_default());
            for code in verdicts {
                let _ = write!(text, "{:>9}", self.0.get(&(place.origin, code)).unwrap_or(&0));
            }
        }
        text
    }

    fn is_equal(&self, share: usize) -> Result<()> {
        for (of, verdict) in self.0.keys() {
            let name = origin::name(*of);
            ensure!(verdicts(*of).contains(verdict), "{name:?} must never be {:?}", verdict::name(*verdict));
        }
        for place in PLACES {
            for &code in verdicts(place.origin) {
                let count = self.0.get(&(place.origin, code)).copied().unwrap_or(0);
                ensure!(
                    count == share,
                    "{count} and not {share} are {:?} of {:?}",
                    verdict::name(code),
                    origin::name(place.origin)
                );
            }
        }
        Ok(())
    }
}
