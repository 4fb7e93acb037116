//! Answering analysts, from the log.

use std::{
    collections::{BTreeMap, VecDeque},
    pin::Pin,
    sync::Arc,
};

use bytes::Bytes;
use palisade_proto::v1::{
    CoverageRequest, CoverageResponse, EventsRequest, EventsResponse, Record, query_server::Query,
    record::Event,
};
use prost::Message as _;
use tokio::sync::{mpsc, watch};
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{Request, Response, Status};

use crate::{
    filter,
    store::{Place, Store},
};

pub struct Queries {
    store: Arc<Store>,
    stopped: watch::Receiver<bool>,
}

impl Queries {
    pub fn new(store: Arc<Store>, stopped: watch::Receiver<bool>) -> Self {
        Self { store, stopped }
    }
}

type Found = mpsc::Sender<Result<EventsResponse, Status>>;

#[tonic::async_trait]
impl Query for Queries {
    type EventsStream = Pin<Box<dyn Stream<Item = Result<EventsResponse, Status>> + Send>>;

    async fn events(&self, request: Request<EventsRequest>) -> Result<Response<Self::EventsStream>, Status> {
        let request = request.into_inner();
        let (found, receiver) = mpsc::channel(16);
        let store = Arc::clone(&self.store);
        let mut stopped = self.stopped.clone();
        tokio::spawn(async move {
            let result = tokio::select! {
                result = search(store, request, &found) => result,
                _ = stopped.wait_for(|stop| *stop) => Ok(()),
            };
            if let Err(status) = result {
                let _asker_gone = found.send(Err(status)).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn coverage(
        &self,
        request: Request<CoverageRequest>,
    ) -> Result<Response<CoverageResponse>, Status> {
        let ended = request.into_inner().ended;
        let store = Arc::clone(&self.store);
        let latest = tokio::task::spawn_blocking(move || {
            let mut latest: BTreeMap<(String, String, u64), Record> = BTreeMap::new();
            let mut place = Place::default();
            while let Some(entry) = store.read(&mut place).map_err(failed)? {
                for record in entry.records {
                    let Ok(record) = Record::decode(record) else { continue };
                    if matches!(record.event, Some(Event::Coverage(_))) {
                        latest.insert((record.node.clone(), record.boot.clone(), record.slot), record);
                    }
                }
            }
            Ok::<_, Status>(latest)
        })
        .await
        .map_err(|error| Status::internal(error.to_string()))??;
        let has_ended = |record: &Record| matches!(&record.event, Some(Event::Coverage(coverage)) if coverage.change == "ended");
        let containers = latest.into_values().filter(|record| ended || !has_ended(record)).collect();
        Ok(Response::new(CoverageResponse { containers }))
    }
}

fn failed(error: anyhow::Error) -> Status {
    tracing::error!(error = format!("{error:#}"), "a query fails");
    Status::data_loss(format!("{error:#}"))
}

/// Most records in one answer.
const PAGE: usize = 256;

async fn search(store: Arc<Store>, mut request: EventsRequest, found: &Found) -> Result<(), Status> {
    let mut ends = store.watch();
    let mut place = Place::default();
    let mut page: Vec<Bytes> = Vec::new();
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
                page.push(bytes);
                if page.len() >= PAGE && !send(found, &mut page).await {
                    return Ok(());
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
        let records = page.drain(..page.len().min(PAGE)).collect();
        if found.send(Ok(EventsResponse { records })).await.is_err() {
            return false;
        }
    }
    true
}
