//! The file in which records wait: batches, how far each is acknowledged, and how many records of each slot it has ever taken, changed
//! together or not at all.
//!
//! Each run of an agent has positions of its own, so that what a run had only in memory when it was killed is nobody else's.

use std::{
    collections::{BTreeMap, HashMap},
    fs::Permissions,
    os::unix::fs::PermissionsExt as _,
    path::Path,
};

use anyhow::{Context as _, Result, bail};
use redb::{
    Builder, Database, DatabaseError, ReadableDatabase as _, ReadableTable as _, StorageError,
    TableDefinition, TableError, WriteTransaction,
};

use super::row::{Credit, Row};

/// By run and first position.
const ROWS: TableDefinition<'_, (u64, u64), &[u8]> = TableDefinition::new("rows");
/// The names of runs, and where they go on.
const RUNS: TableDefinition<'_, u64, (&str, &str, u64, u64)> = TableDefinition::new("runs");
/// By epoch and slot: numbered records that were ever taken in, and those that gap records count.
const BOOKED: TableDefinition<'_, (u64, u64), (u64, u64)> = TableDefinition::new("booked");
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const VERSION: &str = "version";
const LIVED: &str = "lived";
/// Of these tables, of rows, and of the records in them.
const FORMAT: u64 = 2;
/// Pages that are kept in memory.
const CACHE: usize = 4 << 20;
/// How much larger than what is in it the file may be, as a fraction: whole pages, of which freed ones are used again later.
const OVERHEAD: (u64, u64) = (13, 5);
const FILE: &str = "records.redb";

/// One run of an agent: a sequence of positions from 0, which a collector knows by these names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    pub number: u64,
    pub node: String,
    pub boot: String,
    /// When it began, nanoseconds since the Unix epoch.
    pub started: u64,
    /// Everything before is acknowledged, or given up.
    pub first: u64,
}

/// What was ever taken in of a slot: numbered records, and records that gaps count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Booked {
    pub delivered: u64,
    pub reported: u64,
}

impl Booked {
    pub fn sum(self) -> u64 {
        self.delivered + self.reported
    }

    pub fn add(&mut self, credit: &Credit) {
        self.delivered = self.delivered.saturating_add_signed(credit.delivered);
        self.reported = self.reported.saturating_add_signed(credit.reported);
    }
}

pub type SlotOf = (u64, u64);

/// What an open spool holds.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Content {
    /// The oldest first.
    pub runs: Vec<Run>,
    pub booked: HashMap<SlotOf, Booked>,
    /// Of everything that waits, one for each slot.
    pub waiting: HashMap<SlotOf, Credit>,
    pub records: u64,
    pub bytes: u64,
    /// Milliseconds that it has been in use.
    pub lived: u64,
}

/// What is changed at once.
#[derive(Debug, Default)]
pub struct Change {
    /// With their runs and first positions.
    pub rows: Vec<(u64, u64, Row)>,
    /// Of runs that are new, or have got on: rows that end before their first position go.
    pub runs: Vec<Run>,
    /// Rows that go without having been acknowledged, by their run and first position.
    pub shed: Vec<(u64, u64)>,
    /// Runs that are over, with their rows.
    pub ended: Vec<u64>,
    /// What was taken in of slots before this change, which the spool does not know.
    pub rebased: Vec<(SlotOf, u64)>,
    /// Slots that are settled.
    pub settled: Vec<SlotOf>,
    pub lived: u64,
}

/// A row that is not there any more, without its records.
pub struct Gone {
    pub length: u64,
    pub row: Row,
}

#[derive(Debug)]
pub struct Spool {
    database: Database,
}

/// Most bytes of rows, so that the file does not grow beyond `bytes`.
pub fn payload_of(bytes: u64) -> u64 {
    bytes / OVERHEAD.0 * OVERHEAD.1
}

impl Spool {
    /// Opens the spool in `folder`, for records of `node`. One that is damaged, or of another node, is put aside.
    ///
    /// # Errors
    ///
    /// When the disk does not allow it, or somebody else has it open.
    pub fn open(folder: &Path, node: &str) -> Result<(Self, Content)> {
        std::fs::create_dir_all(folder)
            .and_then(|()| std::fs::set_permissions(folder, Permissions::from_mode(0o700)))
            .with_context(|| format!("cannot make {}", folder.display()))?;
        let path = folder.join(FILE);
        if !path.try_exists()? {
            // Whole or not at all: what is cut off here would be taken for damage later.
            let partial = path.with_extension("partial");
            let _left_by_one_that_was_killed = std::fs::remove_file(&partial);
            drop(Self::at(&partial)?);
            std::fs::rename(&partial, &path)?;
        }
        let why = match Self::at(&path) {
            Ok((spool, content)) => match content.runs.iter().find(|run| run.node != node) {
                None => return Ok((spool, content)),
                Some(run) => format!("it is of node {:?}, and this is {node:?}", run.node),
            },
            Err(error) if is_damage(&error) => format!("{error:#}"),
            Err(error) => return Err(error.context(format!("cannot open {}", path.display()))),
        };
        let aside = path.with_extension("aside");
        tracing::error!(spool = %path.display(), aside = %aside.display(), "the spool is put aside: {why}. What it had is not delivered");
        std::fs::rename(&path, &aside).with_context(|| format!("cannot move {}", path.display()))?;
        Self::open(folder, node)
    }

    fn at(path: &Path) -> Result<(Self, Content)> {
        // Without that a damaged file may end the agent instead of being told.
        let mut database =
            Builder::new().set_cache_size(CACHE).set_check_integrity_on_open(true).create(path)?;
        std::fs::set_permissions(path, Permissions::from_mode(0o600))?;
        match Self::version(&database)? {
            Some(FORMAT) => {}
            Some(other) => bail!(Damage(format!("it is of version {other}, this build's is {FORMAT}"))),
            None => {
                let transaction = database.begin_write()?;
                transaction.open_table(META)?.insert(VERSION, FORMAT)?;
                transaction.open_table(ROWS)?;
                transaction.open_table(RUNS)?;
                transaction.open_table(BOOKED)?;
                transaction.commit()?;
            }
        }
        if let Err(error) = database.compact() {
            tracing::warn!(spool = %path.display(), %error, "it stays as large as it is");
        }
        let spool = Self { database };
        let content = spool.content()?;
        Ok((spool, content))
    }

    fn version(database: &Database) -> Result<Option<u64>> {
        match database.begin_read()?.open_table(META) {
            Ok(meta) => Ok(meta.get(VERSION)?.map(|version| version.value())),
            Err(TableError::TableDoesNotExist(_)) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn content(&self) -> Result<Content> {
        let transaction = self.database.begin_read()?;
        let mut content = Content::default();
        for found in transaction.open_table(RUNS)?.iter()? {
            let (number, run) = found?;
            let (node, boot, started, first) = run.value();
            content.runs.push(Run {
                number: number.value(),
                node: node.to_owned(),
                boot: boot.to_owned(),
                started,
                first,
            });
        }
        for found in transaction.open_table(BOOKED)?.iter()? {
            let (slot, booked) = found?;
            let (delivered, reported) = booked.value();
            content.booked.insert(slot.value(), Booked { delivered, reported });
        }
        for found in transaction.open_table(ROWS)?.iter()? {
            let (_, bytes) = found?;
            let row = Row::decode(bytes.value()).map_err(|error| Damage(error.to_string()))?;
            content.records += u64::from(row.count);
            content.bytes += row.length() as u64;
            for credit in row.credits {
                add(&mut content.waiting, &credit);
            }
        }
        content.lived = transaction.open_table(META)?.get(LIVED)?.map_or(0, |lived| lived.value());
        Ok(content)
    }

    /// Changes what is there, durably. Returns the rows that went.
    ///
    /// # Errors
    ///
    /// When the disk fails. The change may be there all the same, and the spool must be opened anew.
    pub fn change(&self, change: &Change) -> Result<Vec<Gone>> {
        let transaction = self.database.begin_write()?;
        let gone = apply(&transaction, change)?;
        transaction.commit()?;
        Ok(gone)
    }

    /// The row of `run` that `position` is in, or else the next one, with its first position.
    ///
    /// # Errors
    ///
    /// When it cannot be read.
    pub fn row(&self, run: u64, position: u64) -> Result<Option<(u64, Row)>> {
        let transaction = self.database.begin_read()?;
        let rows = transaction.open_table(ROWS)?;
        if let Some(found) = rows.range((run, 0)..=(run, position))?.next_back() {
            let (key, bytes) = found?;
            let row = Row::decode(bytes.value())?;
            let first = key.value().1;
            if first + u64::from(row.count) > position {
                return Ok(Some((first, row)));
            }
        }
        let Some(found) = rows.range((run, position)..=(run, u64::MAX))?.next() else { return Ok(None) };
        let (key, bytes) = found?;
        Ok(Some((key.value().1, Row::decode(bytes.value())?)))
    }

    /// Up to `most` rows of `run` from position `first` on that were made before the spool had lived for `lived` milliseconds.
    ///
    /// # Errors
    ///
    /// When they cannot be read.
    pub fn older(&self, run: u64, first: u64, lived: u64, most: usize) -> Result<Vec<(u64, Row)>> {
        let transaction = self.database.begin_read()?;
        let rows = transaction.open_table(ROWS)?;
        let mut older = Vec::new();
        for found in rows.range((run, first)..=(run, u64::MAX))?.take(most) {
            let (key, bytes) = found?;
            let row = Row::decode(bytes.value())?;
            if row.lived >= lived {
                break;
            }
            older.push((key.value().1, row));
        }
        Ok(older)
    }
}

fn apply(transaction: &WriteTransaction, change: &Change) -> Result<Vec<Gone>> {
    let Change { rows, runs, shed, ended, rebased, settled, lived } = change;
    let mut gone = Vec::new();
    let mut table = transaction.open_table(ROWS)?;
    let mut names = transaction.open_table(RUNS)?;
    let mut booked = transaction.open_table(BOOKED)?;
    for (slot, sum) in rebased {
        booked.insert(*slot, (*sum, 0))?;
    }
    let mut gains: BTreeMap<SlotOf, Booked> = BTreeMap::new();
    for (run, first, row) in rows {
        table.insert((*run, *first), row.encode().as_slice())?;
        for credit in row.credits.iter().filter(|credit| credit.delivered != 0 || credit.reported != 0) {
            let slot = (credit.epoch, credit.slot);
            let before = match gains.get(&slot) {
                Some(before) => *before,
                None => booked.get(slot)?.map_or(Booked::default(), |found| {
                    let (delivered, reported) = found.value();
                    Booked { delivered, reported }
                }),
            };
            let mut after = before;
            after.add(credit);
            gains.insert(slot, after);
        }
    }
    for (slot, Booked { delivered, reported }) in gains {
        booked.insert(slot, (delivered, reported))?;
    }
    for slot in settled {
        booked.remove(*slot)?;
    }
    let remove = |table: &mut redb::Table<'_, (u64, u64), &'static [u8]>, key| -> Result<Option<Gone>> {
        let Some(bytes) = table.remove(key)? else { return Ok(None) };
        let length = bytes.value().len() as u64;
        let row = Row::decode(bytes.value())?;
        Ok(Some(Gone { length, row: Row { compressed: bytes::Bytes::new(), ..row } }))
    };
    for key in shed {
        gone.extend(remove(&mut table, *key)?);
    }
    for Run { number, node, boot, started, first } in runs {
        names.insert(*number, (node.as_str(), boot.as_str(), *started, *first))?;
        while let Some((key, end)) = first_row(&table, *number)? {
            if end > *first {
                break;
            }
            gone.extend(remove(&mut table, key)?);
        }
    }
    for number in ended {
        names.remove(*number)?;
        while let Some((key, _)) = first_row(&table, *number)? {
            gone.extend(remove(&mut table, key)?);
        }
    }
    transaction.open_table(META)?.insert(LIVED, *lived)?;
    Ok(gone)
}

/// The key of a run's first row, and the position behind it.
fn first_row(
    table: &redb::Table<'_, (u64, u64), &'static [u8]>,
    run: u64,
) -> Result<Option<((u64, u64), u64)>> {
    let Some(found) = table.range((run, 0)..=(run, u64::MAX))?.next() else { return Ok(None) };
    let (key, bytes) = found?;
    let count = Row::decode(bytes.value())?.count;
    Ok(Some((key.value(), key.value().1 + u64::from(count))))
}

/// Adds to what is known of a slot.
pub fn add(waiting: &mut HashMap<SlotOf, Credit>, credit: &Credit) {
    let Credit { epoch, slot, delivered, reported, bytes } = *credit;
    let nothing = Credit { epoch, slot, ..Credit::default() };
    let sum = waiting.entry((epoch, slot)).or_insert(nothing);
    sum.delivered += delivered;
    sum.reported += reported;
    sum.bytes += bytes;
}

/// The file is there and is not what it should be.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Damage(String);

fn is_damage(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause.is::<Damage>()
            || matches!(cause.downcast_ref(), Some(StorageError::Corrupted(_)))
            || matches!(
                cause.downcast_ref(),
                Some(DatabaseError::UpgradeRequired(_) | DatabaseError::Storage(StorageError::Corrupted(_)))
            )
            // What is no such file at all.
            || matches!(
                cause.downcast_ref(),
                Some(DatabaseError::Storage(StorageError::Io(error))) if error.kind() == std::io::ErrorKind::InvalidData
            )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(number: u64, first: u64) -> Run {
        Run { number, node: "n".to_owned(), boot: "b".to_owned(), started: 5, first }
    }

    fn row(slot: u64, count: u32, lived: u64) -> Row {
        let credit = Credit { epoch: 3, slot, delivered: count.into(), reported: 0, bytes: 10 };
        Row { lived, count, size: 9, credits: vec![credit], compressed: vec![7; 50].into() }
    }

    #[test]
    fn rows_runs_and_accounts_change_together_and_are_there_again() {
        let folder = tempfile::tempdir().unwrap();
        let (spool, content) = Spool::open(folder.path(), "n").unwrap();
        assert_eq!(content, Content::default());
        let gone = spool
            .change(&Change {
                rows: vec![
                    (1, 0, row(7, 4, 10)),
                    (1, 4, row(8, 2, 20)),
                    (1, 6, row(7, 3, 30)),
                    (2, 0, row(9, 1, 5)),
                ],
                runs: vec![run(1, 0), run(2, 0)],
                lived: 30,
                ..Change::default()
            })
            .unwrap();
        assert!(gone.is_empty());
        // A part of the second row is acknowledged, which stays.
        let gone = spool.change(&Change { runs: vec![run(1, 5)], lived: 31, ..Change::default() }).unwrap();
        assert_eq!(gone.iter().map(|gone| gone.row.count).collect::<Vec<_>>(), [4]);
        drop(spool);
        assert!(Spool::open(folder.path(), "n").is_ok_and(|(_, content)| content.records == 6));
        let (spool, content) = Spool::open(folder.path(), "n").unwrap();
        assert!(
            Spool::open(folder.path(), "n").unwrap_err().to_string().contains("records.redb"),
            "another agent has it"
        );
        let booked = |delivered| Booked { delivered, reported: 0 };
        assert_eq!(
            content.booked,
            HashMap::from([((3, 7), booked(7)), ((3, 8), booked(2)), ((3, 9), booked(1))])
        );
        assert_eq!((content.runs, content.lived), (vec![run(1, 5), run(2, 0)], 31));
        assert_eq!(content.waiting[&(3, 7)].delivered, 3);
        let found = |run, position| spool.row(run, position).unwrap().map(|(first, row)| (first, row.count));
        assert_eq!(found(1, 0), Some((4, 2)), "the next one");
        assert_eq!(found(1, 5), Some((4, 2)), "the one that it is in");
        assert_eq!(found(1, 6), Some((6, 3)));
        assert_eq!(found(1, 9), None);
        assert_eq!(found(0, 0), None);
        let older = |lived, most| {
            let rows = spool.older(1, 4, lived, most).unwrap();
            rows.into_iter().map(|(first, _)| first).collect::<Vec<_>>()
        };
        assert_eq!((older(20, 9), older(31, 9), older(31, 1)), (vec![], vec![4, 6], vec![4]));
        let instead = Credit { epoch: 3, slot: 8, delivered: -2, reported: 2, bytes: 1 };
        let change = Change {
            rows: vec![(1, 9, Row { count: 1, credits: vec![instead], ..row(0, 1, 40) })],
            shed: vec![(1, 4)],
            ended: vec![2],
            settled: vec![(3, 9)],
            rebased: vec![((3, 7), 100)],
            ..Change::default()
        };
        assert_eq!(spool.change(&change).unwrap().len(), 2);
        let content = spool.content().unwrap();
        let counted = Booked { delivered: 0, reported: 2 };
        assert_eq!(content.booked, HashMap::from([((3, 7), booked(100)), ((3, 8), counted)]));
        assert_eq!((content.runs, content.records), (vec![run(1, 5)], 4));
    }

    #[test]
    fn what_is_damaged_or_of_another_node_is_put_aside() {
        let folder = tempfile::tempdir().unwrap();
        let rows = || vec![(1, 0, row(7, 4, 10))];
        let (spool, _) = Spool::open(folder.path(), "n").unwrap();
        spool.change(&Change { rows: rows(), runs: vec![run(1, 0)], ..Change::default() }).unwrap();
        drop(spool);
        let (spool, content) = Spool::open(folder.path(), "other").unwrap();
        assert_eq!(content, Content::default());
        assert!(folder.path().join("records.aside").exists());
        // Of another version, as after an upgrade.
        spool.change(&Change { rows: rows(), ..Change::default() }).unwrap();
        let transaction = spool.database.begin_write().unwrap();
        transaction.open_table(META).unwrap().insert(VERSION, FORMAT - 1).unwrap();
        transaction.commit().unwrap();
        drop(spool);
        let (spool, content) = Spool::open(folder.path(), "other").unwrap();
        assert_eq!(content, Content::default());
        drop(spool);
        let path = folder.path().join(FILE);
        for bytes in [b"no spool at all".to_vec(), vec![0; 1 << 16]] {
            std::fs::write(&path, bytes).unwrap();
            let (spool, content) = Spool::open(folder.path(), "n").unwrap();
            assert_eq!(content, Content::default());
            spool.change(&Change { rows: rows(), runs: vec![run(1, 0)], ..Change::default() }).unwrap();
        }
        let whole = std::fs::read(&path).unwrap();
        let at = whole.windows(50).position(|window| window == [7; 50]).unwrap();
        let mut damaged = whole;
        damaged[at] = 8;
        std::fs::write(&path, damaged).unwrap();
        let (_, content) = Spool::open(folder.path(), "n").unwrap();
        assert_eq!(content, Content::default(), "a byte of a row was changed");
    }
}
