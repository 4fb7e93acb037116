//! Answering analysts, from the log.

use std::{
    collections::{BTreeMap, VecDeque},
    pin::Pin,
    sync::Arc,
};

use bytes::Bytes;
use palisade_audit::{View, filter};
use palisade_proto::v1::{
    CoverageRequest, CoverageResponse, EventsRequest, EventsResponse, Record, query_server::Query,
};
use prost::Message as _;
use tokio::sync::{mpsc, watch};
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{Request, Response, Status};

use crate::{
    admission::Admission,
    store::{Place, Store},
};

pub struct Queries {
    store: Arc<Store>,
    admission: Admission,
    stopped: watch::Receiver<bool>,
}

impl Queries {
    pub fn new(store: Arc<Store>, admission: Admission, stopped: watch::Receiver<bool>) -> Self {
        Self { store, admission, stopped }
    }
}

type Found = mpsc::Sender<Result<EventsResponse, Status>>;

#[tonic::async_trait]
impl Query for Queries {
    type CoverageStream = Pin<Box<dyn Stream<Item = Result<CoverageResponse, Status>> + Send>>;
    type EventsStream = Pin<Box<dyn Stream<Item = Result<EventsResponse, Status>> + Send>>;

    async fn events(&self, request: Request<EventsRequest>) -> Result<Response<Self::EventsStream>, Status> {
        self.admission.asker(&request)?;
        let request = request.into_inner();
        let (found, receiver) = mpsc::channel(16);
        let store = Arc::clone(&self.store);
        let mut stopped = self.stopped.clone();
        tokio::spawn(async move {
            let result = tokio::select! {
                result = search(store, request, &found) => result,
                // An answer that is cut off must not look complete.
                _ = stopped.wait_for(|stop| *stop) => Err(Status::unavailable("the collector is stopping")),
            };
            if let Err(status) = result {
                // Bounded, since whoever asked may not be reading any more.
                let _asker_gone = tokio::time::timeout(LAST_WORD, found.send(Err(status))).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn coverage(
        &self,
        request: Request<CoverageRequest>,
    ) -> Result<Response<Self::CoverageStream>, Status> {
        self.admission.asker(&request)?;
        let ended = request.into_inner().ended;
        let store = Arc::clone(&self.store);
        let latest = tokio::task::spawn_blocking(move || {
            let mut latest: BTreeMap<(String, u64), Record> = BTreeMap::new();
            let mut runs: BTreeMap<String, Vec<(String, u64)>> = BTreeMap::new();
            let mut place = Place::default();
            while let Some(entry) = store.read(&mut place).map_err(failed)? {
                // A later run of a node's agent says everything anew; what an earlier one said is void. Later in the
                // log, not by the clock, which may go back.
                let run = (entry.boot.clone(), entry.epoch);
                let seen = runs.entry(entry.node.clone()).or_default();
                if !seen.contains(&run) {
                    seen.push(run);
                    latest.retain(|(node, _), record| *node != entry.node || View::new(record).has_ended());
                } else if seen.last() != Some(&run) {
                    continue;
                }
                for record in entry.records {
                    let Ok(record) = Record::decode(record) else { continue };
                    if View::new(&record).coverage().is_some() {
                        latest.insert((record.node.clone(), record.slot), record);
                    }
                }
            }
            Ok::<_, Status>(latest)
        })
        .await
        .map_err(|error| Status::internal(error.to_string()))??;
        let containers: Vec<Record> =
            latest.into_values().filter(|record| ended || !View::new(record).has_ended()).collect();
        let answers: Vec<Result<CoverageResponse, Status>> =
            containers.chunks(PAGE).map(|page| Ok(CoverageResponse { containers: page.to_vec() })).collect();
        Ok(Response::new(Box::pin(tokio_stream::iter(answers))))
    }
}

fn failed(error: anyhow::Error) -> Status {
    tracing::error!(error = format!("{error:#}"), "a query fails");
    Status::data_loss(format!("{error:#}"))
}

/// How long the reason for the end of an answer may wait for its reader.
const LAST_WORD: std::time::Duration = std::time::Duration::from_secs(3);

/// Most records in one answer, and most bytes of them: a record can be large, and a client's limit is 4 MiB.
const PAGE: usize = 256;
const PAGE_BYTES: usize = 1 << 20;

async fn search(store: Arc<Store>, mut request: EventsRequest, found: &Found) -> Result<(), Status> {
    let mut ends = store.watch();
    let mut place = Place::default();
    let mut page: Vec<Bytes> = Vec::new();
    let mut page_bytes = 0;
    let mut last: VecDeque<Bytes> = VecDeque::new();
    loop {
        ends.mark_unchanged();
        loop {
            let reader = Arc::clone(&store);
            let (entry, next) = tokio::task::spawn_blocking(move || {
                let entry = reader.read(&mut place);
                entry.map(|entry| (entry, place))
            })
            .await
            .map_err(|error| Status::internal(error.to_string()))?
            .map_err(failed)?;
            place = next;
            let Some(entry) = entry else { break };
            for bytes in entry.records {
                let Ok(record) = Record::decode(bytes.clone()) else { continue };
                if !filter::matches(&request, &record) {
                    continue;
                }
                if request.last > 0 {
                    last.push_back(bytes);
                    if last.len() as u64 > request.last {
                        last.pop_front();
                    }
                    continue;
                }
                page_bytes += bytes.len();
                page.push(bytes);
                if page.len() >= PAGE || page_bytes >= PAGE_BYTES {
                    page_bytes = 0;
                    if !send(found, &mut page).await {
                        return Ok(());
                    }
                }
            }
        }
        page.extend(last.drain(..));
        // What arrives from now on is newer than all of these.
        request.last = 0;
        if !send(found, &mut page).await || !request.follow {
            return Ok(());
        }
        tokio::select! {
            changed = ends.changed() => if changed.is_err() { return Ok(()) },
            () = found.closed() => return Ok(()),
        }
    }
}

/// Sends what is on the page; false when nobody listens any more.
async fn send(found: &Found, page: &mut Vec<Bytes>) -> bool {
    while !page.is_empty() {
        let mut bytes = 0;
        let fits = page
            .iter()
            .take_while(|record| {
                let fits = bytes == 0 || bytes + record.len() <= PAGE_BYTES;
                bytes += record.len();
                fits
            })
            .take(PAGE)
            .count();
        let records = page.drain(..fits).collect();
        if found.send(Ok(EventsResponse { records })).await.is_err() {
            return false;
        }
    }
    true
}
