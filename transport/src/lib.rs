//! What agents, the collector and readers talk over: mutual TLS 1.3, or unix sockets of one machine.
//!
//! Under TLS a peer is who its certificate says ([`name`]), never who a message says. Certificates are read anew for every
//! connection ([`files`]), so that a file that was replaced counts from the next one on; whoever holds a connection for long asks
//! whether they have [changed](files::Files::fingerprint). At a unix socket ([`local`]) file rights decide, and the kernel tells
//! the [`peer`]'s user. [`accept`] is the collector's side of TCP, [`dial`] the side of agents and readers, at whatever
//! [`address`]. [`pki`] makes certificates for a demo or a small site.

pub mod accept;
pub mod address;
pub mod dial;
pub mod files;
pub mod http;
pub mod local;
pub mod name;
pub mod peer;
pub mod pki;
mod stream;
#[cfg(test)]
mod tests;
