//! The side of agents and readers.

use std::{io, sync::Arc};

use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, pki_types::ServerName};
use thiserror::Error;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint, Uri};

use crate::{
    files::{Files, FilesError},
    name::Name,
    stream::Stream,
};

/// Why there is no connection.
#[derive(Debug, Error)]
pub enum DialError {
    #[error("{0:?} is not an address; write https://HOST:PORT, or http://127.0.0.1:PORT without TLS")]
    Address(String),
    #[error(
        "{0} is not a loopback address; without TLS records go to this machine alone, so write https:// and name certificates"
    )]
    Plain(String),
    #[error("{0} asks for TLS; name the certificates")]
    NoFiles(String),
    #[error("{0} goes without TLS, but certificates are named; write https://, or leave them out")]
    Unused(String),
    #[error(transparent)]
    Files(#[from] FilesError),
    #[error(transparent)]
    Connect(#[from] tonic::transport::Error),
}

/// Where to connect to, and as whom.
#[derive(Clone, Debug)]
pub struct Target {
    uri: Uri,
    files: Option<Files>,
}

impl Target {
    /// Checks an address: `https://` goes with files, `http://` with loopback.
    ///
    /// # Errors
    ///
    /// See [`DialError`].
    pub fn new(address: &str, files: Option<Files>) -> Result<Self, DialError> {
        let uri: Uri = address.parse().map_err(|_| DialError::Address(address.to_owned()))?;
        let named = || address.to_owned();
        match (uri.scheme_str(), &files) {
            (Some("https"), None) => return Err(DialError::NoFiles(named())),
            (Some("http"), _) if !is_loopback(&uri) => return Err(DialError::Plain(named())),
            (Some("http"), Some(_)) => return Err(DialError::Unused(named())),
            (Some("https" | "http"), _) if uri.host().is_some() && uri.port().is_some() => {}
            _ => return Err(DialError::Address(named())),
        }
        Ok(Self { uri, files })
    }

    /// The files that it connects with; `None` without TLS.
    #[must_use]
    pub fn files(&self) -> Option<&Files> {
        self.files.as_ref()
    }

    /// Connects, with the certificates that are there now. `settings` are those of the connection.
    ///
    /// # Errors
    ///
    /// When the files cannot be used, or nobody answers who is a collector.
    pub async fn connect(&self, settings: impl FnOnce(Endpoint) -> Endpoint) -> Result<Channel, DialError> {
        let config = self.files.as_ref().map(Files::client).transpose()?;
        let endpoint = settings(Endpoint::from(self.uri.clone()));
        let connector = tower::service_fn(move |uri: Uri| secure(uri, config.clone()));
        Ok(endpoint.connect_with_connector(connector).await?)
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.uri)
    }
}

fn is_loopback(uri: &Uri) -> bool {
    let host = uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

pub(crate) async fn secure(uri: Uri, config: Option<Arc<ClientConfig>>) -> io::Result<TokioIo<Stream>> {
    let host = uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']').to_owned();
    let stream = TcpStream::connect((host.as_str(), uri.port_u16().unwrap_or_default())).await?;
    stream.set_nodelay(true)?;
    let Some(config) = config else { return Ok(TokioIo::new(Stream::Plain(stream))) };
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
