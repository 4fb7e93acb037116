//! What waits for the collector: let in by the agent, kept by the spool ([`super::keeper`]), taken by the stream.
//!
//! A record takes its position when it is let in, so positions have no holes, whatever is turned away. Telemetry is turned away
//! before denials are, and of one container as soon as it has as much here as is left for all others: what was recorded first
//! stays, and nobody can push out what others have done, nor the traces of his own beginnings.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque},
    path::PathBuf,
    sync::{Condvar, Mutex, MutexGuard, PoisonError, RwLock},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use palisade_proto::{
    batch::{self, MOST_OF_RECORD, taken_by},
    v1::Batch,
};
use tokio::sync::{Notify, mpsc};

use super::{
    row::{Credit, Row},
    spool::{Booked, Content, Run, SlotOf, Spool, add, payload_of},
};

/// Why a record was not let in; the caller counts it as lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Full {
    Memory,
    Disk,
}

/// Overhead that is counted for each record.
const OVERHEAD: usize = 64;
/// The share of the room that only urgent records may use, as a divisor.
const RESERVED_SHARE: u64 = 8;
/// Rows that are read for one batch.
const MOST_ROWS: usize = 256;

/// What the agent learns of records that it has let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum News {
    /// They are on the node's disk.
    Spooled(Credit),
    /// They were, and the collector has them.
    Delivered(Credit),
    /// They were not, and the collector has them.
    DeliveredFromMemory(Credit),
    /// They are lost.
    Lost(Credit),
}

/// Where records wait, and how many.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Bytes in memory.
    pub memory: usize,
    /// Folder of the spool; absent: everything is in memory only.
    pub folder: Option<PathBuf>,
    /// Bytes on disk.
    pub disk: u64,
    /// How long records are kept, of the time that the spool is in use.
    pub age: Option<Duration>,
}

/// What waits.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Waiting {
    pub records: u64,
    /// In memory, of how many.
    pub memory_bytes: u64,
    pub most_memory_bytes: u64,
    /// On disk, of how many.
    pub disk_bytes: u64,
    pub most_disk_bytes: u64,
    /// How long the first has waited.
    pub oldest: Duration,
    /// Records that no collector would take, so far.
    pub given_up: u64,
    /// Records that were acknowledged, so far.
    pub acknowledged: u64,
    /// Why nothing is written to the disk; empty when it is.
    pub problem: String,
}

/// What is known of the records of a slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Taken in, ever.
    pub booked: Booked,
    /// Of them what no collector has yet.
    pub waiting: Booked,
    /// Of that what is in memory only.
    pub kept: u64,
}

pub(super) struct Entry {
    pub record: Bytes,
    pub credit: Credit,
}

#[derive(Default)]
pub(super) struct State {
    /// Earlier runs that have something left, the oldest first, and this one.
    pub runs: VecDeque<Run>,
    /// The position of the next record that is let in.
    pub next: u64,
    /// Let in, and not yet in a row.
    pub staged: VecDeque<Entry>,
    pub staged_since: Option<Instant>,
    /// Bytes of what is staged, or being made a row of, and how many each slot has of them.
    pub memory: u64,
    pub memory_of: HashMap<SlotOf, u64>,
    /// Rows that are not on disk.
    pub kept: BTreeMap<u64, Row>,
    pub kept_bytes: u64,
    /// Those of them that are being written, or may have been: a change that failed may be on the disk. Until that is known nothing is
    /// booked of them.
    pub doubtful: BTreeSet<u64>,
    /// Rows on disk.
    pub disk_records: u64,
    pub disk_bytes: u64,
    /// Of all rows: what each slot has of them, and what it ever had.
    pub waiting: HashMap<SlotOf, Credit>,
    pub booked: HashMap<SlotOf, Booked>,
    /// When the spool had been in use for how long.
    pub lived: (Duration, Option<Instant>),
    /// Somebody waits for what is staged.
    pub flush: bool,
    /// Runs that have got on since the spool was told, and since when.
    pub moved: HashSet<u64>,
    pub moved_since: Option<Instant>,
    pub ended: Vec<u64>,
    pub settled: Vec<SlotOf>,
    pub rebased: Vec<(SlotOf, u64)>,
    /// The run of which old rows are to go.
    pub shed: Option<u64>,
    /// Whether the spool was ever open.
    pub opened: bool,
    /// Whether it is not open any more.
    pub absent: bool,
    /// Where the last row of this run on the disk ends.
    pub disk_end: u64,
    /// Rows of this run from here on wait until they are written.
    pub withheld: Option<u64>,
    /// When the first row that waits was made, as the spool counts time.
    pub first_lived: Option<u64>,
    /// Rows on disk that something else has taken the place of.
    pub hidden: BTreeSet<(u64, u64)>,
    pub problem: String,
    pub retry: Option<Instant>,
    pub acknowledged: u64,
    pub given_up: u64,
    pub closing: bool,
    pub closed: bool,
}

impl State {
    pub(super) fn own(&self) -> &Run {
        &self.runs[self.runs.len() - 1]
    }

    /// How long the spool has been in use, milliseconds.
    pub(super) fn lived(&self) -> u64 {
        let (before, since) = self.lived;
        let now = before + since.map_or(Duration::ZERO, |since| since.elapsed());
        u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
    }

    pub(super) fn book(&mut self, row: &Row) {
        for credit in &row.credits {
            add(&mut self.waiting, credit);
            self.booked.entry((credit.epoch, credit.slot)).or_default().add(credit);
        }
    }

    /// A row is not here any more.
    pub(super) fn took(&mut self, row: &Row) {
        for Credit { epoch, slot, delivered, reported, bytes } in &row.credits {
            let key = (*epoch, *slot);
            let Some(waiting) = self.waiting.get_mut(&key) else { continue };
            waiting.delivered -= delivered;
            waiting.reported -= reported;
            waiting.bytes = waiting.bytes.saturating_sub(*bytes);
            if waiting.bytes == 0 {
                self.waiting.remove(&key);
            }
        }
    }

    pub(super) fn drop_kept(&mut self, first: u64) -> Option<Row> {
        self.doubtful.remove(&first);
        let row = self.kept.remove(&first)?;
        self.kept_bytes -= row.length() as u64;
        Some(row)
    }

    /// Whether what is to be sent is in a spool that is not open.
    fn lacks_rows(&self) -> bool {
        self.absent && (self.runs.len() > 1 || self.own().first < self.disk_end)
    }

    /// Whether everything is acknowledged.
    fn is_empty(&self) -> bool {
        self.runs.len() == 1 && self.own().first == self.next
    }
}

/// Records between the agent and the collector.
pub struct Queue {
    pub(super) state: Mutex<State>,
    pub(super) spool: RwLock<Option<Spool>>,
    pub(super) limits: Limits,
    pub(super) work: Condvar,
    pub(super) filled: Notify,
    pub(super) emptied: Notify,
    pub(super) shed: Notify,
    pub(super) news: mpsc::UnboundedSender<News>,
    /// What the disk does next: fails, or fails after it has taken the change.
    #[cfg(test)]
    pub(super) faults: Mutex<VecDeque<Fault>>,
}

#[cfg(test)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    NotTaken,
    TakenAndNotSaid,
}

/// A run as the stream sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequence {
    pub run: Run,
    /// Whether it still grows; else nobody knows what it had only in memory.
    pub own: bool,
    pub next: u64,
}

impl Queue {
    /// Begins a new run.
    pub fn new(limits: Limits, run: Run, news: mpsc::UnboundedSender<News>) -> Self {
        let mut state = State { lived: (Duration::ZERO, Some(Instant::now())), ..State::default() };
        state.moved.insert(run.started);
        state.runs.push_back(Run { number: run.started, first: 0, ..run });
        Self {
            state: Mutex::new(state),
            spool: RwLock::new(None),
            limits,
            #[cfg(test)]
            faults: Mutex::default(),
            work: Condvar::new(),
            filled: Notify::new(),
            emptied: Notify::new(),
            shed: Notify::new(),
            news,
        }
    }

    /// Opens the spool and learns what is in it. What is wrong with the disk is said, and tried again.
    pub fn open(&self) {
        let Some(folder) = &self.limits.folder else { return };
        if let Err(error) = self.reopen(folder) {
            let mut state = self.state();
            state.fails(&error);
            state.retry = Some(Instant::now());
        }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        // Every change below is complete before anything can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets a record in.
    ///
    /// # Errors
    ///
    /// When there is no room for it, or it is larger than a record may be.
    pub fn push(&self, record: Bytes, urgent: bool, credit: Credit) -> Result<(), Full> {
        if record.len() > MOST_OF_RECORD {
            return Err(Full::Memory);
        }
        let mut state = self.state();
        let size = (record.len() + OVERHEAD) as u64;
        let key = (credit.epoch, credit.slot);
        // The agent's own words are of no container.
        let shared = credit.slot != 0;
        let fits = |used: u64, own: u64, limit: u64| {
            let free = limit.saturating_sub(used);
            let reserved = if urgent { 0 } else { limit / RESERVED_SHARE };
            let share = if urgent { free.saturating_mul(2) } else { free };
            size + reserved <= free && (!shared || own + size <= share)
        };
        let staged = state.memory_of.get(&key).copied().unwrap_or(0);
        let made = state.waiting.get(&key).map_or(0, |waiting| waiting.bytes);
        // Rows are in memory only where nothing can be written.
        let own = staged + if state.kept.is_empty() { 0 } else { made };
        let memory = state.memory + state.kept_bytes;
        if !fits(memory, own, self.limits.memory as u64) {
            return Err(Full::Memory);
        }
        let disk = state.disk_bytes + memory;
        if self.limits.folder.is_some() && !fits(disk, made + staged, payload_of(self.limits.disk)) {
            return Err(Full::Disk);
        }
        state.memory += size;
        *state.memory_of.entry(key).or_default() += size;
        state.staged_since.get_or_insert_with(Instant::now);
        state.staged.push_back(Entry { record, credit: Credit { bytes: size, ..credit } });
        state.next += 1;
        Ok(())
    }

    /// Has everything sent that was let in.
    pub fn flush(&self) {
        let mut state = self.state();
        if !state.staged.is_empty() {
            state.flush = true;
            drop(state);
            self.work.notify_one();
        }
    }

    /// Waits until there may be something to send.
    pub async fn filled(&self) {
        self.filled.notified().await;
    }

    /// The run whose turn it is.
    pub fn sequence(&self) -> Sequence {
        let state = self.state();
        let run = state.runs[0].clone();
        Sequence { own: state.runs.len() == 1, next: state.next, run }
    }

    /// A batch of `run` with the first records from `position` on, up to `most` of them and together up to `bytes`.
    ///
    /// # Errors
    ///
    /// When they cannot be read at this moment.
    pub fn batch(&self, run: u64, position: u64, most: usize, bytes: usize) -> Result<Option<Batch>> {
        let given_up = self.state().runs.iter().find(|known| known.number == run).map_or(0, |run| run.first);
        let position = position.max(given_up);
        let mut rows: Vec<(u64, Row)> = Vec::new();
        let (mut at, mut records, mut taken) = (position, 0, 0);
        while rows.len() < MOST_ROWS {
            let Some((first, row)) = self.row(run, at)? else { break };
            records += row.count as usize;
            taken += row.size as usize;
            if !rows.is_empty() && (first != at || records > most || taken > bytes) {
                break;
            }
            at = first + u64::from(row.count);
            rows.push((first, row));
        }
        let Some((first, row)) = rows.first() else { return Ok(None) };
        let first_position = position.max(*first);
        let as_batch = |first_position, row: &Row| Batch {
            first_position,
            compressed: row.compressed.clone(),
            count: row.count,
            size: row.size,
            given_up: 0,
        };
        if rows.len() == 1
            && *first == first_position
            && row.count as usize <= most
            && row.size as usize <= bytes
        {
            return Ok(Some(as_batch(first_position, row)));
        }
        let mut all = Vec::new();
        for (first, row) in &rows {
            all.extend(batch::unpack(&as_batch(*first, row)).context("a batch in the spool is damaged")?);
        }
        let mut taken = 0;
        let some: Vec<Bytes> = all
            .into_iter()
            .skip((first_position - first) as usize)
            .take(most)
            .take_while(|record| {
                let size = taken_by(record.len());
                let fits = taken == 0 || taken + size <= bytes;
                taken += size;
                fits
            })
            .collect();
        Ok(Some(batch::pack(first_position, &some)?))
    }

    /// The row that `position` is in, or the next one.
    pub(super) fn row(&self, run: u64, position: u64) -> Result<Option<(u64, Row)>> {
        let spool = self.spool.read().unwrap_or_else(PoisonError::into_inner);
        // First what is in memory: what goes to the disk meanwhile is found there.
        let in_memory = {
            let state = self.state();
            anyhow::ensure!(
                spool.is_some() || !state.lacks_rows(),
                "what is in the spool cannot be read: {}",
                state.problem
            );
            let before = state.kept.range(..=position).next_back();
            before
                .filter(|(first, row)| **first + u64::from(row.count) > position)
                .or_else(|| state.kept.range(position..).next())
                .filter(|(first, _)| {
                    run == state.own().number && state.withheld.is_none_or(|from| **first < from)
                })
                .map(|(first, row)| (*first, row.clone()))
        };
        let mut at = position;
        let on_disk = loop {
            let found = spool.as_ref().map_or(Ok(None), |spool| spool.row(run, at))?;
            match found {
                Some((first, row)) if self.state().hidden.contains(&(run, first)) => {
                    at = first + u64::from(row.count);
                }
                other => break other,
            }
        };
        Ok([on_disk, in_memory].into_iter().flatten().min_by_key(|(first, _)| *first))
    }

    /// Every record of `run` before `next` is at a collector.
    pub fn acknowledge(&self, run: u64, next: u64) {
        let mut state = self.state();
        let Some(index) = state.runs.iter().position(|known| known.number == run) else { return };
        let own = index + 1 == state.runs.len();
        let next = if own { next.min(state.next) } else { next };
        if next <= state.runs[index].first {
            return;
        }
        state.acknowledged += next - state.runs[index].first;
        state.runs[index].first = next;
        state.moved.insert(run);
        state.moved_since.get_or_insert_with(Instant::now);
        if own {
            self.release(&mut state);
        }
        self.tell_if_empty(&state);
    }

    /// Lets go of rows in memory that are acknowledged.
    pub(super) fn release(&self, state: &mut State) {
        let first = state.own().first;
        let delivered: Vec<u64> = state
            .kept
            .iter()
            .take_while(|(at, row)| **at + u64::from(row.count) <= first)
            .map(|(at, _)| *at)
            .filter(|at| !state.doubtful.contains(at))
            .collect();
        for at in delivered {
            let Some(row) = state.drop_kept(at) else { continue };
            state.took(&row);
            for credit in row.credits {
                self.tell(News::DeliveredFromMemory(credit));
            }
        }
    }

    /// A run that does not grow has nothing left.
    pub fn finish(&self, run: u64) {
        let mut state = self.state();
        if state.runs.len() > 1 && state.runs[0].number == run {
            state.runs.pop_front();
            state.ended.push(run);
            state.moved.remove(&run);
            state.moved_since.get_or_insert_with(Instant::now);
        }
        self.tell_if_empty(&state);
    }

    fn tell_if_empty(&self, state: &State) {
        if state.is_empty() {
            self.emptied.notify_waiters();
        }
    }

    pub(super) fn tell(&self, news: News) {
        let _the_agent_stops = self.news.send(news);
    }

    /// The record at `position` of `run`, which must be the first that is left.
    ///
    /// # Errors
    ///
    /// When it cannot be read.
    pub fn first_record(&self, run: u64, position: u64) -> Result<Option<Bytes>> {
        let batch = self.batch(run, position, 1, usize::MAX)?;
        let Some(batch) = batch.filter(|batch| batch.first_position == position) else { return Ok(None) };
        Ok(batch::unpack(&batch)?.into_iter().next())
    }

    /// Takes out the record at `position` of `run`, which must be the first: it is never delivered. `replacement` comes last,
    /// whatever room there is, and counts it.
    pub fn give_up(&self, run: u64, position: u64, replacement: Option<(Bytes, Credit)>) {
        let mut state = self.state();
        let Some(index) = state.runs.iter().position(|known| known.number == run) else { return };
        // There may be a hole before it.
        if state.runs[index].first > position {
            return;
        }
        state.runs[index].first = position + 1;
        state.moved.insert(run);
        state.moved_since.get_or_insert_with(Instant::now);
        state.given_up += 1;
        if let Some((record, credit)) = replacement {
            state.add(record, credit);
        }
        state.flush = true;
        drop(state);
        self.work.notify_one();
    }

    /// Has everything of `run` dropped and counted that is too old, and waits for that.
    pub async fn without_old(&self, run: u64) {
        if self.limits.age.is_none() || self.limits.folder.is_none() {
            return;
        }
        loop {
            let done = self.shed.notified();
            tokio::pin!(done);
            done.as_mut().enable();
            {
                let mut state = self.state();
                if state.closed || !state.problem.is_empty() {
                    state.shed = None;
                    return;
                }
                state.shed = Some(run);
            }
            self.work.notify_one();
            done.await;
            if self.state().shed.is_none() {
                return;
            }
        }
    }

    /// A slot needs no account any more.
    pub fn settle(&self, slot: SlotOf) {
        let mut state = self.state();
        state.booked.remove(&slot);
        if self.limits.folder.is_some() {
            state.settled.push(slot);
            state.moved_since.get_or_insert_with(Instant::now);
        }
    }

    /// What was taken in of a slot is `sum`, whatever the spool says.
    pub fn rebase(&self, slot: SlotOf, sum: u64) {
        let mut state = self.state();
        state.booked.insert(slot, Booked { delivered: sum, reported: 0 });
        state.rebased.push((slot, sum));
        state.moved_since.get_or_insert_with(Instant::now);
    }

    /// Forgets accounts of slots that `known` does not know.
    pub fn settle_all_but(&self, known: &HashSet<SlotOf>) {
        let unknown: Vec<SlotOf> =
            self.state().booked.keys().filter(|slot| !known.contains(slot)).copied().collect();
        for slot in unknown {
            self.settle(slot);
        }
    }

    /// What was ever taken in of each slot, as far as the spool knows: records that were only in memory before this run are
    /// not among them.
    pub fn booked(&self, slot: SlotOf) -> Option<u64> {
        self.state().booked.get(&slot).map(|booked| booked.sum())
    }

    /// Whether the spool can be read, or was never meant to be there.
    pub fn knows(&self) -> bool {
        self.limits.folder.is_none() || self.state().opened
    }

    pub fn tally(&self, slot: SlotOf) -> Tally {
        let state = self.state();
        let waiting = state.waiting.get(&slot).map_or(Booked::default(), |waiting| Booked {
            delivered: waiting.delivered.max(0).unsigned_abs(),
            reported: waiting.reported.max(0).unsigned_abs(),
        });
        let of_slot = |credit: &&Credit| (credit.epoch, credit.slot) == slot;
        let kept = state.kept.values().flat_map(|row| &row.credits).filter(of_slot);
        let kept: i64 = kept.map(|credit| credit.delivered + credit.reported).sum();
        Tally {
            booked: state.booked.get(&slot).copied().unwrap_or_default(),
            waiting,
            kept: kept.max(0).unsigned_abs(),
        }
    }

    pub fn waiting(&self) -> Waiting {
        let state = self.state();
        let kept: u64 = state.kept.values().map(|row| u64::from(row.count)).sum();
        let staged = state.staged_since.map_or(Duration::ZERO, |since| since.elapsed());
        let oldest = state.first_lived.filter(|_| !state.is_empty());
        let oldest = oldest.map(|lived| Duration::from_millis(state.lived().saturating_sub(lived)));
        Waiting {
            records: state.disk_records + kept + state.staged.len() as u64,
            memory_bytes: state.memory + state.kept_bytes,
            most_memory_bytes: self.limits.memory as u64,
            disk_bytes: state.disk_bytes,
            most_disk_bytes: if self.limits.folder.is_some() { payload_of(self.limits.disk) } else { 0 },
            oldest: oldest.unwrap_or(staged),
            given_up: state.given_up,
            acknowledged: state.acknowledged,
            problem: state.problem.clone(),
        }
    }

    /// Waits until everything is acknowledged.
    pub async fn drained(&self) {
        loop {
            let emptied = self.emptied.notified();
            tokio::pin!(emptied);
            emptied.as_mut().enable();
            if self.state().is_empty() {
                return;
            }
            emptied.await;
        }
    }

    /// Whether what is not acknowledged outlives the agent.
    pub fn outlives_the_agent(&self) -> bool {
        self.limits.folder.is_some() && self.state().problem.is_empty()
    }

    /// Has everything written that is here. Nothing may be let in any more.
    pub fn close(&self) {
        self.state().closing = true;
        self.work.notify_one();
    }
}

impl State {
    /// Stages a record that the agent has not let in.
    pub(super) fn add(&mut self, record: Bytes, credit: Credit) {
        let size = (record.len() + OVERHEAD) as u64;
        self.memory += size;
        *self.memory_of.entry((credit.epoch, credit.slot)).or_default() += size;
        self.staged_since.get_or_insert_with(Instant::now);
        self.staged.push_back(Entry { record, credit: Credit { bytes: size, ..credit } });
        self.next += 1;
    }

    /// Takes over what a spool holds, beside what is known already.
    pub(super) fn learn(&mut self, content: Content) {
        let Content { runs, booked, waiting, records, bytes, lived } = content;
        // Numbers are unique also when the clock was set back.
        let last = runs.iter().map(|run| run.number + 1).max().unwrap_or(0);
        let own = self.runs.len() - 1;
        if self.runs[own].number < last && self.kept.is_empty() {
            self.moved.remove(&self.runs[own].number);
            self.runs[own].number = last;
            self.moved.insert(last);
        }
        for run in runs.into_iter().rev() {
            self.runs.push_front(run);
        }
        for (slot, found) in booked {
            let known = self.booked.entry(slot).or_default();
            known.delivered += found.delivered;
            known.reported += found.reported;
        }
        for credit in waiting.values() {
            add(&mut self.waiting, credit);
        }
        self.disk_records = records;
        self.disk_bytes = bytes;
        self.lived = (Duration::from_millis(lived), Some(Instant::now()));
        // What was made before it was known how old the spool is.
        self.kept.values_mut().for_each(|row| row.lived += lived);
        self.opened = true;
    }

    /// Nothing can be written to the spool.
    pub(super) fn fails(&mut self, error: &anyhow::Error) {
        let problem = format!("{error:#}");
        if problem != self.problem {
            tracing::error!("records wait in memory only: {problem}");
            self.problem = problem;
        }
    }
}
