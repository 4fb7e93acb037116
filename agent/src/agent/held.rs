//! What is stopped until its container is identified: settled, let go or killed, and recorded.

use palisade_abi::{
    codes::{action, mode, origin, reason, verdict},
    record::INTERPRETER,
    state::Process,
};
use palisade_profile::{
    exec::evaluate::{Execution, evaluate},
    image,
    mode::Mode,
    policy::Policy,
};

use super::{Agent, flow::HeldExec};
use crate::{
    containers::Standing,
    processes::{self, ProcessKey},
    records::{Body, Decision, Event, Exec, File, Held, Interpreter},
};

impl Agent {
    /// Decides what was stopped until its container was identified, and lets it go or kills it.
    pub(super) fn settle(&mut self, slot: u64) {
        let Some(held) = self.held.remove(&slot) else { return };
        let policy = self
            .containers
            .get(&slot)
            .and_then(|container| container.identity.as_ref())
            .filter(|identity| !identity.sandbox)
            .and_then(|identity| self.profiles.policy_for(&identity.facts))
            .map(|policy| self.verified(slot, policy));
        for held in held {
            let leads = |name, path| self.leads(slot, name, path);
            let hash = |path: &[u8]| self.source.hash(path);
            let decision = judge(policy.as_ref(), &held.exec, &held.held, hash, leads);
            self.finish(slot, held, decision);
        }
    }

    /// Carries a decision out and records it.
    pub(super) fn finish(&mut self, slot: u64, exec: HeldExec, settled: Settled) {
        let HeldExec { made, actor, decision: Decision { mut revision, .. }, mut exec, since, held: _ } =
            exec;
        let Settled { verdict, reason, mode, of_script } = settled;
        let killed = verdict == verdict::DENIED;
        self.let_go(made.process, killed);
        if let Some(container) = self.containers.get(&slot)
            && !matches!(reason, reason::UNIDENTIFIED | reason::AGENT_ABSENT)
        {
            revision.clone_from(&container.revision);
        }
        let action = if killed { action::KILLED } else { action::NONE };
        let decision = Decision { verdict, action, reason, mode, revision };
        exec.rest.verdict_of_script = of_script;
        exec.rest.held = since.elapsed().as_nanos() as u64;
        self.deliver(slot, &made, Body { actor, decision: Some(decision), event: Event::Exec(exec) });
    }

    /// Lets a process go or kills it; tried again as long as that fails.
    fn let_go(&mut self, process: ProcessKey, kill: bool) {
        if !kill {
            self.let_go_in_others(process.0);
        }
        if let Err(error) = self.kernel.let_go(process, kill) {
            tracing::error!(
                pid = process.0,
                error = format!("{error:#}"),
                "a held process stays stopped for now"
            );
            self.not_let_go.push((process, kill));
        }
    }

    /// Settles what is held without a record that says so, at two scans in a row: the record was lost. Nobody knows what
    /// it executed, so under an enforced profile it is killed.
    pub(super) fn settle_unrecorded(&mut self) {
        let recorded: Vec<u32> = self.held.values().flatten().map(|exec| exec.made.process.0).collect();
        let unrecorded: Vec<(u32, Process)> = self
            .kernel
            .maps
            .state
            .processes()
            .into_iter()
            .filter(|(pid, process)| process.held != 0 && !recorded.contains(pid))
            .collect();
        let before =
            std::mem::replace(&mut self.unrecorded, unrecorded.iter().map(|(pid, _)| *pid).collect());
        for (pid, process) in unrecorded.into_iter().filter(|(pid, _)| before.contains(pid)) {
            let Some(container) = self.containers.get(&process.slot) else { continue };
            let Some((start, _)) = processes::start_and_parent(pid) else { continue };
            if container.is_under_policy() && processes::is_stopped(pid) {
                let kill = container.standing == Standing::Under(Mode::Enforce);
                tracing::warn!(pid, container = container.id, kill, "held, and its record was lost");
                self.let_go((pid, start), kill);
            }
        }
    }

    pub(super) fn let_go_again(&mut self) {
        for (process, kill) in std::mem::take(&mut self.not_let_go) {
            self.let_go(process, kill);
        }
    }

    /// Lets go whoever an agent that was killed left stopped, now that his container is identified: what an enforced
    /// profile covers and nobody judged is killed. That is a container older than this agent in which everything is
    /// stopped; what this agent holds itself is not meant.
    pub(super) fn release_left_behind(&mut self, slot: u64) {
        let Some(container) = self.containers.get_mut(&slot) else { return };
        if !container.found_running || !container.is_under_policy() {
            return;
        }
        // Once: what somebody stops later, he has stopped on purpose.
        if std::mem::replace(&mut container.left_behind_settled, true) {
            return;
        }
        let enforced = container.standing == Standing::Under(Mode::Enforce);
        let members: Vec<(u32, Process)> = self
            .kernel
            .maps
            .state
            .processes()
            .into_iter()
            .filter(|(_, process)| process.slot == slot)
            .collect();
        if !members.iter().all(|(pid, process)| process.held == 0 && processes::is_stopped(*pid)) {
            return;
        }
        for (pid, _) in members {
            let Some((start, _)) = processes::start_and_parent(pid) else { continue };
            tracing::warn!(pid, slot, killed = enforced, "it was left stopped");
            self.let_go((pid, start), enforced);
        }
    }
}

/// A decision that was taken late.
pub(super) struct Settled {
    verdict: u8,
    reason: u8,
    mode: u8,
    of_script: bool,
}

impl Settled {
    /// Nobody will ever say what the container is: recorded, and let go.
    pub(super) fn unidentified() -> Self {
        Self { verdict: verdict::AUDITED, reason: reason::UNIDENTIFIED, mode: mode::HOLD, of_script: false }
    }

    /// The agent goes before anybody has said what the container is.
    pub(super) fn without_agent(deny: bool) -> Self {
        let (verdict, mode) =
            if deny { (verdict::DENIED, mode::ENFORCE) } else { (verdict::AUDITED, mode::AUDIT) };
        Self { verdict, reason: reason::AGENT_ABSENT, mode, of_script: false }
    }
}

/// Judges what was held as the kernel would have: the script first, then its interpreter, and the worse of the two.
/// `leads` says whether a name leads to a file in the image, both by their hashes.
fn judge(
    policy: Option<&Policy>,
    exec: &Exec,
    held: &Held,
    hash: impl Fn(&[u8]) -> [u64; 2],
    leads: impl Fn([u64; 2], [u64; 2]) -> bool,
) -> Settled {
    let Some(policy) = policy else {
        return Settled { verdict: verdict::ALLOWED, reason: reason::NO_PROFILE, mode: 0, of_script: false };
    };
    let code = policy.mode.code();
    let mismatch = |reason| Settled {
        verdict: if code == mode::AUDIT { verdict::AUDITED } else { verdict::DENIED },
        reason,
        mode: code,
        of_script: false,
    };
    if exec.rest.escaped {
        return mismatch(reason::ESCAPED);
    }
    if held.foreign_interpreter && held.interpreter.is_none() && policy.exec.is_some() {
        return mismatch(reason::INTERPRETER);
    }
    let no_elevation = policy.exec.as_ref().is_some_and(|exec| exec.code.no_elevation);
    // A policy that cannot be compiled was not applied either.
    let Ok(image) = image::compile(policy) else { return mismatch(reason::LOOKUP_MISSED) };
    let Held { session, failure, .. } = *held;
    let exact = image.exec.iter().flat_map(|exec| &exec.exact);
    let mut parents = exact.filter(|(_, rule)| rule.parent != 0).map(|(key, _)| key.path.as_slice());
    let caller = parents.find(|path| hash(path) == held.caller);
    if let Some(Interpreter { path, origin, path_hash, name_hash }) = &held.interpreter
        && policy.exec.is_some()
    {
        let of_image = *origin == origin::IMAGE && (path_hash == name_hash || leads(*name_hash, *path_hash));
        let loader = Execution { path, origin: *origin, session, failure: 0, caller, arguments: None };
        // What is cut is no path that a rule names.
        let named = path.len() < INTERPRETER && evaluate(&image, &loader).verdict == verdict::ALLOWED;
        if !of_image && !named {
            return mismatch(reason::INTERPRETER);
        }
    }
    let own = Execution {
        path: &exec.file.path,
        origin: exec.file.origin,
        session,
        failure,
        caller,
        arguments: held.arguments.as_deref(),
    };
    let own = evaluate(&image, &own);
    let script = exec.script.as_ref().map(|File { path, origin, .. }| {
        let script = Execution { path, origin: *origin, session, failure: 0, caller, arguments: None };
        evaluate(&image, &script)
    });
    let of_script = script.is_some_and(|script| script.verdict > own.verdict);
    let worse = script.filter(|_| of_script).unwrap_or(own);
    if worse.verdict == verdict::ALLOWED && exec.rest.elevated && no_elevation {
        return mismatch(reason::ELEVATION);
    }
    Settled { verdict: worse.verdict, reason: worse.reason, mode: code, of_script }
}
