//! The attacks, what each looks like to the kernel, and how one is carried out and checked.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::{
    cri::{Pod, Runtime, WORKLOAD_IMAGE},
    events,
    node::Node,
};

/// Exit codes of the fixture.
pub const PAYLOAD_RAN: i32 = 42;
pub const EPERM: i32 = 1;
pub const KILLED: i32 = 137;
/// Users that attacks are carried out by.
pub const ROOT: &str = "0";
pub const NOBODY: &str = "65534";
/// The kernel lacks what an act needs.
pub const NOT_POSSIBLE: i32 = 77;

/// One way to run what is not allowed, and the record that a denial must leave.
#[derive(Clone, Copy)]
pub struct Attack {
    pub name: &'static str,
    pub executable: &'static str,
    pub origin: &'static str,
    pub reason: &'static str,
    /// The act on an allowed executable with which it begins, and which the full tier refuses; empty for none.
    pub spoils: &'static str,
    /// Who carries it out.
    pub uid: &'static str,
    /// Whether it needs no rights.
    pub by_anybody: bool,
}

const fn spoiling(name: &'static str, spoils: &'static str) -> Attack {
    Attack { spoils, ..attack(name, "/usr/bin/workload", "drift", "origin-not-allowed") }
}

const fn by_anybody(
    name: &'static str,
    executable: &'static str,
    origin: &'static str,
    reason: &'static str,
) -> Attack {
    Attack { by_anybody: true, ..attack(name, executable, origin, reason) }
}

pub const fn attack(
    name: &'static str,
    executable: &'static str,
    origin: &'static str,
    reason: &'static str,
) -> Attack {
    Attack { name, executable, origin, reason, spoils: "", uid: ROOT, by_anybody: false }
}

/// Impossible before 6.7.
const BINFMT: &str = "binfmt";
/// The second before 5.11.
const MAY_BE_IMPOSSIBLE: &[&str] = &[BINFMT, "userns-overlay"];

impl Attack {
    /// Whether only the LSM hooks see it: a tracepoint sees the interpreter of a script, and none of an ELF file.
    pub fn needs_hooks(&self) -> bool {
        self.name == "script" || self.name.starts_with("interpreter")
    }
}

pub const ATTACKS: &[Attack] = &[
    by_anybody("third", "/usr/bin/third", "image", "no-rule"),
    by_anybody("script", "/usr/bin/script", "image", "no-rule"),
    by_anybody("copy", "/tmp/attack/workload", "drift", "no-rule"),
    attack("drop-in", "/usr/bin/attentive-er", "drift", "origin-not-allowed"),
    spoiling("copy-over", "remove"),
    spoiling("rename", "rename"),
    spoiling("hardlink", "remove"),
    by_anybody("symlink", "/usr/bin/third", "image", "no-rule"),
    attack("chroot", "/tmp/attack/usr/bin/workload", "drift", "no-rule"),
    by_anybody("userns-tmpfs", "/workload", "memory", "no-rule"),
    attack("userns-overlay", "/workload", "unknown", "origin-unknown"),
    by_anybody("userns-bind-folder", "/tmp/attack/bin/workload", "drift", "no-rule"),
    Attack { spoils: "mount-over", ..attack("userns-bind", "/tmp/attack/workload", "drift", "no-rule") },
    by_anybody(BINFMT, "/usr/bin/third", "image", "no-rule"),
    by_anybody("interpreter-link", "/usr/bin/attached-interpreter", "image", "interpreter-not-allowed"),
    by_anybody("interpreter-bind", "/usr/bin/attached-interpreter", "image", "interpreter-not-allowed"),
    by_anybody("memfd", "memfd:workload", "memory", "path-outside-its-filesystem"),
    attack("tmpfs", "/workload", "memory", "no-rule"),
    by_anybody("proc-fd", "/usr/bin/third", "image", "no-rule"),
    by_anybody("deep", "", "drift", "path-too-deep"),
    by_anybody("long", "", "drift", "path-too-long"),
];

/// The profile of the scenarios: two programs of the image.
pub fn profile(app: &str, mode: &str) -> String {
    format!(
        "apiVersion: palisade.dev/v1alpha1\nkind: Profile\nmetadata: {{name: {app}, namespace: scenarios}}\nspec:\n  \
         selector:\n    podSelector: {{matchLabels: {{app: {app}}}}}\n    containers: [{{image: \"palisade.test/*\"}}]\n  \
         mode: {mode}\n  exec:\n    allow:\n      - path: /usr/bin/workload\n      - path: /usr/bin/att*er\n"
    )
}

/// A word that nobody used before.
pub fn nonce(name: &str) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos());
    format!("{name}-{now:x}")
}

/// How long ago [`nonce`] made a word, or one that it is part of.
pub fn age(word: &str) -> Option<Duration> {
    let made = word
        .split('-')
        .filter(|part| part.len() == 16)
        .find_map(|part| u64::from_str_radix(part, 16).ok())?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
    now.checked_sub(Duration::from_nanos(made))
}

/// What is expected of the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// Refused with EPERM, recorded as denied.
    Refused,
    /// Killed, recorded as denied.
    Killed,
    /// Runs, recorded as audited.
    Audited,
    /// Runs, recorded as allowed.
    Allowed,
}

/// How attacks in one container ended: the exit code of each, by its name.
pub struct Outcomes {
    nonce: String,
    codes: BTreeMap<String, i32>,
    said: String,
}

/// Carries out `attacks` one after the other in `container`, as `uid`. None of them may spoil what another needs.
pub async fn carry_out_all(
    runtime: &Runtime,
    container: &str,
    attacks: &[&Attack],
    uid: &str,
) -> Result<Outcomes> {
    let nonce = nonce(uid);
    let mut command = vec!["/usr/bin/workload", "as", uid, "/usr/bin/attacker", "attacks", &nonce];
    command.extend(attacks.iter().map(|attack| attack.name));
    let ended = runtime.exec(container, if uid == ROOT { &command[3..] } else { &command }).await?;
    ensure!(ended.code == 0, "{ended:?}");
    let outcome = |line: &str| {
        let (name, code) = line.split_once(' ')?;
        Some((name.to_owned(), code.parse().ok()?))
    };
    Ok(Outcomes { nonce, codes: ended.stdout.lines().filter_map(outcome).collect(), said: ended.stderr })
}

impl Outcomes {
    /// Checks exit code and record of one of the attacks.
    pub async fn check(
        &self,
        node: &Node,
        name: &str,
        container: &str,
        attack: &Attack,
        expect: Expect,
    ) -> Result<()> {
        let code =
            self.codes.get(attack.name).with_context(|| format!("it was not carried out: {}", self.said))?;
        let nonce = format!("{}-{}", attack.name, self.nonce);
        judge(node, name, container, attack, expect, &nonce, (*code, &self.said), "attacker").await
    }
}

/// Starts a fresh container, waits for its policy, attacks, and checks exit code and record.
pub async fn carry_out(
    node: &Node,
    runtime: &Runtime,
    pod: &Pod,
    attack: &Attack,
    mode: &str,
    expect: Expect,
) -> Result<()> {
    let name = format!("c-{}-{mode}-{}", attack.name, attack.uid);
    let container = runtime.container(pod, &name, WORKLOAD_IMAGE, &[]).await?;
    let result = attack_container(node, runtime, &container, &name, attack, mode, expect).await;
    runtime.remove_container(&container).await?;
    result
}

async fn attack_container(
    node: &Node,
    runtime: &Runtime,
    container: &str,
    name: &str,
    attack: &Attack,
    mode: &str,
    expect: Expect,
) -> Result<()> {
    events::in_mode(node, container, mode).await?;
    let nonce = nonce(attack.name);
    let command = ["/usr/bin/workload", "as", attack.uid, "/usr/bin/attacker", "attack", attack.name, &nonce];
    let ended = runtime.exec(container, if attack.uid == ROOT { &command[3..] } else { &command }).await?;
    // Who entered the container is a child of the runtime.
    let ended = (ended.code, ended.stderr.as_str());
    judge(node, name, container, attack, expect, &nonce, ended, "containerd-shim").await
}

/// Checks how an attack ended, and its record: `code` is the exit code and what was said besides, `parent` the name of the process
/// that began it.
#[expect(clippy::too_many_arguments, reason = "what one attack is known by")]
async fn judge(
    node: &Node,
    name: &str,
    container: &str,
    attack: &Attack,
    expect: Expect,
    nonce: &str,
    (code, said): (i32, &str),
    parent: &str,
) -> Result<()> {
    let wanted = match expect {
        Expect::Refused => EPERM,
        Expect::Killed => KILLED,
        Expect::Audited | Expect::Allowed => PAYLOAD_RAN,
    };
    if code == NOT_POSSIBLE && MAY_BE_IMPOSSIBLE.contains(&attack.name) {
        println!("   this kernel lets nobody do that in a user namespace");
        return Ok(());
    }
    ensure!(code == wanted, "exit code {code} instead of {wanted}: {}", said.trim());
    if expect == Expect::Refused && !attack.spoils.is_empty() {
        return spoiled(node, container, attack).await;
    }
    let record = events::exactly_one(node, nonce).await?;
    check(&record, name, container, attack, expect, nonce, parent)
}

/// The record of an act on an allowed executable.
async fn spoiled(node: &Node, container: &str, attack: &Attack) -> Result<()> {
    let record = crate::cri::until("its record", async || {
        Ok(events::query(node, &["--kind", "code", "--container", container])?.pop())
    })
    .await?;
    let (code, decision) = (&record["code"], &record["decision"]);
    let refused = decision["verdict"] == "denied" && decision["reason"] == "allowed-executable";
    ensure!(refused && code["act"] == attack.spoils, "{record}");
    ensure!(code["file"] == "/usr/bin/workload" && code["origin"] == "image", "{record}");
    Ok(())
}

fn check(
    record: &Value,
    name: &str,
    container: &str,
    attack: &Attack,
    expect: Expect,
    nonce: &str,
    parent: &str,
) -> Result<()> {
    let (exec, actor, decision) = (&record["exec"], &record["actor"], &record["decision"]);
    let (verdict, action) = match expect {
        Expect::Refused => ("denied", "refused"),
        Expect::Killed => ("denied", "killed"),
        Expect::Audited => ("audited", "none"),
        Expect::Allowed => ("allowed", "none"),
    };
    let mut wrong = Vec::new();
    let mut same = |what: &str, found: &Value, wanted: &str| {
        if found != wanted {
            wrong.push(format!("{what} is {found}, not {wanted:?}"));
        }
    };
    same("verdict", &decision["verdict"], verdict);
    same("action", &decision["action"], action);
    // A script that runs is named by its interpreter.
    let runs = matches!(expect, Expect::Audited | Expect::Allowed);
    let named = if attack.name == "script" && runs { "/usr/bin/workload" } else { attack.executable };
    if !named.is_empty() {
        same("executable", &exec["executable"], named);
    }
    if attack.name.starts_with("interpreter") {
        same("interpreter", &exec["interpreter"], "/usr/bin/loader");
        same("interpreter's origin", &exec["interpreter_origin"], "image");
    }
    if named != attack.executable {
        same("script", &exec["script"], attack.executable);
        same("script's origin", &exec["script_origin"], attack.origin);
    }
    same("origin", &exec["origin"], attack.origin);
    if verdict != "allowed" {
        same("reason", &decision["reason"], attack.reason);
    }
    let about = &record["container"];
    same("container id", &about["id"], container);
    same("container name", &about["name"], name);
    same("namespace", &about["namespace"], "scenarios");
    same("image", &about["image"], WORKLOAD_IMAGE);
    same("node", &record["node"], "test-node");
    let digest = about["image_digest"].as_str().unwrap_or_default();
    if !digest.starts_with("sha256:") || digest.len() != 71 {
        wrong.push(format!("image digest is {digest:?}"));
    }
    if about["labels"]["app"].as_str().is_none_or(str::is_empty) {
        wrong.push("the pod's labels are missing".to_owned());
    }
    if exec["arguments"].as_array().and_then(|list| list.last()).is_none_or(|last| last != nonce) {
        wrong.push(format!("arguments are {}", exec["arguments"]));
    }
    let count = exec["arguments"].as_array().map_or(0, Vec::len) as u64;
    // What is refused tells the caller's arguments; the interpreter would have got one more.
    let more = u64::from(attack.name == BINFMT && expect == Expect::Refused);
    if exec["argument_count"] != count + more || exec["arguments_truncated"] != false {
        wrong.push(format!("argument count is {} for {count} arguments", exec["argument_count"]));
    }
    let found = actor["parent_comm"].as_str().unwrap_or_default();
    if !found.contains(parent) && !found.contains("runc") {
        wrong.push(format!("the parent is {found:?}"));
    }
    for (what, value) in [("pid", &actor["pid"]), ("parent", &actor["parent_pid"])] {
        if value.as_u64().unwrap_or(0) == 0 {
            wrong.push(format!("{what} is missing"));
        }
    }
    if !wrong.is_empty() {
        bail!("{}; the record: {record}", wrong.join("; "));
    }
    Ok(())
}
