//! Reading profiles from YAML, with the place of every fault.
//!
//! A field that design and schema know but this build cannot enforce is an error, never ignored.

use std::collections::{BTreeMap, BTreeSet};

use marked_yaml::{
    LoadError, LoaderOptions, Node, Span,
    types::{MarkedMappingNode, MarkedScalarNode},
};
use palisade_abi::{
    codes::{mode, origin},
    maps::VOLUME_NAME_CAPACITY,
};

use crate::{
    code::{CodeRules, Libraries},
    condition::Arguments,
    glob::Pattern,
    problem::Problem,
    selector::{ContainerSelector, Selector},
    session::{Session, Sessions},
};

pub const API_VERSION: &str = "palisade.dev/v1alpha1";

/// What happens on a mismatch. Ordered from lenient to strict.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Mode {
    /// Record and allow.
    Audit,
    /// Record and refuse.
    Enforce,
}

impl Mode {
    /// As it is written in profiles and records.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Audit => "audit",
            Self::Enforce => "enforce",
        }
    }

    /// As it stands in a policy image.
    #[must_use]
    pub fn code(self) -> u8 {
        match self {
            Self::Audit => mode::AUDIT,
            Self::Enforce => mode::ENFORCE,
        }
    }
}

/// Where a file's bytes may come from.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Origin {
    Image,
    Drift,
    Memory,
    Host,
    Volume(VolumeName),
}

/// The name of a volume: as the pod has it, or the path at which the mount stands in the container where nobody gives it
/// another name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VolumeName(String);

impl VolumeName {
    /// `None` for a text that is no volume's name: an empty or relative one, or one with a colon, which separates name
    /// and path, or with control characters, or a path with `*`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let is_path = !text.contains('*') && Pattern::of_path(text).is_ok();
        let is_name = !text.is_empty() && !text.contains('/');
        let plain = text.chars().all(|character| character != ':' && !character.is_control());
        ((is_path || is_name) && plain && text.len() < VOLUME_NAME_CAPACITY).then(|| Self(text.to_owned()))
    }

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// How volumes are written as origins.
const VOLUME: &str = "volume:";

impl Origin {
    /// Reads an origin as profiles and records have it.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        if let Some(name) = text.strip_prefix(VOLUME) {
            return VolumeName::parse(name).map(Self::Volume);
        }
        let plain = [Self::Image, Self::Drift, Self::Memory, Self::Host];
        plain.into_iter().find(|origin| origin.to_string() == text)
    }

    #[must_use]
    pub fn code(&self) -> u8 {
        match self {
            Self::Image => origin::IMAGE,
            Self::Drift => origin::DRIFT,
            Self::Memory => origin::MEMORY,
            Self::Host => origin::HOST,
            Self::Volume(_) => origin::VOLUME,
        }
    }
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Image => f.write_str("image"),
            Self::Drift => f.write_str("drift"),
            Self::Memory => f.write_str("memory"),
            Self::Host => f.write_str("host"),
            Self::Volume(name) => write!(f, "{VOLUME}{}", name.as_str()),
        }
    }
}

/// A SHA-256.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// Reads 64 hexadecimal digits.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        if text.len() != 64 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return None;
        }
        let mut digest = [0; 32];
        for (index, byte) in digest.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * index..2 * index + 2], 16).ok()?;
        }
        Some(Self(digest))
    }
}

impl std::fmt::Display for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::fmt::Debug for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

/// One allowed executable.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ExecRule {
    pub path: Pattern,
    pub from: BTreeSet<Origin>,
    pub sessions: Sessions,
    /// What the file's bytes must be; only with an exact path, and for the image's files.
    pub sha256: Option<Digest>,
    /// Programs of the image that may execute it; any when empty. Only with an exact path.
    pub parents: BTreeSet<Pattern>,
    /// What its arguments must be; only with an exact path.
    pub arguments: Option<Arguments>,
}

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
    pub exec: Option<Vec<ExecRule>>,
    /// The rest of the section; means nothing without it.
    pub code: CodeRules,
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
    let mut reader = Reader { file, problems: Vec::new() };
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

/// Splits a stream into documents, each with blank lines in front so that line numbers stay those of the file.
fn documents(text: &str) -> Vec<String> {
    let mut documents = Vec::new();
    let mut current = String::new();
    for (number, line) in text.lines().enumerate() {
        if line.trim_end() == "---" {
            documents.push(std::mem::take(&mut current));
            current = "\n".repeat(number + 1);
        } else {
            current.push_str(line);
            current.push('\n');
        }
    }
    documents.push(current);
    let has_content = |document: &String| {
        document.lines().any(|line| !line.trim().is_empty() && !line.trim_start().starts_with('#'))
    };
    documents.retain(has_content);
    documents
}

/// Fields of the schema that this build cannot enforce, by their parent.
const NOT_YET: &[(&str, &[&str])] = &[
    ("spec", &["files", "network"]),
    ("spec.selector", &["namespaceSelector"]),
    ("spec.selector.podSelector", &["matchExpressions"]),
];

struct Reader<'a> {
    file: &'a str,
    problems: Vec<Problem>,
}

impl Reader<'_> {
    fn problem(&mut self, span: &Span, field: &str, message: impl Into<String>, remedy: impl Into<String>) {
        let (line, column) = span.start().map_or((0, 0), |marker| (marker.line(), marker.column()));
        self.problems.push(Problem {
            file: self.file.to_owned(),
            line,
            column,
            field: field.to_owned(),
            message: message.into(),
            remedy: remedy.into(),
        });
    }

    fn document(&mut self, text: &str) -> Option<Profile> {
        let root = match marked_yaml::parse_yaml_with_options(
            0,
            text,
            LoaderOptions::default().error_on_duplicate_keys(true),
        ) {
            Ok(root) => root,
            Err(error) => {
                self.not_yaml(&error);
                return None;
            }
        };
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
        let (exec, code) = exec.map_or_else(Default::default, |(rules, code)| (Some(rules), code));
        Some(Profile { name: name.as_str().to_owned(), scope, selector, mode: mode?, exec, code })
    }

    fn not_yaml(&mut self, error: &LoadError) {
        let marker = match error {
            LoadError::TopLevelMustBeMapping(marker)
            | LoadError::TopLevelMustBeSequence(marker)
            | LoadError::UnexpectedAnchor(marker)
            | LoadError::MappingKeyMustBeScalar(marker)
            | LoadError::UnexpectedTag(marker)
            | LoadError::ScanError(marker, _) => Some(*marker),
            _ => None,
        };
        if let LoadError::DuplicateKey(duplicate) = error {
            let name = duplicate.key.as_str();
            let message = format!("the field {name:?} stands twice");
            self.problem(duplicate.key.span(), name, message, "keep one of the two");
            return;
        }
        self.problems.push(Problem {
            file: self.file.to_owned(),
            line: marker.map_or(0, |marker| marker.line()),
            column: marker.map_or(0, |marker| marker.column()),
            field: String::new(),
            message: format!("this is not a profile in YAML: {error}"),
            remedy: "check indentation, quotes and brackets there".to_owned(),
        });
    }

    fn mapping<'n>(&mut self, node: &'n Node, field: &str) -> Option<&'n MarkedMappingNode> {
        let mapping = node.as_mapping();
        if mapping.is_none() {
            self.problem(node.span(), field, "must be a mapping", "write \"key: value\" lines below it");
        }
        mapping
    }

    fn known(&mut self, mapping: &MarkedMappingNode, field: &str, known: &[&str]) {
        let schema = generic(field);
        let later = NOT_YET.iter().find(|(parent, _)| *parent == schema).map_or(&[][..], |(_, names)| *names);
        for key in mapping.keys() {
            let name = key.as_str();
            if known.contains(&name) {
                continue;
            }
            let full = join(field, name);
            if later.contains(&name) {
                self.problem(
                    key.span(),
                    &full,
                    "this build cannot enforce it",
                    "remove it, or use a build that can; it is not ignored, since you would believe it in force",
                );
                continue;
            }
            let nearest = known
                .iter()
                .map(|candidate| (distance(name, candidate), *candidate))
                .min()
                .filter(|(distance, _)| *distance <= 2);
            let remedy = match nearest {
                Some((_, candidate)) => format!("did you mean {candidate}?"),
                None => format!("known here: {}", known.join(", ")),
            };
            self.problem(key.span(), &full, "no such field", remedy);
        }
    }

    fn required_text<'n>(
        &mut self,
        mapping: &'n MarkedMappingNode,
        field: &str,
        name: &str,
    ) -> Option<&'n MarkedScalarNode> {
        let Some(node) = mapping.get_node(name) else {
            self.problem(mapping.span(), &join(field, name), "is missing", format!("add \"{name}: …\""));
            return None;
        };
        self.text(node, &join(field, name))
    }

    fn optional_text<'n>(
        &mut self,
        mapping: &'n MarkedMappingNode,
        field: &str,
        name: &str,
    ) -> Option<&'n MarkedScalarNode> {
        mapping.get_node(name).and_then(|node| self.text(node, &join(field, name)))
    }

    fn text<'n>(&mut self, node: &'n Node, field: &str) -> Option<&'n MarkedScalarNode> {
        let scalar = node.as_scalar();
        match scalar {
            Some(text) if !text.as_str().is_empty() => scalar,
            _ => {
                self.problem(
                    node.span(),
                    field,
                    "must be a text",
                    "write one value, in quotes if it has special characters",
                );
                None
            }
        }
    }

    fn required_mapping<'n>(
        &mut self,
        mapping: &'n MarkedMappingNode,
        field: &str,
        name: &str,
    ) -> Option<&'n MarkedMappingNode> {
        let Some(node) = mapping.get_node(name) else {
            self.problem(
                mapping.span(),
                &join(field, name),
                "is missing",
                format!("add \"{name}:\" and its fields"),
            );
            return None;
        };
        self.mapping(node, &join(field, name))
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

    fn exec(&mut self, node: &Node) -> Option<(Vec<ExecRule>, CodeRules)> {
        let field = "spec.exec";
        let mapping = self.mapping(node, field)?;
        self.known(mapping, field, &["allow", "libraries", "memory", "jit", "trace", "elevation"]);
        let code = CodeRules {
            libraries: match mapping.get_node("libraries") {
                Some(node) => Some(self.libraries(node)?),
                None => None,
            },
            memory: self.allowed(mapping, "memory", false)?,
            jit: self.allowed(mapping, "jit", false)?,
            trace: self.allowed(mapping, "trace", false)?,
            no_elevation: !self.allowed(mapping, "elevation", true)?,
        };
        let Some(node) = mapping.get_node("allow") else {
            self.problem(
                mapping.span(),
                "spec.exec.allow",
                "is missing",
                "list what may run; [] allows nothing",
            );
            return None;
        };
        let field = "spec.exec.allow";
        let Some(list) = node.as_sequence() else {
            self.problem(node.span(), field, "must be a list", "write \"- path: /usr/bin/…\" lines");
            return None;
        };
        let mut rules = Vec::new();
        for (index, node) in list.iter().enumerate() {
            let field = format!("{field}[{index}]");
            if let Some(rule) = self.exec_rule(node, &field) {
                rules.push(rule);
            }
        }
        Some((rules, code))
    }

    /// A field of `spec.exec` that is `allow` or `deny`.
    fn allowed(&mut self, exec: &MarkedMappingNode, name: &str, left_out: bool) -> Option<bool> {
        let Some(text) = self.optional_text(exec, "spec.exec", name) else {
            return exec.get_node(name).is_none().then_some(left_out);
        };
        match text.as_str() {
            "allow" => Some(true),
            "deny" => Some(false),
            other => {
                let message = format!("{other:?} is neither allow nor deny");
                self.problem(text.span(), &join("spec.exec", name), message, "write allow or deny");
                None
            }
        }
    }

    fn libraries(&mut self, node: &Node) -> Option<Libraries> {
        let field = "spec.exec.libraries";
        let Some(list) = node.as_sequence() else {
            self.problem(node.span(), field, "must be a list", "write \"- path: /usr/lib/**\" lines");
            return None;
        };
        let mut libraries = Libraries::new();
        for (index, node) in list.iter().enumerate() {
            let field = format!("{field}[{index}]");
            let mapping = self.mapping(node, &field)?;
            self.known(mapping, &field, &["path", "from"]);
            let path = self.path(mapping, &field);
            let from = self.from(mapping, &field);
            libraries.entry(path?).or_default().extend(from);
        }
        Some(libraries)
    }

    fn exec_rule(&mut self, node: &Node, field: &str) -> Option<ExecRule> {
        let mapping = self.mapping(node, field)?;
        self.known(mapping, field, &["path", "from", "sessions", "sha256", "parents", "args", "names"]);
        let path = self.path(mapping, field);
        let from = self.from(mapping, field);
        let sessions = self.sessions(mapping, field)?;
        let path = path?;
        let sha256 = match mapping.get_node("sha256") {
            None => None,
            Some(node) => Some(self.digest(node, &join(field, "sha256"), &path, &from)?),
        };
        let parents = match mapping.get_node("parents") {
            None => BTreeSet::new(),
            Some(node) => self.parents(node, &join(field, "parents"), &path)?,
        };
        let arguments = match mapping.get_node("args") {
            None => None,
            Some(node) => Some(self.arguments(node, field, mapping, &path)?),
        };
        if arguments.is_none()
            && let Some(node) = mapping.get_node("names")
        {
            let remedy = "write args: [\"**\"] beside it for any arguments";
            self.problem(node.span(), &join(field, "names"), "stands without args", remedy);
            return None;
        }
        Some(ExecRule { path, from, sessions, sha256, parents, arguments })
    }

    fn parents(&mut self, node: &Node, field: &str, path: &Pattern) -> Option<BTreeSet<Pattern>> {
        self.one_file(node, field, path)?;
        let nodes: Vec<(String, &Node)> = match node {
            Node::Sequence(list) => {
                list.iter().enumerate().map(|(index, node)| (format!("{field}[{index}]"), node)).collect()
            }
            node => vec![(field.to_owned(), node)],
        };
        if nodes.is_empty() {
            let remedy = "name the programs that may execute it, or leave it out for all";
            self.problem(node.span(), field, "is empty, so that nobody may execute it", remedy);
            return None;
        }
        let mut parents = BTreeSet::new();
        for (field, node) in nodes {
            let text = self.text(node, &field)?;
            match Pattern::parse(text.as_str()) {
                Ok(parent) if parent.exact().is_some() => drop(parents.insert(parent)),
                Ok(_) => {
                    self.problem(
                        node.span(),
                        &field,
                        "has wildcards",
                        "write the path of one program, and \\* for a '*' in it",
                    );
                    return None;
                }
                Err(error) => {
                    self.problem(node.span(), &field, error.to_string(), error.remedy());
                    return None;
                }
            }
        }
        Some(parents)
    }

    fn arguments(
        &mut self,
        node: &Node,
        rule_field: &str,
        rule: &MarkedMappingNode,
        path: &Pattern,
    ) -> Option<Arguments> {
        let field = &join(rule_field, "args");
        self.one_file(node, field, path)?;
        let mut names = Vec::new();
        let named = join(rule_field, "names");
        match rule.get_node("names") {
            None => {}
            Some(Node::Sequence(list)) => {
                for (index, node) in list.iter().enumerate() {
                    names.push(self.text(node, &format!("{named}[{index}]"))?.as_str().to_owned());
                }
            }
            Some(node) => names.push(self.text(node, &named)?.as_str().to_owned()),
        }
        let Some(list) = node.as_sequence() else {
            let remedy =
                "write one pattern for each argument after the program's name: [-m, http.server, \"**\"]";
            self.problem(node.span(), field, "must be a list", remedy);
            return None;
        };
        let mut patterns = Vec::new();
        for (index, node) in list.iter().enumerate() {
            // Unlike other texts one may be empty.
            let Some(text) = node.as_scalar() else {
                let field = format!("{field}[{index}]");
                self.problem(node.span(), &field, "must be a text", "write one value, in quotes");
                return None;
            };
            patterns.push(text.as_str().to_owned());
        }
        match Arguments::parse(names, patterns) {
            Ok(arguments) => Some(arguments),
            Err(error) => {
                self.problem(node.span(), field, error.to_string(), error.remedy());
                None
            }
        }
    }

    /// A condition is for one file.
    fn one_file(&mut self, node: &Node, field: &str, path: &Pattern) -> Option<()> {
        if path.exact().is_some() {
            return Some(());
        }
        self.problem(
            node.span(),
            field,
            "the path has wildcards",
            "write a rule for each file that it is for, and \\* for a '*' in its path",
        );
        None
    }

    fn digest(
        &mut self,
        node: &Node,
        field: &str,
        path: &Pattern,
        from: &BTreeSet<Origin>,
    ) -> Option<Digest> {
        let text = self.text(node, field)?;
        let digest = Digest::parse(text.as_str());
        if digest.is_none() {
            let message = format!("{:?} is not a SHA-256", text.as_str());
            self.problem(
                text.span(),
                field,
                message,
                "write 64 hexadecimal digits, as sha256sum prints them",
            );
        } else if path.exact().is_none() {
            self.problem(
                text.span(),
                field,
                "the path has wildcards",
                "write the path of one file, and \\* for a '*' in it",
            );
        } else if *from != BTreeSet::from([Origin::Image]) {
            let remedy = "take `from` away: only the image's bytes stay what they are";
            self.problem(text.span(), field, "the file need not be the image's", remedy);
        } else {
            return digest;
        }
        None
    }

    fn path(&mut self, rule: &MarkedMappingNode, field: &str) -> Option<Pattern> {
        let path = self.required_text(rule, field, "path")?;
        match Pattern::parse(path.as_str()) {
            Ok(pattern) => Some(pattern),
            Err(error) => {
                self.problem(path.span(), &join(field, "path"), error.to_string(), error.remedy());
                None
            }
        }
    }

    fn from(&mut self, mapping: &MarkedMappingNode, field: &str) -> BTreeSet<Origin> {
        let mut from = BTreeSet::new();
        match mapping.get_node("from") {
            None => {
                from.insert(Origin::Image);
            }
            Some(Node::Sequence(list)) => {
                for (index, node) in list.iter().enumerate() {
                    from.extend(self.origin(node, &format!("{field}.from[{index}]")));
                }
            }
            Some(node) => from.extend(self.origin(node, &join(field, "from"))),
        }
        from
    }

    fn sessions(&mut self, rule: &MarkedMappingNode, field: &str) -> Option<Sessions> {
        match rule.get_node("sessions") {
            None => Some(Sessions::ANY),
            Some(Node::Sequence(list)) if list.is_empty() => {
                self.problem(
                    list.span(),
                    &join(field, "sessions"),
                    "is empty, so that the rule is for nobody",
                    "write workload, admin, or leave it out for both",
                );
                None
            }
            Some(Node::Sequence(list)) => list
                .iter()
                .enumerate()
                .map(|(index, node)| self.session(node, &format!("{field}.sessions[{index}]")))
                .collect(),
            Some(node) => {
                self.session(node, &join(field, "sessions")).map(|session| [session].into_iter().collect())
            }
        }
    }

    fn session(&mut self, node: &Node, field: &str) -> Option<Session> {
        let text = self.text(node, field)?;
        let found = Session::parse(text.as_str());
        if found.is_none() {
            let remedy = if text.as_str() == "probe" {
                "write admin: the kernel cannot tell a probe from others who enter and run the same command"
            } else {
                "write workload or admin"
            };
            self.problem(text.span(), field, format!("{:?} is not a session", text.as_str()), remedy);
        }
        found
    }

    fn origin(&mut self, node: &Node, field: &str) -> Option<Origin> {
        let text = self.text(node, field)?;
        let found = Origin::parse(text.as_str());
        if found.is_none() {
            let remedy = if text.as_str().starts_with(VOLUME) {
                "write the volume's name as the pod has it (volume:plugins), or the path at which it is mounted where \
                 it has none (volume:/etc/hosts)"
            } else {
                "write image, drift, memory, host or volume:NAME"
            };
            self.problem(text.span(), field, format!("{:?} is not an origin", text.as_str()), remedy);
        }
        found
    }
}

fn join(field: &str, name: &str) -> String {
    if field.is_empty() { name.to_owned() } else { format!("{field}.{name}") }
}

/// A field's path with list indices left out, as the schema names it.
fn generic(field: &str) -> String {
    let mut out = String::new();
    let mut inside = false;
    for character in field.chars() {
        match character {
            '[' => {
                inside = true;
                out.push('[');
            }
            ']' => {
                inside = false;
                out.push(']');
            }
            _ if inside => {}
            other => out.push(other),
        }
    }
    out
}

fn is_dns_label(name: &str) -> bool {
    let allowed =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'.');
    !name.is_empty() && name.len() <= 253 && name.bytes().all(allowed)
}

/// Levenshtein's edit distance.
pub(crate) fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let next = (diagonal + usize::from(x != *y)).min(row[j] + 1).min(row[j + 1] + 1);
            diagonal = std::mem::replace(&mut row[j + 1], next);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "\
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

    fn problems(text: &str) -> Vec<String> {
        parse("web.yaml", text).unwrap_err().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_good_profile_is_read_whole() {
        let profiles = parse("web.yaml", GOOD).unwrap();
        let [profile] = profiles.as_slice() else { panic!() };
        assert_eq!(profile.reference(), "shop/web");
        assert_eq!(profile.mode, Mode::Enforce);
        let rules = profile.exec.as_ref().unwrap();
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
    fn an_origin_is_one_of_the_five_kinds() {
        for good in ["volume:plugins", "volume:/etc/hosts", "volume:pvc-1.a", "host"] {
            let found = Origin::parse(good).map(|origin| origin.to_string());
            assert_eq!(found.as_deref(), Some(good));
        }
        for bad in [
            "volume:/a\\\\*",
            "volume:a:b",
            "volume:",
            "volume:a/b",
            "volume:/a//b",
            "volume:/a/../b",
            "volume:/*",
            "disk",
        ] {
            let found = problems(&GOOD.replace("from: drift", &format!("from: \"{bad}\"")));
            assert!(found.len() == 1 && found[0].contains("is not an origin; write"), "{bad}: {found:?}");
        }
    }

    #[test]
    fn a_rule_may_ask_for_sessions() {
        let rule = |sessions: &str| {
            let text = GOOD
                .replace("- path: /usr/sbin/nginx", &format!("- {{path: /bin/sh, sessions: {sessions}}}"));
            parse("web.yaml", &text).map(|profiles| profiles[0].exec.as_ref().unwrap()[0].sessions)
        };
        assert_eq!(rule("admin").unwrap(), [Session::Admin].into_iter().collect());
        assert_eq!(rule("[workload, admin]").unwrap(), Session::ALL.into_iter().collect());
        assert!(!rule("[workload, admin]").unwrap().is_any(), "unknown is not one of them");
        for (bad, says) in
            [("probe", "write admin"), ("[]", "is empty"), ("[root]", "write workload or admin")]
        {
            let problems = rule(bad).unwrap_err();
            assert!(problems.len() == 1 && problems[0].to_string().contains(says), "{bad}: {problems:?}");
        }
    }

    #[test]
    fn a_rule_may_have_conditions() {
        let rule = |rest: &str| {
            let text =
                GOOD.replace("- path: /usr/sbin/nginx", &format!("- {{path: /usr/sbin/nginx, {rest}}}"));
            parse("web.yaml", &text).map(|profiles| profiles[0].exec.as_ref().unwrap()[0].clone())
        };
        let parents = |rest: &str| {
            let parents = rule(rest).unwrap().parents;
            parents.iter().map(|parent| parent.as_str().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(parents("parents: /bin/sh"), ["/bin/sh"]);
        assert_eq!(parents("parents: [/bin/sh, /bin/a]"), ["/bin/a", "/bin/sh"]);
        let found = rule("args: [-c, \"\", \"**\"]").unwrap().arguments.unwrap();
        assert_eq!(found.patterns(), ["-c", "", "**"]);
        let found = rule("args: [x], names: [python3, \"/usr/bin/py*\"]").unwrap().arguments.unwrap();
        assert_eq!(found.names(), ["python3", "/usr/bin/py*"]);
        assert!(rule("args: []").unwrap().arguments.unwrap().patterns().is_empty());
        let long = format!("args: [{}]", "x".repeat(1024));
        for (bad, says) in [
            ("parents: []", "is empty"),
            ("parents: bin/sh", "does not start with"),
            ("parents: /bin/*", "the path of one program"),
            ("parents: [[/bin/sh]]", "must be a text"),
            ("names: sh", "stands without args"),
            ("args: [], names: \"**\"", "'**' as an argument of its own"),
            ("args: -c", "must be a list"),
            ("args: [[x]]", "must be a text"),
            ("args: [x**]", "'**' as an argument of its own"),
            (&long, "shorter patterns"),
        ] {
            let found = rule(bad).unwrap_err();
            assert!(found.len() == 1 && found[0].to_string().contains(says), "{bad}: {found:?}");
        }
        for condition in ["parents: /bin/sh", "args: []"] {
            let wide = GOOD.replace("/opt/plugins/**, from: drift", &format!("/opt/**, {condition}"));
            assert!(problems(&wide)[0].contains("a rule for each file"));
        }
    }

    #[test]
    fn a_digest_is_of_one_file_of_the_image() {
        let digest = "ab".repeat(32);
        let rule = |rest: &str| {
            let text =
                GOOD.replace("- path: /usr/sbin/nginx", &format!("- {{path: /usr/sbin/nginx, {rest}}}"));
            parse("web.yaml", &text).map(|profiles| profiles[0].exec.as_ref().unwrap()[0].sha256)
        };
        assert_eq!(
            rule(&format!("sha256: {digest}")).unwrap().map(|found| found.to_string()),
            Some(digest.clone())
        );
        for (bad, says) in [
            ("sha256: 9f86".to_owned(), "64 hexadecimal digits"),
            (format!("sha256: {}", "xy".repeat(32)), "64 hexadecimal digits"),
            (format!("from: drift, sha256: {digest}"), "only the image's bytes"),
        ] {
            let found = rule(&bad).unwrap_err();
            assert!(found.len() == 1 && found[0].to_string().contains(says), "{bad}: {found:?}");
        }
        let wide = GOOD.replace("/opt/plugins/**, from: drift", &format!("/opt/**, sha256: {digest}"));
        assert!(problems(&wide)[0].contains("one file"));
    }

    #[test]
    fn code_that_is_not_executed_has_fields_of_its_own() {
        let code = |fields: &str| {
            parse("web.yaml", &GOOD.replace("    allow:", &format!("    {fields}\n    allow:")))
                .map(|profiles| profiles[0].code.clone())
        };
        assert_eq!(parse("web.yaml", GOOD).unwrap()[0].code, CodeRules::default());
        assert_eq!(code("jit: allow").unwrap(), CodeRules { jit: true, ..CodeRules::default() });
        assert_eq!(code("memory: deny").unwrap(), CodeRules::default());
        assert_eq!(code("elevation: allow").unwrap(), CodeRules::default());
        assert!(code("elevation: deny").unwrap().no_elevation);
        let listed =
            code("libraries: [{path: /usr/lib/**}, {path: /opt/*.so, from: \"volume:plugins\"}]").unwrap();
        assert_eq!(listed.libraries.unwrap().len(), 2);
        assert_eq!(code("libraries: []").unwrap().libraries, Some(Libraries::new()));
        for (bad, says) in [
            ("trace: yes", "neither allow nor deny"),
            ("jit: [allow]", "must be a text"),
            ("libraries: /usr/lib", "must be a list"),
            ("libraries: [{path: lib}]", "spec.exec.libraries[0].path"),
            ("libraries: [{path: /lib, sessions: admin}]", "no such field"),
        ] {
            let found = code(bad).unwrap_err();
            assert!(found.len() == 1 && found[0].to_string().contains(says), "{bad}: {found:?}");
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
