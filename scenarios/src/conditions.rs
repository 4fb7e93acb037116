//! Rules that ask which program calls exec, and with which arguments.

use std::{path::Path, process::ExitCode};

use anyhow::{Result, ensure};
use serde_json::Value;

use crate::{
    attacks::{EPERM, KILLED, NOT_POSSIBLE, PAYLOAD_RAN, nonce},
    cri::{Pod, Runtime, WORKLOAD_IMAGE},
    events,
    node::{AgentOptions, Node},
    report::Report,
};

const WORKLOAD: &str = "/usr/bin/workload";
/// Only executed by the next.
const CHILD: &str = "/usr/bin/third";
/// Only with certain arguments.
const PARENT: &str = "/usr/bin/attacker";
/// A script that executes what its second line says, which only its interpreter may.
const SCRIPT: &str = "/usr/bin/steps";
const STEP: &str = "/usr/libexec/tree/two/two/two";
/// A script whose rule asks for arguments, which are never a script's own.
const ASKED_SCRIPT: &str = "/usr/libexec/palisade/write";

/// A symbolic link of the image, and what it leads to.
const LINK: &str = "/usr/bin/link-to-mark";
const LINKED: &str = "/usr/bin/mark";

fn profile(mode: &str) -> String {
    format!(
        "apiVersion: palisade.dev/v1alpha1\nkind: ClusterProfile\nmetadata: {{name: conditions-{mode}}}\nspec:\n  selector: \
         {{podSelector: {{matchLabels: {{app: conditions-{mode}}}}}}}\n  mode: {mode}\n  exec:\n    allow:\n      - path: {WORKLOAD}\n      \
         - path: {SCRIPT}\n      - {{path: {CHILD}, parents: [{PARENT}, /usr/bin/absent]}}\n      - {{path: {PARENT}, args: [run, \
         \"**\"]}}\n      - {{path: {PARENT}, args: [loop, \"/usr/bin/*\", \"1\", \"**\"], sessions: admin}}\n      - {{path: {STEP}, \
         parents: {WORKLOAD}, args: [\"steps-*\"], names: [\"/usr/*\", two]}}\n      - {{path: {ASKED_SCRIPT}, args: [\"**\"]}}\n      - path: {LINK}\n"
    )
}

/// What is executed in a container by somebody who enters, and what becomes of the last program in it.
struct Case {
    name: &'static str,
    command: &'static [&'static str],
    /// The program that is judged.
    program: &'static str,
    /// The reason against it; empty when it is allowed.
    reason: &'static str,
    caller: &'static str,
    /// Whether it is past its point of no return when it is refused.
    late: bool,
}

impl Case {
    fn has_script(&self) -> bool {
        self.command.iter().any(|word| [SCRIPT, ASKED_SCRIPT].contains(word))
    }
}

const PARENT_REASON: &str = "parent-not-allowed";
const ARGUMENTS_REASON: &str = "arguments-not-allowed";
/// More than are compared.
const LONG: &str = "LONG";

const CASES: &[Case] = &[
    Case {
        name: "a child of its parent runs",
        command: &[WORKLOAD, "run", PARENT, "run", CHILD, "payload"],
        program: CHILD,
        reason: "",
        caller: PARENT,
        late: false,
    },
    Case {
        name: "executed by another program it does not",
        command: &[WORKLOAD, "run", CHILD, "payload"],
        program: CHILD,
        reason: PARENT_REASON,
        caller: WORKLOAD,
        late: false,
    },
    Case {
        name: "nor when the runtime executes it",
        command: &[CHILD, "payload"],
        program: CHILD,
        reason: PARENT_REASON,
        caller: "",
        late: false,
    },
    Case {
        name: "nor when only the process above is the parent",
        command: &[WORKLOAD, "run", PARENT, "loop", WORKLOAD, "1", "run", CHILD, "payload"],
        program: CHILD,
        reason: PARENT_REASON,
        caller: WORKLOAD,
        late: false,
    },
    Case {
        name: "a forked process is still the parent's program",
        command: &[WORKLOAD, "run", PARENT, "loop", CHILD, "1", "payload"],
        program: CHILD,
        reason: "",
        caller: PARENT,
        late: false,
    },
    Case {
        name: "a script counts as its interpreter",
        command: &[WORKLOAD, "run", SCRIPT],
        program: STEP,
        reason: "",
        caller: WORKLOAD,
        late: false,
    },
    Case {
        name: "under another name it is refused",
        command: &[WORKLOAD, "named", "payload", STEP],
        program: STEP,
        reason: ARGUMENTS_REASON,
        caller: WORKLOAD,
        late: true,
    },
    Case {
        name: "other arguments are refused",
        command: &[WORKLOAD, "run", PARENT, "payload", "run"],
        program: PARENT,
        reason: ARGUMENTS_REASON,
        caller: WORKLOAD,
        late: true,
    },
    Case {
        name: "so are arguments that only begin alike",
        command: &[WORKLOAD, "run", PARENT, "loop", "/tmp/x", "1"],
        program: PARENT,
        reason: ARGUMENTS_REASON,
        caller: WORKLOAD,
        late: true,
    },
    Case {
        name: "and more than are compared",
        command: &[WORKLOAD, "run", PARENT, "run", CHILD, "payload", LONG],
        program: PARENT,
        reason: ARGUMENTS_REASON,
        caller: WORKLOAD,
        late: true,
    },
    Case {
        name: "a script's arguments meet no rule",
        command: &[WORKLOAD, "run", ASKED_SCRIPT],
        program: ASKED_SCRIPT,
        reason: ARGUMENTS_REASON,
        caller: WORKLOAD,
        late: false,
    },
];

pub async fn run(cri: &Path) -> Result<ExitCode> {
    let mut report = Report::new();
    let runtime = Runtime::connect(cri);
    let mut node = Node::start(cri).await?;
    let pod = runtime.pod("pod-conditions-control", "conditions-control", "").await?;
    let control = runtime.container(&pod, "c", WORKLOAD_IMAGE, &[]).await?;
    report.case("control: without an agent all of them run", unguarded(&runtime, &control)).await;
    runtime.remove_pod(&pod).await?;
    for mode in ["enforce", "audit"] {
        node.write_profile(&format!("{mode}.yaml"), &profile(mode))?;
    }
    let tier = node.start_agent(&AgentOptions::default()).await?;
    println!("tier: {tier}");
    let full = tier == "full";
    for mode in ["enforce", "audit"] {
        let app = format!("conditions-{mode}");
        let pod = runtime.pod(&format!("pod-{app}"), &app, "").await?;
        // Nothing of it changes a container, so one serves all.
        let container = runtime.container(&pod, "c", WORKLOAD_IMAGE, &[]).await?;
        events::in_mode(&node, &container, mode).await?;
        let mut stage = Stage { node: &mut node, runtime: &runtime, pod: &pod, container, full, mode };
        // In the fallback tier nobody sees the script.
        for case in CASES.iter().filter(|case| full || !case.has_script()) {
            report.case(&format!("{mode}: {}", case.name), stage.executes(case)).await;
        }
        report.case(&format!("{mode}: a rule that is a link is named"), stage.linked()).await;
        if full {
            report.case(&format!("{mode}: questions are answered"), stage.asked()).await;
        }
        if mode == "enforce" {
            report.case("who is a parent outlives the agent", stage.restarted()).await;
        }
        runtime.remove_pod(&pod).await?;
    }
    report.case("the agent stops cleanly", async { node.stop_agent() }).await;
    if report.failed() > 0 {
        println!("--- the agent's log\n{}", node.log("agent"));
    }
    Ok(report.close())
}

/// Rules whose conditions nobody meets.
pub const TRIAL_RULES: &str = "      - {path: /usr/libexec/tree/one/one/two, parents: /usr/bin/absent}\n      - {path: \
                               /usr/libexec/tree/one/one/three, args: [never]}\n";

/// Whether somebody who does not meet the conditions of [`TRIAL_RULES`] is refused, in a pod under a profile with them.
pub async fn trial(node: &Node, runtime: &Runtime, pod: &Pod, mode: &str, report: &mut Report) {
    for program in ["/usr/libexec/tree/one/one/two", "/usr/libexec/tree/one/one/three"] {
        let refused = async {
            let container = runtime.container(pod, &nonce("c-trial"), WORKLOAD_IMAGE, &[]).await?;
            events::in_mode(node, &container, mode).await?;
            let ended = runtime.exec(&container, &[WORKLOAD, "run", program, "x"]).await?;
            ensure!([EPERM, KILLED].contains(&ended.code), "{program}: {ended:?}");
            runtime.remove_container(&container).await
        };
        report.case("trial", refused).await;
    }
}

/// The words of a case, with a last one to know its records by.
fn words(case: &Case, nonce: &str) -> Vec<String> {
    let long = "x".repeat(1100);
    let words = case.command.iter().map(|word| if *word == LONG { long.clone() } else { (*word).to_owned() });
    words.chain([nonce.to_owned()]).collect()
}

/// Whether what ran says that the last program did.
fn ran(case: &Case, code: i32) -> bool {
    // A loop reports an exec that ended with anything but 0.
    code == PAYLOAD_RAN || (case.command.contains(&"loop") && code == 1)
}

async fn unguarded(runtime: &Runtime, container: &str) -> Result<()> {
    for case in CASES.iter().filter(|case| !case.command.contains(&"/tmp/x")) {
        let words = words(case, "control");
        let command: Vec<&str> = words.iter().map(String::as_str).collect();
        let ended = runtime.exec(container, &command).await?;
        ensure!(ran(case, ended.code), "{}: {ended:?}", case.name);
    }
    Ok(())
}

struct Stage<'a> {
    node: &'a mut Node,
    runtime: &'a Runtime,
    pod: &'a Pod,
    container: String,
    full: bool,
    mode: &'static str,
}

impl Stage<'_> {
    async fn executes(&self, case: &Case) -> Result<()> {
        let nonce = nonce("steps");
        let words = words(case, &nonce);
        let command: Vec<&str> = words.iter().map(String::as_str).collect();
        let ended = self.runtime.exec(&self.container, &command).await;
        let record = crate::cri::until("its record", async || {
            let records = events::query(self.node, &["--kind", "exec"])?;
            Ok(records.into_iter().rfind(|record| self.is_of(record, case, &nonce)))
        })
        .await?;
        let denied = !case.reason.is_empty() && self.mode == "enforce";
        let (exec, decision) = (&record["exec"], &record["decision"]);
        let verdict = match (case.reason, denied) {
            ("", _) => "allowed",
            (_, true) => "denied",
            (_, false) => "audited",
        };
        let reason = if case.reason.is_empty() { "rule" } else { case.reason };
        ensure!(
            decision["verdict"] == verdict && decision["reason"] == reason,
            "not {verdict}, {reason}: {record}"
        );
        ensure!(exec["caller"] == case.caller, "not called by {:?}: {record}", case.caller);
        if denied {
            let killed = case.late || !self.full;
            let (code, action) = if killed { (KILLED, "killed") } else { (EPERM, "refused") };
            ensure!(decision["action"] == action, "not {action}: {record}");
            // The runtime may call an exec failed that was refused, and a loop's own end says less.
            let seen = ended.as_ref().map_or(code, |ended| ended.code);
            ensure!(seen == code || case.command.contains(&"loop"), "{ended:?}");
        } else {
            ensure!(ended.as_ref().is_ok_and(|ended| ran(case, ended.code) || case.late), "{ended:?}");
        }
        Ok(())
    }

    /// A rule that names a symbolic link allows nothing, and the refusal says so.
    async fn linked(&self) -> Result<()> {
        let nonce = nonce("linked");
        // The runtime may call an exec failed that was refused.
        let _ended = self.runtime.exec(&self.container, &[WORKLOAD, "run", LINK, "x", &nonce]).await;
        let record = crate::cri::until("its record", async || {
            let records = events::query(self.node, &["--kind", "exec", "--executable", LINKED])?;
            Ok(records.into_iter().find(|record| events::has_argument(record, &nonce)))
        })
        .await?;
        let (exec, decision) = (&record["exec"], &record["decision"]);
        ensure!(decision["reason"] == "no-rule" && exec["rule_by_link"] == LINK, "{record}");
        Ok(())
    }

    /// Whether somebody who only asks (`AT_EXECVE_CHECK`) hears what would happen, and what is not allowed is recorded.
    async fn asked(&self) -> Result<()> {
        for (program, reason) in [
            (WORKLOAD, ""),
            (SCRIPT, ""),
            (CHILD, PARENT_REASON),
            // Nobody knows the arguments of what will not be executed.
            (PARENT, ARGUMENTS_REASON),
            ("/usr/bin/script", "no-rule"),
        ] {
            let nonce = nonce("asked");
            let ended =
                self.runtime.exec(&self.container, &[WORKLOAD, "ask", program, "run", &nonce]).await?;
            if ended.code == NOT_POSSIBLE {
                println!("   this kernel has no AT_EXECVE_CHECK");
                break;
            }
            let denied = !reason.is_empty() && self.mode == "enforce";
            ensure!(ended.code == if denied { EPERM } else { 0 }, "{program}: {ended:?}");
            // What comes behind it has arrived, so it would have.
            self.runtime.exec(&self.container, &[WORKLOAD, "true", &format!("{nonce}-marker")]).await?;
            crate::cri::until("what was executed behind it is recorded", async || {
                let records = events::query(self.node, &["--kind", "exec", "--executable", WORKLOAD])?;
                let marker = format!("{nonce}-marker");
                Ok(records.iter().any(|record| events::has_argument(record, &marker)).then_some(()))
            })
            .await?;
            let records = events::query(self.node, &["--kind", "exec", "--executable", program])?;
            // The program that asks has the word among its arguments, too.
            let record = records
                .into_iter()
                .find(|record| events::has_argument(record, &nonce) && record["exec"]["only_asked"] == true);
            if reason.is_empty() {
                ensure!(record.is_none(), "{program} would be allowed: {record:?}");
                continue;
            }
            let decision = record.as_ref().map(|record| &record["decision"]);
            let verdict = if denied { "denied" } else { "audited" };
            ensure!(
                decision.is_some_and(|found| found["reason"] == reason && found["verdict"] == verdict),
                "{program}: {record:?}"
            );
        }
        // By the number that the call has for 32-bit programs, too.
        for (program, allowed) in [(WORKLOAD, true), ("/usr/bin/script", false)] {
            let ended = self.runtime.exec(&self.container, &[WORKLOAD, "ask-32", program]).await?;
            let denied = !allowed && self.mode == "enforce";
            let expected = if denied { EPERM } else { 0 };
            ensure!([expected, NOT_POSSIBLE].contains(&ended.code), "{program} by int 0x80: {ended:?}");
        }
        Ok(())
    }

    /// Whether a record is about the program of the case, and not about one that leads to it.
    fn is_of(&self, record: &Value, case: &Case, nonce: &str) -> bool {
        let exec = &record["exec"];
        let of_script = case.program == ASKED_SCRIPT;
        // Under audit a script runs, and is named beside its interpreter.
        let named = if of_script && self.mode == "audit" { "script" } else { "executable" };
        events::has_argument(record, nonce) && exec[named] == case.program
    }

    /// The agent is killed and comes back; a program that ran before is still what it was.
    async fn restarted(&mut self) -> Result<()> {
        let gates = tempfile::tempdir()?;
        let name = nonce("c-restarted");
        let gate = crate::gate::Gate::new(&gates.path().join("gate"))?;
        // The workload executes the parent, which waits at the gate before it executes the child.
        let command =
            [WORKLOAD, "run", PARENT, "run", WORKLOAD, "after", "/gates/gate", PARENT, "run", CHILD];
        let command = [&command[..], &["payload", &name]].concat();
        let mounts = [(gates.path(), "/gates")];
        let spec = crate::cri::Spec { name: &name, command: &command, mounts: &mounts, ..Default::default() };
        let container = self.runtime.create(self.pod, &spec).await?;
        self.runtime.start(&container).await?;
        events::in_mode(self.node, &container, "enforce").await?;
        self.node.kill_agent()?;
        self.node.start_agent(&AgentOptions::default()).await?;
        gate.open().await?;
        let code = self.runtime.ended(&container).await?;
        ensure!(code == PAYLOAD_RAN, "it ended with {code}");
        let record = crate::cri::until("its record", async || {
            let records = events::query(self.node, &["--kind", "exec", "--executable", CHILD])?;
            Ok(records.into_iter().find(|record| events::has_argument(record, &name)))
        })
        .await?;
        ensure!(record["exec"]["caller"] == PARENT && record["decision"]["verdict"] == "allowed", "{record}");
        self.runtime.remove_container(&container).await
    }
}
