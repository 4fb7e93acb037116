//! The few programs that may start in a container that is not identified, so that a node cannot lock itself out.

use std::os::unix::{ffi::OsStringExt as _, fs::MetadataExt as _};

use palisade_abi::codes::origin;

use super::Agent;
use crate::{containers::Container, records::Exec};

impl Agent {
    /// Remembers what a container that is not identified executed, in case it is a pod's sandbox.
    pub(super) fn note_entrypoint(&mut self, slot: u64, exec: &Exec) {
        let of_image = exec.file.origin == origin::IMAGE && !exec.rest.path_truncated;
        if let Some(container) = self.containers.get_mut(&slot)
            && container.entrypoint.is_none()
            && of_image
        {
            container.entrypoint = Some((exec.file.path.clone(), exec.rest.inode));
            self.admit_sandbox(slot);
        }
    }

    /// Lets the pause program start in containers that are not identified, once it has been seen as one.
    pub(super) fn admit_sandbox(&mut self, slot: u64) {
        let workload = self.kernel.maps.ledger.slot(slot).map_or(0, |slot| slot.workload_pid);
        let Some(container) = self.containers.get_mut(&slot) else { return };
        if !container.identity.as_ref().is_some_and(|identity| identity.sandbox) {
            return;
        }
        if container.entrypoint.is_none() && (container.found_running || container.adopted) {
            container.entrypoint = program_of(&format!("/proc/{workload}/exe"));
        }
        if let Some((path, inode)) = container.entrypoint.clone() {
            self.admit(path, inode);
        }
    }

    /// Takes the admission of a sandbox's program back with the last sandbox that runs it: the layer may be deleted then,
    /// and its inodes given to others.
    pub(super) fn admit_no_more(&mut self, slot: u64) {
        let Some(container) = self.containers.get(&slot) else { return };
        let Some(program) = container.entrypoint.clone() else { return };
        let is_sandbox =
            |container: &Container| container.identity.as_ref().is_some_and(|identity| identity.sandbox);
        let of_others = self.containers.iter().any(|(other, found)| {
            *other != slot && is_sandbox(found) && found.entrypoint.as_ref() == Some(&program)
        });
        if is_sandbox(container) && !of_others && self.admitted.remove(&program) {
            self.kernel.maps.admit_no_more(&program.0, program.1);
        }
    }

    /// Lets the agent's own program start in a container that is not identified: its replacement, from the same image.
    /// An agent on the host is replaced on the host, where nothing is refused.
    pub(super) fn admit_own_program(&mut self) {
        if self.kernel.has_hosts_root(std::process::id()) {
            return;
        }
        match program_of("/proc/self/exe") {
            Some((path, inode)) => self.admit(path, inode),
            None => tracing::warn!("the agent's own program is not admitted under whenAgentAbsent: deny"),
        }
    }

    fn admit(&mut self, path: Vec<u8>, inode: u64) {
        let result = self.kernel.maps.admit(&path, inode);
        if self.admitted.insert((path, inode))
            && let Err(error) = result
        {
            tracing::warn!(error = format!("{error:#}"), "not admitted while unidentified");
        }
    }
}

/// Path and inode of the program that a process executes, as its own root directory shows it.
fn program_of(link: &str) -> Option<(Vec<u8>, u64)> {
    let path = std::fs::read_link(link).ok()?.into_os_string().into_vec();
    Some((path, std::fs::metadata(link).ok()?.ino()))
}
