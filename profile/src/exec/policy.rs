//! The section of a container's policy: the union of its profiles' rules.

use std::collections::BTreeMap;

use palisade_abi::codes::session;

use super::{ExecRule, Section, code::CodeRules, condition::Condition};
use crate::{digest::Digest, glob::Pattern, origin::Origin, session::Sessions};

/// What may be executed in a container, and what else may become code there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    pub allowed: Allowed,
    /// Rules that hold only where the image's file has these bytes; [`Rules::verified`] decides about them.
    pub pinned: Pinned,
    pub code: CodeRules,
}

/// Who may execute something, by what else must hold.
pub type Who = BTreeMap<Condition, Sessions>;

/// By path and by what the bytes must be: who may execute it.
pub type Pinned = BTreeMap<(Pattern, Digest), Who>;

/// By path, and by where its bytes come from: who may execute it.
pub type Allowed = BTreeMap<Pattern, BTreeMap<Origin, Who>>;

impl Rules {
    /// The union; `None` when there is no section. One that is absent adds nothing.
    pub(crate) fn unite<'a>(sections: impl IntoIterator<Item = &'a Section>) -> Option<Self> {
        let mut sections = sections.into_iter().peekable();
        let mut rules = Self { code: sections.peek()?.code.clone(), ..Self::default() };
        for Section { allow, code } in sections {
            add(&mut rules.allowed, &mut rules.pinned, allow);
            rules.code.unite(code);
        }
        Some(rules)
    }

    /// The rules of a container whose image has files of these digests: a pinned rule whose bytes are as it says is one like
    /// any other, and one whose bytes are not is none.
    pub(crate) fn verified(mut self, digest_of: impl Fn(&str) -> Option<Digest>) -> Self {
        for ((path, digest), who) in std::mem::take(&mut self.pinned) {
            if path.exact().and_then(&digest_of) == Some(digest) {
                let origins = self.allowed.entry(path).or_default();
                add_who(origins.entry(Origin::Image).or_default(), &who);
            }
        }
        self
    }

    /// What each pinned file is to be.
    #[must_use]
    pub fn pinned_digests(&self) -> BTreeMap<String, Digest> {
        self.pinned.keys().filter_map(|(path, digest)| Some((path.exact()?.to_owned(), *digest))).collect()
    }

    /// As [`crate::policy::Policy::needs_mounts`].
    pub(crate) fn needs_mounts(&self) -> bool {
        let executables = self.allowed.values().flat_map(BTreeMap::keys);
        let libraries = self.code.libraries.iter().flat_map(BTreeMap::values).flatten();
        self.code.memory
            || !self.pinned.is_empty()
            || executables
                .chain(libraries)
                .any(|origin| matches!(origin, Origin::Volume(_) | Origin::Host | Origin::Memory))
    }

    /// Hands everything that makes them these rules to `part`, in an order of their own.
    pub(crate) fn name(&self, part: &mut impl FnMut(&str)) {
        let Self { allowed, pinned, code } = self;
        for (pattern, origins) in allowed {
            part(pattern.as_str());
            for (origin, who) in origins {
                part(&origin.to_string());
                part_of_who(part, who);
            }
        }
        for ((path, digest), who) in pinned {
            part("pinned");
            part(path.as_str());
            part(&digest.to_string());
            part_of_who(part, who);
        }
        part_of_code(part, code);
    }
}

fn add(allowed: &mut Allowed, pinned: &mut Pinned, rules: &[ExecRule]) {
    for rule in rules {
        let conditions = Condition::each(&rule.parents, rule.arguments.as_ref());
        let who = conditions.into_iter().map(|condition| (condition, rule.sessions)).collect();
        if let Some(digest) = rule.sha256 {
            add_who(pinned.entry((rule.path.clone(), digest)).or_default(), &who);
            continue;
        }
        let origins = allowed.entry(rule.path.clone()).or_default();
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
