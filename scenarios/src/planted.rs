//! The suite itself on trial: against programs with a planted bug, and against an agent that does nothing, it must
//! fail.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    attacks::{ATTACKS, Expect, carry_out, profile},
    cri::Runtime,
    node::{AgentOptions, Node},
    report::Report,
};

/// Enough to notice each bug; the first failure ends a trial.
const TRIAL: &[&str] = &["third", "copy", "copy-over", "memfd", "deep"];

pub async fn run(cri: &Path, objects: &Path) -> Result<ExitCode> {
    let mut report = Report::new();
    let mut bugs: Vec<PathBuf> = std::fs::read_dir(objects)
        .with_context(|| format!("cannot list {}", objects.display()))?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    bugs.sort();
    ensure!(bugs.len() >= 5, "fewer than five bugs in {}", objects.display());
    report
        .case("an agent that enforces nothing is noticed", async {
            ensure!(trial(cri, None).await? > 0, "the suite passed although no profile was in force");
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
    node.write_profile("enforce.yaml", &profile("enforce", mode))?;
    let options = AgentOptions {
        program: objects.map(|_| PathBuf::from("palisade-agent-test")),
        objects: objects.map(Path::to_owned),
        ..AgentOptions::default()
    };
    node.start_agent(&options).await?;
    let pod = runtime.pod("pod-trial", "enforce", "").await?;
    let mut report = Report::quiet();
    for attack in ATTACKS.iter().filter(|attack| TRIAL.contains(&attack.name)) {
        report.case(attack.name, carry_out(&node, &runtime, &pod, attack, label, Expect::Refused)).await;
        if report.failed() > 0 {
            break;
        }
    }
    runtime.remove_pod(&pod).await?;
    let stopped = node.stop_agent();
    // Its self-probe may have noticed before the attacks did.
    if !node.log("agent").contains("enforcement does not work") {
        stopped?;
    }
    Ok(report.failed())
}
