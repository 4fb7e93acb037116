//! No circle between the modules of a crate: what a module takes from others is read out of its paths, and nothing may lead back to it.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use syn::visit::{self, Visit};

use crate::paths;

/// Names of a module from the crate's root on; none for the root.
type Module = Vec<String>;

/// What each module takes from others.
type Arrows = BTreeMap<Module, BTreeSet<Module>>;

/// The crates that are looked at.
const CRATES: [&str; 2] = ["agent-abi", "agent-ebpf"];

#[test]
fn no_modules_take_from_each_other_in_a_circle() {
    for name in CRATES {
        let circles = circles(&arrows(&paths::repository().join(name).join("src")));
        assert!(circles.is_empty(), "circles in {name}:\n{}", circles.join("\n"));
    }
}

#[test]
fn a_circle_is_found() {
    let files = [
        ("", "mod a; mod b; mod c; pub use a::Thing;"),
        ("a", "use crate::b::{self, helper}; struct Thing;"),
        ("b", "fn helper() { super::c::deep() }"),
        ("c", "#[cfg(test)] mod tests { use crate::b; } fn deep() -> crate::a::Thing { loop {} }"),
    ];
    let files: Vec<(Module, String)> = files
        .map(|(name, text)| {
            let module = if name.is_empty() { Vec::new() } else { vec![name.to_owned()] };
            (module, text.to_owned())
        })
        .into();
    assert_eq!(circles(&arrows_between(&files)), ["a → b", "b → c", "c → a"]);
    // Without the last arrow there is none: what tests take does not count, nor what the root hands on.
    let mut files = files;
    files[3].1 = files[3].1.replace("crate::a::Thing", "u8");
    assert!(circles(&arrows_between(&files)).is_empty());
}

/// The arrows between the modules below `source`.
fn arrows(source: &Path) -> Arrows {
    let mut files = Vec::new();
    collect(source, &mut Vec::new(), &mut files);
    assert!(!files.is_empty(), "no source in {}", source.display());
    arrows_between(&files)
}

/// The modules in `folder`, with their text.
fn collect(folder: &Path, module: &mut Module, files: &mut Vec<(Module, String)>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        if path.is_dir() {
            // Programs of their own.
            if name != "bin" {
                module.push(name);
                collect(&path, module, files);
                module.pop();
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let mut own = module.clone();
            if !matches!(name.as_str(), "main" | "lib" | "mod") {
                own.push(name);
            }
            files.push((own, std::fs::read_to_string(&path).unwrap()));
        }
    }
}

fn arrows_between(files: &[(Module, String)]) -> Arrows {
    let modules: BTreeSet<Module> = files.iter().map(|(module, _)| module.clone()).collect();
    let mut arrows = Arrows::new();
    let mut of_tests = BTreeSet::new();
    for (module, text) in files {
        let file = syn::parse_file(text).unwrap_or_else(|error| panic!("{}: {error}", module.join("::")));
        let mut reader =
            Reader { module, modules: &modules, taken: BTreeSet::new(), of_tests: &mut of_tests };
        reader.visit_file(&file);
        arrows.entry(module.clone()).or_default().extend(reader.taken);
    }
    arrows.retain(|module, _| !of_tests.contains(module));
    arrows
}

/// Reads one file.
struct Reader<'a> {
    module: &'a Module,
    modules: &'a BTreeSet<Module>,
    taken: BTreeSet<Module>,
    /// Modules that are only there in tests.
    of_tests: &'a mut BTreeSet<Module>,
}

impl Reader<'_> {
    /// Notes the module that `path` leads to, if it is another one of the crate.
    fn take(&mut self, path: &[String]) {
        let mut place = match path.first().map(String::as_str) {
            Some("crate") => Vec::new(),
            Some("self") => self.module.clone(),
            Some("super") => self.module[..self.module.len().saturating_sub(1)].to_vec(),
            Some(child) => {
                let mut place = self.module.clone();
                place.push(child.to_owned());
                if !self.modules.contains(&place) {
                    return;
                }
                place
            }
            None => return,
        };
        for name in &path[1..] {
            if name == "super" {
                place.pop();
                continue;
            }
            place.push(name.clone());
            if !self.modules.contains(&place) {
                place.pop();
                break;
            }
        }
        if place != *self.module {
            self.taken.insert(place);
        }
    }

    fn take_tree(&mut self, tree: &syn::UseTree, path: &mut Vec<String>) {
        match tree {
            syn::UseTree::Path(step) => {
                path.push(step.ident.to_string());
                self.take_tree(&step.tree, path);
                path.pop();
            }
            syn::UseTree::Group(group) => {
                for tree in &group.items {
                    self.take_tree(tree, path);
                }
            }
            syn::UseTree::Name(syn::UseName { ident })
            | syn::UseTree::Rename(syn::UseRename { ident, .. }) => {
                path.push(ident.to_string());
                self.take(path);
                path.pop();
            }
            syn::UseTree::Glob(_) => self.take(path),
        }
    }
}

fn is_of_tests(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("cfg")
            && attribute.parse_args::<syn::Path>().is_ok_and(|what| what.is_ident("test"))
    })
}

impl<'a> Visit<'a> for Reader<'_> {
    fn visit_item_mod(&mut self, item: &'a syn::ItemMod) {
        if !is_of_tests(&item.attrs) {
            visit::visit_item_mod(self, item);
        } else if item.content.is_none() {
            let mut module = self.module.clone();
            module.push(item.ident.to_string());
            self.of_tests.insert(module);
        }
    }

    fn visit_item_use(&mut self, item: &'a syn::ItemUse) {
        // What a module hands on from one of its own is that one's.
        let hands_on = !matches!(item.vis, syn::Visibility::Inherited);
        if !hands_on && !is_of_tests(&item.attrs) {
            self.take_tree(&item.tree, &mut Vec::new());
        }
    }

    fn visit_path(&mut self, path: &'a syn::Path) {
        let names: Vec<String> = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
        if names.len() > 1 {
            self.take(&names);
        }
        visit::visit_path(self, path);
    }
}

/// The arrows of which circles consist, in words.
fn circles(arrows: &Arrows) -> Vec<String> {
    let reached = |from: &Module| -> BTreeSet<Module> {
        let mut reached = BTreeSet::new();
        let mut next: Vec<&Module> = arrows.get(from).into_iter().flatten().collect();
        while let Some(module) = next.pop() {
            if reached.insert(module.clone()) {
                next.extend(arrows.get(module).into_iter().flatten());
            }
        }
        reached
    };
    let words = |module: &Module| if module.is_empty() { "crate".to_owned() } else { module.join("::") };
    let mut circles = Vec::new();
    for (from, taken) in arrows {
        for to in taken.iter().filter(|to| reached(to).contains(from)) {
            circles.push(format!("{} → {}", words(from), words(to)));
        }
    }
    circles
}
