//! The policy of one container: the union of its profiles' rules under the strictest of their modes.

use std::collections::BTreeMap;

use palisade_abi::codes::session;
use sha2::{Digest as _, Sha256};

use crate::{
    document::{ExecRule, Mode, Origin, Profile, Scope},
    glob::Pattern,
    selector::ContainerFacts,
    session::Sessions,
};

/// What holds for a container. Equal policies are one revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// References of the profiles that were united, sorted.
    pub profiles: Vec<String>,
    pub mode: Mode,
    /// `None` when no profile has an `exec` section.
    pub exec: Option<Rules>,
}

/// By path, and by where its bytes come from: who may execute it.
pub type Rules = BTreeMap<Pattern, BTreeMap<Origin, Sessions>>;

/// Chooses and unites the profiles for a container; `None` when none names it.
///
/// A namespace's profiles take the place of the cluster's. A section that only some of the united profiles have
/// restricts: its absence in the others adds nothing to it.
#[must_use]
pub fn unite<'a>(
    profiles: impl IntoIterator<Item = &'a Profile, IntoIter: Clone>,
    facts: &ContainerFacts,
) -> Option<Policy> {
    let profiles = profiles.into_iter();
    let selected = |wanted: &dyn Fn(&Scope) -> bool| -> Vec<&Profile> {
        profiles.clone().filter(|profile| wanted(&profile.scope) && profile.selector.matches(facts)).collect()
    };
    let mut chosen =
        selected(&|scope| matches!(scope, Scope::Namespace(namespace) if *namespace == facts.namespace));
    if chosen.is_empty() {
        chosen = selected(&|scope| *scope == Scope::Cluster);
    }
    let mode = chosen.iter().map(|profile| profile.mode).max()?;
    let mut names: Vec<String> = chosen.iter().map(|profile| profile.reference()).collect();
    names.sort();
    let mut exec = None;
    for rules in chosen.iter().filter_map(|profile| profile.exec.as_ref()) {
        add(exec.get_or_insert_default(), rules);
    }
    Some(Policy { profiles: names, mode, exec })
}

/// The policy that one profile makes by itself, to check that it can be compiled.
#[must_use]
pub fn alone(profile: &Profile) -> Policy {
    let exec = profile.exec.as_ref().map(|rules| {
        let mut union = Rules::new();
        add(&mut union, rules);
        union
    });
    Policy { profiles: vec![profile.reference()], mode: profile.mode, exec }
}

fn add(union: &mut Rules, rules: &[ExecRule]) {
    for rule in rules {
        let origins = union.entry(rule.path.clone()).or_default();
        for origin in &rule.from {
            origins.entry(origin.clone()).or_default().add(rule.sessions);
        }
    }
}

impl Policy {
    /// Whether a verdict can depend on which volume a file is on. Such a policy means nothing before the container's
    /// mounts are known: until then a volume's files pass for the host's, or for memory.
    #[must_use]
    pub fn needs_mounts(&self) -> bool {
        let mut origins = self.exec.iter().flat_map(BTreeMap::values).flat_map(BTreeMap::keys);
        origins.any(|origin| matches!(origin, Origin::Volume(_) | Origin::Host | Origin::Memory))
    }

    /// Names the revision by its content: the first 12 hexadecimal digits of a SHA-256.
    #[must_use]
    pub fn revision_name(&self) -> String {
        let Self { profiles, mode, exec } = self;
        let mut hash = Sha256::new();
        let mut part = |text: &str| {
            hash.update((text.len() as u64).to_le_bytes());
            hash.update(text.as_bytes());
        };
        for profile in profiles {
            part(profile);
        }
        part(mode.as_str());
        match exec {
            None => part("exec is not restricted"),
            Some(rules) => {
                for (pattern, origins) in rules {
                    part(pattern.as_str());
                    for (origin, sessions) in origins {
                        part(&origin.to_string());
                        for code in sessions.codes().filter(|_| !sessions.is_any()) {
                            part(session::name(code).unwrap_or_default());
                        }
                    }
                }
            }
        }
        hash.finalize().iter().take(6).map(|byte| format!("{byte:02x}")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::document::parse;

    fn profile(kind: &str, name: &str, mode: &str, path: &str) -> Profile {
        let namespace = if kind == "Profile" { ", namespace: shop" } else { "" };
        let text = format!(
            "apiVersion: palisade.dev/v1alpha1\nkind: {kind}\nmetadata: {{name: {name}{namespace}}}\n\
             spec: {{selector: {{}}, mode: {mode}, exec: {{allow: [{{path: {path}}}]}}}}\n"
        );
        parse("x", &text).unwrap().remove(0)
    }

    fn facts(namespace: &str) -> ContainerFacts {
        ContainerFacts { namespace: namespace.to_owned(), ..ContainerFacts::default() }
    }

    #[test]
    fn rules_add_up_under_the_strictest_mode() {
        let profiles = [profile("Profile", "a", "audit", "/a"), profile("Profile", "b", "enforce", "/b")];
        let policy = unite(&profiles, &facts("shop")).unwrap();
        assert_eq!(policy.mode, Mode::Enforce);
        assert_eq!(policy.exec.unwrap().len(), 2);
    }

    #[test]
    fn a_profile_takes_the_place_of_a_cluster_profile() {
        let profiles =
            [profile("ClusterProfile", "a", "enforce", "/a"), profile("Profile", "b", "audit", "/b")];
        assert_eq!(unite(&profiles, &facts("shop")).unwrap().profiles, ["shop/b"]);
        assert_eq!(unite(&profiles, &facts("other")).unwrap().profiles, ["a"]);
    }

    #[test]
    fn a_revision_is_named_by_its_content() {
        let name =
            |path| unite(&[profile("Profile", "a", "audit", path)], &facts("shop")).unwrap().revision_name();
        assert_eq!(name("/a"), name("/a"));
        assert_ne!(name("/a"), name("/b"));
    }
}
