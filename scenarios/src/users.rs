//! Users of the collector's machine, at a collector without TLS: file rights say who may ask, the kernel who delivers, and the
//! network is no way in.

use std::{
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::Path,
    process::{Command, ExitCode, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use palisade_transport::local::Purpose;

use crate::{
    cri::until,
    events,
    faults::fails,
    node::Node,
    peers::{Peer, stored},
    report::Report,
};

/// A group that may ask, and a user that may deliver; the numbers are those of [`SOCKETS`].
const GROUP: u32 = 4242;
const AGENT: u32 = 4243;
/// With such an agent the group gets at the socket for delivery, too, and the kernel's word on the user is all that decides.
const SOCKETS: &str = ", group: 4242, agents: [4243]";
/// Any other user.
const OTHER: u32 = 65534;

/// The cases, with a collector of their own.
pub async fn cases(cri: &Path, report: &mut Report) -> Result<()> {
    let mut node = Node::without_collector(cri)?;
    // So that only the rights of the collector's folder and sockets are in the way.
    std::fs::set_permissions(node.folder.path(), std::fs::Permissions::from_mode(0o755))?;
    node.socket_settings = SOCKETS;
    node.start_collector().await?;
    let failed = report.failed();
    report.case("root delivers and asks, each at its socket", root(&node)).await;
    report.case("another user neither asks nor delivers", another_user(&node)).await;
    report.case("a member of the group asks, and does not deliver", member(&node)).await;
    report.case("a user that is configured delivers", configured(&node)).await;
    report.case("no socket of the network is open", async { no_network(&node) }).await;
    report.case("TCP without TLS is refused with both remedies", async { no_plain_tcp(&node) }).await;
    if report.failed() > failed {
        println!("--- the collector's log\n{}", node.log("collector"));
    }
    node.kill_collector()
}

/// A user and a group that a command has, and no other groups.
#[derive(Clone, Copy)]
struct User(u32, u32);

/// What a command says, when it succeeds and when it fails.
fn run_as(User(user, group): User, command: &mut Command) -> Result<std::result::Result<String, String>> {
    let output = command.uid(user).gid(group).stdin(Stdio::null()).output().context("cannot start it")?;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    Ok(if output.status.success() { Ok(said) } else { Err(said) })
}

/// Asks as a user; what is answered, or why nothing is.
fn ask(node: &Node, user: User, at: Purpose) -> Result<std::result::Result<String, String>> {
    let mut command = Command::new("palisade");
    run_as(user, command.args(["events", "--json", "--all", "--collector", &node.address(at)]))
}

/// Delivers one record as a user, in another process.
fn deliver(node: &Node, user: User, at: Purpose, name: &str) -> Result<std::result::Result<String, String>> {
    let mut command = Command::new(std::env::current_exe()?);
    run_as(user, command.args(["deliver", "--collector", &node.address(at), "--node", name]))
}

/// What the other process does.
pub async fn deliver_one(address: &str, name: &str) -> Result<ExitCode> {
    let (mut peer, _) = Peer::greet_at(address, name, 0).await?;
    peer.deliver(0, &["delivered"]).await?;
    Ok(ExitCode::SUCCESS)
}

fn succeeds(outcome: std::result::Result<String, String>) -> Result<String> {
    outcome.map_err(|said| anyhow::anyhow!("it fails: {said}"))
}

fn refused(outcome: std::result::Result<String, String>, says: &str) -> Result<()> {
    match outcome {
        Err(said) if said.contains(says) => Ok(()),
        other => Err(anyhow::anyhow!("instead of {says:?}: {other:?}")),
    }
}

/// Whether the collector has a record of the refusal of a user.
async fn recorded(node: &Node, at: Purpose, user: u32, why: &str) -> Result<()> {
    until(&format!("a record of the refusal of user {user}, {why}"), async || {
        let address = format!("unix:{}", node.socket(at).display());
        let refusals = events::query(node, &["--kind", "refusal"])?;
        let of = |record: &serde_json::Value| {
            let refusal = &record["refusal"];
            refusal["address"] == *address
                && refusal["peer"] == format!("user/{user}")
                && refusal["why"].as_str().is_some_and(|said| said.contains(why))
        };
        Ok(refusals.iter().any(of).then_some(()))
    })
    .await
}

async fn root(node: &Node) -> Result<()> {
    let root = User(0, 0);
    succeeds(deliver(node, root, Purpose::Deliver, "of-root")?)?;
    ensure!(stored(node, "of-root")? == ["delivered"], "it is not stored");
    ensure!(succeeds(ask(node, root, Purpose::Ask)?)?.contains("of-root"), "it is not shown");
    refused(ask(node, root, Purpose::Deliver)?, "this socket is for delivery")?;
    recorded(node, Purpose::Deliver, 0, "this socket is for delivery").await
}

async fn another_user(node: &Node) -> Result<()> {
    let other = User(OTHER, OTHER);
    for at in [Purpose::Ask, Purpose::Deliver] {
        refused(ask(node, other, at)?, "is not open to this user")?;
        refused(deliver(node, other, at, "of-other")?, "is not open to this user")?;
    }
    ensure!(stored(node, "of-other")?.is_empty(), "it has delivered");
    Ok(())
}

async fn member(node: &Node) -> Result<()> {
    let member = User(OTHER, GROUP);
    ensure!(succeeds(ask(node, member, Purpose::Ask)?)?.contains("of-root"), "it is shown nothing");
    refused(deliver(node, member, Purpose::Deliver, "of-member")?, "user 65534 may not deliver")?;
    recorded(node, Purpose::Deliver, OTHER, "user 65534 may not deliver").await?;
    refused(deliver(node, member, Purpose::Ask, "of-member")?, "this socket is for asking")?;
    recorded(node, Purpose::Ask, OTHER, "this socket is for asking").await?;
    ensure!(stored(node, "of-member")?.is_empty(), "it has delivered");
    Ok(())
}

async fn configured(node: &Node) -> Result<()> {
    succeeds(deliver(node, User(AGENT, GROUP), Purpose::Deliver, "of-agent")?)?;
    ensure!(stored(node, "of-agent")? == ["delivered"], "it is not stored");
    Ok(())
}

/// Any pod in the host's network could connect to one.
fn no_network(node: &Node) -> Result<()> {
    let pid = node.collector_pid().context("no collector runs")?;
    let mut inodes = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        let Ok(target) = std::fs::read_link(entry?.path()) else { continue };
        let target = target.to_string_lossy().into_owned();
        inodes.extend(
            target.strip_prefix("socket:[").and_then(|rest| rest.strip_suffix(']')).map(str::to_owned),
        );
    }
    ensure!(inodes.len() >= 2, "not even the two sockets of the collector are seen: {inodes:?}");
    for table in ["tcp", "tcp6", "udp", "udp6"] {
        // The kernel may be without IPv6.
        let Ok(text) = std::fs::read_to_string(format!("/proc/{pid}/net/{table}")) else { continue };
        for line in text.lines() {
            let inode = line.split_whitespace().nth(9).unwrap_or_default();
            ensure!(!inodes.iter().any(|own| own == inode), "{table}: {line}");
        }
    }
    Ok(())
}

fn no_plain_tcp(node: &Node) -> Result<()> {
    let (config, store) = (node.folder.path().join("tcp.yaml"), node.folder.path().join("tcp-store"));
    let collector = || {
        let mut command = Command::new("palisade-collector");
        command.arg("--store").arg(&store);
        command
    };
    let remedies =
        ["listen: 127.0.0.1:0", "without TLS", "unix sockets in /run/palisade/collector", "palisade pki"];
    fails(collector().args(["--listen", "127.0.0.1:0"]), 1, &remedies)?;
    std::fs::write(&config, "listen: 127.0.0.1:0\n")?;
    fails(collector().arg("--config").arg(&config), 1, &[&remedies[..], &["tcp.yaml"]].concat())?;
    let remedies = ["--collector", "without TLS", "unix:///run/palisade/collector/", "palisade pki"];
    let mut command = Command::new("palisade");
    fails(command.args(["events", "--collector", "http://127.0.0.1:7443"]), 1, &remedies)
}
