//! The other end of a connection that was let in.

use std::{net::IpAddr, path::Path, sync::Arc};

use crate::{local::Purpose, name::Name};

/// What is known of it, without its own word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// Over TCP: who its certificate is for.
    Certified { address: IpAddr, name: Name },
    /// Over a unix socket: the user that connected, as the kernel tells, and what the socket is for.
    Local { socket: Arc<Path>, purpose: Purpose, user: u32 },
}

impl Peer {
    /// Where it came in: its IP address, or `unix:` and the socket's path.
    #[must_use]
    pub fn address(&self) -> String {
        match self {
            Self::Certified { address, .. } => address.to_string(),
            Self::Local { socket, .. } => format!("unix:{}", socket.display()),
        }
    }
}

/// Who it is, as records have it: `node/NAME`, `reader/NAME`, `collector` or `user/NUMBER`.
impl std::fmt::Display for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Certified { name, .. } => write!(f, "{name}"),
            Self::Local { user, .. } => write!(f, "user/{user}"),
        }
    }
}
