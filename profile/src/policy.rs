//! The policy of one container: the union of its profiles' sections under the strictest of their modes.

use sha2::{Digest as _, Sha256};

use crate::{
    digest::Digest,
    document::{Profile, Scope},
    exec,
    mode::Mode,
    selector::ContainerFacts,
};

/// What holds for a container. Equal policies are one revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// References of the profiles that were united, sorted.
    pub profiles: Vec<String>,
    pub mode: Mode,
    /// `None` when no profile has the section: then the family is not restricted.
    pub exec: Option<exec::Rules>,
}

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
    Some(of(names, mode, &chosen))
}

/// The policy that one profile makes by itself, to check that it can be compiled.
#[must_use]
pub fn alone(profile: &Profile) -> Policy {
    of(vec![profile.reference()], profile.mode, &[profile])
}

fn of(names: Vec<String>, mode: Mode, profiles: &[&Profile]) -> Policy {
    let exec = exec::Rules::unite(profiles.iter().filter_map(|profile| profile.exec.as_ref()));
    Policy { profiles: names, mode, exec }
}

impl Policy {
    /// The policy of a container whose image has files of these digests: a pinned rule whose bytes are as it says is one like
    /// any other, and one whose bytes are not is none.
    #[must_use]
    pub fn verified(self, digest_of: impl Fn(&str) -> Option<Digest>) -> Self {
        let Self { profiles, mode, exec } = self;
        Self { profiles, mode, exec: exec.map(|rules| rules.verified(digest_of)) }
    }

    /// The policy as it is where every pinned file is as its rule says: the largest that it can become.
    #[must_use]
    pub fn verified_whole(self) -> Self {
        let pinned = self.exec.as_ref().map(exec::Rules::pinned_digests).unwrap_or_default();
        self.verified(|path| pinned.get(path).copied())
    }

    /// Whether a verdict can depend on which volume a file is on. Such a policy means nothing before the container's
    /// mounts are known: until then a volume's files pass for the host's, or for memory. Nor does one with pinned rules, whose
    /// files cannot be read before its root filesystem is there.
    #[must_use]
    pub fn needs_mounts(&self) -> bool {
        let Self { profiles: _, mode: _, exec } = self;
        exec.as_ref().is_some_and(exec::Rules::needs_mounts)
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
            Some(rules) => rules.name(&mut part),
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
        assert_eq!(policy.exec.unwrap().allowed.len(), 2);
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
        assert!(policy.needs_mounts() && policy.exec.as_ref().unwrap().allowed.is_empty());
        let verified = |found: Option<Digest>| policy.clone().verified(|path| found.filter(|_| path == "/a"));
        assert_eq!(verified(Some(digest)).exec.unwrap().allowed.len(), 1);
        for other in [verified(None), verified(Some(Digest([8; 32])))] {
            assert_eq!(other.exec, Some(exec::Rules::default()));
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
