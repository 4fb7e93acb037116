//! Delivery under mutual TLS, with certificates that `palisade pki` made: who may, who may not, and new ones while records flow.

use std::{
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use palisade_proto::v1::{EventsRequest, query_client::QueryClient};
use palisade_transport::local::Purpose;
use serde_json::Value;
use tonic::transport::Endpoint;

use crate::{
    attacks::{PAYLOAD_RAN, nonce},
    cri::{Runtime, WORKLOAD_IMAGE, until, until_within},
    events,
    node::{AgentOptions, Node},
    report::Report,
};

/// How long the agent may take to notice that its certificates have been replaced.
const NOTICE: std::time::Duration = std::time::Duration::from_secs(60);

pub async fn run(cri: &Path) -> Result<ExitCode> {
    let mut report = Report::new();
    let runtime = Runtime::connect(cri);
    let site = Site::new("test-node")?;
    let foreign = Site::new("test-node")?;
    let mut node = Node::without_collector(cri)?;
    node.tls = Some(site.folder.path().to_owned());
    node.start_collector().await?;
    let tier = node.start_agent(&AgentOptions::default()).await?;
    println!("tier: {tier}");
    report.case("records arrive", arrives(&node, &runtime)).await;
    report.case("without a certificate nobody asks", plain(&node)).await;
    report
        .case("a certificate of another authority is refused", refused(&node, &site, &foreign, "reader-ana"))
        .await;
    report.case("a node's certificate is not for asking", wrong_role(&node, &site)).await;
    report.case("certificates are replaced while records flow", replaced(&node, &runtime, &site)).await;
    report.case("an agent of another node is refused", other_node(&mut node, &runtime, &site)).await;
    report.case("a revoked reader is refused", revoked(&node, &site)).await;
    report.case("the agent stops cleanly", async { node.stop_agent() }).await;
    if report.failed() > 0 {
        println!(
            "--- the agent's log\n{}\n--- the collector's\n{}",
            node.log("agent"),
            node.log("collector")
        );
    }
    Ok(report.close())
}

/// A folder with an authority and what it has signed.
pub struct Site {
    pub folder: tempfile::TempDir,
}

impl Site {
    pub fn new(node: &str) -> Result<Self> {
        let site = Self { folder: tempfile::tempdir()? };
        site.pki(&["init"])?;
        site.pki(&["collector", "127.0.0.1"])?;
        site.pki(&["node", node])?;
        site.pki(&["reader", "ana"])?;
        Ok(site)
    }

    /// Runs `palisade pki` on the folder.
    pub fn pki(&self, words: &[&str]) -> Result<()> {
        let output = Command::new("palisade")
            .arg("pki")
            .args(&words[..1])
            .arg("--folder")
            .arg(self.folder.path())
            .args(&words[1..])
            .stdin(Stdio::null())
            .output()?;
        ensure!(output.status.success(), "pki {words:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

async fn arrives(node: &Node, runtime: &Runtime) -> Result<()> {
    let nonce = nonce("tls");
    let pod = runtime.pod(&nonce, "tls", "").await?;
    let container = runtime.container(&pod, "c", WORKLOAD_IMAGE, &[]).await?;
    let ended = runtime.exec(&container, &["/usr/bin/workload", "payload", &nonce]).await?;
    ensure!(ended.code == PAYLOAD_RAN, "{ended:?}");
    let record = events::exactly_one(node, &nonce).await?;
    ensure!(record["node"] == "test-node", "{record}");
    runtime.remove_pod(&pod).await
}

/// Asks with these certificates; what is said.
fn ask(node: &Node, ca: &Path, (certificate, key): (&Path, &Path)) -> Result<(bool, String)> {
    let mut command = Command::new("palisade");
    command.args(["events", "--collector", &node.address(Purpose::Ask)]);
    command.arg("--ca").arg(ca).arg("--certificate").arg(certificate).arg("--key").arg(key);
    let output = command.stdin(Stdio::null()).output()?;
    Ok((output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned()))
}

async fn plain(node: &Node) -> Result<()> {
    // Another program than `palisade`, which does not even try.
    let endpoint = Endpoint::from_shared(format!("http://{}", node.collector_address))?;
    let answered = match endpoint.connect().await {
        Ok(channel) => QueryClient::new(channel).events(EventsRequest::default()).await.is_ok(),
        Err(_) => false,
    };
    ensure!(!answered, "it was answered");
    recorded(node, "", "message").await
}

/// Whether the collector has a record of a refusal.
async fn recorded(node: &Node, peer: &str, why: &str) -> Result<()> {
    until(&format!("a record of the refusal of {peer:?}, {why}"), async || {
        let refusals = events::query(node, &["--kind", "refusal"])?;
        let of = |record: &Value| {
            let refusal = &record["refusal"];
            refusal["peer"] == peer
                && refusal["why"].as_str().is_some_and(|text| text.contains(why))
                && refusal["address"] == "127.0.0.1"
        };
        Ok(refusals.iter().any(of).then_some(()))
    })
    .await
}

async fn refused(node: &Node, site: &Site, foreign: &Site, name: &str) -> Result<()> {
    let (certificate, key) = (foreign.file(&format!("{name}.pem")), foreign.file(&format!("{name}-key.pem")));
    let (succeeded, said) = ask(node, &site.file("ca.pem"), (&certificate, &key))?;
    ensure!(!succeeded, "it was answered: {said}");
    recorded(node, "", "certificate").await?;
    // Nor does its holder take this collector for his.
    let (succeeded, said) = ask(node, &foreign.file("ca.pem"), (&certificate, &key))?;
    ensure!(!succeeded, "it trusts a collector of another authority: {said}");
    Ok(())
}

async fn wrong_role(node: &Node, site: &Site) -> Result<()> {
    let (certificate, key) = (site.file("node-test-node.pem"), site.file("node-test-node-key.pem"));
    let (succeeded, said) = ask(node, &site.file("ca.pem"), (&certificate, &key))?;
    ensure!(!succeeded && said.contains("no reader's certificate"), "{said}");
    recorded(node, "node/test-node", "only readers ask").await
}

async fn replaced(node: &Node, runtime: &Runtime, site: &Site) -> Result<()> {
    let before = node.log("agent").matches("delivering").count();
    site.pki(&["collector", "127.0.0.1"])?;
    site.pki(&["node", "test-node"])?;
    until_within(NOTICE, "the agent streams anew", async || {
        Ok((node.log("agent").matches("delivering").count() > before).then_some(()))
    })
    .await?;
    arrives(node, runtime).await
}

/// The agent of another node that claims to be this one cannot: its certificate says who it is. It is the certificate that
/// names the node.
async fn other_node(node: &mut Node, runtime: &Runtime, site: &Site) -> Result<()> {
    site.pki(&["node", "other"])?;
    for suffix in ["", "-key"] {
        std::fs::copy(
            site.file(&format!("node-other{suffix}.pem")),
            site.file(&format!("node-test-node{suffix}.pem")),
        )?;
    }
    // The agent goes on under the name with which it began, which the new certificate is not for.
    recorded(node, "node/other", "it claims to be node test-node").await?;
    // Its own certificate comes back, and nothing is lost.
    site.pki(&["node", "test-node"])?;
    arrives(node, runtime).await.context("with its own certificate again")
}

async fn revoked(node: &Node, site: &Site) -> Result<()> {
    site.pki(&["reader", "eve"])?;
    let (certificate, key) = (site.file("reader-eve.pem"), site.file("reader-eve-key.pem"));
    let ca = site.file("ca.pem");
    let (succeeded, said) = ask(node, &ca, (&certificate, &key))?;
    ensure!(succeeded, "control: {said}");
    site.pki(&["revoke", &certificate.display().to_string()])?;
    let (succeeded, said) = ask(node, &ca, (&certificate, &key))?;
    ensure!(!succeeded, "it was answered: {said}");
    recorded(node, "", "Revoked").await
}
