//! The suite itself on trial: against programs with a planted bug, and against an agent that does nothing, it must
//! fail.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    attacks::{ATTACKS, Expect, carry_out, profile},
    code, conditions,
    cri::Runtime,
    node::{AgentOptions, Node},
    noisy,
    report::Report,
    who,
};

/// Enough to notice each bug of the exec's verdict; the first failure ends a trial.
const TRIAL: &[&str] = &["third", "script", "copy", "drop-in", "memfd", "deep"];
/// How bugs are called that are about other code than what is executed, about sessions, about conditions, and about the ring: what
/// they break is tried first.
const OF_CODE: &str = "plant-code-";
const OF_SESSIONS: &str = "plant-sessions-";
const OF_CONDITIONS: &str = "plant-conditions-";
const OF_RING: &str = "plant-ring-";
/// Programs without a bug.
const CONTROL: &str = "control";

pub async fn run(cri: &Path, objects: &Path) -> Result<ExitCode> {
    let mut report = Report::new();
    let mut bugs: Vec<PathBuf> = std::fs::read_dir(objects)
        .with_context(|| format!("cannot list {}", objects.display()))?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    bugs.sort();
    ensure!(bugs.len() > 10, "fewer than ten bugs, and programs without one, in {}", objects.display());
    report
        .case("an agent that enforces nothing is noticed", async {
            ensure!(trial(cri, None).await? > 0, "the suite passed although no profile was in force");
            Ok(())
        })
        .await;
    let (controls, bugs): (Vec<_>, Vec<_>) = bugs.into_iter().partition(|path| path.ends_with(CONTROL));
    let control = controls.first().context("no objects without a bug")?;
    report
        .case("programs without a bug pass all of it", async {
            let failed = trial(cri, Some(control)).await?;
            ensure!(failed == 0, "{failed} cases failed, so that nothing below means anything");
            Ok(())
        })
        .await;
    for bug in bugs {
        let name = bug.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        report
            .case(&format!("the bug {name} is noticed"), async {
                ensure!(trial(cri, Some(&bug)).await? > 0, "the suite passed in spite of it");
                Ok(())
            })
            .await;
    }
    Ok(report.close())
}

/// Runs the enforce scenario and returns how many cases failed.
async fn trial(cri: &Path, objects: Option<&Path>) -> Result<u32> {
    let runtime = Runtime::connect(cri);
    let mut node = Node::start(cri).await?;
    // Without objects: a profile that only audits, which is what an agent that does nothing comes to.
    let (mode, label) = if objects.is_some() { ("enforce", "enforce") } else { ("audit", "audit") };
    let text = profile("enforce", mode) + code::EXECUTABLES + who::TOOL_RULE + conditions::TRIAL_RULES;
    node.write_profile("enforce.yaml", &text)?;
    let bug =
        objects.and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let of_ring = bug.starts_with(OF_RING) || bug == CONTROL;
    let options = AgentOptions {
        program: objects.map(|_| PathBuf::from("palisade-agent-test")),
        objects: objects.map(Path::to_owned),
        settings: if of_ring { noisy::SMALL_RING } else { "" },
        ..AgentOptions::default()
    };
    node.start_agent(&options).await?;
    let pod = runtime.pod("pod-trial", "enforce", "").await?;
    let mut report = Report::quiet();
    if of_ring {
        noisy::trial(&node, &runtime, &mut report).await;
    }
    if bug.starts_with(OF_CODE) || bug == CONTROL {
        code::trial(&node, &runtime, &pod, label, &mut report).await;
    }
    if bug.starts_with(OF_SESSIONS) || bug == CONTROL {
        who::trial(&mut node, &runtime, &pod, &mut report).await?;
    }
    if bug.starts_with(OF_CONDITIONS) || bug == CONTROL {
        conditions::trial(&node, &runtime, &pod, label, &mut report).await;
    }
    for attack in ATTACKS.iter().filter(|attack| TRIAL.contains(&attack.name)) {
        if report.failed() > 0 {
            break;
        }
        report.case(attack.name, carry_out(&node, &runtime, &pod, attack, label, Expect::Refused)).await;
    }
    runtime.remove_pod(&pod).await?;
    let stopped = node.stop_agent();
    // Its self-probe may have noticed before the attacks did.
    if !node.log("agent").contains("enforcement does not work") {
        stopped?;
    }
    Ok(report.failed())
}
