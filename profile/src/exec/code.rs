//! Code that a process gets other than by an exec: what is mapped executable, made at run time, or written into it from outside.

use std::collections::{BTreeMap, BTreeSet};

use palisade_abi::codes::code_flags;

use crate::{glob::Pattern, origin::Origin};

/// What a policy says about such code.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CodeRules {
    /// What may be mapped executable besides what may be executed. `None`: every unmodified file of the image.
    pub libraries: Option<Libraries>,
    /// Memory files (memfd, shared memory, files on a tmpfs that is no volume) may be mapped executable.
    pub memory: bool,
    /// So may memory that is in no file, or that was written to.
    pub jit: bool,
    /// Processes may trace others and write to the memory of running ones.
    pub trace: bool,
    /// No program may have rights that its caller has not. Only where every profile says so.
    pub no_elevation: bool,
}

/// Where the bytes may come from, by path.
pub type Libraries = BTreeMap<Pattern, BTreeSet<Origin>>;

impl CodeRules {
    /// Adds what `other` allows.
    pub fn unite(&mut self, other: &Self) {
        let Self { libraries, memory, jit, trace, no_elevation } = other;
        match (&mut self.libraries, libraries) {
            (None, None) => {}
            (Some(own), Some(other)) => add(own, other),
            (Some(own), None) => add(own, &whole_image()),
            (own @ None, Some(other)) => {
                let mut union = whole_image();
                add(&mut union, other);
                *own = Some(union);
            }
        }
        self.memory |= memory;
        self.jit |= jit;
        self.trace |= trace;
        self.no_elevation &= no_elevation;
    }

    /// [`code_flags`] of a policy image.
    #[must_use]
    pub fn flags(&self) -> u32 {
        let image = whole_image();
        let of_image = self.libraries.as_ref().is_none_or(|libraries| {
            image
                .iter()
                .all(|(path, origins)| libraries.get(path).is_some_and(|listed| listed.is_superset(origins)))
        });
        [
            (of_image, code_flags::LIBRARIES_OF_IMAGE),
            (self.memory, code_flags::MEMORY),
            (self.jit, code_flags::JIT),
            (self.trace, code_flags::TRACE),
            (self.no_elevation, code_flags::NO_ELEVATION),
        ]
        .into_iter()
        .filter(|(set, _)| *set)
        .fold(0, |flags, (_, flag)| flags | flag)
    }
}

fn add(own: &mut Libraries, other: &Libraries) {
    for (path, origins) in other {
        own.entry(path.clone()).or_default().extend(origins.iter().cloned());
    }
}

/// What holds where `libraries` is left out.
fn whole_image() -> Libraries {
    // The pattern is valid; a test says so.
    Pattern::parse("/**")
        .map(|all| BTreeMap::from([(all, BTreeSet::from([Origin::Image]))]))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_leaves_out_and_another_lists_adds_up() {
        assert_eq!(whole_image().len(), 1);
        let listed = |path: &str| CodeRules {
            libraries: Some(BTreeMap::from([(
                Pattern::parse(path).unwrap(),
                BTreeSet::from([Origin::Volume(crate::origin::VolumeName::parse("plugins").unwrap())]),
            )])),
            ..CodeRules::default()
        };
        let mut rules = listed("/opt/*.so");
        assert_eq!(rules.flags() & code_flags::LIBRARIES_OF_IMAGE, 0);
        rules.unite(&listed("/opt/b"));
        assert_eq!(rules.libraries.as_ref().unwrap().len(), 2);
        rules.unite(&CodeRules { jit: true, ..CodeRules::default() });
        assert_eq!(rules.libraries.as_ref().unwrap().len(), 3);
        assert_eq!(rules.flags(), code_flags::LIBRARIES_OF_IMAGE | code_flags::JIT);
        let mut other = CodeRules::default();
        other.unite(&listed("/opt/*.so"));
        assert_eq!(other.flags(), code_flags::LIBRARIES_OF_IMAGE);
        assert_eq!(other.libraries.unwrap().len(), 2);
    }
}
