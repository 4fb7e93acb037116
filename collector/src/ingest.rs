//! Taking batches from agents.

use std::{
    pin::Pin,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use palisade_proto::{
    batch,
    v1::{
        Acknowledgement, AgentMessage, Batch, CollectorMessage, Hello, NotTaken, Welcome, agent_message,
        collector_message, delivery_server::Delivery,
    },
};
use palisade_transport::{name::Name, peer::Peer};
use prost::Message as _;
use tokio::sync::{mpsc, watch};
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, Streaming};

use crate::{
    admission::Admission,
    log::Entry,
    refusals::OWN_BOOT,
    store::{Store, StreamName},
    streams::Streams,
};

/// Longest name of a node or boot, in bytes.
const LONGEST_NAME: usize = 253;
/// Batches that an agent may have on their way.
const WINDOW: u32 = 8;
/// How long an agent may take to say who it is.
const HELLO_DEADLINE: Duration = Duration::from_secs(10);
/// How long an agent may take to take an answer.
const READ_DEADLINE: Duration = Duration::from_secs(60);
/// The same, of the last one.
const LAST_WORD: Duration = Duration::from_secs(3);
/// How long agents wait before they try a store again that takes nothing.
const DISK_WAIT: Duration = Duration::from_secs(1);

pub struct Ingest {
    store: Arc<Store>,
    admission: Admission,
    streams: Streams,
    stopped: watch::Receiver<bool>,
}

impl Ingest {
    pub fn new(store: Arc<Store>, admission: Admission, stopped: watch::Receiver<bool>) -> Self {
        Self { store, admission, streams: Streams::default(), stopped }
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
        let peer = self.admission.deliverer(&request)?;
        let admission = self.admission.clone();
        let (answers, receiver) = mpsc::channel(16);
        let store = Arc::clone(&self.store);
        let streams = self.streams.clone();
        let mut stopped = self.stopped.clone();
        let mut messages = request.into_inner();
        tokio::spawn(async move {
            let work = take(&store, &admission, &streams, &peer, &mut messages, &answers);
            let result = tokio::select! {
                result = work => result,
                _ = stopped.wait_for(|stop| *stop) => Err(Status::unavailable("the collector is stopping")),
            };
            if let Err(status) = result {
                tracing::warn!(address = peer.address(), %peer, %status, "a stream ends");
                // Bounded, since the agent may not be reading.
                let _agent_gone = tokio::time::timeout(LAST_WORD, answers.send(Err(status))).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

/// Takes the batches of one stream, in order.
async fn take(
    store: &Arc<Store>,
    admission: &Admission,
    streams: &Streams,
    peer: &Peer,
    messages: &mut Streaming<AgentMessage>,
    answers: &Answers,
) -> Result<(), Status> {
    let first = tokio::time::timeout(HELLO_DEADLINE, messages.message()).await;
    let first = first.map_err(|_| {
        Status::deadline_exceeded(format!("no Hello within {} s", HELLO_DEADLINE.as_secs()))
    })??;
    let Some(AgentMessage { message: Some(agent_message::Message::Hello(hello)) }) = first else {
        return Err(Status::invalid_argument("the first message is no Hello"));
    };
    let name = named(&hello)?;
    if let Peer::Certified { name: certified, .. } = peer
        && *certified != Name::Node(name.0.clone())
    {
        admission.note(peer, &format!("it claims to be node {}", name.0));
        return Err(Status::permission_denied(format!(
            "the certificate is for {certified}, and Hello.node says {}",
            name.0
        )));
    }
    let mut place = streams.open(&name).map_err(Status::resource_exhausted)?;
    let stored = store.next_position(&name);
    if stored > hello.next_position {
        return Err(Status::failed_precondition(format!(
            "the store has positions up to {stored} of this stream, and the agent only up to {}",
            hello.next_position
        )));
    }
    if hello.first_position > stored {
        tracing::warn!(
            node = name.0,
            records = hello.first_position - stored,
            "records that the agent has not any more are not in this store: another has them, or gap records count them"
        );
    }
    let mut next_position = stored.max(hello.first_position);
    tracing::info!(node = name.0, epoch = name.2, next_position, "an agent streams");
    let welcome = Welcome {
        next_position,
        most_records: batch::MOST_RECORDS as u32,
        most_bytes: batch::MOST_BYTES as u32,
        window: WINDOW,
    };
    let mut answer = collector_message::Message::Welcome(welcome);
    loop {
        tokio::select! {
            sent = answers.send(Ok(CollectorMessage { message: Some(answer) })) => if sent.is_err() {
                return Ok(());
            },
            () = place.taken_over() => return Err(over()),
            () = tokio::time::sleep(READ_DEADLINE) => {
                return Err(Status::deadline_exceeded("the agent does not read its answers"));
            }
        }
        let message = tokio::select! {
            message = messages.message() => message?,
            () = place.taken_over() => return Err(over()),
        };
        let batch = match message.map(|message| message.message) {
            None => return Ok(()),
            Some(Some(agent_message::Message::Batch(batch))) => batch,
            Some(Some(agent_message::Message::Hello(_))) => {
                return Err(Status::invalid_argument("a second Hello"));
            }
            Some(None) => return Err(Status::invalid_argument("a message of no known kind")),
        };
        answer = match append(store, &name, next_position, batch).await? {
            Ok(next) => {
                next_position = next;
                collector_message::Message::Acknowledgement(Acknowledgement { next_position })
            }
            Err(Problem { why, never, wait }) => {
                if never {
                    admission.note(peer, &format!("a batch of node {} is not taken: {why}", name.0));
                }
                let wait_ms = wait.as_millis() as u32;
                collector_message::Message::NotTaken(NotTaken { next_position, why, never, wait_ms })
            }
        };
    }
}

fn over() -> Status {
    Status::aborted("a newer stream of the same agent has taken over")
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
    if hello.boot == OWN_BOOT {
        return Err(Status::invalid_argument(format!("Hello.boot is {OWN_BOOT:?}, which no boot is called")));
    }
    Ok((hello.node.clone(), hello.boot.clone(), hello.epoch))
}

/// Why a batch is not in the store.
struct Problem {
    why: String,
    /// Something is wrong with it.
    never: bool,
    wait: Duration,
}

impl Problem {
    /// What `why` says is bounded: a peer must not decide how much is kept for it to read.
    fn of_batch(why: impl ToString) -> Self {
        Self { why: why.to_string(), never: true, wait: Duration::ZERO }
    }
}

/// Of a record only who it is of: that is what a certificate is for.
#[derive(Clone, PartialEq, prost::Message)]
struct Origin {
    #[prost(string, tag = "1")]
    node: String,
}

fn check(records: &[Bytes], node: &str) -> Result<(), Problem> {
    for (index, record) in records.iter().enumerate() {
        if record.len() > batch::MOST_OF_RECORD {
            let bytes = record.len();
            return Err(Problem::of_batch(format!(
                "its record {index} has {bytes} bytes, more than any may"
            )));
        }
        match Origin::decode(record.clone()) {
            Ok(origin) if origin.node == node => {}
            Ok(origin) if origin.node.len() > LONGEST_NAME => {
                return Err(Problem::of_batch(format!(
                    "its record {index} is of a node whose name is too long"
                )));
            }
            Ok(origin) => {
                return Err(Problem::of_batch(format!("its record {index} is of node {:?}", origin.node)));
            }
            Err(_) => return Err(Problem::of_batch(format!("its record {index} is no record"))),
        }
    }
    Ok(())
}

/// Puts a batch into the store if it begins at `expected`. Returns where to go on.
async fn append(
    store: &Arc<Store>,
    name: &StreamName,
    expected: u64,
    batch: Batch,
) -> Result<Result<u64, Problem>, Status> {
    let first = batch.first_position;
    if expected.checked_add(batch.given_up) != Some(first) {
        // What follows a batch that was not taken.
        let why = format!("it begins at position {first}, and {expected} is the next");
        return Ok(Err(Problem { why, never: false, wait: Duration::ZERO }));
    }
    let (node, boot, epoch) = name.clone();
    let store = Arc::clone(store);
    let work = move || {
        let records = batch::unpack(&batch).map_err(Problem::of_batch)?;
        check(&records, &node)?;
        let received = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64);
        let next = first
            .checked_add(records.len() as u64)
            .ok_or_else(|| Problem::of_batch("its positions are beyond all bounds"))?;
        let entry = Entry { node, boot, epoch, first_position: first, received, records };
        store.append(entry).map_err(|error| {
            tracing::error!(
                error = format!("{error:#}"),
                "the store takes nothing; agents keep what they have"
            );
            Problem { why: format!("the store takes nothing: {error:#}"), never: false, wait: DISK_WAIT }
        })?;
        Ok(next)
    };
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| Status::internal(format!("appending failed: {error}")))
}
