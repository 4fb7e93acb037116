//! The collector's side of TCP: connections whose peer has shown a certificate.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use rustls::ServerConfig;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream, UnixStream},
    sync::{Semaphore, mpsc, watch},
};
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;

use crate::{
    files::{Files, FilesError},
    name::Name,
    peer::Peer,
    stream::Stream,
};

/// How long a peer may take to show its certificate.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);
/// Peers that may be about to, at a time; others wait in the kernel's queue.
const MOST_HANDSHAKES: usize = 1024;
/// The same, from one address; more are refused. So that one who says nothing keeps nobody out.
const MOST_FROM_ONE: usize = 64;
/// Connections that nobody has taken yet.
const MOST_WAITING: usize = 64;
/// How often to look whether the certificates or the list of the revoked ones have changed.
const LOOK_AT_FILES: Duration = Duration::from_secs(5);
/// How long to wait when no connection can be accepted, for want of descriptors for example.
const BREATH: Duration = Duration::from_millis(100);

/// A peer that was not let in, and why.
#[derive(Clone, Debug)]
pub struct Refusal {
    pub address: SocketAddr,
    pub why: String,
}

/// Accepts connections until what is returned is dropped. Peers that are refused are told to `refused`.
///
/// # Errors
///
/// When the files cannot be used at the start. Later the last good ones stay in use, and the log says so.
pub fn incoming(
    listener: TcpListener,
    files: Files,
    refused: impl Fn(Refusal) + Send + Sync + 'static,
) -> Result<ReceiverStream<io::Result<Connection>>, FilesError> {
    let mut current = Current::read(files)?;
    let (accepted, connections) = mpsc::channel(MOST_WAITING);
    let refused = Arc::new(refused);
    let slots = Arc::new(Semaphore::new(MOST_HANDSHAKES));
    let from = Arc::new(Mutex::new(HashMap::<IpAddr, usize>::new()));
    let (changes, _) = watch::channel(());
    let mut look = tokio::time::interval(LOOK_AT_FILES);
    tokio::spawn(async move {
        loop {
            // Closed only with this task.
            let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
            let (stream, address) = tokio::select! {
                () = accepted.closed() => return,
                _ = look.tick() => {
                    if current.look() {
                        changes.send_replace(());
                    }
                    continue;
                }
                found = listener.accept() => match found {
                    Ok(found) => found,
                    Err(error) => {
                        tracing::warn!(%error, "a connection cannot be accepted");
                        tokio::time::sleep(BREATH).await;
                        continue;
                    }
                },
            };
            if current.look() {
                changes.send_replace(());
            }
            let config = Arc::clone(&current.config);
            let Some(place) = Place::take(&from, address.ip()) else {
                refused(Refusal {
                    address,
                    why: format!("{MOST_FROM_ONE} others of its address are about to"),
                });
                continue;
            };
            let (accepted, refused) = (accepted.clone(), Arc::clone(&refused));
            let until = changes.subscribe();
            tokio::spawn(async move {
                let secured = secure(stream, address, config, until).await;
                drop((slot, place));
                match secured {
                    Ok(connection) => drop(accepted.send(Ok(connection)).await),
                    Err(why) => refused(Refusal { address, why }),
                }
            });
        }
    });
    Ok(ReceiverStream::new(connections))
}

/// One of the handshakes that an address may have at a time.
struct Place {
    from: Arc<Mutex<HashMap<IpAddr, usize>>>,
    address: IpAddr,
}

impl Place {
    fn take(from: &Arc<Mutex<HashMap<IpAddr, usize>>>, address: IpAddr) -> Option<Self> {
        let mut counts = from.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(address).or_default();
        if *count == MOST_FROM_ONE {
            return None;
        }
        *count += 1;
        Some(Self { from: Arc::clone(from), address })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = self.from.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.address);
            }
        }
    }
}

async fn secure(
    stream: TcpStream,
    address: SocketAddr,
    config: Arc<ServerConfig>,
    mut changes: watch::Receiver<()>,
) -> Result<Connection, String> {
    stream.set_nodelay(true).map_err(|error| error.to_string())?;
    let shaken = tokio::time::timeout(HANDSHAKE_DEADLINE, TlsAcceptor::from(config).accept(stream)).await;
    let stream = shaken
        .map_err(|_| format!("no certificate within {} s", HANDSHAKE_DEADLINE.as_secs()))?
        .map_err(|error| error.to_string())?;
    let certificate =
        stream.get_ref().1.peer_certificates().and_then(<[_]>::first).ok_or("it has no certificate")?;
    let name = Name::of(certificate).map_err(|error| format!("its certificate names nobody: {error}"))?;
    Ok(Connection {
        stream: Stream::Mutual(Box::new(stream.into())),
        peer: Peer::Certified { address: address.ip(), name },
        // Whoever accepts may be gone, and connections outlive that.
        changed: Box::pin(async move {
            if changes.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }),
    })
}

/// The files as they are in use.
struct Current {
    files: Files,
    /// Of what was looked at last, in use or not.
    seen: [u8; 32],
    config: Arc<ServerConfig>,
}

impl Current {
    fn read(files: Files) -> Result<Self, FilesError> {
        let seen = files.fingerprint()?;
        let config = files.server()?;
        Ok(Self { files, seen, config })
    }

    /// Takes over what the files hold now, if it differs and can be used; tells whether it did.
    fn look(&mut self) -> bool {
        // What cannot be read this moment is being replaced.
        let Ok(now) = self.files.fingerprint() else { return false };
        if now == self.seen {
            return false;
        }
        self.seen = now;
        match self.files.server() {
            Ok(config) => {
                tracing::info!("the certificates have changed; all connections are made anew");
                self.config = config;
                true
            }
            Err(error) => {
                tracing::error!(%error, "the certificates have changed and cannot be used; those before stay");
                false
            }
        }
    }
}

/// A connection that was let in. One under TLS ends when the certificates or the list of the revoked ones change, so that its peer
/// has to show again that it may.
pub struct Connection {
    stream: Stream,
    peer: Peer,
    changed: Pin<Box<dyn Future<Output = ()> + Send>>,
}

impl Connection {
    /// At a unix socket, where nothing changes.
    pub(crate) fn local(stream: UnixStream, peer: Peer) -> Self {
        Self { stream: Stream::Local(stream), peer, changed: Box::pin(std::future::pending()) }
    }
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // Never polled again: an error ends the connection.
        if self.changed.as_mut().poll(context).is_ready() {
            self.changed = Box::pin(std::future::pending());
            return Poll::Ready(Err(io::Error::other("the certificates have changed")));
        }
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
