//! The log on disk: numbered segments in one folder, appended to by one process.
//!
//! A batch is acknowledged after `fdatasync`. A write that fails leaves the store closed for writing until the
//! log could be cut back to its last whole entry; what was not acknowledged the agents send again.

use std::{
    collections::HashMap,
    fs::{File, OpenOptions},
    io::{Seek as _, SeekFrom, Write as _},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use tokio::sync::watch;

use crate::{
    log::{self, Entry, Read},
    retention::{Closed, Retention},
};

/// A place in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Place {
    pub segment: u64,
    pub offset: u64,
    /// Records before it.
    pub records: u64,
}

/// The file with what is known of streams, in the format of a segment whose entries have no records. Beside the log: what it knows
/// may no longer be in there.
const POSITIONS: &str = "positions.log";

/// One run of one agent.
pub type StreamName = (String, String, u64);

/// What is known of a stream.
#[derive(Clone, Copy, Default)]
struct Known {
    /// The next position expected.
    next: u64,
    /// When its last batch came, nanoseconds since the Unix epoch.
    received: u64,
}

struct Writer {
    file: File,
    end: Place,
    /// The segments before the one that is appended to.
    closed: Vec<Closed>,
    /// When the earliest and the latest entry of the one that is appended to came.
    open: Option<(u64, u64)>,
    /// Set when the file may hold a part of an entry.
    dirty: bool,
}

/// The log.
pub struct Store {
    folder: PathBuf,
    segment_bytes: u64,
    retention: Retention,
    writer: Mutex<Writer>,
    /// Apart from the writer, which waits for the disk.
    streams: Mutex<HashMap<StreamName, Known>>,
    committed: watch::Sender<Place>,
    _lock: File,
}

impl Store {
    /// Opens the log in `folder`, makes it if there is none, and cuts off what a crash left unfinished.
    ///
    /// # Errors
    ///
    /// When the folder cannot be written, another process has it open, or a segment was changed.
    pub fn open(folder: &Path, segment_bytes: u64, retention: Retention) -> Result<Self> {
        std::fs::create_dir_all(folder)
            .with_context(|| format!("cannot make the store's folder {}", folder.display()))?;
        let lock_path = folder.join("lock");
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&lock_path)
            .with_context(|| format!("cannot write in the store's folder {}", folder.display()))?;
        if rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_err() {
            bail!("another collector has the store {} open", folder.display());
        }
        let mut segments = segments(folder)?;
        if segments.is_empty() {
            create_segment(folder, 0)?;
            segments.push(0);
        }
        // One that was begun and never written to may follow the one with the unfinished write.
        let last_used = segments.iter().rposition(|segment| !is_unused(folder, *segment)).unwrap_or(0);
        let mut end = Place::default();
        let mut streams: HashMap<StreamName, Known> = HashMap::new();
        let mut learn = |entry: Entry| {
            let next = entry.first_position + entry.records.len() as u64;
            let known = streams.entry((entry.node, entry.boot, entry.epoch)).or_default();
            known.next = next.max(known.next);
            known.received = entry.received.max(known.received);
        };
        read_positions(folder, &mut learn)?;
        let mut closed = Vec::new();
        let mut open = None;
        for (index, segment) in segments.iter().enumerate() {
            open = None;
            end = scan(folder, *segment, end.records, index >= last_used, |entry| {
                open = Some(widened(open, entry.received));
                learn(entry);
            })?;
            if index + 1 < segments.len() {
                let received = open.map_or(0, |(_, latest)| latest);
                closed.push(Closed { number: *segment, bytes: end.offset, received });
            }
        }
        let mut file = open_for_append(folder, end.segment)?;
        file.seek(SeekFrom::Start(end.offset))?;
        let (committed, _) = watch::channel(end);
        Ok(Self {
            folder: folder.to_owned(),
            segment_bytes,
            retention,
            writer: Mutex::new(Writer { file, end, closed, open, dirty: false }),
            streams: Mutex::new(streams),
            committed,
            _lock: lock,
        })
    }

    fn writer(&self) -> MutexGuard<'_, Writer> {
        // A panic while appending leaves `dirty` set, which the next append handles.
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn streams(&self) -> MutexGuard<'_, HashMap<StreamName, Known>> {
        // Every change is complete before anything can panic.
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the durable log ends.
    pub fn end(&self) -> Place {
        *self.committed.borrow()
    }

    /// Says when the end moves.
    pub fn watch(&self) -> watch::Receiver<Place> {
        self.committed.subscribe()
    }

    /// The next position expected of a stream.
    pub fn next_position(&self, stream: &StreamName) -> u64 {
        self.streams().get(stream).map_or(0, |known| known.next)
    }

    /// Appends a batch durably. Records that the log already has are left out.
    ///
    /// # Errors
    ///
    /// When the disk is full or fails; nothing of the batch counts then, and a later call may succeed.
    pub fn append(&self, mut entry: Entry) -> Result<()> {
        let mut writer = self.writer();
        let stream = (entry.node.clone(), entry.boot.clone(), entry.epoch);
        let expected = self.streams().get(&stream).map_or(0, |known| known.next);
        let already = expected.saturating_sub(entry.first_position).min(entry.records.len() as u64);
        entry.records.drain(..already as usize);
        entry.first_position += already;
        if entry.records.is_empty() {
            return Ok(());
        }
        let next_position = entry.first_position + entry.records.len() as u64;
        let bytes = entry.encode();
        if bytes.len() - log::ENTRY_HEAD > log::LARGEST_PAYLOAD {
            bail!("a batch of {} records is larger than an entry of the log may be", entry.records.len());
        }
        self.write(&mut writer, &bytes, entry.records.len(), entry.received)?;
        self.streams().insert(stream, Known { next: next_position, received: entry.received });
        Ok(())
    }

    /// Removes what is older, or more, than is to be kept; `now` in nanoseconds since the Unix epoch. What was taken of each
    /// stream stays known: the positions are written to a file of their own before the segments go.
    ///
    /// # Errors
    ///
    /// When the positions cannot be written. Nothing is removed then, but for one segment where the disk is full: else there
    /// would never be room again.
    pub fn retain(&self, now: u64) -> Result<()> {
        let mut writer = self.writer();
        let mut difficulty = None;
        if writer.open.is_some_and(|(first, _)| self.retention.closes(first, now)) {
            // Without it the segment is closed later.
            difficulty = self.lengthen(&mut writer).err();
        }
        let expired = self.retention.expired(&writer.closed, writer.end.offset, now);
        let gone: Vec<Closed> = writer.closed.drain(..expired).collect();
        drop(writer);
        if let Some((first, rest)) = gone.split_first() {
            let mut written = self.write_positions(now);
            if let Err(error) = &written
                && is_full(error)
            {
                self.remove(first);
                written = self.write_positions(now);
            }
            match written {
                Ok(()) => gone.iter().for_each(|segment| self.remove(segment)),
                Err(error) => {
                    // Tried again: what is not there any more is skipped.
                    let mut writer = self.writer();
                    let stay = if is_full(&error) { rest } else { &gone };
                    writer.closed.splice(..0, stay.iter().copied());
                    difficulty = Some(error);
                }
            }
        }
        difficulty.map_or(Ok(()), Err)
    }

    fn remove(&self, segment: &Closed) {
        let path = segment_path(&self.folder, segment.number);
        match std::fs::remove_file(&path) {
            Ok(()) => tracing::info!(segment = %path.display(), bytes = segment.bytes, "no longer kept"),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => tracing::error!(segment = %path.display(), %error, "cannot be removed"),
        }
    }

    /// Writes what is known of all streams, and forgets those of which nothing more is to be expected.
    fn write_positions(&self, now: u64) -> Result<()> {
        let mut streams = self.streams();
        let all: Vec<(StreamName, u64)> =
            streams.iter().map(|(name, known)| (name.clone(), known.received)).collect();
        for name in self.retention.forgotten(&all, now) {
            streams.remove(&name);
        }
        let entry = |((node, boot, epoch), known): (&StreamName, &Known)| Entry {
            node: node.clone(),
            boot: boot.clone(),
            epoch: *epoch,
            first_position: known.next,
            received: known.received,
            records: Vec::new(),
        };
        let mut bytes = log::MAGIC.to_vec();
        for stream in streams.iter() {
            bytes.extend(entry(stream).encode());
        }
        drop(streams);
        let path = self.folder.join(POSITIONS);
        replace(&path, &bytes).with_context(|| format!("cannot write {}", path.display()))?;
        sync_folder(&self.folder)
    }

    /// Appends whole entries, with so many records, durably.
    fn write(&self, writer: &mut Writer, bytes: &Bytes, records: usize, received: u64) -> Result<()> {
        let place = || format!("the log in {}", self.folder.display());
        self.cut_back(writer)?;
        if writer.end.offset >= self.segment_bytes {
            self.lengthen(writer)?;
        }
        writer.dirty = true;
        writer.file.write_all(bytes).with_context(|| format!("cannot write {}", place()))?;
        writer.file.sync_data().with_context(|| format!("cannot sync {}", place()))?;
        writer.dirty = false;
        writer.end.offset += bytes.len() as u64;
        writer.end.records += records as u64;
        writer.open = Some(widened(writer.open, received));
        self.committed.send_replace(writer.end);
        Ok(())
    }

    /// Takes away what a write that failed may have left.
    fn cut_back(&self, writer: &mut Writer) -> Result<()> {
        if writer.dirty {
            let place = || format!("cannot cut back the log in {}", self.folder.display());
            writer.file.set_len(writer.end.offset).with_context(place)?;
            writer.file.sync_data().with_context(place)?;
            writer.file.seek(SeekFrom::Start(writer.end.offset))?;
            writer.dirty = false;
        }
        Ok(())
    }

    /// Begins a new segment.
    fn lengthen(&self, writer: &mut Writer) -> Result<()> {
        self.cut_back(writer)?;
        let next = writer.end.segment + 1;
        create_segment(&self.folder, next)
            .with_context(|| format!("cannot lengthen the log in {}", self.folder.display()))?;
        let mut file = open_for_append(&self.folder, next)?;
        file.seek(SeekFrom::End(0))?;
        let received = writer.open.take().map_or(0, |(_, last)| last);
        writer.closed.push(Closed { number: writer.end.segment, bytes: writer.end.offset, received });
        writer.file = file;
        writer.end = Place { segment: next, offset: log::MAGIC.len() as u64, ..writer.end };
        // A reader that waits at the end of the one before goes on from here.
        self.committed.send_replace(writer.end);
        Ok(())
    }

    /// Reads the entry at `place`, at most up to the durable end, and moves `place` behind it.
    ///
    /// # Errors
    ///
    /// When the segment cannot be read or was changed.
    pub fn read(&self, place: &mut Place) -> Result<Option<Entry>> {
        loop {
            // Anew each time: what was the end may be gone by now.
            let end = self.end();
            place.offset = place.offset.max(log::MAGIC.len() as u64);
            if (place.segment, place.offset) >= (end.segment, end.offset) {
                return Ok(None);
            }
            let path = segment_path(&self.folder, place.segment);
            let file = match File::open(&path) {
                Ok(file) => file,
                // No longer kept, or moved away by an operator, as the message about a damaged segment offers.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound && place.segment < end.segment => {
                    *place = Place { segment: place.segment + 1, offset: log::MAGIC.len() as u64, ..*place };
                    continue;
                }
                Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
            };
            let length = file.metadata()?.len();
            let offset = place.offset;
            if place.segment < end.segment && offset >= length {
                *place = Place { segment: place.segment + 1, offset: log::MAGIC.len() as u64, ..*place };
                continue;
            }
            let mut head = [0; log::ENTRY_HEAD];
            file.read_exact_at(&mut head, offset)
                .with_context(|| format!("cannot read {}", path.display()))?;
            let size = u32::from_le_bytes([head[0], head[1], head[2], head[3]]) as usize;
            if size > log::LARGEST_PAYLOAD {
                bail!("{} at byte {offset}: an entry claims {size} bytes", path.display());
            }
            let mut bytes = vec![0; log::ENTRY_HEAD + size];
            file.read_exact_at(&mut bytes, offset)
                .with_context(|| format!("cannot read {}", path.display()))?;
            return match log::read(&bytes.into()) {
                Ok(Read::Entry(entry, size)) => {
                    place.offset = offset + size as u64;
                    place.records += entry.records.len() as u64;
                    Ok(Some(entry))
                }
                Ok(Read::End | Read::Torn) => {
                    bail!("{} at byte {offset}: the log is cut off", path.display())
                }
                Err(error) => bail!("{} at byte {offset}: {error}", path.display()),
            };
        }
    }
}

fn segment_path(folder: &Path, number: u64) -> PathBuf {
    folder.join(format!("segment-{number:012}.log"))
}

fn segments(folder: &Path) -> Result<Vec<u64>> {
    let mut numbers = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))? {
        let name = entry?.file_name();
        let name = name.to_string_lossy();
        if let Some(number) = name.strip_prefix("segment-").and_then(|rest| rest.strip_suffix(".log")) {
            numbers.push(number.parse().with_context(|| format!("{name} is not a segment's name"))?);
        }
    }
    numbers.sort_unstable();
    Ok(numbers)
}

fn create_segment(folder: &Path, number: u64) -> Result<()> {
    let path = segment_path(folder, number);
    replace(&path, log::MAGIC).with_context(|| format!("cannot write {}", path.display()))?;
    sync_folder(folder)
}

/// Puts a file in its place whole, or not at all.
fn replace(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let partial = path.with_extension("partial");
    let written = File::create(&partial)
        .and_then(|mut file| {
            file.write_all(bytes)?;
            file.sync_all()
        })
        .and_then(|()| std::fs::rename(&partial, path));
    if written.is_err() {
        let _never_made = std::fs::remove_file(&partial);
    }
    written
}

fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|folder| folder.sync_all()).context("cannot sync the store's folder")
}

/// Whether nothing was ever appended to a segment.
fn is_unused(folder: &Path, number: u64) -> bool {
    let length = std::fs::metadata(segment_path(folder, number)).map_or(0, |found| found.len());
    length <= log::MAGIC.len() as u64
}

fn widened(open: Option<(u64, u64)>, received: u64) -> (u64, u64) {
    open.map_or((received, received), |(earliest, latest)| (earliest.min(received), latest.max(received)))
}

fn is_full(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<std::io::Error>()
        .is_some_and(|error| error.kind() == std::io::ErrorKind::StorageFull)
}

/// Reads what is known of streams.
fn read_positions(folder: &Path, take: &mut impl FnMut(Entry)) -> Result<()> {
    let path = folder.join(POSITIONS);
    let bytes: Bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes.into(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    let broken = |why: &dyn std::fmt::Display| {
        anyhow::anyhow!(
            "{}: {why}; the file was changed after it was written. Restore it, or move it away: what agents send again may \
             then be stored twice",
            path.display()
        )
    };
    match log::check_start(&bytes) {
        Ok(()) => {}
        Err(error @ log::FormatError::Version(_)) => bail!("{}: {error}", path.display()),
        Err(error) => return Err(broken(&error)),
    }
    let mut rest = bytes.slice(log::MAGIC.len()..);
    loop {
        match log::read(&rest) {
            Ok(Read::Entry(entry, size)) => {
                take(entry);
                rest = rest.slice(size..);
            }
            Ok(Read::End) => return Ok(()),
            Ok(Read::Torn) => return Err(broken(&"it is cut off")),
            Err(error) => return Err(broken(&error)),
        }
    }
}

fn open_for_append(folder: &Path, number: u64) -> Result<File> {
    let path = segment_path(folder, number);
    OpenOptions::new().write(true).open(&path).with_context(|| format!("cannot write {}", path.display()))
}

/// Reads a whole segment; cuts a torn end off when it is the last one.
fn scan(folder: &Path, number: u64, records: u64, last: bool, mut take: impl FnMut(Entry)) -> Result<Place> {
    let path = segment_path(folder, number);
    let bytes: Bytes =
        std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?.into();
    let mut place = Place { segment: number, offset: log::MAGIC.len() as u64, records };
    if let Err(error) = log::check_start(&bytes) {
        if last && log::MAGIC.starts_with(&bytes) {
            create_segment(folder, number)?;
            return Ok(place);
        }
        bail!("{}: {error}", path.display());
    }
    loop {
        match log::read(&bytes.slice(place.offset as usize..)) {
            Ok(Read::Entry(entry, size)) => {
                place.offset += size as u64;
                place.records += entry.records.len() as u64;
                take(entry);
            }
            Ok(Read::End) => return Ok(place),
            Ok(Read::Torn) if last => {
                tracing::warn!(segment = %path.display(), at = place.offset, "an unfinished write is cut off");
                let file = open_for_append(folder, number)?;
                file.set_len(place.offset).and_then(|()| file.sync_all())?;
                return Ok(place);
            }
            Ok(Read::Torn) => bail!("{} at byte {}: the segment is cut off", path.display(), place.offset),
            // A power cut can leave the length of an unfinished write without its bytes.
            Err(error) if last && log::reaches_end(&bytes.slice(place.offset as usize..)) => {
                let aside = path.with_extension("torn");
                std::fs::write(&aside, &bytes[place.offset as usize..])
                    .with_context(|| format!("cannot write {}", aside.display()))?;
                tracing::error!(
                    segment = %path.display(), at = place.offset, %error, kept = %aside.display(),
                    "the last entry is damaged, as after a power cut, and is set aside"
                );
                let file = open_for_append(folder, number)?;
                file.set_len(place.offset).and_then(|()| file.sync_all())?;
                return Ok(place);
            }
            Err(error) => bail!(
                "{} at byte {}: {error}; the log was changed after it was written. Restore the file, or move it away to \
                 go on without its records",
                path.display(),
                place.offset
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Retention = Retention { bytes: 0, days: 0 };

    fn batch(first: u64, records: &[&'static str]) -> Entry {
        Entry {
            node: "n".to_owned(),
            boot: "b".to_owned(),
            epoch: 1,
            first_position: first,
            received: 0,
            records: records.iter().map(|text| Bytes::from_static(text.as_bytes())).collect(),
        }
    }

    fn stream() -> StreamName {
        ("n".to_owned(), "b".to_owned(), 1)
    }

    fn all(store: &Store) -> Vec<Bytes> {
        let mut place = Place::default();
        let mut found = Vec::new();
        while let Some(entry) = store.read(&mut place).unwrap() {
            found.extend(entry.records);
        }
        found
    }

    #[test]
    fn what_is_sent_again_is_stored_once_also_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path(), 1 << 16, ALL).unwrap();
        store.append(batch(0, &["a", "b"])).unwrap();
        assert_eq!(store.next_position(&stream()), 2);
        store.append(batch(1, &["b", "c"])).unwrap();
        assert_eq!(store.next_position(&stream()), 3);
        drop(store);
        let store = Store::open(folder.path(), 1 << 16, ALL).unwrap();
        store.append(batch(0, &["a", "b", "c"])).unwrap();
        assert_eq!(store.next_position(&stream()), 3);
        assert_eq!(all(&store), ["a", "b", "c"]);
        assert_eq!(store.end().records, 3);
    }

    #[test]
    fn a_store_of_another_version_is_refused_and_left_as_it_is() {
        let older = b"PALLOG\x00\x01 and what that version has";
        for name in ["segment-000000000000.log", POSITIONS] {
            let folder = tempfile::tempdir().unwrap();
            std::fs::write(folder.path().join(name), older).unwrap();
            let Err(error) = Store::open(folder.path(), 1 << 16, ALL) else { panic!("{name} was read") };
            let error = format!("{error:#}");
            assert!(error.contains(name) && error.contains("of version 1, and this build reads"), "{error}");
            assert_eq!(std::fs::read(folder.path().join(name)).unwrap(), older);
        }
    }

    #[test]
    fn a_torn_end_is_cut_off_and_a_changed_byte_is_refused_with_its_place() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path(), 1 << 16, ALL).unwrap();
        store.append(batch(0, &["a"])).unwrap();
        let whole = store.end().offset;
        store.append(batch(1, &["b"])).unwrap();
        drop(store);
        let path = segment_path(folder.path(), 0);
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(whole + 5).unwrap();
        let store = Store::open(folder.path(), 1 << 16, ALL).unwrap();
        assert_eq!(all(&store), ["a"]);
        drop(store);
        // In the last entry this is what a power cut leaves; before it, somebody's doing.
        let store = Store::open(folder.path(), 1 << 16, ALL).unwrap();
        store.append(batch(1, &["b"])).unwrap();
        drop(store);
        file.write_all_at(b"X", whole - 1).unwrap();
        let error = Store::open(folder.path(), 1 << 16, ALL).err().unwrap().to_string();
        assert!(error.contains("segment-000000000000.log at byte 8"), "{error}");
    }

    #[test]
    fn a_damaged_last_entry_is_set_aside() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path(), 1 << 16, ALL).unwrap();
        store.append(batch(0, &["a"])).unwrap();
        let whole = store.end().offset;
        drop(store);
        let file = OpenOptions::new().write(true).open(segment_path(folder.path(), 0)).unwrap();
        file.set_len(whole + 4096).unwrap();
        let store = Store::open(folder.path(), 1 << 16, ALL).unwrap();
        assert_eq!(all(&store), ["a"]);
        store.append(batch(1, &["b"])).unwrap();
        assert_eq!(store.next_position(&stream()), 2);
        assert!(folder.path().join("segment-000000000000.torn").exists());
    }

    #[test]
    fn an_empty_store_answers_with_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path(), 1 << 16, ALL).unwrap();
        assert!(all(&store).is_empty());
    }

    #[test]
    fn segments_follow_each_other() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path(), 100, ALL).unwrap();
        for position in 0..20 {
            store.append(batch(position, &["0123456789"])).unwrap();
        }
        assert!(segments(folder.path()).unwrap().len() > 3);
        assert_eq!(all(&store).len(), 20);
        drop(store);
        assert_eq!(all(&Store::open(folder.path(), 100, ALL).unwrap()).len(), 20);
    }

    #[test]
    fn what_is_not_kept_is_still_not_taken_twice() {
        let folder = tempfile::tempdir().unwrap();
        let open = || Store::open(folder.path(), 200, Retention { bytes: 600, days: 0 }).unwrap();
        let store = open();
        let old = |store: &Store| store.next_position(&("old".to_owned(), "b".to_owned(), 1));
        store.append(Entry { node: "old".to_owned(), ..batch(0, &["a", "b"]) }).unwrap();
        for position in 0..40 {
            store.append(batch(position, &["0123456789"])).unwrap();
            store.retain(0).unwrap();
        }
        let kept = all(&store).len();
        assert!((2..20).contains(&kept), "{kept}");
        let bytes: u64 = std::fs::read_dir(folder.path())
            .unwrap()
            .map(|file| file.unwrap().metadata().unwrap().len())
            .sum();
        assert!(bytes < 1000, "{bytes}");
        assert_eq!(old(&store), 2);
        drop(store);
        let store = open();
        assert_eq!(old(&store), 2, "after a restart, too");
        store.append(batch(39, &["0123456789", "new"])).unwrap();
        assert_eq!(store.next_position(&stream()), 41);
        assert_eq!(all(&store).last().unwrap(), "new");
        assert_eq!(all(&store).len(), kept + 1);
    }

    #[test]
    fn what_is_too_old_goes_also_when_nothing_comes() {
        let folder = tempfile::tempdir().unwrap();
        let day = 24 * 3600 * 1_000_000_000;
        let store = Store::open(folder.path(), 1 << 20, Retention { bytes: 0, days: 2 }).unwrap();
        store.append(Entry { received: 10 * day, ..batch(0, &["a"]) }).unwrap();
        store.retain(12 * day).unwrap();
        assert_eq!(all(&store), ["a"]);
        // A reader who stands in what goes away goes on behind it.
        let mut place = Place::default();
        store.read(&mut place).unwrap().unwrap();
        store.append(Entry { received: 13 * day, ..batch(1, &["b"]) }).unwrap();
        store.retain(13 * day).unwrap();
        assert_eq!(all(&store), ["b"]);
        let found = std::iter::from_fn(|| store.read(&mut place).unwrap()).flat_map(|entry| entry.records);
        assert_eq!(found.collect::<Vec<_>>(), ["b"]);
    }

    #[test]
    fn a_restart_does_not_make_fresh_segments_old() {
        let folder = tempfile::tempdir().unwrap();
        let day = 24 * 3600 * 1_000_000_000;
        let open = || Store::open(folder.path(), 1 << 20, Retention { bytes: 0, days: 3 }).unwrap();
        let store = open();
        store.append(Entry { node: "old".to_owned(), received: 100 * day, ..batch(0, &["old"]) }).unwrap();
        for number in 0..8 {
            let now = (101 + number) * day + 2;
            store.append(Entry { received: now, ..batch(number, &["x"]) }).unwrap();
            store.retain(now).unwrap();
        }
        let kept = all(&store);
        assert!(kept.len() >= 3 && !kept.contains(&Bytes::from_static(b"old")), "{kept:?}");
        drop(store);
        let store = open();
        store.retain(108 * day + 3).unwrap();
        assert_eq!(all(&store), kept);
        assert_eq!(store.next_position(&("old".to_owned(), "b".to_owned(), 1)), 1);
    }

    #[test]
    fn an_unfinished_write_before_a_segment_that_was_only_begun_is_cut_off() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path(), 1 << 16, ALL).unwrap();
        store.append(batch(0, &["a"])).unwrap();
        let whole = store.end().offset;
        store.append(batch(1, &["b"])).unwrap();
        drop(store);
        OpenOptions::new()
            .write(true)
            .open(segment_path(folder.path(), 0))
            .unwrap()
            .set_len(whole + 5)
            .unwrap();
        create_segment(folder.path(), 1).unwrap();
        let store = Store::open(folder.path(), 1 << 16, ALL).unwrap();
        store.append(batch(1, &["b"])).unwrap();
        assert_eq!(store.next_position(&stream()), 2);
        assert_eq!(all(&store), ["a", "b"]);
        drop(store);
        assert_eq!(all(&Store::open(folder.path(), 1 << 16, ALL).unwrap()), ["a", "b"]);
    }

    #[test]
    fn positions_that_were_changed_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path(), 1 << 16, ALL).unwrap();
        store.append(batch(0, &["a"])).unwrap();
        store.write_positions(0).unwrap();
        drop(store);
        let path = folder.path().join(POSITIONS);
        let mut bytes = std::fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        let error = Store::open(folder.path(), 1 << 16, ALL).err().unwrap().to_string();
        assert!(error.contains(POSITIONS) && error.contains("move it away"), "{error}");
    }

    #[test]
    fn a_second_collector_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let _first = Store::open(folder.path(), 1 << 16, ALL).unwrap();
        let error = Store::open(folder.path(), 1 << 16, ALL).err().unwrap().to_string();
        assert!(error.contains("another collector"), "{error}");
    }
}
