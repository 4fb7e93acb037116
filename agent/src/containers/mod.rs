//! Containers: found by their cgroups, identified by the runtime.

pub mod bundle;
pub mod cgroups;
pub mod containerd;
pub mod cri;
pub mod docker;
pub mod identify;
pub mod kubernetes;
pub mod mounts;
pub mod nri;
pub mod storage;

use std::{collections::HashMap, path::PathBuf};

use bytes::Bytes;
use palisade_profile::{mode::Mode, selector::ContainerFacts};
use palisade_proto::v1;
use prost::Message as _;

use self::mounts::{Described, Volume};
use crate::agent::{digests::Digests, interpreters::Interpreters, links::Links};

/// What the runtime says of a container.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    pub facts: ContainerFacts,
    pub pod_uid: String,
    pub image_digest: String,
    /// The pause container of a pod.
    pub sandbox: bool,
    /// Who said so: "nri", "cri", "containerd", "docker", "podman".
    pub by: &'static str,
    /// Commands that the pod declares as probes and lifecycle handlers of this container.
    pub probes: Vec<Vec<String>>,
    /// What the runtime mounted for it.
    pub mounts: Vec<Described>,
}

impl Identity {
    /// Whether the other is of the same container, in whatever words. The first word stays, so that a container does
    /// not change its policy because two sources name its image or labels differently.
    pub fn is_the_same_as(&self, other: &Self) -> bool {
        let key = |identity: &Self| {
            let ContainerFacts { namespace, pod, name, .. } = &identity.facts;
            (namespace.clone(), pod.clone(), name.clone(), identity.sandbox)
        };
        key(self) == key(other)
    }
}

/// What the root filesystem of a container was found to be. The text is for people.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum RootFilesystem {
    #[default]
    NotCompared,
    /// What the kernel takes for its image is what the runtime has made.
    Runtimes,
    /// The same, but its first process has gone to another one.
    Left(String),
    /// The kernel saw it begin on another one than the runtime names.
    Another(String),
    /// What the runtime has made cannot be found, so nothing counts as its image.
    NotFound(String),
    /// It is no overlay.
    NotExamined,
}

impl RootFilesystem {
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::NotCompared => "",
            Self::Runtimes => "runtime",
            Self::Left(_) => "left",
            Self::Another(_) => "another",
            Self::NotFound(_) => "not-found",
            Self::NotExamined => "not-examined",
        }
    }

    /// What speaks against it.
    pub fn objection(&self) -> Option<&str> {
        match self {
            Self::Left(why) | Self::Another(why) | Self::NotFound(why) => Some(why),
            Self::NotCompared | Self::Runtimes | Self::NotExamined => None,
        }
    }

    /// Whether what the kernel takes for the image is that, as far as it was found out.
    fn is_the_image(&self) -> bool {
        !matches!(self, Self::Another(_) | Self::NotFound(_))
    }

    /// Whether another look would find nothing else.
    pub fn is_settled(&self) -> bool {
        !matches!(self, Self::NotCompared | Self::NotFound(_))
    }
}

/// A container on this node.
#[derive(Clone, Debug)]
pub struct Container {
    /// The runtime's id.
    pub id: String,
    pub identity: Option<Identity>,
    /// Names of the profiles, the revision's name, and what that makes of it.
    pub profiles: Vec<String>,
    pub revision: String,
    pub standing: Standing,
    /// Wall-clock nanoseconds since when the policy stands in the kernel; 0 when there is none.
    pub in_force_since: u64,
    /// Whether it ran before the agent did.
    pub found_running: bool,
    /// Whether the kernel knows every process that was there when it was found running.
    pub members_known: bool,
    pub root: RootFilesystem,
    /// How often it was looked at.
    pub root_looks: u32,
    /// Its cgroup's folder; empty when it is not known.
    pub cgroup: PathBuf,
    /// Its mounts that are volumes; `None` until they are known.
    pub volumes: Option<Vec<Volume>>,
    /// Whether the agent claims nothing of it, since its self-probe fails.
    pub withdrawn: bool,
    /// Whether an agent before this one has known it.
    pub adopted: bool,
    /// Digests of files of its image that rules ask for.
    pub digests: Digests,
    pub interpreters: Interpreters,
    /// Rules of its policy that are symbolic links in its image.
    pub links: Links,
    /// Since when they are, nanoseconds since boot.
    pub volumes_since: u64,
    /// Whether another attempt may find more.
    pub volumes_open: bool,
    /// Whether what an agent before this one left stopped in it has been looked for.
    pub left_behind_settled: bool,
    /// What it executed first out of its image: path and inode.
    pub entrypoint: Option<(Vec<u8>, u64)>,
    /// How long the runtime waited for the agent before its start, and would have waited; nanoseconds, 0 where it
    /// did not.
    pub answered_in: u64,
    pub answer_deadline: u64,
    /// Whether the first exec of its workload has been reported.
    pub first_exec_told: bool,
    /// The container block of its records, encoded once.
    encoded: Bytes,
}

/// Under what a container stands. Records have it as its mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It is not identified.
    Unidentified,
    /// No profile names it.
    NoProfile,
    /// Profiles name it, and the strictest has this mode.
    Under(Mode),
    /// Its agent has stopped, or claims nothing of it.
    NotInForce,
}

impl Standing {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unidentified => "unidentified",
            Self::NoProfile => "none",
            Self::Under(mode) => mode.as_str(),
            Self::NotInForce => "not-in-force",
        }
    }
}

impl Container {
    pub fn new(id: String, cgroup: PathBuf, found_running: bool) -> Self {
        let mut container = Self {
            id,
            identity: None,
            profiles: Vec::new(),
            revision: String::new(),
            standing: Standing::Unidentified,
            in_force_since: 0,
            found_running,
            members_known: false,
            root: RootFilesystem::default(),
            root_looks: 0,
            cgroup,
            volumes: None,
            withdrawn: false,
            adopted: false,
            digests: Digests::default(),
            interpreters: Interpreters::default(),
            links: Links::default(),
            volumes_since: 0,
            volumes_open: false,
            left_behind_settled: false,
            entrypoint: None,
            answered_in: 0,
            answer_deadline: 0,
            first_exec_told: false,
            encoded: Bytes::new(),
        };
        container.encode();
        container
    }

    /// Whether it is identified and its policy stands in the kernel.
    pub fn is_under_policy(&self) -> bool {
        self.identity.is_some() && self.standing != Standing::Unidentified
    }

    /// Under what it stands as far as the agent claims it.
    pub fn claimed(&self) -> Standing {
        let enforces = self.standing == Standing::Under(Mode::Enforce);
        if self.withdrawn || enforces && !self.root.is_the_image() {
            Standing::NotInForce
        } else {
            self.standing
        }
    }

    /// Encodes the container block anew. To be called after every change.
    pub fn encode(&mut self) {
        self.encoded = self.to_proto().encode_to_vec().into();
    }

    /// The encoded container block.
    pub fn encoded(&self) -> &Bytes {
        &self.encoded
    }

    fn to_proto(&self) -> v1::Container {
        let identity = self.identity.clone().unwrap_or_default();
        v1::Container {
            id: self.id.clone(),
            name: identity.facts.name,
            pod: identity.facts.pod,
            pod_uid: identity.pod_uid,
            namespace: identity.facts.namespace,
            image: identity.facts.image,
            image_digest: identity.image_digest,
            labels: identity.facts.labels,
            identified: self.identity.is_some(),
            class: if identity.sandbox { "sandbox" } else { "container" }.to_owned(),
            profiles: self.profiles.clone(),
            revision: self.revision.clone(),
            mode: self.claimed().as_str().to_owned(),
            identified_by: identity.by.to_owned(),
        }
    }
}

/// All containers of this node, by slot.
pub type Containers = HashMap<u64, Container>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn enforce_is_claimed_only_where_the_image_is_known() {
        let claimed = |standing, root: RootFilesystem| {
            let mut container = Container::new("c".to_owned(), PathBuf::new(), true);
            (container.standing, container.root) = (standing, root);
            assert_eq!(container.to_proto().mode, container.claimed().as_str());
            container.claimed()
        };
        let why = || "why".to_owned();
        let enforce = Standing::Under(Mode::Enforce);
        for root in [RootFilesystem::NotFound(why()), RootFilesystem::Another(why())] {
            assert_eq!(claimed(enforce, root.clone()), Standing::NotInForce, "{root:?}");
            for other in [Standing::Under(Mode::Audit), Standing::NoProfile, Standing::Unidentified] {
                assert_eq!(claimed(other, root.clone()), other, "{root:?}");
            }
        }
        for root in [
            RootFilesystem::NotCompared,
            RootFilesystem::Runtimes,
            RootFilesystem::NotExamined,
            RootFilesystem::Left(why()),
        ] {
            assert_eq!(claimed(enforce, root.clone()), enforce, "{root:?}");
        }
    }
}
