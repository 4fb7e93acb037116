//! Services of Debian, each as a pod under a profile that was drafted from what it did and then read: they start, serve, and are
//! refused what is dropped into them.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use palisade_abi::codes::{origin, session, verdict};
use palisade_profile::{
    document::{self, Profile},
    exec::evaluate::{Execution, evaluate},
    image::compile,
    policy::alone,
};
use serde_json::Value;

use crate::{
    attacks::PAYLOAD_RAN,
    cri::{Pod, Runtime, until, until_within},
    events,
    node::{AgentOptions, Node},
    report::Report,
};

const IMAGE: &str = "palisade.test/apps:1";
/// How long a service may take to come up on an emulated processor.
const PATIENCE: Duration = Duration::from_secs(240);

struct App {
    name: &'static str,
    command: &'static [&'static str],
    port: u16,
    /// What a client says, and what the answer begins with.
    question: &'static [u8],
    answer: &'static [u8],
    /// Its own program, entered: what loads the libraries that somebody has preloaded.
    version: &'static [&'static str],
    profile: &'static str,
}

macro_rules! example {
    ($name:literal) => {
        include_str!(concat!("../../deploy/examples/profiles/", $name, ".yaml"))
    };
}

const GET: &[u8] = b"GET / HTTP/1.0\r\n\r\n";

const APPS: &[App] = &[
    App {
        name: "nginx",
        command: &["/usr/sbin/nginx", "-g", "daemon off;"],
        port: 80,
        question: GET,
        answer: b"HTTP/1.1 200",
        version: &["/usr/sbin/nginx", "-v"],
        profile: example!("nginx"),
    },
    App {
        name: "redis",
        command: &["/usr/bin/redis-server", "--port", "6379", "--save", ""],
        port: 6379,
        question: b"PING\r\n",
        answer: b"+PONG",
        version: &["/usr/bin/redis-server", "--version"],
        profile: example!("redis"),
    },
    App {
        name: "postgresql",
        command: &[
            "/usr/bin/setpriv",
            "--reuid=postgres",
            "--regid=postgres",
            "--clear-groups",
            "/usr/lib/postgresql/17/bin/postgres",
            "-D",
            "/var/lib/postgresql/17/main",
            "-c",
            "config_file=/etc/postgresql/17/main/postgresql.conf",
            "-c",
            "unix_socket_directories=/tmp",
            "-c",
            "external_pid_file=",
            "-c",
            "ssl=off",
        ],
        port: 5432,
        // SSLRequest of the protocol, version 3: refused with one letter.
        question: b"\0\0\0\x08\x04\xd2\x16\x2f",
        answer: b"N",
        version: &["/usr/lib/postgresql/17/bin/postgres", "--version"],
        profile: example!("postgresql"),
    },
    App {
        name: "python",
        command: &[
            "/usr/bin/python3",
            "-m",
            "http.server",
            "18082",
            "--bind",
            "127.0.0.1",
            "--directory",
            "/usr/lib/palisade",
        ],
        port: 18082,
        question: GET,
        answer: b"HTTP/1.0 200",
        version: &["/usr/bin/python3", "-V"],
        profile: example!("python"),
    },
    App {
        name: "java",
        command: &[
            "/usr/bin/java",
            "-Xmx64m",
            "-m",
            "jdk.httpserver",
            "-b",
            "127.0.0.1",
            "-p",
            "18083",
            "-d",
            "/usr/lib/palisade",
        ],
        port: 18083,
        question: GET,
        answer: b"HTTP/1.1 200",
        version: &["/usr/bin/java", "-Xmx64m", "-version"],
        profile: example!("java"),
    },
];

pub async fn run(cri: &Path, only: &str) -> Result<ExitCode> {
    let mut report = Report::of(only);
    let runtime = Runtime::connect(cri);
    let mut node = Node::start(cri).await?;
    let wanted = || APPS.iter().filter(|app| app.name.contains(only));
    node.write_profile("older.yaml", OLDER)?;
    let older = runtime.pod("pod-older", "older", "").await?;
    let running = runtime.container(&older, "c-older", IMAGE, &["/usr/bin/sleep", "infinity"]).await?;
    let control = runtime.exec(&running, &["/usr/bin/id"]).await?;
    ensure!(control.code == 0, "what is to be refused does not run without us: {control:?}");
    for app in wanted() {
        node.write_profile(&format!("{}.yaml", app.name), &observing(app.name))?;
    }
    let tier = node.start_agent(&AgentOptions::default()).await?;
    println!("tier: {tier}");
    report
        .case("older: a container from before the agent runs linked programs, and no others", async {
            events::in_mode(&node, &running, "enforce").await?;
            let linked = runtime.exec(&running, &["/usr/bin/true"]).await?;
            ensure!(linked.code == 0, "what is allowed does not run: {linked:?}");
            // The runtime may call an exec failed that was refused.
            let other = runtime.exec(&running, &["/usr/bin/id"]).await;
            ensure!(other.is_err() || other.is_ok_and(|ended| ended.code != 0), "what is not allowed runs");
            runtime.remove_pod(&older).await
        })
        .await;
    for app in wanted() {
        let pod = runtime.pod(&format!("pod-{}", app.name), app.name, "").await?;
        let stage = Stage { node: &node, runtime: &runtime, pod: &pod, app };
        report
            .case(
                &format!("{}: it is observed, a profile is drafted, what is dropped runs", app.name),
                stage.observe(),
            )
            .await;
        node.write_profile(&format!("{}.yaml", app.name), app.profile)?;
        let name = format!("{}: under its profile it serves, and nothing that is dropped runs", app.name);
        report.case(&name, stage.enforce()).await;
        runtime.remove_pod(&pod).await?;
    }
    let after = if only.is_empty() { String::new() } else { format!(" after {only}") };
    report.case(&format!("the agent stops cleanly{after}"), async { node.stop_agent() }).await;
    if report.failed() > 0 {
        println!("--- the agent's log\n{}", node.log("agent"));
    }
    Ok(report.close())
}

/// The profile of a container that runs before the agent does. The names of its programs' interpreter lead through links.
const OLDER: &str = "apiVersion: palisade.dev/v1alpha1\nkind: ClusterProfile\nmetadata: {name: older}\nspec:\n  selector: {podSelector: \
                     {matchLabels: {app: older}}}\n  mode: enforce\n  exec: {allow: [{path: /usr/bin/sleep}, {path: /usr/bin/true}]}\n";

/// Allows nothing and refuses nothing, so that everything is on record.
fn observing(app: &str) -> String {
    format!(
        "apiVersion: palisade.dev/v1alpha1\nkind: ClusterProfile\nmetadata: {{name: {app}}}\nspec:\n  selector: \
         {{podSelector: {{matchLabels: {{app: {app}}}}}}}\n  mode: audit\n  exec: {{allow: []}}\n"
    )
}

struct Stage<'a> {
    node: &'a Node,
    runtime: &'a Runtime,
    pod: &'a Pod,
    app: &'static App,
}

impl Stage<'_> {
    /// Starts the service and waits until it answers.
    async fn serve(&self, name: &str, mode: &str) -> Result<String> {
        let begun = Instant::now();
        let container = self.runtime.container(self.pod, name, IMAGE, self.app.command).await?;
        events::in_mode(self.node, &container, mode).await?;
        until_within(PATIENCE, "the service answers", async || {
            let (running, code) = self.runtime.state(&container).await?;
            ensure!(
                running,
                "it has ended with {code}: {:?}",
                events::query(self.node, &["--kind", "code", "--container", &container])
            );
            Ok(self.ask().unwrap_or(false).then_some(()))
        })
        .await?;
        println!("   {} serves after {:.1} s", self.app.name, begun.elapsed().as_secs_f64());
        let ended = self.runtime.exec(&container, self.app.version).await?;
        ensure!(ended.code == 0, "{:?}: {ended:?}", self.app.version);
        Ok(container)
    }

    fn ask(&self) -> Result<bool> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.app.port))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        stream.write_all(self.app.question)?;
        let mut answer = vec![0; self.app.answer.len()];
        stream.read_exact(&mut answer)?;
        Ok(answer == self.app.answer)
    }

    async fn observe(&self) -> Result<()> {
        let container = self.serve("c-observed", "audit").await?;
        let events = self.node.folder.path().join("observed.jsonl");
        let draft = until("the records", async || {
            let text = self.node.palisade(&["events", "--json", "--container", &container])?;
            // The last thing that was done.
            let entered = self.app.version.last().is_some_and(|word| text.contains(&format!("\"{word}\"")));
            fs::write(&events, text)?;
            let mut init = Command::new("palisade");
            let output = init.args(["profile", "init", "--from-events"]).arg(&events).output()?;
            let draft = String::from_utf8_lossy(&output.stdout).into_owned();
            Ok((entered && output.status.success()).then_some(draft))
        })
        .await?;
        self.compare(&draft)?;
        // The control: nothing is in force, and everything runs.
        let Dropped { program, script, loaded } = self.drop_into(&container).await?;
        ensure!(
            program == PAYLOAD_RAN && script == PAYLOAD_RAN && loaded,
            "the attacks fail without us: {program}, {script}, {loaded}"
        );
        self.runtime.remove_container(&container).await
    }

    /// The profile that was read allows what the draft does, and the draft names every field that the profile has.
    fn compare(&self, draft: &str) -> Result<()> {
        let read = |name: &str, text: &str| -> Result<Profile> {
            let profiles = document::parse(name, text).map_err(|problems| {
                anyhow::anyhow!(problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))
            })?;
            profiles.into_iter().next().context("no profile")
        };
        let (drafted, kept) = (read("draft", draft)?, read(self.app.name, self.app.profile)?);
        let image = compile(&alone(&kept))?;
        for rule in drafted.exec.iter().flat_map(|exec| &exec.allow) {
            let path = rule.path.exact().context("a draft has a wildcard")?;
            let session = if rule.sessions.is_any() { session::WORKLOAD } else { session::ENTERED };
            let execution = Execution {
                path: path.as_bytes(),
                origin: origin::IMAGE,
                session,
                failure: 0,
                caller: None,
                arguments: None,
            };
            let decision = evaluate(&image, &execution);
            ensure!(
                decision.verdict == verdict::ALLOWED,
                "the profile lacks {path}, which was drafted:\n{draft}"
            );
        }
        let jit = draft.contains("jit: allow");
        ensure!(
            kept.exec.as_ref().is_some_and(|exec| exec.code.jit) || !jit,
            "the draft asks about jit, the profile does not allow it:\n{draft}"
        );
        for field in ["memory: allow", "trace: allow", "libraries:"] {
            ensure!(!draft.contains(field), "the draft asks for more than the profile has:\n{draft}");
        }
        Ok(())
    }

    async fn enforce(&self) -> Result<()> {
        let container = self.serve("c-enforced", "enforce").await?;
        let Dropped { program, script, loaded } = self.drop_into(&container).await?;
        ensure!(program != PAYLOAD_RAN, "a dropped binary ran");
        ensure!(script != PAYLOAD_RAN, "a dropped script ran");
        ensure!(!loaded, "a dropped library was loaded");
        for (kind, field, file) in [
            ("exec", "executable", "/tmp/dropped"),
            ("exec", "executable", "/tmp/dropped.sh"),
            ("code", "file", "/tmp/dropped.so"),
        ] {
            let record = until(&format!("the record of {file}"), async || {
                let records = events::query(self.node, &["--kind", kind, "--container", &container])?;
                Ok(records.into_iter().find(|record: &Value| record[kind][field] == file))
            })
            .await?;
            ensure!(
                record["decision"]["verdict"] == "denied" && record[kind]["origin"] == "drift",
                "{record}"
            );
        }
        ensure!(self.ask()?, "it does not serve any more");
        self.runtime.remove_container(&container).await
    }

    /// Drops a binary, a script and a library from outside, and has them run from inside.
    async fn drop_into(&self, container: &str) -> Result<Dropped> {
        let root = PathBuf::from(format!("/proc/{}/root", self.runtime.pid(container).await?));
        let executable = |path: &Path| fs::set_permissions(path, fs::Permissions::from_mode(0o755));
        fs::copy(root.join("usr/bin/mark"), root.join("tmp/dropped"))?;
        executable(&root.join("tmp/dropped"))?;
        fs::write(root.join("tmp/dropped.sh"), format!("#!/bin/sh\nexit {PAYLOAD_RAN}\n"))?;
        executable(&root.join("tmp/dropped.sh"))?;
        fs::copy(root.join("usr/lib/palisade/dropped.so"), root.join("tmp/dropped.so"))?;
        // The runtime may call an exec failed that was refused.
        let run = async |command: &[&str]| {
            self.runtime.exec(container, command).await.map_or(-1, |ended| ended.code)
        };
        let program = run(&["/tmp/dropped", "/tmp/made"]).await;
        let script = run(&["/tmp/dropped.sh"]).await;
        fs::write(root.join("etc/ld.so.preload"), "/tmp/dropped.so\n")?;
        let version = run(self.app.version).await;
        fs::remove_file(root.join("etc/ld.so.preload"))?;
        ensure!(version == 0, "{:?} ended with {version}", self.app.version);
        Ok(Dropped { program, script, loaded: root.join("tmp/loaded").exists() })
    }
}

/// What came of it: exit codes, and whether the library's code ran.
struct Dropped {
    program: i32,
    script: i32,
    loaded: bool,
}
