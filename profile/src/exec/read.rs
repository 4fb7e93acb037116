//! The section as authors write it.

use std::collections::BTreeSet;

use marked_yaml::{Node, types::MarkedMappingNode};

use super::{
    ExecRule, Section,
    code::{CodeRules, Libraries},
    condition::Arguments,
};
use crate::{
    digest::Digest,
    glob::Pattern,
    origin::Origin,
    read::{Reader, join},
    session::{Session, Sessions},
};

impl Reader<'_> {
    /// The section.
    pub(crate) fn exec(&mut self, node: &Node) -> Option<Section> {
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
        let mut allow = Vec::new();
        for (index, node) in list.iter().enumerate() {
            let field = format!("{field}[{index}]");
            if let Some(rule) = self.exec_rule(node, &field) {
                allow.push(rule);
            }
        }
        Some(Section { allow, code })
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::document::{
        parse,
        tests::{GOOD, problems},
    };

    #[test]
    fn what_is_no_origin_is_an_error_that_says_what_is() {
        for bad in ["volume:", "disk"] {
            let found = problems(&GOOD.replace("from: drift", &format!("from: \"{bad}\"")));
            assert!(found.len() == 1 && found[0].contains("is not an origin; write"), "{bad}: {found:?}");
        }
    }

    #[test]
    fn a_rule_may_ask_for_sessions() {
        let rule = |sessions: &str| {
            let text = GOOD
                .replace("- path: /usr/sbin/nginx", &format!("- {{path: /bin/sh, sessions: {sessions}}}"));
            parse("web.yaml", &text).map(|profiles| profiles[0].exec.as_ref().unwrap().allow[0].sessions)
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
            parse("web.yaml", &text).map(|profiles| profiles[0].exec.as_ref().unwrap().allow[0].clone())
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
            parse("web.yaml", &text).map(|profiles| profiles[0].exec.as_ref().unwrap().allow[0].sha256)
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
                .map(|profiles| profiles[0].exec.as_ref().unwrap().code.clone())
        };
        assert_eq!(parse("web.yaml", GOOD).unwrap()[0].exec.as_ref().unwrap().code, CodeRules::default());
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
}
