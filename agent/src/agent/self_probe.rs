//! Proof that enforcement works, again and again: an act that must be refused, and a look at what it rests on.
//!
//! A child of the agent is given to a slot of its own, under a revision that allows nothing, and executes a program. The
//! kernel must refuse that, or kill the child on the fallback tier, and the record of it must arrive. Where the agent
//! protects itself the child also sends it a signal that does no harm. What fails is mended where it can be, and until the next proof the agent claims nothing.

use std::{
    io::{Read as _, Write as _},
    os::unix::process::ExitStatusExt as _,
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use palisade_abi::{
    codes::{mode, verdict},
    state::{PROBE_SLOT, Process},
};
use palisade_profile::{image::PolicyImage, mode::Mode};
use palisade_proto::v1;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::Agent;
use crate::{
    kernel::Tier,
    records::{Body, Event},
};

/// Exit code of a child whose execution was refused.
pub const REFUSED: u8 = 77;
/// Exit code of a child whose signal to the agent was not.
pub const SIGNAL_LET_THROUGH: u8 = 78;
/// How long nothing is claimed after the kernel has skipped a program.
const AFTER_SKIP: Duration = Duration::from_secs(300);
const SKIPPED: &str = "the kernel has skipped a program";
/// When to try again after a failure.
const SOON: Duration = Duration::from_secs(1);
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
    /// What speaks against the claim; empty when it holds, absent before the first proof.
    failures: Option<Vec<String>>,
    /// Whether the last proof failed in a way that may be chance.
    doubtful: bool,
    /// Records of the probe that were lost so far.
    lost: u64,
    /// Children that do not end.
    leftover: Vec<Child>,
    /// Whether the last act ran.
    ran: bool,
    /// The revision that allows nothing.
    revision: Option<u32>,
    /// How often the kernel has skipped a program, and when that last went up.
    skips: u64,
    skipped: Option<Instant>,
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
            failures: None,
            doubtful: false,
            lost: 0,
            leftover: Vec::new(),
            ran: false,
            revision: None,
            skips: 0,
            skipped: None,
        }
    }

    /// What speaks against the claim, as long as the kernel skipped a program not long ago.
    fn has_skipped(&self) -> Option<String> {
        let recent = self.skipped.is_some_and(|last| last.elapsed() < AFTER_SKIP);
        recent.then(|| format!("{SKIPPED} {} times: it was in it already", self.skips))
    }

    /// Takes a record of the probe's own slot.
    pub(super) fn take(&mut self, body: &Body) {
        let denied = body.decision.as_ref().is_some_and(|decision| decision.verdict == verdict::DENIED);
        self.recorded |= denied && matches!(body.event, Event::Exec(_));
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
        let revision = maps.policies.install(0, &PolicyImage::nothing(Mode::Enforce))?;
        maps.policies.set_policy(PROBE_SLOT, revision, 0)?;
        if let Some(before) = self.self_probe.revision.replace(revision) {
            maps.policies.retire(before);
        }
        Ok(())
    }

    /// Takes the proof a step further: begins one when it is due, lets the child act when it is ready, ends it when it has
    /// acted.
    pub(super) fn probe_self(&mut self) {
        self.self_probe.leftover.retain_mut(|child| !matches!(child.try_wait(), Ok(Some(_))));
        let Some(mut running) = self.self_probe.running.take() else {
            if Instant::now() >= self.self_probe.due {
                self.begin_proof();
            }
            return;
        };
        if let Err(error) = self.let_it_act(&mut running) {
            tracing::error!(error = format!("{error:#}"), "the self-probe cannot be made");
        }
        if self.self_probe.ended.is_none() {
            self.self_probe.ended = running.child.try_wait().ok().flatten();
        }
        let overdue = running.begun.elapsed() > PATIENCE;
        if overdue {
            // The agent itself may have been late.
            self.empty_ring();
        }
        match self.self_probe.ended {
            Some(status) if self.self_probe.recorded || overdue || !self.is_refusal(status) => {
                self.conclude();
            }
            None if overdue => {
                let _it_has_ended_already = running.child.kill();
                self.self_probe.leftover.push(running.child);
                self.conclude();
            }
            _ => self.self_probe.running = Some(running),
        }
    }

    /// Starts a child, which says when it is ready.
    fn begin_proof(&mut self) {
        self.self_probe.due = Instant::now() + self.self_probe.period;
        self.self_probe.ended = None;
        self.self_probe.recorded = false;
        let protects_itself =
            self.kernel.tier == Tier::Full && self.state.self_protection == u32::from(mode::ENFORCE);
        let started = Command::new("/proc/self/exe")
            .arg("self-probe")
            .args(protects_itself.then_some("--signal"))
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
        self.kernel.maps.state.put_process(running.child.id(), Process::new(PROBE_SLOT, 0))?;
        let mut go = running.child.stdin.take().context("the child has no input")?;
        go.write_all(b"\n").context("the child does not listen")?;
        running.acts = true;
        Ok(())
    }

    fn is_refusal(&self, status: ExitStatus) -> bool {
        match self.kernel.tier {
            Tier::Full => status.code() == Some(REFUSED.into()),
            Tier::Fallback => status.signal() == Some(SIGKILL),
        }
    }

    /// Puts together what speaks against the claim, mends what can be mended, and says so when it has changed.
    fn conclude(&mut self) {
        let mut failures = Vec::new();
        let lost = self.kernel.maps.ledger.lost(PROBE_SLOT);
        let lost_before = std::mem::replace(&mut self.self_probe.lost, lost);
        let code = self.self_probe.ended.and_then(|status| status.code());
        let signalled = code == Some(SIGNAL_LET_THROUGH.into());
        let ran = code == Some(0);
        match self.self_probe.ended {
            // A ring that a container floods has no room for the probe's record, either; that is counted elsewhere.
            Some(status) if self.is_refusal(status) && (self.self_probe.recorded || lost > lost_before) => {}
            Some(status) if self.is_refusal(status) => {
                failures.push("the record of a refused act did not arrive".to_owned());
            }
            Some(_) if signalled => {
                failures.push("a signal to the agent that must be refused was not".to_owned());
            }
            Some(status) if ran => failures.push(format!("an act that must be refused was not ({status})")),
            Some(status) => failures.push(format!("whether an act is refused could not be tried ({status})")),
            None => failures.push("whether an act is refused could not be tried in time".to_owned()),
        }
        // A set that does not record gates nothing, either, and numbers what it refuses as lost.
        match self.kernel.maps.recording() {
            Ok(epoch) if epoch == self.kernel.meta.epoch => {}
            Ok(_) => failures.push("another set of programs is said to make the records".to_owned()),
            Err(error) => failures.push(format!("{error:#}")),
        }
        // Once may be chance, unless it ran.
        if !ran && !failures.is_empty() && !std::mem::replace(&mut self.self_probe.doubtful, true) {
            failures.clear();
            self.self_probe.due = Instant::now() + SOON;
        } else if failures.is_empty() {
            self.self_probe.doubtful = false;
        }
        match self.kernel.verify() {
            Ok(mended) => {
                failures.extend(mended);
                self.protect_pins();
            }
            Err(error) => failures.push(format!("{error:#}")),
        }
        let again = std::mem::replace(&mut self.self_probe.ran, ran) && ran;
        if again {
            // A program that was attached cannot be attached again on every kernel; another set can.
            self.start_over = true;
        } else if ran && let Err(error) = self.prepare_self_probe() {
            // The proof's own policy may be all that is wrong; it is not when this does not help.
            failures.push(format!("the probe's own policy cannot be written: {error:#}"));
        }
        if !failures.is_empty() {
            // Soon again: what was mended must prove itself.
            self.self_probe.due = Instant::now() + SOON;
        }
        failures.extend(self.self_probe.has_skipped());
        self.claim(failures);
    }

    /// The kernel has skipped programs `skips` times by now, since it was in them already. If that is more than before, something may
    /// have passed that must not, and the claim is withdrawn at once; it comes back when it has not happened for [`AFTER_SKIP`].
    pub(super) fn note_skipped(&mut self, skips: u64) {
        if skips <= self.self_probe.skips {
            return;
        }
        self.self_probe.skips = skips;
        self.self_probe.skipped = Some(Instant::now());
        // Before the first proof nothing is claimed.
        if let Some(mut failures) = self.self_probe.failures.clone() {
            failures.retain(|failure| !failure.starts_with(SKIPPED));
            failures.extend(self.self_probe.has_skipped());
            self.claim(failures);
        }
    }

    /// Says what is claimed from now on.
    fn claim(&mut self, failures: Vec<String>) {
        if self.self_probe.failures.as_ref() == Some(&failures) {
            return;
        }
        let first = self.self_probe.failures.is_none();
        let holds = failures.is_empty();
        self.withdrawn = !holds;
        if holds && first {
            tracing::info!("the self-probe succeeds: what profiles say is enforced");
        } else if holds {
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
        self.self_probe.failures = Some(failures);
        let slots: Vec<u64> = self.containers.keys().copied().collect();
        self.tell(0, v1::record::Event::NodeState(state));
        for slot in slots {
            let Some(container) = self.containers.get_mut(&slot) else { continue };
            if container.withdrawn == self.withdrawn {
                continue;
            }
            container.withdrawn = self.withdrawn;
            container.encode();
            self.tell_coverage(slot, if holds { "claim-restored" } else { "claim-withdrawn" }, 0);
        }
    }
}
