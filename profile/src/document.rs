//! Reading profiles from YAML, with the place of every fault.
//!
//! A field that design and schema know but this build cannot enforce is an error, never ignored.

use std::collections::BTreeMap;

use marked_yaml::{
    Node,
    types::{MarkedMappingNode, MarkedScalarNode},
};

use crate::{
    exec,
    mode::Mode,
    problem::Problem,
    read::{Reader, documents, join},
    selector::{ContainerSelector, Selector},
};

pub const API_VERSION: &str = "palisade.dev/v1alpha1";

/// `Profile` or `ClusterProfile`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    Namespace(String),
    Cluster,
}

/// A profile as an author wrote it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Profile {
    pub name: String,
    pub scope: Scope,
    pub selector: Selector,
    pub mode: Mode,
    /// `None`: the section is absent and exec is not restricted.
    pub exec: Option<exec::Section>,
}

impl Profile {
    /// How the profile is named in records and messages: `namespace/name`, or the name alone for a cluster's.
    #[must_use]
    pub fn reference(&self) -> String {
        match &self.scope {
            Scope::Namespace(namespace) => format!("{namespace}/{}", self.name),
            Scope::Cluster => self.name.clone(),
        }
    }
}

/// Reads every profile of a file; documents are separated by `---` lines.
///
/// # Errors
///
/// All problems of the file, in its order.
pub fn parse(file: &str, text: &str) -> Result<Vec<Profile>, Vec<Problem>> {
    let mut reader = Reader { file, problems: Vec::new(), not_yet: NOT_YET };
    let mut profiles = Vec::new();
    for document in documents(text) {
        let before = reader.problems.len();
        if let Some(profile) = reader.document(&document)
            && reader.problems.len() == before
        {
            profiles.push(profile);
        }
    }
    if reader.problems.is_empty() && profiles.is_empty() {
        reader.problems.push(Problem {
            file: file.to_owned(),
            line: 0,
            column: 0,
            field: String::new(),
            message: "the file holds no profile".to_owned(),
            remedy: format!("start with \"apiVersion: {API_VERSION}\""),
        });
    }
    if reader.problems.is_empty() { Ok(profiles) } else { Err(reader.problems) }
}

/// Fields of the schema that this build cannot enforce, by their parent.
const NOT_YET: &[(&str, &[&str])] = &[
    ("spec", &["files", "network"]),
    ("spec.selector", &["namespaceSelector"]),
    ("spec.selector.podSelector", &["matchExpressions"]),
];

impl Reader<'_> {
    fn document(&mut self, text: &str) -> Option<Profile> {
        let root = self.tree(text)?;
        let root = self.mapping(&root, "")?;
        self.known(root, "", &["apiVersion", "kind", "metadata", "spec"]);
        let version = self.required_text(root, "", "apiVersion")?;
        if version.as_str() != API_VERSION {
            self.problem(
                version.span(),
                "apiVersion",
                format!("{:?} is not known", version.as_str()),
                format!("write {API_VERSION}"),
            );
        }
        let kind = self.required_text(root, "", "kind")?;
        let metadata = self.required_mapping(root, "", "metadata")?;
        self.known(metadata, "metadata", &["name", "namespace", "labels", "annotations"]);
        let name = self.required_text(metadata, "metadata", "name")?;
        if !is_dns_label(name.as_str()) {
            self.problem(
                name.span(),
                "metadata.name",
                format!("{:?} is not a name", name.as_str()),
                "use lower case letters, digits, '-' and '.', at most 253",
            );
        }
        let namespace = self.optional_text(metadata, "metadata", "namespace");
        let scope = match kind.as_str() {
            "Profile" => Scope::Namespace(
                namespace.map_or_else(|| "default".to_owned(), |node| node.as_str().to_owned()),
            ),
            "ClusterProfile" => {
                if let Some(namespace) = namespace {
                    self.problem(
                        namespace.span(),
                        "metadata.namespace",
                        "a ClusterProfile belongs to no namespace",
                        "remove the line, or write kind: Profile",
                    );
                }
                Scope::Cluster
            }
            other => {
                self.problem(
                    kind.span(),
                    "kind",
                    format!("{other:?} is not known"),
                    "write Profile or ClusterProfile",
                );
                return None;
            }
        };
        let spec = self.required_mapping(root, "", "spec")?;
        self.known(spec, "spec", &["selector", "mode", "exec"]);
        let selector = match spec.get_node("selector") {
            Some(node) => self.selector(node)?,
            None => {
                self.problem(
                    spec.span(),
                    "spec.selector",
                    "is missing",
                    "name the pods, e.g. podSelector: {matchLabels: {app: web}}; {} selects every pod",
                );
                return None;
            }
        };
        let mode = self.mode(spec);
        let exec = match spec.get_node("exec") {
            Some(node) => Some(self.exec(node)?),
            None => None,
        };
        Some(Profile { name: name.as_str().to_owned(), scope, selector, mode: mode?, exec })
    }

    fn mode(&mut self, spec: &MarkedMappingNode) -> Option<Mode> {
        let mode = self.required_text(spec, "spec", "mode")?;
        match mode.as_str() {
            "audit" => Some(Mode::Audit),
            "enforce" => Some(Mode::Enforce),
            "learn" => {
                self.problem(
                    mode.span(),
                    "spec.mode",
                    "this build cannot learn in place",
                    "write audit, and make a profile from what is recorded with `palisade profile init`",
                );
                None
            }
            other => {
                self.problem(
                    mode.span(),
                    "spec.mode",
                    format!("{other:?} is not a mode"),
                    "write audit or enforce",
                );
                None
            }
        }
    }

    fn selector(&mut self, node: &Node) -> Option<Selector> {
        let field = "spec.selector";
        let mapping = self.mapping(node, field)?;
        self.known(mapping, field, &["podSelector", "containers"]);
        let mut selector = Selector::default();
        if let Some(node) = mapping.get_node("podSelector") {
            let field = "spec.selector.podSelector";
            let mapping = self.mapping(node, field)?;
            self.known(mapping, field, &["matchLabels"]);
            if let Some(node) = mapping.get_node("matchLabels") {
                let field = "spec.selector.podSelector.matchLabels";
                selector.labels = self.labels(node, field)?;
            }
        }
        if let Some(node) = mapping.get_node("containers") {
            let field = "spec.selector.containers";
            let Some(list) = node.as_sequence() else {
                self.problem(node.span(), field, "must be a list", "write \"- name: …\" lines");
                return None;
            };
            for (index, node) in list.iter().enumerate() {
                let field = format!("{field}[{index}]");
                let mapping = self.mapping(node, &field)?;
                self.known(mapping, &field, &["name", "image"]);
                let text = |node: Option<&MarkedScalarNode>| node.map(|node| node.as_str().to_owned());
                selector.containers.push(ContainerSelector {
                    name: text(self.optional_text(mapping, &field, "name")),
                    image: text(self.optional_text(mapping, &field, "image")),
                });
            }
        }
        Some(selector)
    }

    fn labels(&mut self, node: &Node, field: &str) -> Option<BTreeMap<String, String>> {
        let mapping = self.mapping(node, field)?;
        let mut labels = BTreeMap::new();
        for (key, value) in mapping.iter() {
            // Unlike other texts a label's value may be empty.
            let Some(value) = value.as_scalar() else {
                let remedy = "write one value, in quotes if it has special characters";
                self.problem(value.span(), &join(field, key.as_str()), "must be a text", remedy);
                return None;
            };
            labels.insert(key.as_str().to_owned(), value.as_str().to_owned());
        }
        Some(labels)
    }
}

fn is_dns_label(name: &str) -> bool {
    let allowed =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'.');
    !name.is_empty() && name.len() <= 253 && name.bytes().all(allowed)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::origin::Origin;

    pub(crate) const GOOD: &str = "\
apiVersion: palisade.dev/v1alpha1
kind: Profile
metadata: {name: web, namespace: shop}
spec:
  selector:
    podSelector: {matchLabels: {app: web}}
    containers: [{name: nginx, image: \"registry.example/shop/web:*\"}]
  mode: enforce
  exec:
    allow:
      - path: /usr/sbin/nginx
      - {path: /opt/plugins/**, from: drift}
";

    pub(crate) fn problems(text: &str) -> Vec<String> {
        parse("web.yaml", text).unwrap_err().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_good_profile_is_read_whole() {
        let profiles = parse("web.yaml", GOOD).unwrap();
        let [profile] = profiles.as_slice() else { panic!() };
        assert_eq!(profile.reference(), "shop/web");
        assert_eq!(profile.mode, Mode::Enforce);
        let rules = &profile.exec.as_ref().unwrap().allow;
        assert_eq!(rules[0].path.as_str(), "/usr/sbin/nginx");
        assert_eq!(rules[0].from, BTreeSet::from([Origin::Image]));
        assert_eq!(rules[1].from, BTreeSet::from([Origin::Drift]));
    }

    #[test]
    fn an_error_names_file_line_column_field_and_remedy() {
        let bad = GOOD.replace("/usr/sbin/nginx", "usr/sbin/nginx");
        assert_eq!(
            problems(&bad),
            ["web.yaml:11:15: spec.exec.allow[0].path: \"usr/sbin/nginx\" does not start with '/'; \
              write the path from the root of the container's file system"]
        );
    }

    #[test]
    fn a_misspelt_field_is_guessed() {
        let found = problems(&GOOD.replace("  exec:", "  exce:"));
        assert_eq!(found, ["web.yaml:9:3: spec.exce: no such field; did you mean exec?"]);
    }

    #[test]
    fn what_this_build_cannot_enforce_is_an_error() {
        for (from, to, field) in [
            ("  mode: enforce", "  mode: enforce\n  network: {}", "spec.network"),
            ("  mode: enforce", "  mode: enforce\n  files: {}", "spec.files"),
            ("mode: enforce", "mode: learn", "spec.mode"),
        ] {
            let found = problems(&GOOD.replace(from, to));
            assert!(found.len() == 1 && found[0].contains(field), "{field}: {found:?}");
            assert!(found[0].contains("this build cannot"), "{found:?}");
        }
    }

    #[test]
    fn lines_are_those_of_the_file_in_every_document() {
        let two = format!("{GOOD}---\n{}", GOOD.replace("mode: enforce", "mode: maybe"));
        let found = problems(&two);
        assert_eq!(found, ["web.yaml:21:9: spec.mode: \"maybe\" is not a mode; write audit or enforce"]);
    }

    #[test]
    fn a_field_that_stands_twice_is_an_error() {
        let found = problems(&GOOD.replace("  mode: enforce", "  mode: enforce\n  mode: audit"));
        assert!(found[0].contains("stands twice") && found[0].starts_with("web.yaml:9:"), "{found:?}");
    }

    #[test]
    fn broken_yaml_is_a_problem_with_a_place() {
        let found = problems("apiVersion: [\n");
        assert!(found[0].starts_with("web.yaml:"), "{found:?}");
    }

    proptest::proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in "\\PC{0,200}|[a-z:{}\\[\\]\\- \n\"]{0,200}") {
            let _ = parse("x", &text);
        }
    }
}
