//! What the agent claims about itself: its pins and programs are tampered with as root of the host can, and it must notice,
//! withdraw its claim, mend what it can, and claim again.

#![expect(unsafe_code, reason = "calls of bpf(2)")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{
    attacks::{PAYLOAD_RAN, nonce, profile},
    cri::{Runtime, WORKLOAD_IMAGE, until},
    events,
    node::{AgentOptions, Node},
    report::Report,
};

pub async fn run(cri: &Path) -> Result<ExitCode> {
    let mut report = Report::new();
    let runtime = Runtime::connect(cri);
    let mut node = Node::start(cri).await?;
    node.write_profile("claims.yaml", &profile("claims", "enforce"))?;
    let options =
        AgentOptions { settings: "selfProbeSeconds: 1\nagentLeaseSeconds: 2\n", ..AgentOptions::default() };
    node.start_agent(&options).await?;
    let pod = runtime.pod("pod-claims", "claims", "").await?;
    let container = runtime.container(&pod, "c-claims", WORKLOAD_IMAGE, &[]).await?;
    events::in_mode(&node, &container, "enforce").await?;
    let stage = Stage { node: &node, runtime: &runtime, container: &container };
    report.case("it is ready", node.is_ready()).await;
    report
        .case(
            "the pin of a link is deleted",
            stage.tampered("the pin of the link of sched_process_exec is gone", async || {
                Ok(fs::remove_file(stage.set()?.join("links/sched_process_exec"))?)
            }),
        )
        .await;
    report
        .case(
            "every pin is deleted",
            stage.tampered("the pin of map SLOTS is gone", async || {
                let set = stage.set()?;
                for kind in ["links", "programs", "maps"] {
                    for entry in fs::read_dir(set.join(kind))? {
                        fs::remove_file(entry?.path())?;
                    }
                }
                Ok(())
            }),
        )
        .await;
    report
        .case(
            "the folder of the links is deleted",
            stage.tampered("the pin of the link of sched_process_exit is gone", async || {
                Ok(fs::remove_dir_all(stage.set()?.join("links"))?)
            }),
        )
        .await;
    report
        .case(
            "the bpffs is unmounted",
            stage.tampered("the bpffs with the pins is gone", async || {
                let status = Command::new("umount").args(["--lazy", "/sys/fs/bpf"]).status()?;
                ensure!(status.success(), "umount ended with {status}");
                Ok(())
            }),
        )
        .await;
    report
        .case(
            "the probe's own policy is taken out of the kernel",
            stage.tampered("an act that must be refused was not", async || {
                /// Of `agent-abi`: the slot of the self-probe.
                const PROBE_SLOT: u64 = u64::MAX - 1;
                bpf::delete(&stage.set()?.join("maps/SLOT_POLICIES"), PROBE_SLOT)
            }),
        )
        .await;
    report.case("it is ready again", node.is_ready()).await;
    node.kill_agent()?;
    let stage = Stage { node: &node, runtime: &runtime, container: &container };
    report.case("what was mended outlives the agent", stage.refused()).await;
    report
        .case(
            "it is not ready without an agent",
            node.says_of_itself("not ready: the agent gives no sign", false),
        )
        .await;
    runtime.remove_pod(&pod).await?;
    if report.failed() > 0 {
        println!("--- the agent's log\n{}", node.log("agent"));
    }
    Ok(report.close())
}

struct Stage<'a> {
    node: &'a Node,
    runtime: &'a Runtime,
    container: &'a str,
}

impl Stage<'_> {
    /// The folder of the set that is in force.
    fn set(&self) -> Result<PathBuf> {
        self.node.sets()?.pop().context("no set is pinned")
    }

    /// What is not allowed does not run.
    async fn refused(&self) -> Result<()> {
        let words = ["/usr/bin/attacker", "run", "/usr/bin/third", "payload", &nonce("claims")];
        let ended = self.runtime.exec(self.container, &words).await?;
        ensure!(ended.code != PAYLOAD_RAN, "it ran: {ended:?}");
        Ok(())
    }

    fn states(&self) -> Result<Vec<Value>> {
        events::query(self.node, &["--kind", "node-state"])
    }

    /// Something is tampered with: the claim is withdrawn for that reason, and made again.
    async fn tampered(&self, failure: &str, tamper: impl AsyncFn() -> Result<()>) -> Result<()> {
        let before = self.states()?.len();
        tamper().await?;
        self.refused().await?;
        until(&format!("the claim is withdrawn: {failure}"), async || {
            let said = self.states()?.split_off(before);
            let found = said.iter().any(|record| {
                record["node_state"]["claim"] == "withdrawn"
                    && record["node_state"]["failures"].to_string().contains(failure)
            });
            Ok(found.then_some(()))
        })
        .await?;
        until("it is claimed again", async || {
            let last = self.states()?.pop().context("no state")?;
            Ok((last["node_state"]["claim"] == "holds").then_some(()))
        })
        .await?;
        let found = events::in_mode(self.node, self.container, "enforce").await?;
        ensure!(found["coverage"]["in_force_since"].as_u64().is_some_and(|since| since > 0), "{found}");
        self.refused().await
    }
}

/// What root of the host does to a pinned map.
mod bpf {
    use std::{ffi::CString, os::unix::ffi::OsStrExt as _, path::Path};

    use anyhow::{Result, ensure};

    // Commands of bpf(2), include/uapi/linux/bpf.h.
    const MAP_DELETE_ELEM: libc::c_int = 3;
    const OBJ_GET: libc::c_int = 7;

    fn call(command: libc::c_int, mut attributes: [u64; 4]) -> Result<i32> {
        // SAFETY: the kernel reads the attributes and what they point to, which lives until it returns.
        let result = unsafe {
            libc::syscall(libc::SYS_bpf, command, attributes.as_mut_ptr(), size_of_val(&attributes))
        };
        ensure!(result >= 0, "bpf({command}): {}", std::io::Error::last_os_error());
        Ok(i32::try_from(result)?)
    }

    /// Deletes `key` from the map pinned at `path`.
    pub fn delete(path: &Path, key: u64) -> Result<()> {
        let path = CString::new(path.as_os_str().as_bytes())?;
        let map = call(OBJ_GET, [path.as_ptr() as u64, 0, 0, 0])?;
        // file descriptor, key, value
        call(MAP_DELETE_ELEM, [map as u64, (&raw const key) as u64, 0, 0])?;
        // SAFETY: the descriptor is this function's own.
        unsafe { libc::close(map) };
        Ok(())
    }
}
