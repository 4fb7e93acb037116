//! Mutual TLS 1.3 between agents, the collector and readers.
//!
//! Who somebody is, his certificate says ([`name`]), never a message. Certificates are read anew for every connection
//! ([`files`]), so that a file that was replaced counts from the next one on; whoever holds a connection for long asks whether
//! they have [changed](files::Files::fingerprint). [`accept`] is the collector's side, [`dial`] the others'. [`pki`] makes
//! certificates for a demo or a small site.

#![forbid(unsafe_code)]

pub mod accept;
pub mod dial;
pub mod files;
pub mod http;
pub mod name;
pub mod pki;
mod stream;
#[cfg(test)]
mod tests;
