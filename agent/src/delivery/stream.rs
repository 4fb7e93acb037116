//! Streaming the queue to the collector, for ever: connects, resumes where the collector says, tries again.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, Result, bail};
use palisade_proto::v1::{
    AgentMessage, Batch, CollectorMessage, Hello, agent_message, collector_message,
    delivery_client::DeliveryClient,
};
use palisade_transport::{dial::Target, files::Files};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::{Credit, Queue};

const MOST_RECORDS: usize = 2048;
const MOST_BYTES: usize = 1 << 20;
/// Batches that may be on their way without an acknowledgement.
const WINDOW: usize = 4;
const FIRST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(5);
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// How often to look whether the certificates have been replaced: a stream may last for longer than one is valid.
const LOOK_AT_CERTIFICATES: Duration = Duration::from_secs(5);

/// Empties the queue until the task is dropped.
/// What is acknowledged goes to `acknowledged`, which never waits.
pub async fn deliver(
    target: Target,
    hello: Hello,
    queue: Arc<Queue>,
    acknowledged: mpsc::UnboundedSender<Credit>,
) {
    let mut wait = FIRST_WAIT;
    let mut said = String::new();
    loop {
        let mut progress = false;
        let result = stream(&target, &hello, &queue, &acknowledged, &mut progress).await;
        if progress {
            wait = FIRST_WAIT;
        }
        let message = match result {
            Ok(()) => "the collector ended the stream".to_owned(),
            Err(error) => format!("{error:#}"),
        };
        if message != said {
            tracing::warn!(%target, waiting = queue.counts().0, "records wait: {message}");
            said = message;
        }
        // Jitter, so that a fleet does not come back in step.
        let jitter = u64::from(std::process::id()).wrapping_mul(2_654_435_761) % 100;
        tokio::time::sleep(wait + wait * jitter as u32 / 200).await;
        wait = (wait * 2).min(LONGEST_WAIT);
    }
}

async fn stream(
    target: &Target,
    hello: &Hello,
    queue: &Queue,
    acknowledged: &mpsc::UnboundedSender<Credit>,
    progress: &mut bool,
) -> Result<()> {
    let certificates = target.files().map(Files::fingerprint).transpose()?;
    let channel = target
        .connect(|endpoint| {
            endpoint
                .connect_timeout(CONNECT_DEADLINE)
                .http2_keep_alive_interval(Duration::from_secs(20))
                .keep_alive_timeout(Duration::from_secs(20))
                .keep_alive_while_idle(true)
        })
        .await
        .with_context(|| format!("cannot reach the collector at {target}"))?;
    let (sender, receiver) = mpsc::channel(WINDOW);
    let message = |message| AgentMessage { message: Some(message) };
    sender.send(message(agent_message::Message::Hello(hello.clone()))).await?;
    let mut answers = DeliveryClient::new(channel)
        .stream(ReceiverStream::new(receiver))
        .await
        .context("the collector refuses the stream")?
        .into_inner();
    let collector_message::Message::Welcome(welcome) = answer(&mut answers).await? else {
        bail!("the collector did not say where to go on");
    };
    tracing::info!(%target, next_position = welcome.next_position, "delivering");
    let tell = |gained: Vec<Credit>| {
        for credit in gained {
            let _the_agent_stops = acknowledged.send(credit);
        }
    };
    tell(queue.acknowledge(welcome.next_position));
    let mut next = welcome.next_position;
    let mut outstanding = 0;
    let mut look = tokio::time::interval(LOOK_AT_CERTIFICATES);
    loop {
        while outstanding < WINDOW {
            let (first_position, records) = queue.batch(next, MOST_RECORDS, MOST_BYTES);
            if records.is_empty() {
                break;
            }
            next = first_position + records.len() as u64;
            outstanding += 1;
            sender.send(message(agent_message::Message::Batch(Batch { first_position, records }))).await?;
        }
        tokio::select! {
            answer = answer(&mut answers) => match answer? {
                collector_message::Message::Acknowledgement(acknowledgement) => {
                    *progress = true;
                    tell(queue.acknowledge(acknowledgement.next_position));
                    outstanding -= 1;
                }
                collector_message::Message::Welcome(_) => bail!("the collector said welcome twice"),
            },
            () = queue.filled(), if outstanding < WINDOW => {}
            // What cannot be read this moment is being replaced.
            _ = look.tick() => if target.files().and_then(|files| files.fingerprint().ok()).is_some_and(|now| Some(now) != certificates) {
                *progress = true;
                bail!("the certificates have changed");
            },
        }
    }
}

async fn answer(answers: &mut Streaming<CollectorMessage>) -> Result<collector_message::Message> {
    answers
        .message()
        .await
        .map_err(|status| anyhow::anyhow!("{}", status.message()).context("the collector ended the stream"))?
        .and_then(|message| message.message)
        .context("the collector closed the stream")
}
