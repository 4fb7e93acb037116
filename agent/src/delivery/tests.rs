//! The queue with its spool, as agents come and go, disks fail, and a collector takes what it gets.

use std::{collections::HashMap, path::Path, time::Duration};

use bytes::Bytes;
use palisade_proto::{
    batch,
    v1::{Gap, Record, record::Event},
};
use prost::Message as _;
use tokio::sync::mpsc;

use super::{
    queue::{Fault, Full, Limits, News, Queue},
    row::Credit,
    spool::Run,
};

const EPOCH: u64 = 3;

fn limits(folder: Option<&Path>) -> Limits {
    Limits { memory: 1 << 20, folder: folder.map(Path::to_owned), disk: 64 << 20, age: None }
}

fn open(limits: Limits, started: u64) -> (Queue, mpsc::UnboundedReceiver<News>) {
    let (tell, news) = mpsc::unbounded_channel();
    let run = Run { number: 0, node: "n".to_owned(), boot: "b".to_owned(), started, first: 0 };
    let queue = Queue::new(limits, run, tell);
    queue.open();
    (queue, news)
}

fn record(slot: u64, sequence: u64) -> Bytes {
    let event = Some(Event::Exit(Default::default()));
    Record { node: "n".to_owned(), epoch: EPOCH, slot, sequence, event, ..Record::default() }
        .encode_to_vec()
        .into()
}

fn one(slot: u64) -> Credit {
    Credit { epoch: EPOCH, slot, delivered: 1, ..Credit::default() }
}

/// What a collector has.
#[derive(Default)]
struct Collector {
    next: HashMap<u64, u64>,
    records: Vec<Record>,
}

impl Collector {
    /// Takes one batch, if there is one, and answers unless the answer gets lost; returns whether there was one.
    fn take(&mut self, queue: &Queue, most: usize, answer: bool) -> bool {
        let sequence = queue.sequence();
        let run = sequence.run.number;
        let next = self.next.entry(run).or_default();
        *next = (*next).max(sequence.run.first);
        assert!(!sequence.own || *next <= sequence.next);
        queue.acknowledge(run, *next);
        let Ok(batch) = queue.batch(run, *next, most, 1 << 20) else { return false };
        let Some(batch) = batch else {
            queue.finish(run);
            return !sequence.own;
        };
        assert!(batch.first_position >= *next);
        let records = batch::unpack(&batch).unwrap();
        *next = batch.first_position + records.len() as u64;
        self.records.extend(records.into_iter().map(|record| Record::decode(record).unwrap()));
        if answer {
            queue.acknowledge(run, *next);
        }
        true
    }

    /// Of each slot: what is here, what gap records count, and whether all of it came in order and once.
    fn balance(&self) -> HashMap<u64, (u64, u64)> {
        let mut balance: HashMap<u64, (u64, u64)> = HashMap::new();
        let mut last: HashMap<u64, u64> = HashMap::new();
        for record in &self.records {
            let (stored, counted) = balance.entry(record.slot).or_default();
            if let Some(Event::Gap(gap)) = &record.event {
                *counted += gap.count;
                continue;
            }
            *stored += 1;
            let last = last.entry(record.slot).or_default();
            assert!(record.sequence > *last, "{} after {last}", record.sequence);
            *last = record.sequence;
        }
        balance
    }
}

/// Takes the folder of a spool away, or brings it back. Where it was is then something that cannot be opened.
fn take_disk(path: &Path, away: &Path, there: bool) {
    if there && away.exists() {
        std::fs::remove_file(path).unwrap();
        std::fs::rename(away, path).unwrap();
    } else if !there {
        std::fs::rename(path, away).unwrap();
        std::fs::write(path, "").unwrap();
    }
}

#[test]
fn telemetry_is_turned_away_before_denials_and_nobody_takes_all() {
    let (queue, _news) = open(limits(None), 1);
    let large = Bytes::from(vec![0; 936]);
    let fill =
        |slot, urgent| (0..).take_while(|_| queue.push(large.clone(), urgent, one(slot)).is_ok()).count();
    let all = (1 << 20) / 1000;
    let first = fill(5, false);
    assert!((all / 2 - 2..=all / 2 + 2).contains(&first), "as much as is left: {first} of {all}");
    let second = fill(6, false);
    assert!(second > all / 5, "{second}");
    assert!(fill(5, true) > 0, "what was not allowed may be twice that");
    for slot in 7..40 {
        fill(slot, false);
    }
    assert!(fill(40, true) > 0, "telemetry leaves room for denials");
    for slot in 41..99 {
        fill(slot, true);
    }
    assert_eq!(queue.push(large, true, one(5)), Err(Full::Memory));
    let huge = Bytes::from(vec![0; batch::MOST_OF_RECORD + 1]);
    assert_eq!(queue.push(huge, true, one(99)), Err(Full::Memory), "no collector would take it");
}

#[test]
fn a_full_spool_takes_no_more_of_who_has_filled_it() {
    let folder = tempfile::tempdir().unwrap();
    let (queue, _news) = open(Limits { disk: 8 << 20, memory: 8 << 20, ..limits(Some(folder.path())) }, 1);
    let mut full = None;
    for sequence in 1..400 {
        // That cannot be compressed.
        let noise: Bytes = (0..20_000).map(|_| fastrand::u8(..)).collect();
        full = queue.push(noise, false, one(5)).err();
        queue.work();
        if full.is_some() {
            assert!(sequence > 50);
            break;
        }
    }
    assert_eq!(full, Some(Full::Disk));
    assert_eq!(queue.push(record(6, 1), false, one(6)), Ok(()), "another container has room");
    let waiting = queue.waiting();
    assert!(waiting.disk_bytes < waiting.most_disk_bytes * 6 / 10, "{waiting:?}");
    assert!(std::fs::metadata(folder.path().join("records.redb")).unwrap().len() <= 8 << 20);
}

#[test]
fn what_is_given_up_is_counted_by_what_comes_in_its_place() {
    let folder = tempfile::tempdir().unwrap();
    let (queue, mut news) = open(limits(Some(folder.path())), 1);
    (1..4).for_each(|sequence| queue.push(record(5, sequence), false, one(5)).unwrap());
    queue.work();
    let run = queue.sequence().run.number;
    let first = queue.first_record(run, 0).unwrap().unwrap();
    assert_eq!(first, record(5, 1));
    let instead = Credit { epoch: EPOCH, slot: 5, delivered: -1, reported: 1, bytes: 0 };
    queue.give_up(run, 0, Some((Bytes::from_static(b"gap"), instead)));
    queue.work();
    let batch = queue.batch(run, 0, 9, 9999).unwrap().unwrap();
    assert_eq!(batch.first_position, 1);
    let rest = vec![record(5, 2), record(5, 3), Bytes::from_static(b"gap")];
    assert_eq!(batch::unpack(&batch).unwrap(), rest);
    queue.acknowledge(run, 4);
    queue.work();
    queue.give_up(run, 1, None);
    assert_eq!(queue.waiting().given_up, 1, "it is acknowledged");
    let tally = queue.tally((EPOCH, 5));
    assert_eq!((tally.booked.delivered, tally.booked.reported, tally.waiting.sum()), (2, 1, 0));
    let mut spooled = 0;
    let mut delivered = 0;
    while let Ok(news) = news.try_recv() {
        match news {
            News::Spooled(credit) => spooled += credit.delivered + credit.reported,
            News::Delivered(credit) => delivered += credit.delivered + credit.reported,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((spooled, delivered), (3, 3));
}

#[tokio::test]
async fn what_is_too_old_is_counted_and_the_clock_does_not_matter() {
    let folder = tempfile::tempdir().unwrap();
    let aged = |age| Limits { age: Some(age), ..limits(Some(folder.path())) };
    let (queue, _news) = open(aged(Duration::from_secs(3600)), 1);
    (1..6).for_each(|sequence| queue.push(record(5, sequence), false, one(5)).unwrap());
    queue.work();
    drop(queue);
    // The next agent finds them old as soon as they have waited for anything at all.
    let (queue, _news) = open(aged(Duration::ZERO), 2);
    let queue = std::sync::Arc::new(queue);
    queue.push(record(6, 1), false, one(6)).unwrap();
    let keeper = std::thread::spawn({
        let queue = std::sync::Arc::clone(&queue);
        move || queue.keep()
    });
    tokio::time::sleep(Duration::from_millis(5)).await;
    let old = queue.sequence();
    assert!(!old.own);
    queue.without_old(old.run.number).await;
    queue.close();
    keeper.join().unwrap();
    let mut collector = Collector::default();
    while collector.take(&queue, 99, true) {}
    let balance = collector.balance();
    assert_eq!(balance[&5], (0, 5));
    assert_eq!(balance[&6], (1, 0));
    assert_eq!(queue.tally((EPOCH, 5)).booked.reported, 5);
}

/// One agent after the other, killed at any moment; a disk that takes nothing at times; a collector whose answers get lost.
#[test]
fn whatever_happens_every_record_is_stored_once_or_counted() {
    for seed in 0..60 {
        let mut random = fastrand::Rng::with_seed(seed);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("spool");
        let away = folder.path().join("away");
        let mut collector = Collector::default();
        // As the kernel has it: made, and booked as spooled, delivered, from memory.
        let mut made: HashMap<u64, u64> = HashMap::new();
        let mut books: HashMap<u64, [i64; 3]> = HashMap::new();
        let book = |books: &mut HashMap<u64, [i64; 3]>, news| {
            let (place, credit) = match news {
                News::Spooled(credit) => (0, credit),
                News::Delivered(credit) => (1, credit),
                News::DeliveredFromMemory(credit) => (2, credit),
                News::Lost(credit) => panic!("{credit:?}"),
            };
            books.entry(credit.slot).or_default()[place] += credit.delivered + credit.reported;
        };
        for agent in 1..6 {
            let disk = |there| take_disk(&path, &away, there);
            disk(true);
            let (queue, mut news) = open(limits(Some(&path)), agent);
            // What went with the one before, as a gap record.
            for (slot, made) in &made {
                let [spooled, delivered, from_memory] = books.get(slot).copied().unwrap_or_default();
                let settled = match queue.booked((EPOCH, *slot)) {
                    Some(booked) => booked.cast_signed().max(spooled) + from_memory,
                    None => delivered + from_memory,
                };
                books.entry(*slot).or_default()[0] = settled - from_memory;
                let missing = made.cast_signed() - settled;
                assert!(missing >= 0, "seed {seed}: slot {slot} has {missing}");
                if missing > 0 {
                    let gap = Gap { count: missing.cast_unsigned(), ..Gap::default() };
                    let event = Some(Event::Gap(gap));
                    let gap = Record { slot: *slot, epoch: EPOCH, event, ..Record::default() };
                    let credit = Credit { epoch: EPOCH, slot: *slot, reported: missing, ..Credit::default() };
                    queue.push(gap.encode_to_vec().into(), true, credit).unwrap();
                }
            }
            let mut no_disk = false;
            for _ in 0..random.usize(1..60) {
                match random.u8(0..10) {
                    0..4 => {
                        for _ in 0..random.usize(1..20) {
                            let slot = random.u64(5..8);
                            let sequence = made.entry(slot).or_default();
                            *sequence += 1;
                            queue.push(record(slot, *sequence), random.bool(), one(slot)).unwrap();
                        }
                    }
                    4..6 => {
                        let fault = [None, None, Some(Fault::NotTaken), Some(Fault::TakenAndNotSaid)];
                        queue.faults.lock().unwrap().extend(*random.choice(&fault).unwrap());
                        queue.state().retry = None;
                        queue.work();
                    }
                    6 if random.bool() => {
                        disk(no_disk);
                        no_disk = !no_disk;
                    }
                    _ => drop(collector.take(&queue, random.usize(1..30), random.bool())),
                }
                // Booked by the agent's own task, when it has its turn.
                while random.bool()
                    && let Ok(news) = news.try_recv()
                {
                    book(&mut books, news);
                }
            }
            // What is only in memory may be at the collector without having been booked: an agent that is killed then counts it
            // although it is there. Here it is stopped.
            disk(true);
            queue.faults.lock().unwrap().clear();
            queue.state().retry = None;
            if agent == 5 || !queue.state().kept.is_empty() || random.bool() {
                queue.work();
                if agent == 5 {
                    while collector.take(&queue, 50, true) {}
                    queue.work();
                }
                while let Ok(news) = news.try_recv() {
                    book(&mut books, news);
                }
            }
            // From memory it is booked when it is acknowledged; the rest may be lost with the agent.
            while let Ok(news) = news.try_recv() {
                if matches!(news, News::DeliveredFromMemory(_)) {
                    book(&mut books, news);
                }
            }
        }
        let balance = collector.balance();
        for (slot, made) in made {
            let (stored, counted) = balance[&slot];
            assert_eq!(stored + counted, made, "seed {seed}, slot {slot}: {stored} + {counted}");
        }
    }
}

/// A disk that comes and goes while records are let in, written, sent from memory, and acknowledged, all at once.
#[test]
fn what_is_acknowledged_while_it_is_written_is_booked_once() {
    let folder = tempfile::tempdir().unwrap();
    let (path, away) = (folder.path().join("spool"), folder.path().join("away"));
    let (queue, mut news) = open(Limits { memory: 64 << 20, ..limits(Some(&path)) }, 1);
    let queue = std::sync::Arc::new(queue);
    let keeper = std::thread::spawn({
        let queue = std::sync::Arc::clone(&queue);
        move || queue.keep()
    });
    let mut collector = Collector::default();
    let mut made = 0;
    for round in 0..400 {
        for _ in 0..30 {
            made += 1;
            queue.push(record(5, made), false, one(5)).unwrap();
        }
        queue.flush();
        std::thread::sleep(Duration::from_millis(1));
        match round % 32 {
            0 => take_disk(&path, &away, false),
            11 => queue.faults.lock().unwrap().push_back(Fault::NotTaken),
            19 => queue.faults.lock().unwrap().push_back(Fault::TakenAndNotSaid),
            7 | 15 | 23 => {
                take_disk(&path, &away, true);
                let mut state = queue.state();
                state.retry = state.retry.map(|_| std::time::Instant::now());
                drop(state);
                queue.work.notify_one();
            }
            _ => {}
        }
        while collector.take(&queue, 40, true) {}
    }
    let begun = std::time::Instant::now();
    while collector.balance()[&5].0 < made {
        assert!(begun.elapsed() < Duration::from_secs(60));
        collector.take(&queue, 40, true);
    }
    take_disk(&path, &away, true);
    queue.faults.lock().unwrap().clear();
    queue.close();
    keeper.join().unwrap();
    let (mut spooled, mut delivered, mut from_memory) = (0, 0, 0);
    while let Ok(news) = news.try_recv() {
        match news {
            News::Spooled(credit) => spooled += credit.delivered.unsigned_abs(),
            News::Delivered(credit) => delivered += credit.delivered.unsigned_abs(),
            News::DeliveredFromMemory(credit) => from_memory += credit.delivered.unsigned_abs(),
            News::Lost(credit) => panic!("{credit:?}"),
        }
    }
    assert!(from_memory > 100 && spooled > 100, "{from_memory} from memory, {spooled} spooled");
    assert_eq!((spooled + from_memory, delivered), (made, spooled));
    assert_eq!(queue.booked((EPOCH, 5)), Some(made));
}

#[test]
fn a_disk_that_takes_nothing_does_not_keep_the_agent_from_ending() {
    let folder = tempfile::tempdir().unwrap();
    let (path, away) = (folder.path().join("spool"), folder.path().join("away"));
    let (queue, _news) = open(limits(Some(&path)), 1);
    queue.push(record(5, 1), false, one(5)).unwrap();
    queue.faults.lock().unwrap().push_back(Fault::NotTaken);
    queue.work();
    take_disk(&path, &away, false);
    queue.push(record(5, 2), false, one(5)).unwrap();
    queue.close();
    let (ended, wait) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        queue.keep();
        ended.send(queue.waiting().records).unwrap();
    });
    assert_eq!(wait.recv_timeout(Duration::from_secs(20)), Ok(2), "it does not end");
}
