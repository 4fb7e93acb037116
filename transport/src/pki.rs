//! Certificates for a demo or a small site: one authority, and what it signs.

use std::{io::Write as _, net::IpAddr, os::unix::fs::OpenOptionsExt as _, path::Path};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SanType, SerialNumber,
};
use rustls::pki_types::ServerName;
use thiserror::Error;
use time::{Duration, OffsetDateTime};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::name::Name;

/// Names of the files in its folder.
pub const CA: &str = "ca.pem";
pub const CA_KEY: &str = "ca-key.pem";
pub const REVOKED: &str = "revoked.pem";

/// Why there is no certificate.
#[derive(Debug, Error)]
pub enum PkiError {
    #[error("{path} is there already; it is not replaced, since what it has signed would count no more")]
    Exists { path: String },
    #[error("{path}: {error}{}", rights(error))]
    File { path: String, error: std::io::Error },
    #[error("cannot make the certificate: {0}")]
    Make(#[from] rcgen::Error),
    #[error("{0:?} is no address of a collector: write host names and IP addresses, without port")]
    Address(String),
    #[error("{path} is no certificate")]
    NoCertificate { path: String },
}

fn rights(error: &std::io::Error) -> &'static str {
    match error.kind() {
        std::io::ErrorKind::PermissionDenied => "; run this as the owner of the folder",
        _ => "",
    }
}

/// Makes the authority in `folder`, for `days`.
///
/// # Errors
///
/// When there is one, or it cannot be written.
pub fn make_authority(folder: &Path, domain: &str, days: u32) -> Result<(), PkiError> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, format!("Palisade authority of {domain}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    valid_for(&mut params, days);
    let certificate = params.self_signed(&key)?;
    write_new(&folder.join(CA_KEY), &key.serialize_pem(), 0o600)?;
    write_new(&folder.join(CA), &certificate.pem(), 0o644)?;
    revoke(folder, &[])
}

/// Makes a certificate for `name`, and for a collector also for its `addresses`: `FILE.pem` and `FILE-key.pem` in `folder`. One
/// that is there is replaced, as at a renewal.
///
/// # Errors
///
/// When the authority is not there, or a file cannot be written.
pub fn issue(
    folder: &Path,
    file: &str,
    name: &Name,
    domain: &str,
    addresses: &[String],
    days: u32,
) -> Result<(), PkiError> {
    let issuer = authority(folder)?;
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name.to_string());
    let uri = name.uri(domain);
    params.subject_alt_names.push(SanType::URI(uri.as_str().try_into()?));
    for address in addresses {
        params.subject_alt_names.push(match address.parse::<IpAddr>() {
            Ok(address) => SanType::IpAddress(address),
            // What a client asks for is compared with it, so it is checked as a client's would be.
            Err(_) => match ServerName::try_from(address.as_str()) {
                Ok(ServerName::DnsName(name)) => SanType::DnsName(name.as_ref().try_into()?),
                _ => return Err(PkiError::Address(address.clone())),
            },
        });
    }
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![match name {
        Name::Collector => ExtendedKeyUsagePurpose::ServerAuth,
        Name::Node(_) | Name::Reader(_) => ExtendedKeyUsagePurpose::ClientAuth,
    }];
    params.use_authority_key_identifier_extension = true;
    valid_for(&mut params, days);
    let certificate = params.signed_by(&key, &issuer)?;
    // The key first: who reads in between finds a pair that does not fit, and keeps what it has.
    replace(&folder.join(format!("{file}-key.pem")), &key.serialize_pem(), 0o600)?;
    replace(&folder.join(format!("{file}.pem")), &certificate.pem(), 0o644)
}

/// Writes the list of revoked certificates: of these files and no others.
///
/// # Errors
///
/// When one is no certificate, or the list cannot be written.
pub fn revoke(folder: &Path, certificates: &[&Path]) -> Result<(), PkiError> {
    let issuer = authority(folder)?;
    let now = OffsetDateTime::now_utc();
    let mut revoked_certs = Vec::new();
    for path in certificates {
        let serial = serial(path)?;
        revoked_certs.push(RevokedCertParams {
            serial_number: serial,
            revocation_time: now,
            reason_code: None,
            invalidity_date: None,
        });
    }
    let params = CertificateRevocationListParams {
        this_update: now - Duration::minutes(1),
        next_update: now + Duration::days(3650),
        crl_number: SerialNumber::from(now.unix_timestamp().unsigned_abs()),
        issuing_distribution_point: None,
        revoked_certs,
        key_identifier_method: KeyIdMethod::Sha256,
    };
    replace(&folder.join(REVOKED), &params.signed_by(&issuer)?.pem()?, 0o644)
}

fn serial(path: &Path) -> Result<SerialNumber, PkiError> {
    let no_certificate = || PkiError::NoCertificate { path: path.display().to_string() };
    let (_, pem) = x509_parser::pem::parse_x509_pem(read(path)?.as_bytes()).map_err(|_| no_certificate())?;
    let (_, parsed) = X509Certificate::from_der(&pem.contents).map_err(|_| no_certificate())?;
    Ok(SerialNumber::from_slice(parsed.raw_serial()))
}

fn authority(folder: &Path) -> Result<Issuer<'static, KeyPair>, PkiError> {
    let key = KeyPair::from_pem(&read(&folder.join(CA_KEY))?)?;
    Ok(Issuer::from_ca_cert_pem(&read(&folder.join(CA))?, key)?)
}

/// From a little before now: clocks differ.
fn valid_for(params: &mut CertificateParams, days: u32) {
    let now = OffsetDateTime::now_utc();
    params.not_before = now - Duration::minutes(5);
    params.not_after = now + Duration::days(days.into());
}

fn read(path: &Path) -> Result<String, PkiError> {
    std::fs::read_to_string(path).map_err(|error| PkiError::File { path: path.display().to_string(), error })
}

fn write_new(path: &Path, text: &str, mode: u32) -> Result<(), PkiError> {
    let named = || path.display().to_string();
    let opened = std::fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(path);
    let written = opened.and_then(|mut file| {
        file.write_all(text.as_bytes())?;
        // A full disk may say so only now.
        file.sync_all()
    });
    match written {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            Err(PkiError::Exists { path: named() })
        }
        Err(error) => Err(PkiError::File { path: named(), error }),
    }
}

/// Puts a new file in the place of an old one, so that nobody reads half of it.
fn replace(path: &Path, text: &str, mode: u32) -> Result<(), PkiError> {
    let partial = path.with_extension("partial");
    let _left_by_one_that_was_killed = std::fs::remove_file(&partial);
    let written = write_new(&partial, text, mode).and_then(|()| {
        std::fs::rename(&partial, path).map_err(|error| PkiError::File { path: String::new(), error })
    });
    written.map_err(|error| {
        let _never_made = std::fs::remove_file(&partial);
        match error {
            PkiError::File { error, .. } => PkiError::File { path: path.display().to_string(), error },
            other => other,
        }
    })
}
