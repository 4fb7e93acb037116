//! Who may deliver, and who may ask. What is refused is on record.

use std::sync::Arc;

use palisade_transport::{local::Purpose, name::Name, peer::Peer};
use tonic::{Request, Status};

use crate::refusals::Refusals;

#[derive(Clone)]
pub struct Admission {
    refusals: Refusals,
    /// Users that may deliver at the socket, besides root.
    agents: Arc<[u32]>,
}

impl Admission {
    pub fn new(refusals: Refusals, agents: &[u32]) -> Self {
        Self { refusals, agents: agents.into() }
    }

    /// The peer of a call that delivers.
    ///
    /// # Errors
    ///
    /// `PERMISSION_DENIED` when it may not.
    pub fn deliverer<T>(&self, request: &Request<T>) -> Result<Peer, Status> {
        self.admit(request, |peer| may_deliver(peer, &self.agents))
    }

    /// The peer of a call that asks.
    ///
    /// # Errors
    ///
    /// As [`Admission::deliverer`].
    pub fn asker<T>(&self, request: &Request<T>) -> Result<Peer, Status> {
        self.admit(request, may_ask)
    }

    fn admit<T>(
        &self,
        request: &Request<T>,
        judge: impl FnOnce(&Peer) -> Result<(), String>,
    ) -> Result<Peer, Status> {
        let Some(peer) = request.extensions().get::<Peer>() else {
            return Err(Status::internal("the connection does not say who is at its other end"));
        };
        judge(peer).map_err(|why| {
            self.note(peer, &why);
            Status::permission_denied(why)
        })?;
        Ok(peer.clone())
    }

    /// Puts a refusal of this peer on record.
    pub fn note(&self, peer: &Peer, why: &str) {
        self.refusals.note(&peer.address(), &peer.to_string(), why);
    }
}

fn may_deliver(peer: &Peer, agents: &[u32]) -> Result<(), String> {
    match peer {
        Peer::Certified { name: Name::Node(_), .. } => Ok(()),
        Peer::Certified { name, .. } => {
            Err(format!("only agents deliver records, and {name} is no agent's certificate"))
        }
        Peer::Local { purpose: Purpose::Ask, .. } => {
            Err(format!("this socket is for asking; records are delivered at {}", Purpose::Deliver.file()))
        }
        Peer::Local { purpose: Purpose::Deliver, user, .. } if *user == 0 || agents.contains(user) => Ok(()),
        Peer::Local { purpose: Purpose::Deliver, user, .. } => Err(format!(
            "user {user} may not deliver, only root and the users under sockets.agents of the collector's configuration"
        )),
    }
}

/// At the socket for asking the rights of its file have decided already.
fn may_ask(peer: &Peer) -> Result<(), String> {
    match peer {
        Peer::Certified { name: Name::Reader(_), .. } | Peer::Local { purpose: Purpose::Ask, .. } => Ok(()),
        Peer::Certified { name, .. } => {
            Err(format!("only readers ask, and {name} is no reader's certificate"))
        }
        Peer::Local { purpose: Purpose::Deliver, .. } => {
            Err(format!("this socket is for delivery; ask at {}", Purpose::Ask.file()))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{net::IpAddr, path::Path};

    use super::*;

    #[test]
    fn each_may_do_one_thing() {
        let certified = |name| Peer::Certified { address: IpAddr::from([192, 0, 2, 1]), name };
        let local =
            |purpose, user| Peer::Local { socket: Arc::from(Path::new("/run/a.sock")), purpose, user };
        let named = |name: &str| name.to_owned();
        for (peer, delivers, asks) in [
            (certified(Name::Node(named("a"))), true, false),
            (certified(Name::Reader(named("a"))), false, true),
            (certified(Name::Collector), false, false),
            (local(Purpose::Deliver, 0), true, false),
            (local(Purpose::Deliver, 990), true, false),
            (local(Purpose::Deliver, 1000), false, false),
            (local(Purpose::Deliver, u32::MAX), false, false),
            (local(Purpose::Ask, 0), false, true),
            (local(Purpose::Ask, 990), false, true),
            (local(Purpose::Ask, 1000), false, true),
        ] {
            assert_eq!(may_deliver(&peer, &[990]).is_ok(), delivers, "{peer:?} delivers");
            assert_eq!(may_ask(&peer).is_ok(), asks, "{peer:?} asks");
        }
    }
}
