//! The root filesystem of a container, whose files are its image: of one that ran before the agent it is learned from the runtime,
//! never from the container's processes, and of every one what the kernel has for it is compared with what the runtime says.

use anyhow::{Result, ensure};

use super::Agent;
use crate::{
    containers::{
        RootFilesystem,
        bundle::{self, Root},
        cgroups::{self, Found},
    },
    processes,
};

/// How often a container's root filesystem is looked at, once each second, before that waits for the next scan of the node.
const EARLY_LOOKS: u32 = 20;

impl Agent {
    /// Compares those root filesystems that are not settled and were not looked at often.
    pub(super) fn compare_roots_early(&mut self) {
        let open: Vec<Found> = self
            .containers
            .iter()
            .filter(|(_, container)| !container.root.is_settled() && container.root_looks < EARLY_LOOKS)
            .map(|(slot, container)| Found {
                slot: *slot,
                id: container.id.clone(),
                folder: container.cgroup.clone(),
            })
            .collect();
        for found in open {
            self.compare_root(&found);
        }
    }

    /// Compares the root filesystem of a container with what the runtime says of it, until that is settled.
    pub(super) fn compare_root(&mut self, found: &Found) {
        let Some(container) = self.containers.get(&found.slot) else { return };
        if container.root.is_settled() {
            return;
        }
        let ran_before = container.found_running;
        // Read in this order: the kernel knows the root before it notes the first exec.
        let has_executed = self.kernel.maps.ledger.slot(found.slot).is_some_and(|slot| slot.first_exec != 0);
        let has_root = self.kernel.maps.state.has_root(found.slot);
        let root = match (ran_before, has_root) {
            (false, false) if !has_executed => return,
            // The kernel would not have it, since it is the host's, say.
            (false, false) => {
                self.keep_without_root(found);
                RootFilesystem::NotExamined
            }
            _ => self.find_root(found, &found.members(), ran_before),
        };
        let Some(container) = self.containers.get_mut(&found.slot) else { return };
        container.root_looks = container.root_looks.saturating_add(1);
        if root == container.root {
            return;
        }
        container.root = root;
        container.encode();
        self.tell_coverage(found.slot, "root-compared", 0);
    }

    /// What is to be said of the root filesystem of a container. That of one that ran before the agent is learned.
    pub(super) fn find_root(&mut self, found: &Found, members: &[u32], ran_before: bool) -> RootFilesystem {
        let Some(first) = processes::oldest(members) else { return RootFilesystem::NotCompared };
        // As long as nothing is in the container's root, the runtime is still at work, and the kernel will see which it chooses.
        let preparing = members.iter().all(|pid| self.kernel.is_at_home(*pid));
        let maps = &self.kernel.maps;
        let theirs = bundle::find(first, &found.id, |pid| {
            maps.state.slot_of_process(pid).is_some() || cgroups::holds_container(pid)
        });
        let settled = match theirs {
            Ok(theirs) if ran_before => self.learn_root(found, first, preparing, &theirs),
            Ok(theirs) => Ok(self.check_root(found.slot, &theirs)),
            Err(error) if ran_before && !preparing => Err(error),
            Err(error) => {
                tracing::debug!(
                    container = found.id,
                    error = format!("{error:#}"),
                    "its root filesystem is not compared"
                );
                return RootFilesystem::NotCompared;
            }
        };
        let root = settled.unwrap_or_else(|error| {
            self.keep_without_root(found);
            RootFilesystem::NotFound(format!(
                "what the runtime has made its root filesystem is not known, so nothing counts as its image: {error:#}"
            ))
        });
        let known = self.containers.get(&found.slot).map(|container| &container.root);
        if let Some(objection) = root.objection()
            && known != Some(&root)
        {
            tracing::error!(container = found.id, "{objection}");
        }
        root
    }

    /// Sees to it that nothing that enters a container later decides what its image is.
    fn keep_without_root(&mut self, found: &Found) {
        if let Err(error) = self.kernel.maps.state.set_no_root(found.slot) {
            tracing::error!(
                container = found.id,
                error = format!("{error:#}"),
                "what enters it may decide what its image is"
            );
        }
    }

    /// Learns the root filesystem that the runtime has made, whatever root the first process has by now.
    fn learn_root(
        &mut self,
        found: &Found,
        first: u32,
        preparing: bool,
        theirs: &Root,
    ) -> Result<RootFilesystem> {
        let own = bundle::of_process(first).ok().filter(|_| !preparing);
        let is_same = own.as_ref().is_some_and(|own| theirs.is_same_filesystem(own));
        let is_hosts = self.kernel.is_hosts_root(theirs.directory());
        let is_known =
            theirs.is_overlay() && self.kernel.maps.state.root_device(found.slot) == Some(theirs.device());
        // A folder that is no overlay may still be waiting for what will be mounted there.
        let may_be_learned = !is_hosts && (theirs.is_overlay() || is_same);
        let learned = if may_be_learned && !is_known {
            self.kernel.learn_root(found.slot, &theirs.path())
        } else {
            Ok(())
        };
        let Some(own) = own else { return learned.map(|()| RootFilesystem::NotCompared) };
        if is_same {
            if is_hosts || learned.is_err() {
                self.keep_without_root(found);
            }
            if let Err(error) = learned {
                tracing::warn!(
                    container = found.id,
                    error = format!("{error:#}"),
                    "the origin of the files on its root filesystem is unknown"
                );
            }
            return Ok(RootFilesystem::Runtimes);
        }
        learned?;
        let (own, theirs_at) = (own.describe(), theirs.describe_with_place());
        ensure!(
            may_be_learned,
            "its first process has another root ({own}) than the runtime gave it ({theirs_at})"
        );
        Ok(RootFilesystem::Left(format!(
            "its first process has another root filesystem ({own}) than the runtime gave it ({theirs_at}); only the runtime's counts as its image"
        )))
    }

    /// Compares the root filesystem that the kernel saw a container begin with. It stays, since nothing of the container had run.
    fn check_root(&self, slot: u64, theirs: &Root) -> RootFilesystem {
        match self.kernel.maps.state.root_device(slot) {
            None => RootFilesystem::NotCompared,
            // Its number need not be the one that stat(2) tells.
            Some(_) if !theirs.is_overlay() => RootFilesystem::NotExamined,
            Some(known) if known == theirs.device() => RootFilesystem::Runtimes,
            Some(known) => RootFilesystem::Another(format!(
                "it began on another root filesystem ({}:{}) than the runtime names ({})",
                known >> 20,
                known & 0xf_ffff,
                theirs.describe_with_place()
            )),
        }
    }
}
