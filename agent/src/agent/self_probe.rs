//! Proof that enforcement works, again and again: an act that must be refused, and a look at what it rests on.
//!
//! A child of the agent is given to a slot of its own, under a revision that allows nothing, and executes a program. The
//! kernel must refuse that, or kill the child on the fallback tier, and the record of it must arrive. What fails is
//! mended where it can be, and until the next proof the agent claims nothing.

use std::{
    io::Write as _,
    os::unix::process::ExitStatusExt as _,
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use palisade_abi::{
    codes::verdict,
    maps::{PROBE_SLOT, Process},
};
use palisade_profile::{document::Mode, image::PolicyImage};
use palisade_proto::v1::{self, record::Event};

use super::Agent;
use crate::{containers::NOT_IN_FORCE, kernel::Tier};

/// Exit code of a child whose execution was refused.
pub const REFUSED: i32 = 77;
/// How long the proof may take before it counts as failed.
const PATIENCE: Duration = Duration::from_secs(5);
const SIGKILL: i32 = 9;

/// Where the proof stands.
pub(super) struct SelfProbe {
    period: Duration,
    due: Instant,
    running: Option<(Child, Instant)>,
    /// How the child ended.
    ended: Option<ExitStatus>,
    /// Whether the record of its execution has come, and was a denial.
    recorded: bool,
    /// What speaks against the claim; empty when it holds.
    failures: Vec<String>,
    /// The revision that allows nothing.
    revision: Option<u32>,
}

impl SelfProbe {
    pub(super) fn new(period: Duration) -> Self {
        Self {
            period,
            due: Instant::now(),
            running: None,
            ended: None,
            recorded: false,
            failures: Vec::new(),
            revision: None,
        }
    }

    /// Takes a record of the probe's own slot.
    pub(super) fn take(&mut self, event: &Event) {
        let denied = verdict::name(verdict::DENIED).unwrap_or_default();
        self.recorded |= matches!(event, Event::Exec(exec) if exec.verdict == denied);
    }
}

impl Agent {
    /// Prepares the slot of the proof.
    ///
    /// # Errors
    ///
    /// When there is no room for it.
    pub(super) fn prepare_self_probe(&mut self) -> Result<()> {
        let maps = &mut self.kernel.maps;
        maps.add_slot(PROBE_SLOT, 0, "self-probe")?;
        let nothing = PolicyImage {
            mode: Mode::Enforce,
            restricts_exec: true,
            exact: std::collections::BTreeMap::default(),
            globs: Vec::new(),
        };
        let revision = maps.install(0, &nothing)?;
        maps.set_policy(PROBE_SLOT, revision, 0)?;
        if let Some(before) = self.self_probe.revision.replace(revision) {
            maps.retire(before);
        }
        Ok(())
    }

    /// Begins a proof when it is due, and ends one that is done.
    pub(super) fn probe_self(&mut self) {
        if let Some((child, begun)) = &mut self.self_probe.running {
            let overdue = begun.elapsed() > PATIENCE;
            match child.try_wait() {
                Ok(Some(status)) => self.self_probe.ended = Some(status),
                _ if overdue => {
                    let _it_ends_or_has_ended = child.kill();
                    let _reaped = child.wait();
                }
                _ => return,
            }
            if self.self_probe.recorded
                || overdue
                || self.self_probe.ended.is_some_and(|status| !self.is_refusal(status))
            {
                self.self_probe.running = None;
                self.conclude();
            }
            return;
        }
        if Instant::now() < self.self_probe.due {
            return;
        }
        self.self_probe.due = Instant::now() + self.self_probe.period;
        self.self_probe.ended = None;
        self.self_probe.recorded = false;
        match self.begin_act() {
            Ok(child) => self.self_probe.running = Some((child, Instant::now())),
            Err(error) => {
                tracing::error!(error = format!("{error:#}"), "the self-probe cannot be made");
                self.conclude();
            }
        }
    }

    /// Starts a child, gives it to the slot of the proof, and lets it act.
    fn begin_act(&mut self) -> Result<Child> {
        let mut child = Command::new("/proc/self/exe")
            .arg("self-probe")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot start a child")?;
        self.kernel.maps.put_process(child.id(), Process::new(PROBE_SLOT, 0))?;
        let mut go = child.stdin.take().context("the child has no input")?;
        go.write_all(b"\n").context("the child does not listen")?;
        Ok(child)
    }

    fn is_refusal(&self, status: ExitStatus) -> bool {
        match self.kernel.tier {
            Tier::Full => status.code() == Some(REFUSED),
            Tier::Fallback => status.signal() == Some(SIGKILL),
        }
    }

    /// Puts together what speaks against the claim, mends what can be mended, and says so when it has changed.
    fn conclude(&mut self) {
        let mut failures = Vec::new();
        match self.self_probe.ended {
            Some(status) if self.is_refusal(status) => {
                if !self.self_probe.recorded {
                    failures.push("the record of a refused act did not arrive".to_owned());
                }
            }
            Some(status) => failures.push(format!("an act that must be refused was not ({status})")),
            None => failures.push("whether an act is refused could not be tried".to_owned()),
        }
        let act_failed = !failures.is_empty();
        match self.kernel.verify() {
            Ok(mended) => failures.extend(mended),
            Err(error) => failures.push(format!("{error:#}")),
        }
        if act_failed && let Err(error) = self.kernel.attach_anew().and_then(|()| self.prepare_self_probe()) {
            failures.push(format!("the programs cannot be attached again: {error:#}"));
        }
        if !failures.is_empty() {
            // Soon again: what was mended must prove itself.
            self.self_probe.due = Instant::now() + Duration::from_secs(1);
        }
        self.claim(failures);
    }

    /// Says what is claimed from now on.
    fn claim(&mut self, failures: Vec<String>) {
        if failures == self.self_probe.failures {
            return;
        }
        let holds = failures.is_empty();
        if holds {
            tracing::info!("the self-probe succeeds again: what profiles say is enforced");
        } else {
            tracing::error!(?failures, "the self-probe fails: nothing is claimed until it succeeds");
        }
        self.state.failing = u32::from(!holds);
        self.renewed = 0;
        self.renew_lease();
        let state = v1::NodeState {
            claim: if holds { "holds" } else { "withdrawn" }.to_owned(),
            failures: failures.clone(),
            tier: self.kernel.tier.as_str().to_owned(),
        };
        self.self_probe.failures = failures;
        let slots: Vec<u64> = self.containers.keys().copied().collect();
        self.tell(0, Event::NodeState(state));
        for slot in slots {
            let Some(container) = self.containers.get_mut(&slot) else { continue };
            if holds {
                self.apply(slot, "claim-restored");
            } else if container.is_under_policy() {
                container.mode = NOT_IN_FORCE;
                container.encode();
                self.tell_coverage(slot, "claim-withdrawn", 0);
            }
        }
    }
}
