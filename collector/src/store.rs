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

use crate::log::{self, Entry, Read};

/// A place in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Place {
    pub segment: u64,
    pub offset: u64,
    /// Records before it.
    pub records: u64,
}

/// One run of one agent.
pub type StreamName = (String, String, u64);

struct Writer {
    file: File,
    end: Place,
    /// Next position expected of each stream.
    streams: HashMap<StreamName, u64>,
    /// Set when the file may hold a part of an entry.
    dirty: bool,
}

/// The log.
pub struct Store {
    folder: PathBuf,
    segment_bytes: u64,
    writer: Mutex<Writer>,
    committed: watch::Sender<Place>,
    _lock: File,
}

/// What became of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Appended {
    /// Next position expected.
    pub next_position: u64,
    /// Records that were missing before the batch: the agent had them acknowledged by a store that is gone.
    pub hole: u64,
}

impl Store {
    /// Opens the log in `folder`, makes it if there is none, and cuts off what a crash left unfinished.
    ///
    /// # Errors
    ///
    /// When the folder cannot be written, another process has it open, or a segment was changed.
    pub fn open(folder: &Path, segment_bytes: u64) -> Result<Self> {
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
        let mut end = Place::default();
        let mut streams = HashMap::new();
        for (index, segment) in segments.iter().enumerate() {
            let last = index + 1 == segments.len();
            end = scan(folder, *segment, end.records, last, |entry| {
                let next = entry.first_position + entry.records.len() as u64;
                let known = streams.entry((entry.node, entry.boot, entry.epoch)).or_insert(0);
                *known = next.max(*known);
            })?;
        }
        let mut file = open_for_append(folder, end.segment)?;
        file.seek(SeekFrom::Start(end.offset))?;
        let (committed, _) = watch::channel(end);
        Ok(Self {
            folder: folder.to_owned(),
            segment_bytes,
            writer: Mutex::new(Writer { file, end, streams, dirty: false }),
            committed,
            _lock: lock,
        })
    }

    fn writer(&self) -> MutexGuard<'_, Writer> {
        // A panic while appending leaves `dirty` set, which the next append handles.
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
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
        self.writer().streams.get(stream).copied().unwrap_or(0)
    }

    /// Appends a batch durably. Records that the log already has are left out.
    ///
    /// # Errors
    ///
    /// When the disk is full or fails; nothing of the batch counts then, and a later call may succeed.
    pub fn append(&self, mut entry: Entry) -> Result<Appended> {
        let mut writer = self.writer();
        let stream = (entry.node.clone(), entry.boot.clone(), entry.epoch);
        let expected = writer.streams.get(&stream).copied().unwrap_or(0);
        let already = expected.saturating_sub(entry.first_position).min(entry.records.len() as u64);
        entry.records.drain(..already as usize);
        entry.first_position += already;
        if entry.records.is_empty() {
            return Ok(Appended { next_position: expected, hole: 0 });
        }
        let hole = entry.first_position.saturating_sub(expected);
        let next_position = entry.first_position + entry.records.len() as u64;
        let bytes = entry.encode();
        if bytes.len() - log::ENTRY_HEAD > log::LARGEST_PAYLOAD {
            bail!("a batch of {} records is larger than an entry of the log may be", entry.records.len());
        }
        self.write(&mut writer, &bytes)?;
        writer.end.offset += bytes.len() as u64;
        writer.end.records += entry.records.len() as u64;
        writer.streams.insert(stream, next_position);
        let end = writer.end;
        drop(writer);
        self.committed.send_replace(end);
        Ok(Appended { next_position, hole })
    }

    fn write(&self, writer: &mut Writer, bytes: &Bytes) -> Result<()> {
        let place = || format!("the log in {}", self.folder.display());
        if writer.dirty {
            writer.file.set_len(writer.end.offset).with_context(|| format!("cannot cut back {}", place()))?;
            writer.file.seek(SeekFrom::Start(writer.end.offset))?;
            writer.dirty = false;
        }
        if writer.end.offset >= self.segment_bytes {
            let next = writer.end.segment + 1;
            create_segment(&self.folder, next).with_context(|| format!("cannot lengthen {}", place()))?;
            writer.file = open_for_append(&self.folder, next)?;
            writer.file.seek(SeekFrom::End(0))?;
            writer.end = Place { segment: next, offset: log::MAGIC.len() as u64, ..writer.end };
        }
        writer.dirty = true;
        writer.file.write_all(bytes).with_context(|| format!("cannot write {}", place()))?;
        writer.file.sync_data().with_context(|| format!("cannot sync {}", place()))?;
        writer.dirty = false;
        Ok(())
    }

    /// Reads the entry at `place`, at most up to the durable end, and moves `place` behind it.
    ///
    /// # Errors
    ///
    /// When the segment cannot be read or was changed.
    pub fn read(&self, place: &mut Place) -> Result<Option<Entry>> {
        let end = self.end();
        loop {
            place.offset = place.offset.max(log::MAGIC.len() as u64);
            if (place.segment, place.offset) >= (end.segment, end.offset) {
                return Ok(None);
            }
            let path = segment_path(&self.folder, place.segment);
            let file = match File::open(&path) {
                Ok(file) => file,
                // Moved away by an operator, as the message about a damaged segment offers.
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
    let mut file = File::create(&path).with_context(|| format!("cannot make {}", path.display()))?;
    file.write_all(log::MAGIC)
        .and_then(|()| file.sync_all())
        .with_context(|| format!("cannot write {}", path.display()))?;
    File::open(folder).and_then(|folder| folder.sync_all()).context("cannot sync the store's folder")
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
    if !bytes.starts_with(log::MAGIC) {
        if last && log::MAGIC.starts_with(&bytes) {
            create_segment(folder, number)?;
            return Ok(place);
        }
        bail!("{}: {}", path.display(), log::FormatError::Magic);
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
        let store = Store::open(folder.path(), 1 << 16).unwrap();
        assert_eq!(store.append(batch(0, &["a", "b"])).unwrap().next_position, 2);
        assert_eq!(store.append(batch(1, &["b", "c"])).unwrap().next_position, 3);
        drop(store);
        let store = Store::open(folder.path(), 1 << 16).unwrap();
        assert_eq!(store.append(batch(0, &["a", "b", "c"])).unwrap().next_position, 3);
        assert_eq!(all(&store), ["a", "b", "c"]);
        assert_eq!(store.end().records, 3);
    }

    #[test]
    fn a_torn_end_is_cut_off_and_a_changed_byte_is_refused_with_its_place() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path(), 1 << 16).unwrap();
        store.append(batch(0, &["a"])).unwrap();
        let whole = store.end().offset;
        store.append(batch(1, &["b"])).unwrap();
        drop(store);
        let path = segment_path(folder.path(), 0);
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(whole + 5).unwrap();
        let store = Store::open(folder.path(), 1 << 16).unwrap();
        assert_eq!(all(&store), ["a"]);
        drop(store);
        // In the last entry this is what a power cut leaves; before it, somebody's doing.
        let store = Store::open(folder.path(), 1 << 16).unwrap();
        store.append(batch(1, &["b"])).unwrap();
        drop(store);
        file.write_all_at(b"X", whole - 1).unwrap();
        let error = Store::open(folder.path(), 1 << 16).err().unwrap().to_string();
        assert!(error.contains("segment-000000000000.log at byte 8"), "{error}");
    }

    #[test]
    fn a_damaged_last_entry_is_set_aside() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path(), 1 << 16).unwrap();
        store.append(batch(0, &["a"])).unwrap();
        let whole = store.end().offset;
        drop(store);
        let file = OpenOptions::new().write(true).open(segment_path(folder.path(), 0)).unwrap();
        file.set_len(whole + 4096).unwrap();
        let store = Store::open(folder.path(), 1 << 16).unwrap();
        assert_eq!(all(&store), ["a"]);
        assert_eq!(store.append(batch(1, &["b"])).unwrap().next_position, 2);
        assert!(folder.path().join("segment-000000000000.torn").exists());
    }

    #[test]
    fn an_empty_store_answers_with_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path(), 1 << 16).unwrap();
        assert!(all(&store).is_empty());
    }

    #[test]
    fn segments_follow_each_other() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path(), 100).unwrap();
        for position in 0..20 {
            store.append(batch(position, &["0123456789"])).unwrap();
        }
        assert!(segments(folder.path()).unwrap().len() > 3);
        assert_eq!(all(&store).len(), 20);
        drop(store);
        assert_eq!(all(&Store::open(folder.path(), 100).unwrap()).len(), 20);
    }

    #[test]
    fn a_second_collector_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let _first = Store::open(folder.path(), 1 << 16).unwrap();
        let error = Store::open(folder.path(), 1 << 16).err().unwrap().to_string();
        assert!(error.contains("another collector"), "{error}");
    }
}
