//! The collector: one process that agents stream to and analysts ask.

mod admission;
mod config;
mod ingest;
mod log;
mod query;
mod refusals;
mod retention;
mod store;
mod streams;

use std::{
    net::SocketAddr,
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result};
use clap::Parser;
use palisade_profile::text::{log_field, printable_lines};
use palisade_proto::v1::{delivery_server::DeliveryServer, query_server::QueryServer};
use palisade_transport::{accept, local};
use tokio::{net::TcpListener, sync::watch};
use tracing_subscriber::{EnvFilter, field::MakeExt as _, fmt::format::debug_fn};

use crate::{
    admission::Admission, config::Config, ingest::Ingest, query::Queries, refusals::Refusals, store::Store,
};

/// Takes audit records from agents, keeps them on disk, and answers queries.
///
/// Exit codes: 0 after SIGTERM or SIGINT, 1 when it cannot start or its store fails.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Configuration file; absent means all defaults
    #[arg(long, env = "PALISADE_COLLECTOR_CONFIG")]
    config: Option<PathBuf>,
    /// TCP address to listen on, instead of the configured one; only with certificates under tls
    #[arg(long)]
    listen: Option<SocketAddr>,
    /// Folder of the store, instead of the configured one
    #[arg(long)]
    store: Option<PathBuf>,
}

fn main() -> ExitCode {
    let filter = EnvFilter::try_from_env("PALISADE_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    // Peers choose much of what is in a log.
    let fields = debug_fn(|out, field, value| log_field(out, field.name(), value)).delimited(" ");
    tracing_subscriber::fmt().with_env_filter(filter).fmt_fields(fields).with_writer(std::io::stderr).init();
    match start(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}", printable_lines(&format!("palisade-collector: {error:#}")));
            ExitCode::FAILURE
        }
    }
}

fn start(arguments: Arguments) -> Result<()> {
    let mut config = Config::read(arguments.config.as_deref())?;
    if arguments.listen.is_some() {
        config.listen = arguments.listen;
    }
    if let Some(store) = arguments.store {
        config.store = store;
    }
    let checked = config.validate();
    match &arguments.config {
        Some(path) => checked.with_context(|| path.display().to_string())?,
        None => checked?,
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the asynchronous runtime")?;
    runtime.block_on(serve(config))
}

async fn serve(config: Config) -> Result<()> {
    let store = Arc::new(Store::open(&config.store, config.segment_bytes, config.retention)?);
    let refusals = Refusals::default();
    let sockets = config.sockets();
    let (connections, at) = match (config.tls, config.listen) {
        (Some(files), Some(listen)) => {
            let listener =
                TcpListener::bind(listen).await.with_context(|| format!("cannot listen on {listen}"))?;
            let at = listener.local_addr()?.to_string();
            let told = refusals.clone();
            let connections = accept::incoming(listener, files, move |refusal| {
                told.note(&refusal.address.ip().to_string(), "", &refusal.why);
            });
            (connections.context("tls")?, at)
        }
        _ => {
            let connections = local::listen(&sockets.rights()?).await.context("sockets")?;
            (connections, sockets.folder.display().to_string())
        }
    };
    tracing::info!(at, store = %config.store.display(), records = store.end().records, "collecting");
    tokio::spawn(retain(Arc::clone(&store)));
    let own_name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    tokio::spawn(refusals.clone().keep(Arc::clone(&store), own_name));
    let admission = Admission::new(refusals, &sockets.agents);
    let (stop, stopped) = watch::channel(false);
    let server = tonic::transport::Server::builder()
        // A peer that is gone without a word is noticed.
        .http2_keepalive_interval(Some(KEEP_ALIVE))
        .http2_keepalive_timeout(Some(KEEP_ALIVE))
        .max_concurrent_streams(MOST_CALLS)
        .add_service(
            DeliveryServer::new(Ingest::new(Arc::clone(&store), admission.clone(), stopped.clone()))
                .max_decoding_message_size(config::LARGEST_MESSAGE),
        )
        .add_service(QueryServer::new(Queries::new(Arc::clone(&store), admission, stopped.clone())));
    let serving = server.serve_with_incoming_shutdown(connections, async move {
        let mut stopped = stopped;
        let _sender_gone = stopped.wait_for(|stop| *stop).await;
    });
    let signals = async {
        let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        tokio::select! {
            _ = terminate.recv() => {}
            result = tokio::signal::ctrl_c() => result?,
        }
        tracing::info!("stopping");
        stop.send_replace(true);
        Ok::<(), std::io::Error>(())
    };
    let mut serving = std::pin::pin!(serving);
    tokio::select! {
        served = &mut serving => return served.context("serving failed"),
        signalled = signals => signalled?,
    }
    // Whoever does not read its answer must not keep the collector from stopping.
    match tokio::time::timeout(STOP_DEADLINE, serving).await {
        Ok(served) => served.context("serving failed"),
        Err(_) => {
            tracing::warn!("connections that do not end are dropped");
            Ok(())
        }
    }
}

/// How often it is looked for what is no longer kept.
const LOOK_FOR_EXPIRED: Duration = Duration::from_secs(10);

/// Removes what is no longer kept, for ever.
async fn retain(store: Arc<Store>) {
    let mut look = tokio::time::interval(LOOK_FOR_EXPIRED);
    loop {
        look.tick().await;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64);
        let store = Arc::clone(&store);
        match tokio::task::spawn_blocking(move || store.retain(now)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::error!(error = format!("{error:#}"), "what is no longer to be kept stays");
            }
            Err(error) => tracing::error!(%error, "what is no longer to be kept stays"),
        }
    }
}

/// How often a connection must show that it is alive.
const KEEP_ALIVE: Duration = Duration::from_secs(20);
/// Calls of one connection at a time.
const MOST_CALLS: u32 = 32;
/// How long connections may take to end.
const STOP_DEADLINE: Duration = Duration::from_secs(5);
