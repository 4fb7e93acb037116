//! Rules whose path is a symbolic link. Rules are compared with canonical paths, so such a rule allows nothing; a refusal of what
//! the link leads to says so, since its author will have meant that. The link is the container's, which may have made it.

use std::{
    collections::BTreeMap,
    os::fd::{AsRawFd as _, OwnedFd},
    sync::mpsc,
    time::Duration,
};

use palisade_abi::codes::{origin, reason};
use palisade_profile::{glob::Pattern, policy::Policy};
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2, readlinkat};

use super::{Agent, digests::root_of};
use crate::records::Body;

/// Rules of one policy that are looked at.
const MOST_RULES: usize = 1024;
/// How long the agent waits for a container's file system, once for each of its revisions.
const PATIENCE: Duration = Duration::from_millis(100);

/// Which rules of a container's policy are links, by what they lead to.
#[derive(Clone, Debug, Default)]
pub struct Links {
    revision: Option<String>,
    known: BTreeMap<String, String>,
}

impl Agent {
    /// Names the rule whose path leads to what was refused by a symbolic link.
    pub(super) fn name_rule_by_link(&mut self, slot: u64, body: &mut Body) {
        let by_no_rule = body
            .decision
            .as_ref()
            .is_some_and(|decision| !decision.is_allowed() && decision.reason == reason::NO_RULE);
        let Some(exec) = body.exec_mut().filter(|exec| by_no_rule && exec.file.origin == origin::IMAGE)
        else {
            return;
        };
        let Some(container) = self.containers.get(&slot) else { return };
        if container.links.revision.as_ref() != Some(&container.revision) {
            // Whatever comes of it, it is not tried again: whoever is refused decides how often this is asked.
            let links = Links {
                revision: Some(container.revision.clone()),
                known: self.links_of(slot).unwrap_or_default(),
            };
            if let Some(container) = self.containers.get_mut(&slot) {
                container.links = links;
            }
        }
        let Some(container) = self.containers.get(&slot) else { return };
        if let Some(rule) = container.links.known.get(&exec.judged().path_text()) {
            exec.rest.rule_by_link.clone_from(rule);
        }
    }

    fn links_of(&self, slot: u64) -> Option<BTreeMap<String, String>> {
        let identity = self.containers.get(&slot)?.identity.as_ref()?;
        let policy = self.profiles.policy_for(&identity.facts)?;
        let rules = exact(&policy);
        let pid = self.process_in_its_root(slot)?;
        let device = self.kernel.maps.state.root_device(slot);
        let (sender, found) = mpsc::channel();
        // A thread that the container's file system keeps waiting is left behind.
        std::thread::spawn(move || {
            let found = root_of(pid, Some(device)).map(|root| links(&root, rules));
            let _nobody_waits = sender.send(found);
        });
        found.recv_timeout(PATIENCE).ok()?.ok()
    }
}

/// The exact rules of a policy, as many as are looked at.
fn exact(policy: &Policy) -> Vec<Pattern> {
    let patterns =
        policy.exec.iter().flat_map(|exec| exec.allowed.keys()).filter(|pattern| pattern.exact().is_some());
    patterns.take(MOST_RULES).cloned().collect()
}

/// Which of these rules are links below `root`, as they are written, by what they lead to.
fn links(root: &OwnedFd, rules: Vec<Pattern>) -> BTreeMap<String, String> {
    let led = |rule: Pattern| {
        let path = rule.exact()?;
        let target = target(root, path).filter(|target| target != path)?;
        Some((target, rule.as_str().to_owned()))
    };
    rules.into_iter().filter_map(led).collect()
}

/// Where a path below `root` leads, without leaving its filesystem.
fn target(root: &OwnedFd, path: &str) -> Option<String> {
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
    let file = openat2(root, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve).ok()?;
    let shown = |file: &OwnedFd| {
        let place = format!("/proc/self/fd/{}", file.as_raw_fd());
        readlinkat(rustix::fs::CWD, place, Vec::new()).ok()?.into_string().ok()
    };
    // As the kernel shows both, whatever the root is called here.
    let (root, file) = (shown(root)?, shown(&file)?);
    file.strip_prefix(root.trim_end_matches('/')).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use palisade_profile::{document::parse, policy::alone};

    use super::*;

    #[test]
    fn a_rule_that_is_a_link_is_known_by_what_it_leads_to() {
        let folder = tempfile::tempdir().unwrap();
        let at = |path: &str| folder.path().join(path);
        std::fs::create_dir_all(at("usr/bin")).unwrap();
        std::fs::write(at("usr/bin/dash"), "").unwrap();
        std::os::unix::fs::symlink("usr/bin", at("bin")).unwrap();
        std::os::unix::fs::symlink("/usr/bin/dash", at("usr/bin/sh")).unwrap();
        std::os::unix::fs::symlink("/absent", at("usr/bin/broken")).unwrap();
        std::fs::write(at("usr/bin/ash"), "").unwrap();
        std::os::unix::fs::symlink("/usr/bin/ash", at("usr/bin/a*")).unwrap();
        let text = "apiVersion: palisade.dev/v1alpha1\nkind: ClusterProfile\nmetadata: {name: a}\n\
             spec: {selector: {}, mode: audit, exec: {allow: [{path: /bin/sh}, {path: /usr/bin/dash}, {path: /usr/bin/broken}, \
             {path: /absent}, {path: /bin/*}, {path: '/bin/a\\*'}]}}\n";
        let policy = alone(&parse("x", text).unwrap()[0]);
        let root: OwnedFd = std::fs::File::open(folder.path()).unwrap().into();
        let expected = [("/usr/bin/ash", "/bin/a\\*"), ("/usr/bin/dash", "/bin/sh")]
            .map(|(to, rule)| (to.to_owned(), rule.to_owned()));
        let expected = BTreeMap::from(expected);
        assert_eq!(links(&root, exact(&policy)), expected);
    }
}
