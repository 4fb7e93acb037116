//! The rules of the section `exec`, of all revisions in force.

use std::collections::HashMap as Table;

use anyhow::{Context as _, Result};
use aya::maps::{HashMap, MapData};
use palisade_abi::{
    hash::hash_path,
    policy::{
        SectionHead,
        exec::{RuleKey, RuleValue},
    },
};
use palisade_profile::exec::image::{Exact, Image};

use super::Automata;
use crate::kernel::{
    maps::{BPF_ANY, copy},
    pins::SetFolder,
    sets::pinned_map,
};

/// The section of one revision.
#[derive(Default)]
pub(super) struct Written {
    pub(super) head: SectionHead,
    rules: Vec<(RuleKey, RuleValue)>,
}

impl Written {
    pub(super) fn new(hash_key: [u64; 2], number: u32, image: &Image, automata: &mut Automata) -> Self {
        let Image { flags, exact, globs } = image;
        let of_globs = automata.add(globs);
        let head = SectionHead {
            restricts: 1,
            flags: *flags,
            automaton_base: of_globs.start,
            automaton_width: globs.width() as u32,
            automaton_chunks: of_globs.len() as u32,
            reserved: 0,
        };
        let rules = exact.iter().map(|(key, rule)| {
            let Exact { grants, with_arguments, arguments, any, parent } = rule;
            let value = RuleValue {
                grants: *grants,
                with_arguments: *with_arguments,
                arguments_base: automata.add(arguments).start,
                arguments_width: arguments.width() as u32,
                any: *any,
                parent: *parent,
            };
            let path_hash = hash_path(hash_key, &key.path);
            (RuleKey { path_hash, revision: number, parent: key.parent }, value)
        });
        Self { head, rules: rules.collect() }
    }

    pub(super) fn move_automata(&mut self, base: u32) {
        self.rules.iter_mut().for_each(|(_, rule)| rule.arguments_base += base);
    }
}

/// The map of rules.
pub(super) struct Store {
    rules: HashMap<MapData, RuleKey, RuleValue>,
}

impl Store {
    pub(super) fn open(folder: &SetFolder) -> Result<Self> {
        Ok(Self { rules: pinned_map(&folder.map("RULES"))?.try_into()? })
    }

    /// Writes a section; the keys of what was written are added to `done`, also when it fails.
    pub(super) fn write(&mut self, section: Written, done: &mut Vec<RuleKey>) -> Result<()> {
        for (key, rule) in section.rules {
            self.rules
                .insert(key, rule, BPF_ANY)
                .context("the map of rules is full; raise maps.rules in the agent's configuration")?;
            done.push(key);
        }
        Ok(())
    }

    /// Whether it has exactly this section, where its revision has so many rules.
    pub(super) fn holds(&self, section: &Written, count: usize) -> bool {
        section.rules.len() == count
            && section
                .rules
                .iter()
                .all(|(key, rule)| self.rules.get(key, 0).is_ok_and(|found| found == *rule))
    }

    /// The keys of all rules, by revision.
    pub(super) fn read_back(&self) -> Result<Table<u32, Vec<RuleKey>>> {
        let mut keys: Table<u32, Vec<RuleKey>> = Table::new();
        for key in self.rules.keys() {
            let key = key?;
            keys.entry(key.revision).or_default().push(key);
        }
        Ok(keys)
    }

    pub(super) fn remove(&mut self, keys: Vec<RuleKey>) {
        for key in keys {
            let _gone_is_gone = self.rules.remove(&key);
        }
    }

    /// Copies the rules of an old set.
    pub(super) fn inherit(&mut self, old: &Self) -> Result<()> {
        copy(&old.rules, &mut self.rules, |_, _| true).context("no room for rules; raise maps.rules")
    }
}
