//! Taking batches from agents.

use std::{
    pin::Pin,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use palisade_proto::v1::{
    Acknowledgement, AgentMessage, Batch, CollectorMessage, Hello, Welcome, agent_message, collector_message,
    delivery_server::Delivery,
};
use palisade_transport::{accept::Peer, name::Name};
use tokio::sync::{mpsc, watch};
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, Streaming};

use crate::{
    log::Entry,
    refusals::Refusals,
    store::{Store, StreamName},
};

/// Longest name of a node or boot, in bytes.
const LONGEST_NAME: usize = 253;

pub struct Ingest {
    store: Arc<Store>,
    refusals: Refusals,
    stopped: watch::Receiver<bool>,
}

impl Ingest {
    pub fn new(store: Arc<Store>, refusals: Refusals, stopped: watch::Receiver<bool>) -> Self {
        Self { store, refusals, stopped }
    }
}

type Answers = mpsc::Sender<Result<CollectorMessage, Status>>;

#[tonic::async_trait]
impl Delivery for Ingest {
    type StreamStream = Pin<Box<dyn Stream<Item = Result<CollectorMessage, Status>> + Send>>;

    async fn stream(
        &self,
        request: Request<Streaming<AgentMessage>>,
    ) -> Result<Response<Self::StreamStream>, Status> {
        let Some(peer) = request.extensions().get::<Peer>().cloned() else {
            return Err(Status::internal("the connection does not say who is at its other end"));
        };
        if let Some(name) = peer.name.as_ref().filter(|name| !matches!(name, Name::Node(_))) {
            self.refusals.note(peer.address.ip(), &name.to_string(), "only agents deliver records");
            return Err(Status::permission_denied(format!("{name} is no agent's certificate")));
        }
        let refusals = self.refusals.clone();
        let (answers, receiver) = mpsc::channel(16);
        let store = Arc::clone(&self.store);
        let mut stopped = self.stopped.clone();
        let mut messages = request.into_inner();
        tokio::spawn(async move {
            let work = take(&store, &refusals, &peer, &mut messages, &answers);
            let result = tokio::select! {
                result = work => result,
                _ = stopped.wait_for(|stop| *stop) => Err(Status::unavailable("the collector is stopping")),
            };
            if let Err(status) = result {
                tracing::warn!(peer = %peer.address, %status, "a stream ends");
                let _agent_gone = answers.send(Err(status)).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

async fn take(
    store: &Arc<Store>,
    refusals: &Refusals,
    peer: &Peer,
    messages: &mut Streaming<AgentMessage>,
    answers: &Answers,
) -> Result<(), Status> {
    let mut stream: Option<StreamName> = None;
    while let Some(message) = messages.message().await? {
        let answer = match (message.message, &stream) {
            (Some(agent_message::Message::Hello(hello)), None) => {
                let name = named(&hello)?;
                let own = peer.name.as_ref().is_none_or(|peer| *peer == Name::Node(name.0.clone()));
                if !own {
                    let certified = peer.name.as_ref().map(ToString::to_string).unwrap_or_default();
                    refusals.note(peer.address.ip(), &certified, &format!("it claims to be node {}", name.0));
                    return Err(Status::permission_denied(format!(
                        "the certificate is for {certified}, and Hello.node says {}",
                        name.0
                    )));
                }
                let next_position = store.next_position(&name);
                tracing::info!(node = name.0, epoch = name.2, next_position, "an agent streams");
                stream = Some(name);
                collector_message::Message::Welcome(Welcome { next_position })
            }
            (Some(agent_message::Message::Batch(batch)), Some(name)) => {
                collector_message::Message::Acknowledgement(append(store, name.clone(), batch).await?)
            }
            (Some(agent_message::Message::Hello(_)), Some(_)) => {
                return Err(Status::invalid_argument("a second Hello"));
            }
            (Some(agent_message::Message::Batch(_)), None) => {
                return Err(Status::invalid_argument("a batch before Hello"));
            }
            (None, _) => return Err(Status::invalid_argument("a message of no known kind")),
        };
        if answers.send(Ok(CollectorMessage { message: Some(answer) })).await.is_err() {
            return Ok(());
        }
    }
    Ok(())
}

fn named(hello: &Hello) -> Result<StreamName, Status> {
    for (field, text) in [("node", &hello.node), ("boot", &hello.boot)] {
        if text.is_empty() || text.len() > LONGEST_NAME {
            return Err(Status::invalid_argument(format!(
                "Hello.{field} has {} bytes, not 1 to {LONGEST_NAME}",
                text.len()
            )));
        }
    }
    Ok((hello.node.clone(), hello.boot.clone(), hello.epoch))
}

async fn append(store: &Arc<Store>, name: StreamName, batch: Batch) -> Result<Acknowledgement, Status> {
    let (node, boot, epoch) = name;
    let received = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64);
    let entry =
        Entry { node, boot, epoch, first_position: batch.first_position, received, records: batch.records };
    let store = Arc::clone(store);
    let appended = tokio::task::spawn_blocking(move || store.append(entry))
        .await
        .map_err(|error| Status::internal(format!("appending failed: {error}")))?
        .map_err(|error| {
            tracing::error!(
                error = format!("{error:#}"),
                "the store takes nothing; agents keep what they have"
            );
            Status::resource_exhausted(format!("the store takes nothing: {error:#}"))
        })?;
    if appended.hole > 0 {
        tracing::warn!(
            records = appended.hole,
            "records that were acknowledged before are not in this store"
        );
    }
    Ok(Acknowledgement { next_position: appended.next_position })
}
