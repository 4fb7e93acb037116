//! Streaming the queue to a collector, for ever: connects, goes on where the collector says, tries again or elsewhere.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, bail};
use palisade_proto::v1::{
    AgentMessage, Batch, CollectorMessage, Hello, NotTaken, agent_message, collector_message,
    delivery_client::DeliveryClient,
};
use palisade_transport::{dial::Target, files::Files};
use tokio::{sync::mpsc, time::Instant};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::{Link, Queue, queue::Sequence, refused::replacement};

const MOST_RECORDS: usize = 2048;
const MOST_BYTES: usize = 1 << 20;
/// Batches that may be on their way without an answer.
const WINDOW: usize = 4;
const FIRST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(5);
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// How long a collector may take to say where to go on.
const WELCOME_DEADLINE: Duration = Duration::from_secs(30);
/// How long a collector may take to answer: longer than a disk ever stalls.
const ANSWER_DEADLINE: Duration = Duration::from_secs(120);
/// How often to look whether the certificates have been replaced: a stream may last for longer than one is valid.
const LOOK_AT_CERTIFICATES: Duration = Duration::from_secs(5);

/// Empties the queue into one of `targets`, which must not be none, until the task is dropped. Those after the first are for when it
/// cannot be had.
pub async fn deliver(targets: Vec<Target>, queue: Arc<Queue>, link: Arc<Link>) {
    let mut wait = FIRST_WAIT;
    let mut said = String::new();
    let mut at = 0;
    loop {
        let target = &targets[at % targets.len()];
        let mut progress = false;
        let result = stream(target, &queue, &link, &mut progress).await;
        // The first one whenever it can be had.
        at = if progress || result.is_ok() { 0 } else { at + 1 };
        if progress {
            wait = FIRST_WAIT;
        }
        let message = match result {
            // Another run has its turn.
            Ok(()) => continue,
            Err(error) => format!("{error:#}"),
        };
        link.is_down(message.clone());
        if message != said {
            tracing::warn!(%target, waiting = queue.waiting().records, "records wait: {message}");
            said = message;
        }
        tokio::time::sleep(jittered(wait)).await;
        wait = (wait * 2).min(LONGEST_WAIT);
    }
}

/// Up to half as long again, so that a fleet does not come back in step.
fn jittered(wait: Duration) -> Duration {
    wait + wait.mul_f64(fastrand::f64() / 2.0)
}

/// A batch that is on its way.
struct Sent {
    first: u64,
    count: u64,
}

/// What is on its way to a collector, and what comes next.
struct Progress {
    /// The next position to send.
    next: u64,
    /// Where the collector will be once it has taken everything that is on its way.
    collector: u64,
    sent: VecDeque<Sent>,
    window: usize,
    most_bytes: usize,
    most_records: usize,
    /// Fewer while what is wrong with a batch is looked for, and up to which position.
    fewer: Option<(usize, u64)>,
    /// The answer that stopped the stream, and the batch. Nothing is sent until the rest is answered, which is not taken either.
    stopped: Option<(NotTaken, Sent)>,
}

/// What to do next after an answer.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    GoOn,
    /// The collector cannot take anything now.
    Wait(Duration),
    /// It will never take this record.
    GiveUp(u64),
}

impl Progress {
    fn limit(&self) -> usize {
        self.fewer.map_or(self.most_records, |(limit, _)| limit)
    }

    fn may_send(&self) -> bool {
        self.stopped.is_none() && self.sent.len() < self.window
    }

    /// Records of `first..first + count` are on their way; returns how many positions before them were given up.
    fn sends(&mut self, first: u64, count: usize) -> u64 {
        let given_up = first - self.collector;
        self.sent.push_back(Sent { first, count: count as u64 });
        self.next = first + count as u64;
        self.collector = self.next;
        given_up
    }

    fn acknowledged(&mut self, next: u64) -> Result<()> {
        let sent = self.sent.pop_front().context("the collector acknowledges what was not sent")?;
        let end = sent.first + sent.count;
        if self.stopped.is_some() || next != end {
            bail!("the collector acknowledges position {next} for a batch that ends at {end}");
        }
        self.fewer = self.fewer.filter(|(_, until)| next < *until);
        Ok(())
    }

    fn not_taken(&mut self, answer: NotTaken) -> Result<()> {
        let sent = self.sent.pop_front().context("the collector refuses what was not sent")?;
        if answer.next_position > sent.first {
            // Else what lies between would never be sent.
            bail!(
                "the collector refuses a batch that begins at {}, and asks for {}",
                sent.first,
                answer.next_position
            );
        }
        self.stopped.get_or_insert((answer, sent));
        Ok(())
    }

    /// What to do, once everything that was sent is answered.
    fn after_answers(&mut self) -> Next {
        if !self.sent.is_empty() {
            return Next::GoOn;
        }
        let Some((answer, sent)) = self.stopped.take() else { return Next::GoOn };
        self.collector = answer.next_position;
        self.next = answer.next_position;
        if !answer.never {
            return Next::Wait(Duration::from_millis(answer.wait_ms.into()).min(LONGEST_WAIT));
        }
        if sent.count > 1 {
            // Halved until the record is found that it is about; the others get through.
            self.fewer = Some(((sent.count / 2) as usize, sent.first + sent.count));
            return Next::GoOn;
        }
        self.next = sent.first + 1;
        Next::GiveUp(sent.first)
    }
}

/// Streams one run: until its last record is acknowledged if it is an earlier one, or until one has to go before it.
async fn stream(target: &Target, queue: &Arc<Queue>, link: &Link, progress: &mut bool) -> Result<()> {
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
    let Sequence { run, own, next } = queue.sequence();
    let hello = Hello {
        node: run.node,
        boot: run.boot,
        epoch: run.started,
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        first_position: run.first,
        // What an earlier run had only in memory nobody knows any more.
        next_position: if own { next } else { u64::MAX },
    };
    let (run, next_position) = (run.number, hello.next_position);
    sender.send(message(agent_message::Message::Hello(hello.clone()))).await?;
    let greet = async {
        let mut answers = DeliveryClient::new(channel)
            .stream(ReceiverStream::new(receiver))
            .await
            .context("the collector refuses the stream")?
            .into_inner();
        match answer(&mut answers).await? {
            collector_message::Message::Welcome(welcome) => Ok((answers, welcome)),
            _ => bail!("the collector did not say where to go on"),
        }
    };
    let greeted = tokio::time::timeout(WELCOME_DEADLINE, greet).await;
    let (mut answers, welcome) = greeted.context("the collector does not say where to go on")??;
    tracing::info!(%target, next_position = welcome.next_position, "delivering");
    if welcome.next_position > next_position {
        bail!("the collector asks for position {}, and {next_position} is the next", welcome.next_position);
    }
    link.is_up(target.to_string());
    queue.acknowledge(run, welcome.next_position);
    queue.without_old(run).await;
    let mut delivery = Progress {
        next: welcome.next_position,
        collector: welcome.next_position,
        sent: VecDeque::new(),
        window: WINDOW.min(welcome.window as usize).max(1),
        most_bytes: MOST_BYTES.min(welcome.most_bytes as usize),
        most_records: MOST_RECORDS.min(welcome.most_records as usize).max(1),
        fewer: None,
        stopped: None,
    };
    let mut look = tokio::time::interval(LOOK_AT_CERTIFICATES);
    let mut answered = Instant::now();
    // When to go on, after the collector could not take anything.
    let mut pause = Instant::now();
    let mut said = String::new();
    loop {
        let mut all_sent = false;
        while delivery.may_send() && pause <= Instant::now() {
            let Some(mut batch) = read(queue, run, &delivery).await? else {
                all_sent = true;
                break;
            };
            if delivery.sent.is_empty() {
                answered = Instant::now();
            }
            batch.given_up = delivery.sends(batch.first_position, batch.count as usize);
            link.has_sent(batch.compressed.len());
            sender.send(message(agent_message::Message::Batch(batch))).await?;
        }
        if all_sent && delivery.sent.is_empty() {
            if !own {
                queue.finish(run);
                return Ok(());
            }
            if queue.sequence().run.number != run {
                return Ok(());
            }
        }
        tokio::select! {
            answer = answer(&mut answers) => {
                answered = Instant::now();
                match answer? {
                    collector_message::Message::Acknowledgement(acknowledgement) => {
                        *progress = true;
                        link.is_up(target.to_string());
                        delivery.acknowledged(acknowledgement.next_position)?;
                        queue.acknowledge(run, acknowledgement.next_position);
                    }
                    collector_message::Message::NotTaken(answer) => {
                        *progress = true;
                        if answer.why != said {
                            tracing::warn!(%target, waiting = queue.waiting().records, "the collector does not take a batch: {}", answer.why);
                            said.clone_from(&answer.why);
                        }
                        delivery.not_taken(answer)?;
                    }
                    collector_message::Message::Welcome(_) => bail!("the collector said welcome twice"),
                }
                match delivery.after_answers() {
                    Next::GoOn => {}
                    Next::Wait(wait) => {
                        link.is_stuck(&said);
                        pause = Instant::now() + jittered(wait);
                    }
                    Next::GiveUp(position) => {
                        tracing::error!(%target, position, "the collector will never take a record; a gap record counts it: {said}");
                        let now =
                            SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64);
                        let reader = Arc::clone(queue);
                        let record =
                            tokio::task::spawn_blocking(move || reader.first_record(run, position)).await??;
                        queue.give_up(run, position, record.and_then(|record| replacement(&record, &hello, now)));
                    }
                }
            }
            () = queue.filled(), if delivery.may_send() && pause <= Instant::now() => {}
            () = tokio::time::sleep_until(pause), if pause > Instant::now() => {}
            () = tokio::time::sleep_until(answered + ANSWER_DEADLINE), if !delivery.sent.is_empty() => {
                bail!("the collector has not answered for {} s", ANSWER_DEADLINE.as_secs());
            }
            // What cannot be read this moment is being replaced.
            _ = look.tick() => if target.files().and_then(|files| files.fingerprint().ok()).is_some_and(|now| Some(now) != certificates) {
                *progress = true;
                bail!("the certificates have changed");
            },
        }
    }
}

/// The next batch of a run.
async fn read(queue: &Arc<Queue>, run: u64, delivery: &Progress) -> Result<Option<Batch>> {
    let (next, most, bytes) = (delivery.next, delivery.limit(), delivery.most_bytes);
    let queue = Arc::clone(queue);
    tokio::task::spawn_blocking(move || queue.batch(run, next, most, bytes)).await?
}

async fn answer(answers: &mut Streaming<CollectorMessage>) -> Result<collector_message::Message> {
    answers
        .message()
        .await
        .map_err(|status| anyhow::anyhow!("{}", status.message()).context("the collector ended the stream"))?
        .and_then(|message| message.message)
        .context("the collector closed the stream")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress() -> Progress {
        Progress {
            next: 10,
            collector: 10,
            sent: VecDeque::new(),
            window: 4,
            most_bytes: MOST_BYTES,
            most_records: 8,
            fewer: None,
            stopped: None,
        }
    }

    fn refusal(next_position: u64, never: bool) -> NotTaken {
        NotTaken { next_position, why: String::new(), never, wait_ms: 700 }
    }

    #[test]
    fn what_the_collector_cannot_take_now_is_sent_again_after_a_while() {
        let mut delivery = progress();
        assert_eq!(delivery.sends(10, 4), 0);
        assert_eq!(delivery.sends(14, 4), 0);
        delivery.acknowledged(14).unwrap();
        assert_eq!(delivery.sends(18, 4), 0);
        delivery.not_taken(refusal(14, false)).unwrap();
        assert_eq!(delivery.after_answers(), Next::GoOn, "one batch is not answered yet");
        assert!(!delivery.may_send());
        delivery.not_taken(refusal(14, false)).unwrap();
        assert_eq!(delivery.after_answers(), Next::Wait(Duration::from_millis(700)));
        assert!(delivery.may_send() && delivery.next == 14);
        assert_eq!(delivery.sends(14, 8), 0);
    }

    #[test]
    fn the_one_record_that_is_never_taken_is_found_and_the_others_get_through() {
        let mut delivery = progress();
        let poison = 15;
        let (mut at, mut stored, mut given_up, mut batches) = (10_u64, Vec::new(), Vec::new(), 0);
        while at < 26 {
            let count = delivery.limit().min((26 - delivery.next) as usize);
            let first = delivery.next;
            let before = delivery.sends(first, count);
            assert_eq!(first, at + before);
            batches += 1;
            let range = first..first + count as u64;
            if range.contains(&poison) {
                delivery.not_taken(refusal(at, true)).unwrap();
            } else {
                at = range.end;
                stored.extend(range);
                delivery.acknowledged(at).unwrap();
            }
            if let Next::GiveUp(position) = delivery.after_answers() {
                given_up.push(position);
            }
        }
        assert_eq!(given_up, [poison]);
        assert_eq!(stored, (10..26).filter(|position| *position != poison).collect::<Vec<_>>());
        assert!(batches < 12, "{batches}");
        assert_eq!(delivery.limit(), 8, "whole batches again");
    }

    #[test]
    fn an_answer_to_nothing_ends_the_stream() {
        assert!(progress().acknowledged(10).is_err());
        assert!(progress().not_taken(refusal(10, true)).is_err());
        let mut delivery = progress();
        delivery.sends(10, 4);
        assert!(delivery.acknowledged(12).is_err(), "a part of a batch");
        let mut delivery = progress();
        delivery.sends(10, 4);
        assert!(delivery.acknowledged(15).is_err(), "what was never sent");
        let mut delivery = progress();
        delivery.sends(10, 4);
        assert!(delivery.not_taken(refusal(11, false)).is_err(), "what would be left out");
    }
}
