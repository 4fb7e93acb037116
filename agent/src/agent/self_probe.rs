//! Proof that enforcement works, again and again: an act that must be refused, and a look at what it rests on.
//!
//! A child of the agent is given to a slot of its own, under a revision that allows nothing, and executes a program. The
//! kernel must refuse that, or kill the child on the fallback tier, and the record of it must arrive. What fails is
//! mended where it can be, and until the next proof the agent claims nothing.

use std::{
    io::{Read as _, Write as _},
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
use rustix::event::{PollFd, PollFlags, Timespec, poll};

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
    running: Option<Running>,
    /// How the child ended.
    ended: Option<ExitStatus>,
    /// Whether the record of its execution has come, and was a denial.
    recorded: bool,
    /// What speaks against the claim; empty when it holds.
    failures: Vec<String>,
    /// Whether the last act ran.
    ran: bool,
    /// The revision that allows nothing.
    revision: Option<u32>,
}

/// A child that proves something.
struct Running {
    child: Child,
    begun: Instant,
    /// Whether it has been told to act.
    acts: bool,
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
            ran: false,
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

    /// Takes the proof a step further: begins one when it is due, lets the child act when it is ready, ends it when it has
    /// acted.
    pub(super) fn probe_self(&mut self) {
        let Some(mut running) = self.self_probe.running.take() else {
            if Instant::now() >= self.self_probe.due {
                self.begin_proof();
            }
            return;
        };
        if running.begun.elapsed() > PATIENCE {
            let _it_has_ended_already = running.child.kill();
            let _reaped = running.child.wait();
            self.conclude();
            return;
        }
        if let Err(error) = self.let_it_act(&mut running) {
            tracing::error!(error = format!("{error:#}"), "the self-probe cannot be made");
        }
        if self.self_probe.ended.is_none() {
            self.self_probe.ended = running.child.try_wait().ok().flatten();
        }
        match self.self_probe.ended {
            Some(status) if self.self_probe.recorded || !self.is_refusal(status) => self.conclude(),
            _ => self.self_probe.running = Some(running),
        }
    }

    /// Starts a child, which says when it is ready.
    fn begin_proof(&mut self) {
        self.self_probe.due = Instant::now() + self.self_probe.period;
        self.self_probe.ended = None;
        self.self_probe.recorded = false;
        let started = Command::new("/proc/self/exe")
            .arg("self-probe")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn();
        match started {
            Ok(child) => {
                self.self_probe.running = Some(Running { child, begun: Instant::now(), acts: false });
            }
            Err(error) => {
                tracing::error!(%error, "the self-probe cannot be made");
                self.conclude();
            }
        }
    }

    /// Gives a child that is ready to the slot of the proof, and lets it act. Not before: what the kernel still has to say
    /// about the child's own start would be judged, too.
    fn let_it_act(&mut self, running: &mut Running) -> Result<()> {
        let Some(output) = running.child.stdout.as_mut().filter(|_| !running.acts) else { return Ok(()) };
        let mut wanted = [PollFd::new(output, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        if poll(&mut wanted, Some(&now))? == 0 {
            return Ok(());
        }
        let mut word = [0; 1];
        output.read_exact(&mut word).context("the child does not get ready")?;
        self.kernel.maps.put_process(running.child.id(), Process::new(PROBE_SLOT, 0))?;
        let mut go = running.child.stdin.take().context("the child has no input")?;
        go.write_all(b"\n").context("the child does not listen")?;
        running.acts = true;
        Ok(())
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
        let mut ran = false;
        match self.self_probe.ended {
            Some(status) if self.is_refusal(status) => {
                if !self.self_probe.recorded {
                    failures.push("the record of a refused act did not arrive".to_owned());
                }
            }
            Some(status) => {
                ran = true;
                failures.push(format!("an act that must be refused was not ({status})"));
            }
            None => failures.push("whether an act is refused could not be tried".to_owned()),
        }
        match self.kernel.verify() {
            Ok(mended) => failures.extend(mended),
            Err(error) => failures.push(format!("{error:#}")),
        }
        let again = std::mem::replace(&mut self.self_probe.ran, ran) && ran;
        if ran {
            // The proof's own policy first: it may be all that is wrong. Attaching programs anew leaves a moment without.
            let attached = if again { self.kernel.attach_anew() } else { Ok(()) };
            if let Err(error) = attached.and_then(|()| self.prepare_self_probe()) {
                failures.push(format!("it cannot be mended: {error:#}"));
            }
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
