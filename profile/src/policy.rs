//! The policy of one container: the union of its profiles' rules under the strictest of their modes.

use std::collections::BTreeMap;

use palisade_abi::codes::session;
use sha2::{Digest as _, Sha256};

use crate::{
    code::CodeRules,
    condition::Condition,
    digest::Digest,
    document::{Profile, Scope},
    exec::ExecRule,
    glob::Pattern,
    mode::Mode,
    origin::Origin,
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
    /// Rules that hold only where the image's file has these bytes; [`Policy::verified`] decides about them.
    pub pinned: Pinned,
    /// The rest of that section.
    pub code: CodeRules,
}

/// Who may execute something, by what else must hold.
pub type Who = BTreeMap<Condition, Sessions>;

/// By path and by what the bytes must be: who may execute it.
pub type Pinned = BTreeMap<(Pattern, Digest), Who>;

/// By path, and by where its bytes come from: who may execute it.
pub type Rules = BTreeMap<Pattern, BTreeMap<Origin, Who>>;

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
    let (exec, pinned, code) = sections(&chosen);
    Some(Policy { profiles: names, mode, exec, pinned, code })
}

fn sections(profiles: &[&Profile]) -> (Option<Rules>, Pinned, CodeRules) {
    let mut exec = None;
    let mut pinned = Pinned::new();
    let mut code = CodeRules::default();
    for profile in profiles {
        let Some(rules) = &profile.exec else { continue };
        if exec.is_none() {
            code = profile.code.clone();
        }
        add(exec.get_or_insert_default(), &mut pinned, rules);
        code.unite(&profile.code);
    }
    (exec, pinned, code)
}

/// The policy that one profile makes by itself, to check that it can be compiled.
#[must_use]
pub fn alone(profile: &Profile) -> Policy {
    let (exec, pinned, code) = sections(&[profile]);
    Policy { profiles: vec![profile.reference()], mode: profile.mode, exec, pinned, code }
}

fn add(union: &mut Rules, pinned: &mut Pinned, rules: &[ExecRule]) {
    for rule in rules {
        let conditions = Condition::each(&rule.parents, rule.arguments.as_ref());
        let who = conditions.into_iter().map(|condition| (condition, rule.sessions)).collect();
        if let Some(digest) = rule.sha256 {
            add_who(pinned.entry((rule.path.clone(), digest)).or_default(), &who);
            continue;
        }
        let origins = union.entry(rule.path.clone()).or_default();
        for origin in &rule.from {
            add_who(origins.entry(origin.clone()).or_default(), &who);
        }
    }
}

fn add_who(own: &mut Who, other: &Who) {
    for (condition, sessions) in other {
        own.entry(condition.clone()).or_default().add(*sessions);
    }
}

impl Policy {
    /// The policy of a container whose image has files of these digests: a pinned rule whose bytes are as it says is one like
    /// any other, and one whose bytes are not is none.
    #[must_use]
    pub fn verified(mut self, digest_of: impl Fn(&str) -> Option<Digest>) -> Self {
        for ((path, digest), who) in std::mem::take(&mut self.pinned) {
            if path.exact().and_then(&digest_of) == Some(digest) {
                let origins = self.exec.get_or_insert_default().entry(path).or_default();
                add_who(origins.entry(Origin::Image).or_default(), &who);
            }
        }
        self
    }

    /// The policy as it is where every pinned file is as its rule says: the largest that it can become.
    #[must_use]
    pub fn verified_whole(self) -> Self {
        let pinned: BTreeMap<String, Digest> = self
            .pinned
            .keys()
            .filter_map(|(path, digest)| Some((path.exact()?.to_owned(), *digest)))
            .collect();
        self.verified(|path| pinned.get(path).copied())
    }

    /// Whether a verdict can depend on which volume a file is on. Such a policy means nothing before the container's
    /// mounts are known: until then a volume's files pass for the host's, or for memory. Nor does one with pinned rules, whose
    /// files cannot be read before its root filesystem is there.
    #[must_use]
    pub fn needs_mounts(&self) -> bool {
        let executables = self.exec.iter().flat_map(BTreeMap::values).flat_map(BTreeMap::keys);
        let libraries = self.code.libraries.iter().flat_map(BTreeMap::values).flatten();
        self.code.memory
            || !self.pinned.is_empty()
            || executables
                .chain(libraries)
                .any(|origin| matches!(origin, Origin::Volume(_) | Origin::Host | Origin::Memory))
    }

    /// Names the revision by its content: the first 12 hexadecimal digits of a SHA-256.
    #[must_use]
    pub fn revision_name(&self) -> String {
        let Self { profiles, mode, exec, pinned, code } = self;
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
                    for (origin, who) in origins {
                        part(&origin.to_string());
                        part_of_who(&mut part, who);
                    }
                }
                for ((path, digest), who) in pinned {
                    part("pinned");
                    part(path.as_str());
                    part(&digest.to_string());
                    part_of_who(&mut part, who);
                }
                part_of_code(&mut part, code);
            }
        }
        hash.finalize().iter().take(6).map(|byte| format!("{byte:02x}")).collect()
    }
}

/// Adds who may execute something.
fn part_of_who(part: &mut impl FnMut(&str), who: &Who) {
    for (condition, sessions) in who {
        // No path, origin or session reads like these, and how many arguments follow is said.
        if let Some(parent) = &condition.parent {
            part("parent");
            part(parent.as_str());
        }
        if let Some(arguments) = &condition.arguments {
            part("arguments");
            part(&arguments.names().len().to_string());
            arguments.names().iter().for_each(|name| part(name));
            part(&arguments.patterns().len().to_string());
            arguments.patterns().iter().for_each(|pattern| part(pattern));
        }
        if !condition.is_none() || !sessions.is_any() {
            for code in sessions.codes() {
                part(session::name(code).unwrap_or_default());
            }
        }
    }
}

/// Adds what there is to say about other code; nothing for what holds by default, so that revisions keep their names.
fn part_of_code(part: &mut impl FnMut(&str), code: &CodeRules) {
    let CodeRules { libraries, memory, jit, trace, no_elevation } = code;
    if *code == CodeRules::default() {
        return;
    }
    // No path, origin or session reads like this, so nothing before can pass for what follows.
    part("other code");
    for (allowed, name) in
        [(memory, "memory"), (jit, "jit"), (trace, "trace"), (no_elevation, "no elevation")]
    {
        if *allowed {
            part(name);
        }
    }
    let Some(libraries) = libraries else { return };
    part("libraries");
    for (pattern, origins) in libraries {
        part(pattern.as_str());
        for origin in origins {
            part(&origin.to_string());
        }
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
    fn a_pinned_rule_holds_for_its_bytes_alone() {
        let digest = Digest([7; 32]);
        let text = format!(
            "apiVersion: palisade.dev/v1alpha1\nkind: ClusterProfile\nmetadata: {{name: a}}\n\
             spec: {{selector: {{}}, mode: audit, exec: {{allow: [{{path: /a, sha256: {digest}, sessions: admin}}]}}}}\n"
        );
        let policy = alone(&parse("x", &text).unwrap()[0]);
        assert!(policy.needs_mounts() && policy.exec.as_ref().unwrap().is_empty());
        let verified = |found: Option<Digest>| policy.clone().verified(|path| found.filter(|_| path == "/a"));
        assert_eq!(verified(Some(digest)).exec.unwrap().len(), 1);
        for other in [verified(None), verified(Some(Digest([8; 32])))] {
            assert!(other.exec.as_ref().unwrap().is_empty() && other.pinned.is_empty());
            assert_ne!(other.revision_name(), verified(Some(digest)).revision_name());
        }
    }

    #[test]
    fn a_condition_is_part_of_the_revision() {
        let name = |rules: &str| {
            let text = format!(
                "apiVersion: palisade.dev/v1alpha1\nkind: ClusterProfile\nmetadata: {{name: a}}\n\
                 spec: {{selector: {{}}, mode: audit, exec: {{allow: [{rules}]}}}}\n"
            );
            alone(&parse("x", &text).unwrap()[0]).revision_name()
        };
        let different = [
            "{path: /a}",
            "{path: /a, parents: /b}",
            "{path: /a, parents: /c}",
            "{path: /a, args: []}",
            "{path: /a, args: [x, y]}",
            "{path: /a, args: [xy]}",
            "{path: /a, parents: /b, args: [x]}",
            "{path: /a, args: [x], names: y}",
            "{path: /a}, {path: /a, args: [x]}",
            "{path: /a, parents: /b, sessions: admin}",
        ];
        for (index, one) in different.iter().enumerate() {
            for other in &different[index + 1..] {
                assert_ne!(name(one), name(other), "{one} and {other}");
            }
        }
        assert_eq!(
            name("{path: /a, parents: [/b, /c]}"),
            name("{path: /a, parents: /c}, {path: /a, parents: /b}")
        );
    }

    /// What agents of earlier builds have in force, and records name, is still called so.
    #[test]
    fn a_revision_keeps_its_name() {
        let text = r#"apiVersion: palisade.dev/v1alpha1
kind: ClusterProfile
metadata: {name: a}
spec:
  selector: {}
  mode: audit
  exec:
    allow:
      - {path: '/usr/lib/dev\x2dsda', parents: /bin/sh, args: ['a\d*', "**"], names: 'b*'}
      - {path: '/opt/*\n/**'}
"#;
        assert_eq!(alone(&parse("x", text).unwrap()[0]).revision_name(), "3a65e6ced79d");
    }

    /// Of the shipped examples: whatever is moved or made anew here, what is in force on nodes keeps its name.
    #[test]
    fn the_examples_keep_their_names() {
        let golden: &[(&str, &str, &[&str])] = &[
            ("web.yaml", include_str!("../../deploy/examples/web.yaml"), &["4039acb519cd"]),
            (
                "profiles/java.yaml",
                include_str!("../../deploy/examples/profiles/java.yaml"),
                &["8090ac615470"],
            ),
            (
                "profiles/nginx.yaml",
                include_str!("../../deploy/examples/profiles/nginx.yaml"),
                &["e691a96246ce"],
            ),
            (
                "profiles/postgresql.yaml",
                include_str!("../../deploy/examples/profiles/postgresql.yaml"),
                &["1829ad34229a"],
            ),
            (
                "profiles/python.yaml",
                include_str!("../../deploy/examples/profiles/python.yaml"),
                &["2a67a448a273"],
            ),
            (
                "profiles/redis.yaml",
                include_str!("../../deploy/examples/profiles/redis.yaml"),
                &["0b048d153ade"],
            ),
        ];
        for (file, text, names) in golden {
            let found: Vec<String> =
                parse(file, text).unwrap().iter().map(|profile| alone(profile).revision_name()).collect();
            assert_eq!(found, *names, "{file}");
        }
    }

    #[test]
    fn two_spellings_of_a_path_are_one_file() {
        let image = |rules: &str| {
            let text = format!(
                "apiVersion: palisade.dev/v1alpha1\nkind: ClusterProfile\nmetadata: {{name: a}}\n\
                 spec: {{selector: {{}}, mode: audit, exec: {{allow: [{rules}]}}}}\n"
            );
            crate::image::compile(&alone(&parse("x", &text).unwrap()[0])).unwrap()
        };
        let (one, other) = (r"{path: '/a\b', parents: '/c\d'}", r"{path: '/a\\b', parents: '/c\\d'}");
        assert_eq!(image(one), image(other));
        assert_eq!(image(one), image(&format!("{one}, {other}")));
    }

    #[test]
    fn other_code_is_never_mistaken_for_an_origin() {
        let name = |exec: &str| {
            let text = format!(
                "apiVersion: palisade.dev/v1alpha1\nkind: ClusterProfile\nmetadata: {{name: a}}\n\
                 spec: {{selector: {{}}, mode: audit, exec: {{{exec}}}}}\n"
            );
            alone(&parse("x", &text).unwrap()[0]).revision_name()
        };
        assert_ne!(
            name("allow: [{path: /a, from: [image, memory]}]"),
            name("allow: [{path: /a}], memory: allow")
        );
        assert_ne!(name("allow: [{path: /a}], libraries: []"), name("allow: [{path: /a}]"));
    }

    #[test]
    fn a_revision_is_named_by_its_content() {
        let name =
            |path| unite(&[profile("Profile", "a", "audit", path)], &facts("shop")).unwrap().revision_name();
        assert_eq!(name("/a"), name("/a"));
        assert_ne!(name("/a"), name("/b"));
    }
}
