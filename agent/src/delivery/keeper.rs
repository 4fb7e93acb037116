//! Writes what is let in to the spool before it is sent, and takes out what is acknowledged: a thread of its own, since a disk may
//! take its time. What comes while it waits for the disk goes into the next change, so a slow disk gets larger ones.

use std::{
    path::Path,
    sync::PoisonError,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use palisade_proto::batch::{self, taken_by};

use super::{
    aged::replacements,
    queue::{Entry, News, Queue, State},
    row::{Credit, Row},
    spool::{Change, Content, Gone, Run, Spool, add},
};

/// Of a row.
const MOST_RECORDS: usize = 2048;
const MOST_BYTES: usize = 1 << 20;
/// How long an acknowledgement may wait until it is written; without it the collector gets the same again, and leaves it out.
const LAG: Duration = Duration::from_secs(1);
/// How long a disk that takes nothing is left alone.
const RETRY: Duration = Duration::from_secs(5);
/// Rows that are dropped at once for their age.
const MOST_OLD: usize = 64;
/// Bytes of the disk that are left to others, besides what a change needs: a change writes pages anew before it frees the old ones.
const LEFT_FREE: u64 = 8 << 20;

/// What is to be written, and what it was made of.
#[derive(Default)]
struct Work {
    staged: Vec<Entry>,
    /// Position of the first.
    first: u64,
    /// Bytes of them that count as memory.
    memory: Vec<((u64, u64), u64)>,
    change: Change,
}

impl Queue {
    /// Works until it is closed and everything is written.
    pub fn keep(&self) {
        while self.wait_for_work() {
            self.work();
        }
        self.state().closed = true;
        self.shed.notify_waiters();
    }

    /// Returns whether there is any.
    fn wait_for_work(&self) -> bool {
        let mut state = self.state();
        loop {
            let now = Instant::now();
            let healthy = state.retry.is_none_or(|retry| retry <= now) && self.limits.folder.is_some();
            let staged = !state.staged.is_empty()
                && (state.flush || state.closing || state.memory >= MOST_BYTES as u64);
            let written = state.moved_since.is_some_and(|since| state.closing || since.elapsed() >= LAG);
            let again = state.retry.is_some_and(|retry| retry <= now);
            if staged || healthy && (written || again || state.shed.is_some()) {
                return true;
            }
            if state.closing {
                return false;
            }
            let due = [state.moved_since.filter(|_| healthy).map(|since| since + LAG), state.retry]
                .into_iter()
                .flatten()
                .min()
                .unwrap_or(now + RETRY);
            let wait = due.saturating_duration_since(now).max(Duration::from_millis(1));
            state = self.work.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    pub(super) fn work(&self) {
        let shed = self.state().shed;
        let old = shed.map_or_else(|| Ok(Vec::new()), |run| self.old_rows(run));
        let mut state = self.state();
        let too_old = match old {
            Ok(old) => state.replace(shed.unwrap_or_default(), old),
            Err(error) => {
                state.fails(&error);
                Vec::new()
            }
        };
        let mut work = state.take_work();
        drop(state);
        work.change.shed.extend(too_old);
        let made = rows(std::mem::take(&mut work.staged), work.first, work.change.lived);
        let mut lost = Vec::new();
        let mut rows = Vec::new();
        for (first, row) in made {
            match row {
                Ok(row) => rows.push((first, row)),
                Err(credits) => lost.extend(credits),
            }
        }
        let written = self.write(&mut work.change, &rows);
        let mut state = self.state();
        if work.change.shed.is_empty() || written.is_err() {
            // Nothing is left to drop, or it must wait.
            state.shed = state.shed.filter(|run| shed != Some(*run));
        }
        for (slot, bytes) in work.memory {
            state.release(slot, bytes);
        }
        rows.iter().for_each(|(_, row)| state.book(row));
        lost.into_iter().for_each(|credit| self.tell(News::Lost(credit)));
        match written {
            Ok(gone) => self.has_written(&mut state, &work.change, gone),
            Err(error) => {
                state.fails(&error);
                state.not_written(&work.change);
                state.retry = Some(Instant::now() + RETRY);
                for (first, row) in rows {
                    state.kept_bytes += row.length() as u64;
                    state.kept.insert(first, row);
                }
            }
        }
        drop(state);
        self.filled.notify_one();
        self.shed.notify_waiters();
        self.emptied.notify_waiters();
    }

    /// What a change that is on the disk means.
    fn has_written(&self, state: &mut State, change: &Change, gone: Vec<Gone>) {
        if !state.problem.is_empty() {
            tracing::info!("the spool takes records again");
            state.problem.clear();
        }
        state.retry = None;
        for row in &change.shed {
            state.hidden.remove(row);
        }
        let own = state.own().number;
        for (run, first, row) in &change.rows {
            if *run == own {
                state.drop_kept(*first);
            }
            state.disk_records += u64::from(row.count);
            state.disk_bytes += row.length() as u64;
            row.credits.iter().for_each(|credit| self.tell(News::Spooled(*credit)));
        }
        for Gone { length, row } in gone {
            state.disk_records = state.disk_records.saturating_sub(u64::from(row.count));
            state.disk_bytes = state.disk_bytes.saturating_sub(length);
            state.took(&row);
            row.credits.into_iter().for_each(|credit| self.tell(News::Delivered(credit)));
        }
    }

    /// Writes a change and `rows` of this run, after what could not be written before.
    fn write(&self, change: &mut Change, rows: &[(u64, Row)]) -> Result<Vec<Gone>> {
        let Some(folder) = &self.limits.folder else { bail!("there is no spool (spool.path: none)") };
        if self.state().retry.is_some_and(|retry| retry > Instant::now()) {
            bail!("{}", self.state().problem);
        }
        self.reopen(folder)?;
        let bytes: u64 = rows.iter().map(|(_, row)| row.length() as u64).sum();
        has_room(folder, bytes + self.state().kept_bytes)?;
        {
            let mut state = self.state();
            let own = state.own().number;
            let kept = state.kept.iter().map(|(first, row)| (*first, row.clone()));
            change.rows.extend(kept.chain(rows.iter().cloned()).map(|(first, row)| (own, first, row)));
            // At once with looking at them: what is acknowledged from here on is booked when it is known where it is.
            state.doubtful.extend(change.rows.iter().map(|(_, first, _)| *first));
        }
        let written = {
            let spool = self.spool.read().unwrap_or_else(PoisonError::into_inner);
            spool.as_ref().context("the spool is not open")?.change(change)
        };
        written.inspect_err(|_| {
            // After an error of the disk it is open no more.
            *self.spool.write().unwrap_or_else(PoisonError::into_inner) = None;
            let mut state = self.state();
            state.blind = state.disk_records > 0;
        })
    }

    /// Opens the spool unless it is open, and finds out what of it is still there.
    fn reopen(&self, folder: &Path) -> Result<()> {
        if self.spool.read().unwrap_or_else(PoisonError::into_inner).is_some() {
            return Ok(());
        }
        let node = self.state().own().node.clone();
        let (spool, content) = Spool::open(folder, &node)?;
        let mut state = self.state();
        let Met { there, lost } = state.meet(&spool, content)?;
        there.into_iter().for_each(|credit| self.tell(News::Spooled(credit)));
        lost.into_iter().for_each(|credit| self.tell(News::Lost(credit)));
        self.release(&mut state);
        drop(state);
        *self.spool.write().unwrap_or_else(PoisonError::into_inner) = Some(spool);
        Ok(())
    }

    /// Rows of `run` that are too old; some of them, when they are many.
    fn old_rows(&self, run: u64) -> Result<Vec<(u64, Row)>> {
        let Some(age) = self.limits.age else { return Ok(Vec::new()) };
        let (lived, first) = {
            let state = self.state();
            (state.lived(), state.runs.iter().find(|known| known.number == run).map(|run| run.first))
        };
        let Some(first) = first else { return Ok(Vec::new()) };
        let old = lived.saturating_sub(u64::try_from(age.as_millis()).unwrap_or(u64::MAX));
        let spool = self.spool.read().unwrap_or_else(PoisonError::into_inner);
        let Some(spool) = spool.as_ref() else { return Ok(Vec::new()) };
        // One that has begun to be acknowledged is sent to its end.
        spool.older(run, first, old, MOST_OLD)
    }
}

/// What a spool that was opened again holds of what it should, and what it was not known to hold.
#[derive(Default)]
struct Met {
    there: Vec<Credit>,
    lost: Vec<Credit>,
}

impl State {
    fn take_work(&mut self) -> Work {
        let staged: Vec<Entry> = self.staged.drain(..).collect();
        self.staged_since = None;
        self.flush = false;
        self.moved_since = None;
        let moved = std::mem::take(&mut self.moved);
        let runs: Vec<Run> = self.runs.iter().filter(|run| moved.contains(&run.number)).cloned().collect();
        let memory = staged.iter().map(|entry| ((entry.credit.epoch, entry.credit.slot), entry.credit.bytes));
        Work {
            first: self.next - staged.len() as u64,
            memory: memory.collect(),
            staged,
            change: Change {
                runs,
                ended: std::mem::take(&mut self.ended),
                settled: std::mem::take(&mut self.settled),
                rebased: std::mem::take(&mut self.rebased),
                lived: self.lived(),
                ..Change::default()
            },
        }
    }

    /// Has gap records take the place of rows of `run`; returns which they were.
    fn replace(&mut self, run: u64, rows: Vec<(u64, Row)>) -> Vec<(u64, u64)> {
        // Those of a change that failed are tried again.
        let mut gone: Vec<(u64, u64)> = self.hidden.iter().copied().collect();
        let rows: Vec<(u64, Row)> =
            rows.into_iter().filter(|(first, _)| !self.hidden.contains(&(run, *first))).collect();
        if rows.is_empty() {
            return gone;
        }
        match replacements(&rows) {
            Ok(instead) => instead.into_iter().for_each(|(record, credit)| self.add(record, credit)),
            Err(error) => {
                self.fails(&error);
                return gone;
            }
        }
        let records: u64 = rows.iter().map(|(_, row)| u64::from(row.count)).sum();
        tracing::warn!(records, "too old to be delivered; gap records count them");
        let keys = rows.iter().map(|(first, _)| (run, *first));
        self.hidden.extend(keys.clone());
        gone.extend(keys);
        gone
    }

    /// What a change that failed said is said again with the next one.
    fn not_written(&mut self, change: &Change) {
        self.moved.extend(change.runs.iter().map(|run| run.number));
        self.ended.extend(&change.ended);
        self.settled.extend(&change.settled);
        self.rebased.extend(&change.rebased);
        self.moved_since.get_or_insert_with(Instant::now);
    }

    fn release(&mut self, slot: (u64, u64), bytes: u64) {
        self.memory = self.memory.saturating_sub(bytes);
        if let Some(own) = self.memory_of.get_mut(&slot) {
            *own = own.saturating_sub(bytes);
            if *own == 0 {
                self.memory_of.remove(&slot);
            }
        }
    }

    /// Compares what a spool holds with what it should.
    fn meet(&mut self, spool: &Spool, content: Content) -> Result<Met> {
        if !self.opened {
            self.learn(content);
            return Ok(Met::default());
        }
        let own = self.own().number;
        // A change that failed may be there all the same.
        let mut found = Vec::new();
        for first in &self.doubtful {
            if spool.row(own, *first)?.is_some_and(|(found, _)| found == *first) {
                found.push(*first);
            }
        }
        let there: Vec<Credit> =
            found.into_iter().filter_map(|first| self.drop_kept(first)).flat_map(|row| row.credits).collect();
        self.doubtful.clear();
        let mut waiting = content.waiting;
        self.kept.values().flat_map(|row| &row.credits).for_each(|credit| add(&mut waiting, credit));
        let mut lost = Vec::new();
        for (slot, before) in &self.waiting {
            let now = waiting.get(slot).copied().unwrap_or_default();
            let delivered = (before.delivered - now.delivered).max(0);
            let reported = (before.reported - now.reported).max(0);
            if delivered + reported > 0 {
                lost.push(Credit { delivered, reported, bytes: 0, ..*before });
            }
        }
        self.waiting = waiting;
        self.disk_records = content.records;
        self.disk_bytes = content.bytes;
        self.blind = false;
        self.moved.extend(self.runs.iter().map(|run| run.number));
        Ok(Met { there, lost })
    }
}

/// Whether the disk has room for a change.
fn has_room(folder: &Path, bytes: u64) -> Result<()> {
    let found =
        rustix::fs::statvfs(folder).with_context(|| format!("cannot look at {}", folder.display()))?;
    let free = found.f_bavail.saturating_mul(found.f_frsize);
    anyhow::ensure!(
        free >= LEFT_FREE + 2 * bytes,
        "the disk of {} is full: {} KiB are free",
        folder.display(),
        free >> 10
    );
    Ok(())
}

/// Makes rows of records. What cannot be made one is lost, and said.
fn rows(staged: Vec<Entry>, first: u64, lived: u64) -> Vec<(u64, Result<Row, Vec<Credit>>)> {
    let mut made = Vec::new();
    let mut at = first;
    let mut entries = staged.into_iter().peekable();
    while entries.peek().is_some() {
        let mut records = Vec::new();
        let mut credits = std::collections::HashMap::new();
        let mut bytes = 0;
        while records.len() < MOST_RECORDS
            && let Some(entry) = entries
                .next_if(|entry| records.is_empty() || bytes + taken_by(entry.record.len()) <= MOST_BYTES)
        {
            bytes += taken_by(entry.record.len());
            add(&mut credits, &entry.credit);
            records.push(entry.record);
        }
        let count = records.len() as u64;
        let row = batch::pack(at, &records).map(|batch| {
            let compressed = batch.compressed.len() as u64;
            // Each slot's share of what they take on disk.
            let share = |credit: Credit| {
                let bytes = (credit.bytes * compressed).div_ceil(u64::from(batch.size).max(1));
                Credit { bytes: bytes.max(1), ..credit }
            };
            let credits = credits.values().map(|credit| share(*credit)).collect();
            Row { lived, count: batch.count, size: batch.size, credits, compressed: batch.compressed }
        });
        let row = row.map_err(|error| {
            tracing::error!(%error, "records cannot be made a batch");
            credits.into_values().collect()
        });
        made.push((at, row));
        at += count;
    }
    made
}
