//! Reading YAML with the place of every fault. Nothing here knows what a profile is.

use marked_yaml::{
    LoadError, LoaderOptions, Node, Span,
    types::{MarkedMappingNode, MarkedScalarNode},
};

use crate::problem::Problem;

/// Reads the values of one file, and keeps what is wrong with them.
pub(crate) struct Reader<'a> {
    pub(crate) file: &'a str,
    pub(crate) problems: Vec<Problem>,
    /// Fields of the schema that this build cannot enforce, by their parent.
    pub(crate) not_yet: &'static [(&'static str, &'static [&'static str])],
}

impl Reader<'_> {
    pub(crate) fn problem(
        &mut self,
        span: &Span,
        field: &str,
        message: impl Into<String>,
        remedy: impl Into<String>,
    ) {
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

    /// The tree of one document.
    pub(crate) fn tree(&mut self, text: &str) -> Option<Node> {
        let options = LoaderOptions::default().error_on_duplicate_keys(true);
        match marked_yaml::parse_yaml_with_options(0, text, options) {
            Ok(root) => Some(root),
            Err(error) => {
                self.not_yaml(&error);
                None
            }
        }
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

    pub(crate) fn mapping<'n>(&mut self, node: &'n Node, field: &str) -> Option<&'n MarkedMappingNode> {
        let mapping = node.as_mapping();
        if mapping.is_none() {
            self.problem(node.span(), field, "must be a mapping", "write \"key: value\" lines below it");
        }
        mapping
    }

    pub(crate) fn known(&mut self, mapping: &MarkedMappingNode, field: &str, known: &[&str]) {
        let schema = generic(field);
        let later =
            self.not_yet.iter().find(|(parent, _)| *parent == schema).map_or(&[][..], |(_, names)| *names);
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

    pub(crate) fn required_text<'n>(
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

    pub(crate) fn optional_text<'n>(
        &mut self,
        mapping: &'n MarkedMappingNode,
        field: &str,
        name: &str,
    ) -> Option<&'n MarkedScalarNode> {
        mapping.get_node(name).and_then(|node| self.text(node, &join(field, name)))
    }

    pub(crate) fn text<'n>(&mut self, node: &'n Node, field: &str) -> Option<&'n MarkedScalarNode> {
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

    pub(crate) fn required_mapping<'n>(
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
}

/// Splits a stream into documents, each with blank lines in front so that line numbers stay those of the file.
pub(crate) fn documents(text: &str) -> Vec<String> {
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

pub(crate) fn join(field: &str, name: &str) -> String {
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
