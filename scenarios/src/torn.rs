//! A file whose folder changes its name and place while the file's path is looked at: it has one path or the other, and never half of
//! each.

use anyhow::{Context as _, Result, ensure};

use crate::{
    attacks::nonce,
    cri::{Pod, Runtime, WORKLOAD_IMAGE},
    events,
    node::Node,
    report::Report,
};

/// A path that the file never has: half of it is of one moment, half of another.
pub const RULE: &str = "      - {path: /tmp/torn/b/x/program, from: drift}\n";
/// Attempts. Without a second look about one in five hundred finds the path above.
const ATTEMPTS: &str = "20000";

/// Whether a file is never mapped executable by a path that it does not have, in a pod under a profile with [`RULE`].
pub async fn trial(node: &Node, runtime: &Runtime, pod: &Pod, mode: &str, report: &mut Report) {
    report.case("trial", maps(node, runtime, pod, mode)).await;
}

async fn maps(node: &Node, runtime: &Runtime, pod: &Pod, mode: &str) -> Result<()> {
    let container = runtime.container(pod, &nonce("c-torn"), WORKLOAD_IMAGE, &[]).await?;
    events::in_mode(node, &container, mode).await?;
    let ended = runtime.exec(&container, &["/usr/bin/attacker", "torn", ATTEMPTS]).await?;
    runtime.remove_container(&container).await?;
    let mapped: u64 = ended.stdout.trim().parse().with_context(|| format!("{ended:?}"))?;
    println!("   mapped {mapped} times of {ATTEMPTS}");
    ensure!(mapped == 0, "it was mapped {mapped} times by a path that it never had");
    Ok(())
}
