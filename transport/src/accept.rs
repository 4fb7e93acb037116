//! The collector's side: connections whose peer has shown a certificate.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use rustls::ServerConfig;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc},
};
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;

use crate::{
    files::{Files, FilesError},
    name::Name,
    stream::Stream,
};

/// How long a peer may take to show its certificate.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);
/// Peers that may be about to, at a time; others wait in the kernel's queue.
const MOST_HANDSHAKES: usize = 64;
/// How long to wait when no connection can be accepted, for want of descriptors for example.
const BREATH: Duration = Duration::from_millis(100);

/// Who is at the other end.
#[derive(Clone, Debug)]
pub struct Peer {
    pub address: SocketAddr,
    /// `None` without TLS.
    pub name: Option<Name>,
}

/// A peer that was not let in, and why.
#[derive(Clone, Debug)]
pub struct Refusal {
    pub address: SocketAddr,
    pub why: String,
}

/// What connections are secured with.
#[derive(Clone, Debug)]
pub enum Security {
    /// Nothing: for loopback alone.
    Plain,
    Mutual(Files),
}

/// Accepts connections until what is returned is dropped. Peers that are refused are told to `refused`.
///
/// # Errors
///
/// When the files cannot be used at the start. Later the last good ones stay in use, and the log says so.
pub fn incoming(
    listener: TcpListener,
    security: Security,
    refused: impl Fn(Refusal) + Send + Sync + 'static,
) -> Result<ReceiverStream<io::Result<Connection>>, FilesError> {
    let mut current = match security {
        Security::Plain => None,
        Security::Mutual(files) => Some(Current::read(files)?),
    };
    let (accepted, connections) = mpsc::channel(MOST_HANDSHAKES);
    let refused = Arc::new(refused);
    let slots = Arc::new(Semaphore::new(MOST_HANDSHAKES));
    tokio::spawn(async move {
        loop {
            // Closed only with this task.
            let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
            let (stream, address) = tokio::select! {
                () = accepted.closed() => return,
                found = listener.accept() => match found {
                    Ok(found) => found,
                    Err(error) => {
                        tracing::warn!(%error, "a connection cannot be accepted");
                        tokio::time::sleep(BREATH).await;
                        continue;
                    }
                },
            };
            let config = current.as_mut().map(Current::config);
            let (accepted, refused) = (accepted.clone(), Arc::clone(&refused));
            tokio::spawn(async move {
                let _slot = slot;
                match secure(stream, address, config).await {
                    Ok(connection) => drop(accepted.send(Ok(connection)).await),
                    Err(why) => refused(Refusal { address, why }),
                }
            });
        }
    });
    Ok(ReceiverStream::new(connections))
}

async fn secure(
    stream: TcpStream,
    address: SocketAddr,
    config: Option<Arc<ServerConfig>>,
) -> Result<Connection, String> {
    stream.set_nodelay(true).map_err(|error| error.to_string())?;
    let Some(config) = config else {
        return Ok(Connection { stream: Stream::Plain(stream), peer: Peer { address, name: None } });
    };
    let shaken = tokio::time::timeout(HANDSHAKE_DEADLINE, TlsAcceptor::from(config).accept(stream)).await;
    let stream = shaken
        .map_err(|_| format!("no certificate within {} s", HANDSHAKE_DEADLINE.as_secs()))?
        .map_err(|error| error.to_string())?;
    let certificate =
        stream.get_ref().1.peer_certificates().and_then(<[_]>::first).ok_or("it has no certificate")?;
    let name = Name::of(certificate).map_err(|error| format!("its certificate names nobody: {error}"))?;
    Ok(Connection {
        stream: Stream::Mutual(Box::new(stream.into())),
        peer: Peer { address, name: Some(name) },
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

    /// As the files are now, if they can be used.
    fn config(&mut self) -> Arc<ServerConfig> {
        // What cannot be read this moment is being replaced.
        if let Ok(now) = self.files.fingerprint()
            && now != self.seen
        {
            self.seen = now;
            match self.files.server() {
                Ok(config) => {
                    tracing::info!("the certificates have changed");
                    self.config = config;
                }
                Err(error) => {
                    tracing::error!(%error, "the certificates have changed and cannot be used; those before stay");
                }
            }
        }
        Arc::clone(&self.config)
    }
}

/// A connection that was let in.
#[derive(Debug)]
pub struct Connection {
    stream: Stream,
    peer: Peer,
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
