//! Certificates and keys as files: read whole, checked, and told apart by their content.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, pem::PemObject},
    server::WebPkiClientVerifier,
};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use thiserror::Error;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::name::Name;

/// Where they are. Kubernetes replaces such files by a symbolic link above them, so they are opened by name each time.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Files {
    /// Certificates of the authorities that are trusted, PEM.
    pub ca: PathBuf,
    /// The own certificate and those between it and an authority, PEM.
    pub certificate: PathBuf,
    /// Its private key, PEM.
    pub key: PathBuf,
    /// Revocation lists of the authorities, PEM; only the collector looks at them.
    #[serde(default)]
    pub revoked: Option<PathBuf>,
}

/// Why files cannot be used.
#[derive(Debug, Error)]
pub enum FilesError {
    #[error("cannot read {}: {error}", path.display())]
    Read { path: PathBuf, error: std::io::Error },
    #[error("{} holds no {what} in PEM", path.display())]
    Empty { path: PathBuf, what: &'static str },
    #[error("{}: {error}", path.display())]
    Pem { path: PathBuf, error: String },
    #[error("{}: the certificate {problem}", path.display())]
    Certificate { path: PathBuf, problem: String },
    #[error("{} and {}: {error}", certificate.display(), key.display())]
    Pair { certificate: PathBuf, key: PathBuf, error: rustls::Error },
    #[error("{}: {error}", path.display())]
    Verifier { path: PathBuf, error: String },
    #[error("TLS 1.3 is not to be had: {0}")]
    Protocol(rustls::Error),
}

/// HTTP/2, which is all that is spoken.
const ALPN: &[u8] = b"h2";

/// What the files hold.
struct Material {
    roots: RootCertStore,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    revoked: Vec<CertificateRevocationListDer<'static>>,
}

impl Files {
    /// Names the content of all files, without checking it. Two different ones differ.
    ///
    /// # Errors
    ///
    /// When one cannot be read.
    pub fn fingerprint(&self) -> Result<[u8; 32], FilesError> {
        let mut hash = Sha256::new();
        for path in self.all() {
            let content = read(path)?;
            hash.update((content.len() as u64).to_le_bytes());
            hash.update(&content);
        }
        Ok(hash.finalize().into())
    }

    fn all(&self) -> impl Iterator<Item = &Path> {
        let Self { ca, certificate, key, revoked } = self;
        [ca, certificate, key].into_iter().chain(revoked).map(PathBuf::as_path)
    }

    /// Who the own certificate is for.
    ///
    /// # Errors
    ///
    /// When it cannot be read, or names nobody.
    pub fn name(&self) -> Result<Name, FilesError> {
        let chain = self.chain()?;
        chain.first().map_or(Err(crate::name::NameError::None), |own| Name::of(own)).map_err(|error| {
            FilesError::Certificate {
                path: self.certificate.clone(),
                problem: format!("names nobody: {error}"),
            }
        })
    }

    /// The side of whoever is connected to.
    ///
    /// # Errors
    ///
    /// When the files cannot be used; the message names the one and what is wrong with it.
    pub fn server(&self) -> Result<Arc<ServerConfig>, FilesError> {
        let Material { roots, chain, key, revoked } = self.read()?;
        let provider = provider();
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .with_crls(revoked)
            .build()
            .map_err(|error| FilesError::Verifier {
                path: self.revoked.clone().unwrap_or_else(|| self.ca.clone()),
                error: error.to_string(),
            })?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(FilesError::Protocol)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(|error| self.pair(error))?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        Ok(Arc::new(config))
    }

    /// The side of whoever connects.
    ///
    /// # Errors
    ///
    /// As [`Files::server`].
    pub fn client(&self) -> Result<Arc<ClientConfig>, FilesError> {
        let Material { roots, chain, key, revoked: _ } = self.read()?;
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(FilesError::Protocol)?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .map_err(|error| self.pair(error))?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        // A session that is taken up again shows no certificate, and this one may have been replaced.
        config.resumption = rustls::client::Resumption::disabled();
        Ok(Arc::new(config))
    }

    fn pair(&self, error: rustls::Error) -> FilesError {
        FilesError::Pair { certificate: self.certificate.clone(), key: self.key.clone(), error }
    }

    fn chain(&self) -> Result<Vec<CertificateDer<'static>>, FilesError> {
        pem(&self.certificate, "certificate")
    }

    fn read(&self) -> Result<Material, FilesError> {
        let mut roots = RootCertStore::empty();
        for certificate in pem::<CertificateDer<'static>>(&self.ca, "certificate")? {
            roots.add(certificate).map_err(|error| FilesError::Certificate {
                path: self.ca.clone(),
                problem: format!("is no authority's: {error}"),
            })?;
        }
        let chain = self.chain()?;
        for certificate in &chain {
            valid_now(certificate)
                .map_err(|problem| FilesError::Certificate { path: self.certificate.clone(), problem })?;
        }
        let key = PrivateKeyDer::from_pem_slice(&read(&self.key)?)
            .map_err(|error| FilesError::Pem { path: self.key.clone(), error: error.to_string() })?;
        let revoked = match &self.revoked {
            Some(path) => pem(path, "revocation list")?,
            None => Vec::new(),
        };
        Ok(Material { roots, chain, key, revoked })
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn read(path: &Path) -> Result<Vec<u8>, FilesError> {
    std::fs::read(path).map_err(|error| FilesError::Read { path: path.to_owned(), error })
}

/// All objects of a kind in a file; at least one.
fn pem<T: PemObject>(path: &Path, what: &'static str) -> Result<Vec<T>, FilesError> {
    let content = read(path)?;
    let found: Result<Vec<T>, _> = T::pem_slice_iter(&content).collect();
    let found = found.map_err(|error| FilesError::Pem { path: path.to_owned(), error: error.to_string() })?;
    if found.is_empty() {
        return Err(FilesError::Empty { path: path.to_owned(), what });
    }
    Ok(found)
}

/// Whether a certificate is neither too young nor too old.
fn valid_now(certificate: &[u8]) -> Result<(), String> {
    let (_, parsed) =
        X509Certificate::from_der(certificate).map_err(|error| format!("is broken: {error}"))?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs().cast_signed());
    let validity = parsed.validity();
    if now < validity.not_before.timestamp() {
        return Err(format!("is not valid before {}; is this machine's clock right?", validity.not_before));
    }
    if now > validity.not_after.timestamp() {
        return Err(format!("has expired at {}; renew it", validity.not_after));
    }
    Ok(())
}
