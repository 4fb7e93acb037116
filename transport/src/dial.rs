//! The side of agents and readers.

use std::{error::Error as _, io, path::PathBuf, sync::Arc};

use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, pki_types::ServerName};
use thiserror::Error;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint, Uri};

use crate::{
    address::{Address, AddressError},
    files::{Files, FilesError},
    local,
    name::Name,
    stream::Stream,
};

/// Why there is no connection.
#[derive(Debug, Error)]
pub enum DialError {
    #[error(transparent)]
    Address(#[from] AddressError),
    #[error("{0} asks for TLS; name the certificates")]
    NoFiles(String),
    #[error("{0} goes without TLS, but certificates are named; write https://, or leave them out")]
    Unused(String),
    #[error(transparent)]
    Files(#[from] FilesError),
    #[error(
        "{} is not open to this user: root gets in, and for asking the members of its group (sockets.group of the collector)",
        .0.display()
    )]
    Rights(PathBuf),
    #[error(transparent)]
    Connect(#[from] tonic::transport::Error),
}

/// Where to connect to, and as whom.
#[derive(Clone, Debug)]
pub struct Target {
    address: Address,
    /// With an address that asks for TLS, and with no other.
    files: Option<Files>,
}

impl Target {
    /// Checks an address: `https://` goes with files, `unix://` without.
    ///
    /// # Errors
    ///
    /// See [`DialError`].
    pub fn new(address: &str, files: Option<Files>) -> Result<Self, DialError> {
        let parsed = Address::parse(address)?;
        match (&parsed, &files) {
            (Address::Tls(_), None) => Err(DialError::NoFiles(address.to_owned())),
            (Address::Socket(_), Some(_)) => Err(DialError::Unused(address.to_owned())),
            _ => Ok(Self { address: parsed, files }),
        }
    }

    /// The files that it connects with; `None` at a unix socket.
    #[must_use]
    pub fn files(&self) -> Option<&Files> {
        self.files.as_ref()
    }

    /// Connects, with the certificates that are there now. `settings` are those of the connection.
    ///
    /// # Errors
    ///
    /// When the files cannot be used, the socket is not open to this user, or no collector answers.
    pub async fn connect(&self, settings: impl FnOnce(Endpoint) -> Endpoint) -> Result<Channel, DialError> {
        match (&self.address, &self.files) {
            (Address::Socket(path), _) => {
                let endpoint = settings(Endpoint::from_static(local::ANY));
                endpoint.connect_with_connector(local::Connector::new(path)).await.map_err(|error| {
                    if is_denied(&error) { DialError::Rights(path.clone()) } else { error.into() }
                })
            }
            (Address::Tls(uri), Some(files)) => {
                let config = files.client()?;
                let endpoint = settings(Endpoint::from(uri.clone()));
                let connector = tower::service_fn(move |uri: Uri| secure(uri, Arc::clone(&config)));
                Ok(endpoint.connect_with_connector(connector).await?)
            }
            (Address::Tls(_), None) => Err(DialError::NoFiles(self.to_string())),
        }
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.address)
    }
}

/// Whether file rights were in the way.
fn is_denied(error: &tonic::transport::Error) -> bool {
    let mut cause = error.source();
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<io::Error>() {
            return error.kind() == io::ErrorKind::PermissionDenied;
        }
        cause = error.source();
    }
    false
}

pub(crate) async fn secure(uri: Uri, config: Arc<ClientConfig>) -> io::Result<TokioIo<Stream>> {
    let host = uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']').to_owned();
    let stream = TcpStream::connect((host.as_str(), uri.port_u16().unwrap_or_default())).await?;
    stream.set_nodelay(true)?;
    let name = ServerName::try_from(host).map_err(io::Error::other)?;
    let stream = TlsConnector::from(config).connect(name, stream).await?;
    let certificate = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
    match certificate.map(|certificate| Name::of(certificate)) {
        Some(Ok(Name::Collector)) => Ok(TokioIo::new(Stream::Mutual(Box::new(stream.into())))),
        Some(Ok(other)) => Err(io::Error::other(format!("{other} answers there, and no collector"))),
        Some(Err(error)) => Err(io::Error::other(format!(
            "whoever answers there has a certificate that names nobody: {error}"
        ))),
        None => Err(io::Error::other("whoever answers there has no certificate")),
    }
}
