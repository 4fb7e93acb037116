//! Peers that were not let in, as records of the collector's own in its log.
//!
//! Whoever is refused decides how often: equal refusals within a moment are one record with a count.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use palisade_proto::v1::{self, Record, record::Event};
use prost::Message as _;
use tokio::sync::Notify;

use crate::{log::Entry, store::Store};

/// The boot in the name of the collector's own stream: an agent on the same machine has another.
pub const OWN_BOOT: &str = "collector";
/// How long equal refusals are gathered.
const MOMENT: Duration = Duration::from_secs(1);
/// Different refusals of one moment; what goes beyond counts as "others".
const MOST_DIFFERENT: usize = 64;
/// Longest text of a peer's that is kept, in bytes.
const LONGEST: usize = 256;

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    /// Empty for those that are counted together.
    address: String,
    peer: String,
    why: String,
}

#[derive(Default)]
struct Gathered {
    counts: BTreeMap<Key, u64>,
}

/// Takes refusals from wherever they happen.
#[derive(Clone, Default)]
pub struct Refusals {
    gathered: Arc<Mutex<Gathered>>,
    some: Arc<Notify>,
}

impl Refusals {
    /// Notes one. `address` is where it came in, `peer` who it is; empty when that is not known.
    pub fn note(&self, address: &str, peer: &str, why: &str) {
        let key = Key { address: cut(address), peer: cut(peer), why: cut(why) };
        let mut gathered = self.gathered.lock().unwrap_or_else(PoisonError::into_inner);
        let full = gathered.counts.len() >= MOST_DIFFERENT && !gathered.counts.contains_key(&key);
        let others = Key { address: String::new(), peer: String::new(), why: "others".to_owned() };
        *gathered.counts.entry(if full { others } else { key }).or_default() += 1;
        drop(gathered);
        self.some.notify_one();
    }

    /// Writes them to the log, for ever. `node` is what the collector is called in its own records.
    pub async fn keep(self, store: Arc<Store>, node: String) {
        let now = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64);
        let epoch = now();
        let mut position = 0;
        loop {
            self.some.notified().await;
            tokio::time::sleep(MOMENT).await;
            let counts = {
                let mut gathered = self.gathered.lock().unwrap_or_else(PoisonError::into_inner);
                std::mem::take(&mut gathered.counts)
            };
            let records: Vec<Bytes> = counts
                .into_iter()
                .zip(position + 1..)
                .map(|((key, count), sequence)| {
                    let Key { address, peer, why } = key;
                    tracing::warn!(address, peer, why, count, "refused");
                    let refusal = v1::Refusal { address, peer, why, count };
                    let record = Record {
                        node: node.clone(),
                        epoch,
                        sequence,
                        time: now(),
                        event: Some(Event::Refusal(refusal)),
                        ..Record::default()
                    };
                    record.encode_to_vec().into()
                })
                .collect();
            let count = records.len() as u64;
            let entry = Entry {
                node: node.clone(),
                boot: OWN_BOOT.to_owned(),
                epoch,
                first_position: position,
                received: now(),
                records,
            };
            let store = Arc::clone(&store);
            match tokio::task::spawn_blocking(move || store.append(entry)).await {
                Ok(Ok(_)) => position += count,
                Ok(Err(error)) => {
                    tracing::error!(
                        error = format!("{error:#}"),
                        "refusals are not in the log: it takes nothing"
                    );
                }
                Err(error) => tracing::error!(%error, "refusals are not in the log"),
            }
        }
    }
}

fn cut(text: &str) -> String {
    let mut end = text.len().min(LONGEST);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{retention::Retention, store::Place};

    #[tokio::test]
    async fn equal_refusals_are_one_record_with_a_count() {
        let folder = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::open(folder.path(), 1 << 20, Retention::default()).unwrap());
        let refusals = Refusals::default();
        let keeping = tokio::spawn(refusals.clone().keep(Arc::clone(&store), "hub".to_owned()));
        let address = "192.0.2.1";
        for _ in 0..5 {
            refusals.note(address, "", "UnknownIssuer");
        }
        refusals.note(address, "node/a", &"x".repeat(1000));
        for number in 0..200_u8 {
            refusals.note(&format!("192.0.2.{number}"), "", "late");
        }
        let mut watch = store.watch();
        watch.wait_for(|end| end.records > 0).await.unwrap();
        keeping.abort();
        let entry = store.read(&mut Place::default()).unwrap().unwrap();
        let found: Vec<v1::Refusal> = entry
            .records
            .iter()
            .map(|record| match Record::decode(record.as_ref()).unwrap().event {
                Some(Event::Refusal(refusal)) => refusal,
                other => panic!("{other:?}"),
            })
            .collect();
        assert!(found.iter().any(|refusal| refusal.why == "UnknownIssuer" && refusal.count == 5));
        assert!(found.iter().any(|refusal| refusal.peer == "node/a" && refusal.why.len() == LONGEST));
        assert_eq!(found.iter().map(|refusal| refusal.count).sum::<u64>(), 206);
        assert!(found.len() <= MOST_DIFFERENT + 1);
    }
}
