//! The suite itself on trial: against programs with a planted bug, and against an agent that does nothing, it must fail.
//!
//! One agent serves all trials: its programs have every bug, and a map says which is on.

use std::{path::Path, process::ExitCode};

use anyhow::{Context as _, Result, ensure};
use aya::maps::Array;
use palisade_abi::codes::bug;

use crate::{
    attacks::{ATTACKS, Attack, Expect, carry_out, profile},
    code, conditions, counters,
    cri::{Pod, Runtime},
    layers,
    node::{AgentOptions, Node},
    noisy,
    report::Report,
    who,
};

/// Enough to notice each bug of the exec's verdict; the first failure ends a trial.
const TRIAL: &[&str] = &["third", "script", "copy", "drop-in", "memfd", "deep", "interpreter-link"];
/// What a bug of the exec's verdict lets through, which is tried first.
const FIRST: &[(u32, &str)] = &[
    (bug::ORIGIN_IGNORED, "drop-in"),
    (bug::FAILED_WALK_ALLOWED, "deep"),
    (bug::DRIFT_IS_IMAGE, "drop-in"),
    (bug::SCRIPTS_UNJUDGED, "script"),
    (bug::INTERPRETER_UNJUDGED, "interpreter-link"),
];
/// How bugs are called that are about other code than what is executed, about sessions, about conditions, about the ring, and about layers of
/// images: what they break is tried first.
const OF_CODE: &str = "code-";
const OF_SESSIONS: &str = "sessions-";
const OF_CONDITIONS: &str = "conditions-";
const OF_RING: &str = "ring-";
const OF_LAYERS: &str = "layer-";
/// The agent would notice most bugs by itself and give up. It proves that it enforces before the first trial, and not again.
const SETTINGS: &str = "selfProbeSeconds: 3600\n";

/// What a trial is of.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Trial {
    /// Profiles that only audit, which is what an agent that does nothing comes to.
    Nothing,
    /// Programs without a bug.
    Control,
    Bug(u32, &'static str),
}

impl Trial {
    /// Whether the cases for bugs of this kind are tried.
    fn is_about(self, kind: &str) -> bool {
        match self {
            Self::Nothing => false,
            Self::Control => true,
            Self::Bug(_, name) => name.starts_with(kind),
        }
    }

    /// Whether an attack is the one that a bug lets through.
    fn begins_with(self, attack: &str) -> bool {
        matches!(self, Self::Bug(code, _) if FIRST.contains(&(code, attack)))
    }
}

pub async fn run(cri: &Path, agent: &Path, objects: &Path) -> Result<ExitCode> {
    let mut report = Report::new();
    let runtime = Runtime::connect(cri);
    let mut node = Node::start(cri).await?;
    for (app, mode) in [("enforce", "enforce"), ("nothing", "audit")] {
        let text =
            profile(app, mode) + code::EXECUTABLES + who::TOOL_RULE + conditions::TRIAL_RULES + layers::RULE;
        node.write_profile(&format!("{app}.yaml"), &text)?;
    }
    let options = AgentOptions {
        program: Some(agent.to_owned()),
        objects: Some(objects.to_owned()),
        settings: (noisy::SMALL_RING.to_owned() + SETTINGS).leak(),
        ..AgentOptions::default()
    };
    node.start_agent(&options).await?;
    node.is_ready().await?;
    let mut pods = Pods { enforced: runtime.pod("pod-trial", "enforce", "").await?, number: 0 };
    let audited = runtime.pod("pod-nothing", "nothing", "").await?;
    report
        .case("an agent that enforces nothing is noticed", async {
            let failed = trial(&mut node, &runtime, &audited, Trial::Nothing).await?;
            ensure!(!failed.is_empty(), "the suite passed although no profile was in force");
            Ok(())
        })
        .await;
    runtime.remove_pod(&audited).await?;
    report
        .case("programs without a bug pass all of it", async {
            let failed = trial(&mut node, &runtime, &pods.enforced, Trial::Control).await?;
            ensure!(
                failed.is_empty(),
                "these failed, so that nothing below means anything: {}",
                failed.join("; ")
            );
            Ok(())
        })
        .await;
    for (code, name) in bug::ALL {
        report
            .case(&format!("the bug {name} is noticed"), async {
                plant(&node, *code)?;
                let failed = trial(&mut node, &runtime, &pods.enforced, Trial::Bug(*code, name)).await;
                plant(&node, 0)?;
                // What went wrong in its containers must not be in the next trial's way.
                pods.renew(&runtime).await?;
                ensure!(!failed?.is_empty(), "the suite passed in spite of it");
                Ok(())
            })
            .await;
    }
    report.case("the agent stops cleanly", async { node.stop_agent() }).await;
    Ok(report.close())
}

/// The pod of a trial.
struct Pods {
    enforced: Pod,
    number: u32,
}

impl Pods {
    async fn renew(&mut self, runtime: &Runtime) -> Result<()> {
        self.number += 1;
        runtime.remove_pod(&self.enforced).await?;
        self.enforced = runtime.pod(&format!("pod-trial-{}", self.number), "enforce", "").await?;
        Ok(())
    }
}

/// Switches a bug on; 0 switches off the one that is.
fn plant(node: &Node, bug: u32) -> Result<()> {
    let sets = node.sets()?;
    let set = sets.first().context("no set of programs is pinned")?;
    let mut planted: Array<_, u32> = counters::map(set, "BUG")?.try_into()?;
    Ok(planted.set(0, bug, 0)?)
}

/// Runs what the trial is about, and returns what failed.
async fn trial(node: &mut Node, runtime: &Runtime, pod: &Pod, trial: Trial) -> Result<Vec<String>> {
    let label = if trial == Trial::Nothing { "audit" } else { "enforce" };
    let mut report = Report::quiet();
    if trial.is_about(OF_RING) {
        noisy::trial(node, runtime, &mut report).await;
    }
    if trial.is_about(OF_CODE) {
        code::trial(node, runtime, pod, label, &mut report).await;
    }
    if trial.is_about(OF_SESSIONS) {
        who::trial(node, runtime, pod, &mut report).await?;
    }
    if trial.is_about(OF_CONDITIONS) {
        conditions::trial(node, runtime, pod, label, &mut report).await;
    }
    if trial.is_about(OF_LAYERS) {
        layers::trial(node, runtime, pod, &mut report).await;
    }
    let (first, then): (Vec<&Attack>, Vec<&Attack>) = ATTACKS
        .iter()
        .filter(|attack| TRIAL.contains(&attack.name))
        .partition(|attack| trial.begins_with(attack.name));
    for attack in first.into_iter().chain(then) {
        if report.failed() > 0 {
            break;
        }
        report.case(attack.name, carry_out(node, runtime, pod, attack, label, Expect::Refused)).await;
    }
    Ok(report.into_failures())
}
