//! Code that was never executed: mapped from dropped files and from memory, made at run time, written into other processes.

use std::{
    path::Path,
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{
    attacks::{EPERM, PAYLOAD_RAN, nonce, profile},
    cri::{Pod, Runtime, WORKLOAD_IMAGE, until},
    events,
    node::{AgentOptions, Node},
    report::Report,
};

/// The fixture's answer when the kernel cannot do what an attack needs.
const NOT_POSSIBLE: i32 = 77;
/// What a kernel may have been built to refuse by itself.
const MAY_BE_IMPOSSIBLE: &[&str] = &["own-memory", "other-memory"];
const INTERPRETER: &str = "interpreter";
/// Where the fixture drops files.
const FOLDER: &str = "/tmp/attack";

/// What an attack is to the kernel.
struct Way {
    name: &'static str,
    act: &'static str,
    reason: &'static str,
    origin: &'static str,
    on: On,
}

/// What an attack is on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum On {
    Code,
    /// An allowed executable: refused whatever code is allowed.
    Executable,
    /// The same, in a way for which the kernel asks for root.
    ExecutableByRoot,
}

const fn spoil(name: &'static str, act: &'static str, on: On) -> Way {
    Way { name, act, reason: "allowed-executable", origin: "image", on }
}

const fn way(name: &'static str, act: &'static str, reason: &'static str, origin: &'static str) -> Way {
    Way { name, act, reason, origin, on: On::Code }
}

const WAYS: &[Way] = &[
    way("map", "map", "origin-not-allowed", "drift"),
    way("map-shared", "map", "origin-not-allowed", "drift"),
    way("map-deleted", "map", "origin-not-allowed", "drift"),
    way(INTERPRETER, "", "interpreter-not-allowed", "drift"),
    way("protect", "protect", "origin-not-allowed", "drift"),
    way("pkey-protect", "protect", "origin-not-allowed", "drift"),
    way("implied", "map", "origin-not-allowed", "drift"),
    way("remap", "map", "origin-not-allowed", "drift"),
    way("anonymous", "map", "jit-not-allowed", ""),
    way("anonymous-protect", "protect", "jit-not-allowed", ""),
    way("anonymous-shared", "map", "jit-not-allowed", ""),
    way("anonymous-shared-protect", "protect", "jit-not-allowed", ""),
    way("heap", "protect", "jit-not-allowed", ""),
    way("implied-heap", "map", "jit-not-allowed", ""),
    way("rewritten", "protect", "jit-not-allowed", "image"),
    way("writable", "map", "jit-not-allowed", "image"),
    way("memfd", "map", "memory-not-allowed", "memory"),
    way("tmpfs", "map", "memory-not-allowed", "memory"),
    way("segment", "map", "memory-not-allowed", "memory"),
    way("own-memory", "open-memory", "trace-not-allowed", ""),
    way("other-memory", "open-memory", "trace-not-allowed", ""),
    way("process-vm", "trace", "trace-not-allowed", ""),
    way("trace", "trace", "trace-not-allowed", ""),
    way("be-traced", "be-traced", "trace-not-allowed", ""),
    spoil("write", "change", On::ExecutableByRoot),
    spoil("chmod", "change", On::ExecutableByRoot),
    spoil("link", "change", On::ExecutableByRoot),
    spoil("remove", "remove", On::ExecutableByRoot),
    spoil("rename", "rename", On::ExecutableByRoot),
    spoil("replace", "rename", On::ExecutableByRoot),
    spoil("bind", "mount-over", On::Executable),
];

/// Fields that allow all of it, but for files that are no volume's.
const ALLOWED: &str = "      - {path: /tmp/attack/interpreter, from: drift}\n    memory: allow\n    jit: allow\n    trace: allow\n    libraries: [{path: /**}, {path: /tmp/attack/**, from: drift}]\n";

pub async fn run(cri: &Path) -> Result<ExitCode> {
    let mut report = Report::new();
    let runtime = Runtime::connect(cri);
    let mut node = Node::start(cri).await?;
    let profile = |app, mode| profile(app, mode) + EXECUTABLES;
    node.write_profile("enforce.yaml", &profile("enforce", "enforce"))?;
    node.write_profile("audit.yaml", &profile("audit", "audit"))?;
    node.write_profile("open.yaml", &(profile("open", "enforce") + ALLOWED))?;
    let tier = node.start_agent(&AgentOptions::default()).await?;
    println!("tier: {tier}");
    for (app, mode, expect) in [
        ("free", "none", Expect::Runs),
        ("enforce", "enforce", Expect::Refused),
        ("audit", "audit", Expect::Audited),
        ("open", "enforce", Expect::Runs),
    ] {
        // Without LSM programs nothing of it can be refused, or seen.
        let expect = if tier == "full" { expect } else { Expect::Runs };
        let pod = runtime.pod(&format!("pod-{app}"), app, "").await?;
        for uid in ["0", "65534"] {
            let stage = Stage { node: &node, runtime: &runtime, pod: &pod, full: tier == "full" };
            stage.attack(&mut report, app, mode, uid, expect).await;
        }
        runtime.remove_pod(&pod).await?;
    }
    if tier == "full" {
        report.case("what was refused is explained", explained(&node)).await;
    }
    report.case("the agent stops cleanly", async { node.stop_agent() }).await;
    if report.failed() > 0 {
        println!("--- the agent's log\n{}", node.log("agent"));
    }
    Ok(report.close())
}

/// The rule for the executables that are attacked.
pub const EXECUTABLES: &str = "      - path: /usr/libexec/palisade/*\n";

/// Every attack once, as root, in a pod under a profile with [`EXECUTABLES`].
pub async fn trial(node: &Node, runtime: &Runtime, pod: &Pod, mode: &str, report: &mut Report) {
    let stage = Stage { node, runtime, pod, full: true };
    match stage.outcomes("trial", mode, "0").await {
        Ok((container, outcomes)) => {
            for way in WAYS {
                if report.failed() > 0 {
                    break;
                }
                report.case(way.name, async { outcomes.check(way, Expect::Refused) }).await;
            }
            report.case("the container ends", runtime.remove_container(&container)).await;
        }
        Err(error) => report.case("the attacks are carried out", async { Err(error) }).await,
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Expect {
    Refused,
    Audited,
    Runs,
}

/// How an attack ended: the process that carried it out, as its container counts, and its exit code.
struct Outcome {
    name: String,
    pid: u64,
    code: i32,
}

/// How attacks in one container ended, and what is on record of them.
struct Outcomes {
    outcomes: Vec<Outcome>,
    records: Vec<Value>,
}

struct Stage<'a> {
    node: &'a Node,
    runtime: &'a Runtime,
    pod: &'a Pod,
    full: bool,
}

impl Stage<'_> {
    async fn attack(&self, report: &mut Report, app: &str, mode: &str, uid: &str, expect: Expect) {
        let title = |name: &str| format!("{app}, uid {uid}: {name}");
        match self.outcomes(app, mode, uid).await {
            Ok((container, outcomes)) => {
                for way in WAYS.iter().filter(|way| way.on != On::ExecutableByRoot || uid == "0") {
                    let always = app == "open" && way.on != On::Code && self.full;
                    let expect = if always { Expect::Refused } else { expect };
                    report.case(&title(way.name), async { outcomes.check(way, expect) }).await;
                }
                report.case(&title("the container ends"), self.runtime.remove_container(&container)).await;
            }
            Err(error) => report.case(&title("the attacks are carried out"), async { Err(error) }).await,
        }
    }

    /// Carries out all attacks in a fresh container and waits until their records have come.
    async fn outcomes(&self, app: &str, mode: &str, uid: &str) -> Result<(String, Outcomes)> {
        let name = format!("c-{app}-{uid}");
        let container = self.runtime.container(self.pod, &name, WORKLOAD_IMAGE, &[]).await?;
        events::in_mode(self.node, &container, mode).await?;
        let ended = self.runtime.exec(&container, &["/usr/bin/attacker", "code", FOLDER, uid]).await?;
        ensure!(ended.code == 0, "{ended:?}");
        let outcomes: Vec<Outcome> = ended.stdout.lines().filter_map(outcome).collect();
        ensure!(outcomes.len() == WAYS.len(), "{} attacks, not {}: {ended:?}", outcomes.len(), WAYS.len());
        // Records keep their order, so whatever was made before this one has come when it has.
        let nonce = nonce("after");
        self.runtime.exec(&container, &["/usr/bin/workload", "payload", &nonce]).await?;
        events::exactly_one(self.node, &nonce).await?;
        let kinds = ["--kind", "code", "--kind", "exec", "--container", &container];
        let records = events::query(self.node, &kinds)?;
        Ok((container, Outcomes { outcomes, records }))
    }
}

impl Outcomes {
    fn check(&self, way: &Way, expect: Expect) -> Result<()> {
        let outcome = self.outcomes.iter().find(|outcome| outcome.name == way.name);
        let outcome = outcome.context("it was not carried out")?;
        let by = |record: &&Value| {
            record["code"].is_object() && record["actor"]["namespace_pid"].as_u64() == Some(outcome.pid)
        };
        let records: Vec<&Value> = self.records.iter().filter(by).collect();
        let of_exec = way.name == INTERPRETER;
        let wanted = match expect {
            Expect::Refused => EPERM,
            _ => PAYLOAD_RAN,
        };
        let Outcome { code, .. } = outcome;
        let impossible = *code == NOT_POSSIBLE && MAY_BE_IMPOSSIBLE.contains(&way.name);
        if impossible && expect != Expect::Refused {
            println!("     this kernel refuses {} by itself", way.name);
        } else {
            ensure!(*code == wanted, "exit code {code}, not {wanted}: {records:?}");
        }
        if expect == Expect::Runs {
            ensure!(records.is_empty(), "something was objected to: {records:?}");
            return Ok(());
        }
        let (verdict, action) =
            if expect == Expect::Refused { ("denied", "refused") } else { ("audited", "none") };
        if of_exec {
            return self.check_interpreter(outcome.pid, way, (verdict, action));
        }
        let found = records.iter().find(|record| {
            let (code, reason) = (&record["code"], &record["decision"]["reason"]);
            let same = reason == way.reason && code["origin"] == way.origin;
            // Where the call has no hook of its own, its file is not known.
            let unhooked = way.name == "remap" && reason == "jit-not-allowed" && code["origin"] == "";
            code["act"] == way.act && (same || unhooked)
        });
        let record = found.with_context(|| format!("no record says so: {records:?}"))?;
        let (code, decision) = (&record["code"], &record["decision"]);
        ensure!(decision["verdict"] == verdict && decision["action"] == action, "{record}");
        ensure!(record["actor"]["executable"] == "/usr/bin/attacker", "{record}");
        let folder = if way.on == On::Code { FOLDER } else { "/usr/libexec/palisade" };
        let file = format!("{folder}/{}", way.name);
        let named = code["origin"] == "drift" || way.on != On::Code;
        ensure!(!named || code["file"] == file.as_str(), "not {file}: {code}");
        // A refusal ends the attack, so it is one act.
        ensure!(expect == Expect::Audited || records.len() == 1, "{} records: {records:?}", records.len());
        Ok(())
    }

    /// The record of an exec whose interpreter is not the image's.
    fn check_interpreter(&self, pid: u64, way: &Way, (verdict, action): (&str, &str)) -> Result<()> {
        let found = self.records.iter().find(|record| {
            record["actor"]["namespace_pid"].as_u64() == Some(pid)
                && record["exec"]["executable"] == "/usr/bin/attached-interpreter"
        });
        let record = found.with_context(|| format!("no record says so: {:?}", self.records))?;
        let (exec, decision) = (&record["exec"], &record["decision"]);
        ensure!(
            decision["verdict"] == verdict
                && decision["action"] == action
                && decision["reason"] == way.reason,
            "{record}"
        );
        let loader = format!("{FOLDER}/{}", way.name);
        ensure!(exec["interpreter"] == loader.as_str() && exec["interpreter_origin"] == way.origin, "{exec}");
        Ok(())
    }
}

fn outcome(line: &str) -> Option<Outcome> {
    let mut words = line.split(' ');
    let name = words.next()?.to_owned();
    Some(Outcome { name, pid: words.next()?.parse().ok()?, code: words.next()?.parse().ok()? })
}

/// `palisade explain` names the field that would allow it.
async fn explained(node: &Node) -> Result<()> {
    let events = node.folder.path().join("events.jsonl");
    let profiles = node.folder.path().join("profiles");
    let text = until("the records", async || {
        let text = node.palisade(&["events", "--json"])?;
        Ok(text.contains("trace-not-allowed").then_some(text))
    })
    .await?;
    std::fs::write(&events, text)?;
    let output =
        Command::new("palisade").arg("explain").arg(&events).arg("--profiles").arg(&profiles).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let said = String::from_utf8_lossy(&output.stdout);
    for wanted in
        ["jit: allow", "memory: allow", "trace: allow", "libraries: [{path: /**}, {path: \"/tmp/attack/map\""]
    {
        ensure!(said.contains(wanted), "it lacks {wanted}: {said}");
    }
    Ok(())
}
