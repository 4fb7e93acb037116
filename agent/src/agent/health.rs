//! Answers whoever asks how the agent is.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};
use palisade_abi::{
    codes::{kind, verdict},
    state::PROBE_SLOT,
};
use tokio::{
    io::AsyncWriteExt as _,
    net::{TcpListener, UnixListener},
    sync::{mpsc, oneshot},
};

use super::Agent;
use crate::delivery::{Tally, refused};
use crate::{
    records::Decision,
    status::{ContainerStatus, Delivery, Status, metrics},
};

/// Somebody asks, and waits.
pub(super) type Inquiry = oneshot::Sender<Status>;

/// How long whoever asks may take to take the answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// The agent's socket in the file system, for as long as this lives.
pub(super) struct Socket {
    path: PathBuf,
    inode: u64,
}

impl Socket {
    /// Answers at `path`, for root alone, with the status as JSON. An agent that answered there before does not any more.
    ///
    /// # Errors
    ///
    /// When no socket can be made there.
    pub(super) fn open(path: &Path, inquiries: mpsc::Sender<Inquiry>) -> Result<Self> {
        let folder = path.parent().context("it has no folder")?;
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        // Made beside its place and moved there, so that there is always one that answers.
        let partial = path.with_extension(format!("{}", std::process::id()));
        let _left_by_one_that_was_killed = std::fs::remove_file(&partial);
        let listener = UnixListener::bind(&partial)?;
        std::fs::set_permissions(&partial, std::fs::Permissions::from_mode(0o600))?;
        let inode = std::fs::metadata(&partial)?.ino();
        std::fs::rename(&partial, path)?;
        tokio::spawn(async move {
            loop {
                let mut stream = match listener.accept().await {
                    Ok((stream, _)) => stream,
                    Err(error) => {
                        tracing::warn!(%error, "nobody can ask for the agent's status at this moment");
                        tokio::time::sleep(PATIENCE).await;
                        continue;
                    }
                };
                let Some(status) = ask(&inquiries).await else { return };
                let answer = serde_json::to_vec(&status).unwrap_or_default();
                // One after the other: only root can ask, and the answer fits into what the kernel keeps for most nodes.
                let _asker_gone = tokio::time::timeout(PATIENCE, stream.write_all(&answer)).await;
            }
        });
        Ok(Self { path: path.to_owned(), inode })
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Not that of an agent that has taken over.
        if std::fs::metadata(&self.path).is_ok_and(|found| found.ino() == self.inode) {
            let _gone = std::fs::remove_file(&self.path);
        }
    }
}

/// Answers Prometheus at `address`.
///
/// # Errors
///
/// When nobody may listen there.
pub(super) async fn serve_metrics(address: SocketAddr, inquiries: mpsc::Sender<Inquiry>) -> Result<()> {
    let listener =
        TcpListener::bind(address).await.with_context(|| format!("metrics: cannot listen on {address}"))?;
    tokio::spawn(palisade_transport::http::serve(listener, move || {
        let inquiries = inquiries.clone();
        async move { ask(&inquiries).await.map(|status| metrics(&status)) }
    }));
    Ok(())
}

async fn ask(inquiries: &mpsc::Sender<Inquiry>) -> Option<Status> {
    let (answer, status) = oneshot::channel();
    inquiries.send(answer).await.ok()?;
    status.await.ok()
}

/// What was judged, and how: by kind of record and verdict.
#[derive(Default)]
pub(super) struct Verdicts(BTreeMap<(u16, u8), u64>);

impl Verdicts {
    pub(super) fn count(&mut self, kind: u16, decision: Option<&Decision>) {
        if let Some(decision) = decision {
            *self.0.entry((kind, decision.verdict)).or_default() += 1;
        }
    }

    fn by_name(&self) -> BTreeMap<String, BTreeMap<String, u64>> {
        let name = |found: Option<&str>| found.unwrap_or("unknown").to_owned();
        let mut named: BTreeMap<String, BTreeMap<String, u64>> = BTreeMap::new();
        for ((kind, verdict), count) in &self.0 {
            let counts = named.entry(name(kind::name(*kind))).or_default();
            *counts.entry(name(verdict::name(*verdict))).or_default() += count;
        }
        named
    }
}

impl Agent {
    pub(super) fn status(&self) -> Status {
        let ledger = &self.kernel.maps.ledger;
        let mut containers: Vec<ContainerStatus> = self
            .containers
            .iter()
            .filter(|(slot, _)| **slot != PROBE_SLOT)
            .map(|(slot, container)| {
                let account = ledger.account(*slot);
                let made = ledger.records_made(*slot);
                let Tally { booked, waiting, kept } = self.queue.tally((self.kernel.meta.epoch, *slot));
                let settled = account.spooled + account.from_memory + kept;
                let lost = booked.reported.saturating_sub(waiting.reported);
                let spooled = waiting.sum();
                let facts =
                    container.identity.as_ref().map(|identity| identity.facts.clone()).unwrap_or_default();
                ContainerStatus {
                    slot: *slot,
                    id: container.id.clone(),
                    namespace: facts.namespace,
                    pod: facts.pod,
                    name: facts.name,
                    mode: container.claimed().as_str().to_owned(),
                    revision: container.revision.clone(),
                    made,
                    delivered: settled.saturating_sub(lost + spooled),
                    lost,
                    spooled,
                    on_the_way: made.saturating_sub(settled),
                }
            })
            .collect();
        containers.sort_by(|a, b| {
            (&a.namespace, &a.pod, &a.name, a.slot).cmp(&(&b.namespace, &b.pod, &b.name, b.slot))
        });
        let link = self.link.state();
        let waiting = self.queue.waiting();
        let mut lost: BTreeMap<String, u64> =
            self.losses.totals().map(|(cause, count)| (cause.to_owned(), count)).collect();
        if waiting.given_up > 0 {
            lost.insert(refused::CAUSE.to_owned(), waiting.given_up);
        }
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node: self.source.node.clone(),
            tier: self.kernel.tier.as_str().to_owned(),
            enforces: self.state.failing == 0,
            uptime_seconds: self.begun.elapsed().as_secs(),
            delivery: Delivery {
                collector: link.collector,
                problem: link.problem,
                waiting_records: waiting.records,
                spool_bytes: waiting.disk_bytes,
                most_spool_bytes: waiting.most_disk_bytes,
                spool_problem: waiting.problem,
                memory_bytes: waiting.memory_bytes,
                most_memory_bytes: waiting.most_memory_bytes,
                oldest_seconds: waiting.oldest.as_secs_f64(),
                acknowledged: waiting.acknowledged,
                sent_bytes: link.sent_bytes,
                sent_batches: link.sent_batches,
            },
            lost,
            verdicts: self.verdicts.by_name(),
            errors: self.evidence.iter().cloned().collect(),
            containers,
        }
    }
}
