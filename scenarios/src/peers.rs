//! Peers of the collector that are broken or hostile: none of them harms it, or the agents beside them.
//!
//! Every case ends with an ordinary agent that delivers, and a query that finds what it delivered once: that is the control, too.

use std::{
    path::Path,
    process::ExitCode,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use palisade_proto::{
    batch,
    v1::{
        AgentMessage, Batch, CollectorMessage, Hello, NotTaken, Process, ProcessExit, Record, agent_message,
        collector_message::Message as Answer, delivery_client::DeliveryClient, record::Event,
    },
};
use palisade_transport::{dial::Target, local::Purpose};
use prost::{Message as _, bytes::Bytes};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    sync::mpsc,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use crate::{cri::until, events, node::Node, report::Report, users};

/// How long an answer may take, also under emulation.
const DEADLINE: Duration = Duration::from_secs(60);
/// How much more memory the collector may have had at a time than before: a few batches as large as they may be.
const MOST_MORE: u64 = 64 << 20;

pub async fn run(cri: &Path) -> Result<ExitCode> {
    let mut report = Report::new();
    let mut node = Node::without_collector(cri)?;
    node.start_collector().await?;
    let at_first = most_memory(&node)?;
    report.case("an ordinary agent delivers", ordinary(&node)).await;
    report.case("what is sent again is stored once", again(&node)).await;
    report.case("a stream that is taken over ends", taken_over(&node)).await;
    report.case("what is no HTTP is dropped", noise(&node)).await;
    report.case("messages out of order end the stream", disorder(&node)).await;
    report.case("a message that is too large ends the stream", too_large(&node)).await;
    report.case("a decompression bomb is not taken, and the stream goes on", bomb(&node)).await;
    report.case("a record that is none is not taken, the others are", poison(&node)).await;
    report.case("records of another node are not taken, and that is on record", another_node(&node)).await;
    report.case("positions that leave something out are not taken", positions(&node)).await;
    report.case("who reads no answers keeps nobody waiting", slow_reader(&node)).await;
    report.case("who says nothing keeps nobody waiting", silent(&node)).await;
    report
        .case("all of that cost the collector little memory", async {
            let more = most_memory(&node)?.saturating_sub(at_first);
            println!("   {} KiB more than at first", more >> 10);
            ensure!(more < MOST_MORE, "{more} bytes more than at first");
            Ok(())
        })
        .await;
    if report.failed() > 0 {
        println!("--- the collector's log\n{}", node.log("collector"));
    }
    node.kill_collector()?;
    users::cases(cri, &mut report).await?;
    Ok(report.close())
}

/// The most memory that the collector ever had, in bytes.
fn most_memory(node: &Node) -> Result<u64> {
    let pid = node.collector_pid().context("no collector")?;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? << 10)
}

/// The name of a node that no other case has.
fn fresh() -> String {
    static LAST: AtomicU64 = AtomicU64::new(0);
    format!("peer-{}", LAST.fetch_add(1, Ordering::Relaxed))
}

/// A stream to the collector, as far as an agent has it.
pub struct Peer {
    name: String,
    messages: mpsc::Sender<AgentMessage>,
    answers: Streaming<CollectorMessage>,
}

impl Peer {
    /// Connects, and says nothing yet.
    async fn connect(node: &Node, name: &str) -> Result<Self> {
        Self::connect_at(&node.address(Purpose::Deliver), name).await
    }

    async fn connect_at(address: &str, name: &str) -> Result<Self> {
        let channel = Target::new(address, None)?.connect(|endpoint| endpoint).await?;
        let (messages, receiver) = mpsc::channel(4);
        let answers = DeliveryClient::new(channel).stream(ReceiverStream::new(receiver)).await?.into_inner();
        Ok(Self { name: name.to_owned(), messages, answers })
    }

    /// Connects and says hello, as who has all positions from `first` on.
    pub async fn greet(node: &Node, name: &str, first: u64) -> Result<(Self, u64)> {
        Self::greet_at(&node.address(Purpose::Deliver), name, first).await
    }

    /// The same at an address.
    pub async fn greet_at(address: &str, name: &str, first: u64) -> Result<(Self, u64)> {
        let mut peer = Self::connect_at(address, name).await?;
        peer.say(agent_message::Message::Hello(hello(name, first))).await?;
        match peer.answer().await? {
            Answer::Welcome(welcome) => Ok((peer, welcome.next_position)),
            other => bail!("no welcome, but {other:?}"),
        }
    }

    async fn say(&self, message: agent_message::Message) -> Result<()> {
        Ok(self.messages.send(AgentMessage { message: Some(message) }).await?)
    }

    async fn send(&mut self, batch: Batch) -> Result<Answer> {
        self.say(agent_message::Message::Batch(batch)).await?;
        self.answer().await
    }

    async fn answer(&mut self) -> Result<Answer> {
        let answer = tokio::time::timeout(DEADLINE, self.answers.message()).await.context("no answer")??;
        answer.and_then(|answer| answer.message).context("the stream is over")
    }

    /// Sends records in one batch, which must be taken.
    pub async fn deliver(&mut self, first: u64, words: &[&str]) -> Result<u64> {
        let batch = batch::pack(first, &records(&self.name, words))?;
        match self.send(batch).await? {
            Answer::Acknowledgement(acknowledgement) => Ok(acknowledgement.next_position),
            other => bail!("not taken: {other:?}"),
        }
    }

    /// Sends a batch, which must never be taken, for a reason that has `says` in it.
    async fn refused(&mut self, batch: Batch, says: &str) -> Result<()> {
        match self.send(batch).await? {
            Answer::NotTaken(NotTaken { never: true, why, .. }) if why.contains(says) => Ok(()),
            other => bail!("instead of {says:?}: {other:?}"),
        }
    }

    /// Waits for the end of the stream, with a reason that has `says` in it.
    async fn ends(mut self, says: &str) -> Result<()> {
        loop {
            match tokio::time::timeout(DEADLINE, self.answers.message()).await.context("it goes on")? {
                Ok(Some(_)) => {}
                Ok(None) => bail!("it ends without a reason"),
                Err(status) if status.message().contains(says) => return Ok(()),
                Err(status) => bail!("instead of {says:?}: {status}"),
            }
        }
    }
}

fn hello(name: &str, first_position: u64) -> Hello {
    Hello {
        node: name.to_owned(),
        boot: "boot".to_owned(),
        epoch: 1,
        agent_version: "test".to_owned(),
        first_position,
        next_position: u64::MAX,
    }
}

/// Records of a node that carry these words.
fn records(node: &str, words: &[&str]) -> Vec<Bytes> {
    let record = |word: &&str| {
        let record = Record {
            node: node.to_owned(),
            actor: Some(Process { executable: (*word).to_owned(), ..Process::default() }),
            event: Some(Event::Exit(ProcessExit::default())),
            ..Record::default()
        };
        record.encode_to_vec().into()
    };
    words.iter().map(record).collect()
}

/// The words of what is stored of a node, in order.
pub fn stored(node: &Node, name: &str) -> Result<Vec<String>> {
    let records = events::query(node, &["--all", "--node", name])?;
    Ok(records
        .iter()
        .filter_map(|record| record["actor"]["executable"].as_str().map(str::to_owned))
        .collect())
}

/// An agent that does what agents do, whatever else happens.
async fn ordinary(node: &Node) -> Result<()> {
    let name = fresh();
    let (mut peer, next) = Peer::greet(node, &name, 0).await?;
    ensure!(next == 0, "a new stream goes on at {next}");
    ensure!(peer.deliver(0, &["one", "two"]).await? == 2, "two records");
    ensure!(peer.deliver(2, &["three"]).await? == 3, "a third");
    ensure!(stored(node, &name)? == ["one", "two", "three"], "{:?}", stored(node, &name)?);
    Ok(())
}

async fn again(node: &Node) -> Result<()> {
    let name = fresh();
    let (mut peer, _) = Peer::greet(node, &name, 0).await?;
    peer.deliver(0, &["one", "two"]).await?;
    drop(peer);
    let (mut peer, next) = Peer::greet(node, &name, 0).await?;
    ensure!(next == 2, "it goes on at {next}");
    // Who does not listen is not taken.
    let batch = batch::pack(0, &records(&name, &["one", "two", "three"]))?;
    let answer = peer.send(batch).await?;
    ensure!(
        matches!(&answer, Answer::NotTaken(NotTaken { next_position: 2, never: false, .. })),
        "{answer:?}"
    );
    peer.deliver(2, &["three"]).await?;
    ensure!(stored(node, &name)? == ["one", "two", "three"], "{:?}", stored(node, &name)?);
    ordinary(node).await
}

async fn taken_over(node: &Node) -> Result<()> {
    let name = fresh();
    let (mut old, _) = Peer::greet(node, &name, 0).await?;
    old.deliver(0, &["one"]).await?;
    let (mut new, next) = Peer::greet(node, &name, 0).await?;
    ensure!(next == 1, "it goes on at {next}");
    old.ends("taken over").await?;
    new.deliver(1, &["two"]).await?;
    ensure!(stored(node, &name)? == ["one", "two"], "{:?}", stored(node, &name)?);
    ordinary(node).await
}

async fn noise(node: &Node) -> Result<()> {
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let frame = |length: u32, kind: u8, flags: u8, stream: u32| {
        let mut frame = length.to_be_bytes()[1..].to_vec();
        frame.extend([kind, flags]);
        frame.extend(stream.to_be_bytes());
        frame
    };
    let endless_headers =
        [preface.as_slice(), &frame(0, 4, 0, 0), &frame(16, 1, 0, 1), &[0x82; 16], &frame(1 << 20, 9, 0, 1)]
            .concat();
    for bytes in [
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n".to_vec(),
        vec![0xff; 100_000],
        [preface.as_slice(), &[0xff; 100]].concat(),
        // A data frame of a stream that nobody opened, and one that is larger than any may be.
        [preface.as_slice(), &frame(0, 4, 0, 0), &frame(8, 0, 0, 7), &[0; 8]].concat(),
        [preface.as_slice(), &frame(0, 4, 0, 0), &frame((1 << 24) - 1, 0, 0, 1)].concat(),
        endless_headers,
    ] {
        let mut stream = UnixStream::connect(node.socket(Purpose::Deliver)).await?;
        // It may be closed before all is written.
        let _closed = stream.write_all(&bytes).await;
        let mut answer = Vec::new();
        let ended = tokio::time::timeout(DEADLINE, stream.read_to_end(&mut answer)).await;
        ensure!(ended.is_ok(), "{:?} keeps the connection open", &bytes[..bytes.len().min(40)]);
    }
    ordinary(node).await
}

async fn disorder(node: &Node) -> Result<()> {
    let name = fresh();
    let batch = || batch::pack(0, &records("peer", &["one"]));
    let peer = Peer::connect(node, &name).await?;
    peer.say(agent_message::Message::Batch(batch()?)).await?;
    peer.ends("the first message is no Hello").await?;
    let (peer, _) = Peer::greet(node, &name, 0).await?;
    peer.say(agent_message::Message::Hello(hello(&name, 0))).await?;
    peer.ends("a second Hello").await?;
    let peer = Peer::connect(node, &name).await?;
    peer.messages.send(AgentMessage { message: None }).await?;
    peer.ends("the first message is no Hello").await?;
    for (hello, says) in [
        (Hello { node: String::new(), ..hello(&name, 0) }, "Hello.node"),
        (Hello { boot: "b".repeat(300), ..hello(&name, 0) }, "Hello.boot"),
    ] {
        let peer = Peer::connect(node, &name).await?;
        peer.say(agent_message::Message::Hello(hello)).await?;
        peer.ends(says).await?;
    }
    // Who says nothing at all.
    Peer::connect(node, &name).await?.ends("no Hello within").await?;
    ordinary(node).await
}

async fn too_large(node: &Node) -> Result<()> {
    let (peer, _) = Peer::greet(node, &fresh(), 0).await?;
    let compressed = Bytes::from(vec![7; batch::MOST_COMPRESSED + (1 << 20)]);
    peer.say(agent_message::Message::Batch(Batch { compressed, count: 1, size: 1, ..Batch::default() }))
        .await?;
    peer.ends("").await?;
    ordinary(node).await
}

/// A gigabyte of zeros compressed: a frame that repeats one block of 128 KiB, written by hand as RFC 8878 has it.
fn zeros() -> Bytes {
    const BLOCK: u32 = 128 << 10;
    let blocks: u32 = (1 << 30) / BLOCK;
    // Magic, a descriptor without anything, and a window of 2^(10 + 7) bytes.
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0, 7 << 3];
    for block in 1..=blocks {
        let head = u32::from(block == blocks) | 1 << 1 | BLOCK << 3;
        frame.extend_from_slice(&head.to_le_bytes()[..3]);
        frame.push(0);
    }
    frame.into()
}

async fn bomb(node: &Node) -> Result<()> {
    let name = fresh();
    let (mut peer, _) = Peer::greet(node, &name, 0).await?;
    let bomb = Batch { compressed: zeros(), count: 1, ..Batch::default() };
    for _ in 0..20 {
        peer.refused(Batch { size: 1 << 30, ..bomb.clone() }, "more than").await?;
        peer.refused(Batch { size: 4 << 20, ..bomb.clone() }, "cannot be decompressed").await?;
        peer.refused(Batch { size: 1, ..bomb.clone() }, "cannot be decompressed").await?;
    }
    peer.refused(Batch { count: u32::MAX, size: 9, ..bomb.clone() }, "more than").await?;
    peer.refused(Batch::default(), "no records").await?;
    ensure!(peer.deliver(0, &["one"]).await? == 1, "the stream goes on");
    ordinary(node).await
}

async fn poison(node: &Node) -> Result<()> {
    let name = fresh();
    let (mut peer, _) = Peer::greet(node, &name, 0).await?;
    let mut all = records(&name, &["one", "two", "three"]);
    all[1] = Bytes::from_static(b"\xff\xff\xff");
    peer.refused(batch::pack(0, &all)?, "its record 1 is no record").await?;
    // As an agent does: what comes before, and what comes after without it.
    peer.deliver(0, &["one"]).await?;
    peer.refused(batch::pack(1, &all[1..2])?, "its record 0 is no record").await?;
    let rest = Batch { given_up: 1, ..batch::pack(2, &records(&name, &["three"]))? };
    let answer = peer.send(rest).await?;
    ensure!(matches!(&answer, Answer::Acknowledgement(taken) if taken.next_position == 3), "{answer:?}");
    ensure!(stored(node, &name)? == ["one", "three"], "{:?}", stored(node, &name)?);
    ordinary(node).await
}

async fn another_node(node: &Node) -> Result<()> {
    let (name, other) = (fresh(), fresh());
    let (mut peer, _) = Peer::greet(node, &name, 0).await?;
    peer.refused(batch::pack(0, &records(&other, &["forged"]))?, &format!("of node \"{other}\"")).await?;
    ensure!(stored(node, &other)?.is_empty(), "a record of another node is stored");
    until("a record of the refusal", async || {
        let refusals = events::query(node, &["--kind", "refusal"])?;
        let says = |record: &serde_json::Value| {
            record["refusal"]["why"].as_str().is_some_and(|why| why.contains(&name) && why.contains(&other))
        };
        Ok(refusals.iter().any(says).then_some(()))
    })
    .await?;
    ordinary(node).await
}

async fn positions(node: &Node) -> Result<()> {
    let name = fresh();
    let (mut peer, next) = Peer::greet(node, &name, 5).await?;
    ensure!(next == 5, "what the agent has not any more is asked for: {next}");
    for (first_position, given_up) in [(6, 0), (4, 0), (u64::MAX, 0), (u64::MAX, u64::MAX), (0, u64::MAX)] {
        let batch = Batch { first_position, given_up, ..batch::pack(0, &records(&name, &["x"]))? };
        let answer = peer.send(batch).await?;
        ensure!(matches!(&answer, Answer::NotTaken(NotTaken { next_position: 5, .. })), "{answer:?}");
    }
    peer.deliver(5, &["five"]).await?;
    // At the end of all numbers.
    let last = Batch {
        first_position: u64::MAX,
        given_up: u64::MAX - 6,
        ..batch::pack(0, &records(&name, &["x"]))?
    };
    peer.refused(last, "beyond all bounds").await?;
    ensure!(stored(node, &name)? == ["five"], "{:?}", stored(node, &name)?);
    ordinary(node).await
}

async fn slow_reader(node: &Node) -> Result<()> {
    let name = fresh();
    let (peer, _) = Peer::greet(node, &name, 0).await?;
    // Until nothing more is taken from it, since the answers that it does not read fill every buffer on the way; or until it is
    // thrown out, for having more on the way than a connection may.
    let refused = Batch { count: 1, size: 1, compressed: Bytes::from_static(b"x"), ..Batch::default() };
    for sent in 0.. {
        let message = AgentMessage { message: Some(agent_message::Message::Batch(refused.clone())) };
        match tokio::time::timeout(Duration::from_secs(2), peer.messages.send(message)).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => {
                println!("   thrown out after {sent} batches");
                break;
            }
            Err(_) => {
                println!("   stopped after {sent} batches");
                break;
            }
        }
        ensure!(sent < 1_000_000, "a million answers are kept for who does not read them");
    }
    ordinary(node).await?;
    drop(peer);
    ordinary(node).await
}

async fn silent(node: &Node) -> Result<()> {
    let mut silent = Vec::new();
    for _ in 0..500 {
        silent.push(UnixStream::connect(node.socket(Purpose::Deliver)).await?);
    }
    ordinary(node).await
}
