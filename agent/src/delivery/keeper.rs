//! Writes what is let in to the spool before it is sent, and takes out what is acknowledged: a thread of its own, since a disk may
//! take its time. What comes while it waits for the disk goes into the next change, so a slow disk gets larger ones.

use std::{
    path::Path,
    sync::PoisonError,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
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
            let staged = !state.staged.is_empty()
                && (state.flush || state.closing || state.memory >= MOST_BYTES as u64);
            let moved = state.moved_since.filter(|_| self.limits.folder.is_some()).map(|since| since + LAG);
            // Nothing but what is let in is worth asking a disk that takes nothing.
            let due = match state.retry {
                Some(retry) => Some(retry),
                None if state.shed.is_some() => Some(now),
                None => moved,
            };
            let last = state.closing && moved.is_some();
            if staged || last || due.is_some_and(|due| due <= now) {
                return true;
            }
            if state.closing {
                return false;
            }
            let wait = due.map_or(RETRY, |due| due.saturating_duration_since(now));
            state = self.work.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    pub(super) fn work(&self) {
        let shed = self.state().shed;
        let old = shed.map_or_else(|| Ok(Vec::new()), |run| self.old_rows(run));
        let mut state = self.state();
        let shed_now = match old {
            Ok(old) => state.replace(shed.unwrap_or_default(), old),
            Err(error) => {
                state.fails(&error);
                Vec::new()
            }
        };
        let Work { staged, first, memory, mut change } = state.take_work();
        let (asked, closing) = (state.retry.is_none_or(|retry| retry <= Instant::now()), state.closing);
        drop(state);
        change.shed.extend(shed_now);
        let mut lost = Vec::new();
        let mut made = Vec::new();
        for (first, row) in rows(staged, first, change.lived) {
            match row {
                Ok(row) => made.push((first, row)),
                Err(credits) => lost.extend(credits),
            }
        }
        let written = match &self.limits.folder {
            Some(folder) if asked || closing => Some(self.write(folder, &mut change, &mut made)),
            _ => None,
        };
        let first_lived = self.first_lived();
        let mut state = self.state();
        state.first_lived = first_lived;
        if change.shed.is_empty() || !matches!(written, Some(Ok(_))) {
            // Nothing is left to drop, or it must wait.
            state.shed = state.shed.filter(|run| shed != Some(*run));
        }
        for (slot, bytes) in memory {
            state.release(slot, bytes);
        }
        made.iter().for_each(|(_, row)| state.book(row));
        for credit in lost {
            self.tell(News::Spooled(credit));
            self.tell(News::Lost(credit));
        }
        match written {
            Some(Ok(gone)) => self.has_written(&mut state, &change, gone),
            other => {
                if let Some(Err(error)) = other {
                    state.fails(&error);
                    state.retry = Some(Instant::now() + RETRY);
                }
                if self.limits.folder.is_some() {
                    state.not_written(&change);
                }
                if state.closing {
                    // Once more was asked; nobody waits for a disk that takes nothing.
                    state.moved_since = None;
                }
                if !change.shed.is_empty()
                    && let Some((first, _)) = made.first()
                {
                    // What is in the place of rows that are still on the disk does not go before they do.
                    state.withheld.get_or_insert(*first);
                }
                for (first, row) in made {
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

    /// Since when the first row that waits is there, as the spool counts time.
    fn first_lived(&self) -> Option<u64> {
        let sequence = self.sequence();
        let first = self.row(sequence.run.number, sequence.run.first);
        first.ok().flatten().map(|(_, row)| row.lived)
    }

    /// What a change that is on the disk means.
    fn has_written(&self, state: &mut State, change: &Change, gone: Vec<Gone>) {
        if !state.problem.is_empty() {
            tracing::info!("the spool takes records again");
            state.problem.clear();
        }
        state.retry = None;
        state.withheld = None;
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
            state.disk_end = state.disk_end.max(first + u64::from(row.count));
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
    fn write(&self, folder: &Path, change: &mut Change, rows: &mut [(u64, Row)]) -> Result<Vec<Gone>> {
        self.reopen(folder)?;
        let bytes: u64 = rows.iter().map(|(_, row)| row.length() as u64).sum();
        // Not while the state is held: a disk may hang, and the agent must not wait for it.
        let kept_bytes = self.state().kept_bytes;
        has_room(folder, bytes + kept_bytes)?;
        {
            let mut state = self.state();
            change.lived = state.lived();
            rows.iter_mut().for_each(|(_, row)| row.lived = change.lived);
            let own = state.own().clone();
            let kept = state.kept.iter().map(|(first, row)| (*first, row.clone()));
            change.rows.extend(kept.chain(rows.iter().cloned()).map(|(first, row)| (own.number, first, row)));
            // At once with looking at them: what is acknowledged from here on is booked when it is known where it is.
            state.doubtful.extend(change.rows.iter().map(|(_, first, _)| *first));
            // No row without the name of its run.
            if !change.runs.iter().any(|run| run.number == own.number) {
                change.runs.push(own);
            }
        }
        let written = {
            let spool = self.spool.read().unwrap_or_else(PoisonError::into_inner);
            let spool = spool.as_ref().context("the spool is not open")?;
            #[cfg(test)]
            let written = self.with_faults(|| spool.change(change));
            #[cfg(not(test))]
            let written = spool.change(change);
            written
        };
        written.inspect_err(|_| {
            // After an error of the disk it is open no more. Said first, so that nobody takes it for empty.
            self.state().absent = true;
            let closed = self.spool.write().unwrap_or_else(PoisonError::into_inner).take();
            drop(closed);
        })
    }

    #[cfg(test)]
    fn with_faults(&self, change: impl FnOnce() -> Result<Vec<Gone>>) -> Result<Vec<Gone>> {
        use super::queue::Fault;
        let fault = self.faults.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        if fault != Some(Fault::NotTaken) {
            let gone = change()?;
            if fault.is_none() {
                return Ok(gone);
            }
        }
        anyhow::bail!("the disk fails: {fault:?}")
    }

    /// Opens the spool unless it is open, and finds out what of it is still there.
    pub(super) fn reopen(&self, folder: &Path) -> Result<()> {
        if self.spool.read().unwrap_or_else(PoisonError::into_inner).is_some() {
            return Ok(());
        }
        let node = self.state().own().node.clone();
        let (opened, content) = Spool::open(folder, &node)?;
        // Whoever reads meanwhile waits, and finds all of it.
        let mut spool = self.spool.write().unwrap_or_else(PoisonError::into_inner);
        let mut state = self.state();
        let Met { there, lost, delivered } = state.meet(&opened, content)?;
        *spool = Some(opened);
        there.into_iter().for_each(|credit| self.tell(News::Spooled(credit)));
        lost.into_iter().for_each(|credit| self.tell(News::Lost(credit)));
        delivered.into_iter().for_each(|credit| self.tell(News::Delivered(credit)));
        self.release(&mut state);
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
    delivered: Vec<Credit>,
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
        // Before newer ones.
        self.rebased.splice(..0, change.rebased.iter().copied());
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
        let mut there = Vec::new();
        for first in found {
            let Some(row) = self.drop_kept(first) else { continue };
            self.disk_end = self.disk_end.max(first + u64::from(row.count));
            there.extend(row.credits);
        }
        self.doubtful.clear();
        // Another file: what was in the one before is lost, unless it is acknowledged, of which nobody knows how much was of whom.
        let anew = self.disk_records > 0 && content.runs.is_empty();
        let mut waiting = content.waiting;
        self.kept.values().flat_map(|row| &row.credits).for_each(|credit| add(&mut waiting, credit));
        let mut missing = Vec::new();
        for (slot, before) in &self.waiting {
            let now = waiting.get(slot).copied().unwrap_or_default();
            let delivered = (before.delivered - now.delivered).max(0);
            let reported = (before.reported - now.reported).max(0);
            if delivered + reported > 0 {
                missing.push(Credit { delivered, reported, bytes: 0, ..*before });
            }
        }
        if anew {
            self.disk_end = 0;
            let own = self.runs.len() - 1;
            self.runs.drain(..own);
        }
        self.waiting = waiting;
        self.disk_records = content.records;
        self.disk_bytes = content.bytes;
        self.absent = false;
        self.moved.extend(self.runs.iter().map(|run| run.number));
        self.moved_since.get_or_insert_with(Instant::now);
        // In the same file only what is acknowledged has gone, with a change that failed after it was made.
        let (lost, delivered) = if anew { (missing, Vec::new()) } else { (Vec::new(), missing) };
        Ok(Met { there, lost, delivered })
    }
}

/// Whether the disk has room for a change. One that only takes away writes a few pages.
fn has_room(folder: &Path, bytes: u64) -> Result<()> {
    let found =
        rustix::fs::statvfs(folder).with_context(|| format!("cannot look at {}", folder.display()))?;
    let free = found.f_bavail.saturating_mul(found.f_frsize);
    anyhow::ensure!(
        free >= if bytes > 0 { LEFT_FREE + 2 * bytes } else { LEFT_FREE / 8 },
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
