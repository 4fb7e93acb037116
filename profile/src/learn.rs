//! A first profile from what was recorded.
//!
//! What comes from the image is allowed; about all else an author must decide, so it stands there as a comment.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
};

use crate::{
    document::API_VERSION,
    glob::{Pattern, escaped},
    origin::Origin,
    session::Session,
    text::{may_have_other_bytes, printable, yaml},
};

/// What was recorded.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Act {
    Executed,
    /// A file was mapped executable that no profile allowed: an allowed mapping leaves no record.
    Mapped,
    /// Needs a field of `spec.exec` by this name: `memory`, `jit`, `trace`.
    Needs(&'static str),
}

/// One recorded execution, or code that came by other means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Observation {
    pub act: Act,
    pub namespace: String,
    pub pod: String,
    pub labels: BTreeMap<String, String>,
    pub container: String,
    pub image: String,
    pub path: String,
    /// As records name it.
    pub origin: String,
    /// Whether by somebody who had entered the container, or by a probe.
    pub entered: bool,
}

/// Labels that differ between pods of one workload, and so select nothing.
const PER_POD_LABELS: &[&str] = &[
    "pod-template-hash",
    "controller-revision-hash",
    "statefulset.kubernetes.io/pod-name",
    "apps.kubernetes.io/pod-index",
    "pod-template-generation",
    "batch.kubernetes.io/job-completion-index",
    "job-name",
    "controller-uid",
];

/// Writes one profile in mode `audit` for every container of every workload seen. Executables that do not come
/// from the image are listed as comments: an author must decide about each. What only those executed who entered is allowed to
/// them alone.
#[must_use]
pub fn draft(observations: &[Observation]) -> String {
    type Workload = (String, BTreeMap<String, String>, String);
    // Path and origin, and whether only those executed it who entered.
    type Paths = BTreeMap<(String, String), bool>;
    // The images, what was executed, files that were mapped, and fields that were needed.
    type Seen = (BTreeSet<String>, Paths, BTreeSet<(String, String)>, BTreeSet<&'static str>);
    let mut workloads: BTreeMap<Workload, Seen> = BTreeMap::new();
    for seen in observations {
        let labels: BTreeMap<String, String> = seen
            .labels
            .iter()
            .filter(|(key, _)| !PER_POD_LABELS.contains(&key.as_str()))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
        let key = (seen.namespace.clone(), labels, seen.container.clone());
        let (images, paths, libraries, needs) = workloads.entry(key).or_default();
        images.insert(seen.image.clone());
        let file = (seen.path.clone(), seen.origin.clone());
        match seen.act {
            Act::Executed => *paths.entry(file).or_insert(true) &= seen.entered,
            Act::Mapped => drop(libraries.insert(file)),
            Act::Needs(field) => drop(needs.insert(field)),
        }
    }
    let mut text = String::new();
    for (index, ((namespace, labels, container), seen)) in workloads.iter().enumerate() {
        let (images, paths, libraries, needs) = seen;
        if index > 0 {
            text.push_str("---\n");
        }
        let app = labels.get("app").or_else(|| labels.get("app.kubernetes.io/name")).unwrap_or(container);
        let name = name_of(&[app, container]);
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "# Drafted from {} executables that were recorded. Read it before you enforce it.",
            paths.len()
        );
        for image in images {
            let _ = writeln!(text, "# image: {}", printable(image));
        }
        let _ = writeln!(text, "apiVersion: {API_VERSION}");
        let _ = if namespace.is_empty() {
            // A container of no pod.
            writeln!(text, "kind: ClusterProfile\nmetadata: {{name: {name}}}")
        } else {
            writeln!(text, "kind: Profile\nmetadata: {{name: {name}, namespace: {}}}", yaml(namespace))
        };
        let _ = writeln!(text, "spec:\n  selector:");
        if labels.is_empty() {
            let _ = writeln!(text, "    podSelector: {{}}");
        } else {
            let _ = writeln!(text, "    podSelector:\n      matchLabels:");
            for (key, value) in labels {
                let _ = writeln!(text, "        {}: {}", yaml(key), yaml(value));
            }
        }
        if !container.is_empty() {
            let _ = writeln!(text, "    containers: [{{name: {}}}]", yaml(&escaped(container)));
        }
        let _ = writeln!(text, "  mode: audit\n  exec:");
        let is_image = |origin: &str| origin == "image";
        let of_image = || paths.iter().filter(|((_, origin), _)| is_image(origin));
        let listed = of_image().any(|((path, _), _)| path_of(path).is_ok());
        let _ = writeln!(text, "    allow:{}", if listed { "" } else { " []" });
        for ((path, _), entered) in of_image() {
            let _ = match (path_of(path), entered) {
                (Ok(path), true) => {
                    writeln!(text, "      - {{path: {path}, sessions: {}}}", Session::Admin.as_str())
                }
                (Ok(path), false) => writeln!(text, "      - path: {path}"),
                (Err(why), _) => not_listed(&mut text, path, &why),
            };
        }
        to_decide(&mut text, "it is", paths.keys().filter(|(_, origin)| !is_image(origin)));
        if !libraries.is_empty() {
            let _ = writeln!(text, "    libraries:\n      - path: /**");
        }
        to_decide(&mut text, "it was loaded and is", libraries.iter());
        for field in needs {
            let why = match *field {
                "memory" => "it ran code from files in memory",
                "jit" => "it made code at run time",
                _ => "it traced a process, or wrote to the memory of a running one",
            };
            let _ = writeln!(text, "    # decide, {why}: {field}: allow");
        }
    }
    text
}

/// Why a recorded path is in no rule.
pub(crate) const OTHER_BYTES: &str =
    "its path may have bytes that are not UTF-8, recorded as \\xNN, and a rule can name no such path";

/// The path of a rule for this file and no other, or why there is none.
fn path_of(path: &str) -> Result<String, String> {
    let pattern = Pattern::of_path(path).map_err(|error| error.to_string())?;
    if may_have_other_bytes(path) {
        return Err(format!(
            "{OTHER_BYTES}; if it has these characters, write path: {}",
            yaml(pattern.as_str())
        ));
    }
    Ok(yaml(pattern.as_str()))
}

/// Writes a line about each file that is not the image's.
fn to_decide<'a>(text: &mut String, what: &str, files: impl Iterator<Item = &'a (String, String)>) {
    for (path, origin) in files {
        let rule = path_of(path).and_then(|path| match Origin::parse(origin) {
            Some(_) => Ok(format!("{{path: {path}, from: {}}}", yaml(origin))),
            None => Err(format!("no rule allows bytes from {origin:?}")),
        });
        // Writing to a String cannot fail.
        let _ = match rule {
            Ok(rule) => writeln!(text, "      # decide, {what} not the image's: - {rule}"),
            Err(why) => not_listed(text, path, &why),
        };
    }
}

fn not_listed(text: &mut String, path: &str, why: &str) -> std::fmt::Result {
    writeln!(text, "      # not listed: {}: {}", yaml(path), printable(why))
}

/// Most characters of a profile's name.
const LONGEST_NAME: usize = 253;

fn name_of(parts: &[&String]) -> String {
    let mut unique: Vec<&String> = parts.to_vec();
    unique.dedup();
    let joined: Vec<String> = unique
        .iter()
        .map(|part| {
            part.to_lowercase()
                .chars()
                .map(|character| {
                    if character.is_ascii_lowercase() || character.is_ascii_digit() { character } else { '-' }
                })
                .collect()
        })
        .collect();
    let name: String = joined.join("-").chars().take(LONGEST_NAME).collect();
    let name = name.trim_matches('-').to_owned();
    if name.is_empty() { "workload".to_owned() } else { name }
}

#[cfg(test)]
mod tests {
    use palisade_abi::codes::{origin, session};
    use proptest::prelude::*;

    use super::*;
    use crate::{
        document::parse,
        exec::evaluate::{Execution, evaluate},
        image::compile,
        mode::Mode,
        policy::alone,
        selector::ContainerFacts,
    };

    fn seen(path: &str, origin: &str) -> Observation {
        Observation {
            act: Act::Executed,
            namespace: "shop".to_owned(),
            pod: "web-1".to_owned(),
            labels: BTreeMap::from([
                ("app".to_owned(), "web".to_owned()),
                ("pod-template-hash".to_owned(), "7d4f".to_owned()),
            ]),
            container: "nginx".to_owned(),
            image: "registry.example/web:1".to_owned(),
            path: path.to_owned(),
            origin: origin.to_owned(),
            entered: false,
        }
    }

    #[test]
    fn what_only_those_executed_who_entered_is_for_them_alone() {
        let by_hand = |path| Observation { entered: true, ..seen(path, "image") };
        let text = draft(&[seen("/bin/both", "image"), by_hand("/bin/both"), by_hand("/bin/sh")]);
        let rules = parse("draft", &text).unwrap().remove(0).exec.unwrap().allow;
        assert!(rules[0].sessions.is_any(), "{text}");
        assert_eq!(rules[1].sessions, [Session::Admin].into_iter().collect());
    }

    #[test]
    fn code_that_was_not_executed_is_left_to_the_author() {
        let other = |act, path, origin| Observation { act, ..seen(path, origin) };
        let text = draft(&[
            seen("/usr/bin/java", "image"),
            other(Act::Needs("jit"), "", ""),
            other(Act::Mapped, "/opt/p.so", "volume:plugins"),
        ]);
        let read = |text: &str| parse("draft", text).unwrap().remove(0).exec.unwrap().code;
        assert!(
            !read(&text).jit && read(&text).flags() == crate::exec::code::CodeRules::default().flags(),
            "{text}"
        );
        let decided = text
            .replace("# decide, it made code at run time: ", "")
            .replace("# decide, it was loaded and is not the image's: ", "");
        assert!(read(&decided).jit && read(&decided).libraries.unwrap().len() == 2, "{decided}");
    }

    #[test]
    fn a_draft_is_a_valid_profile_that_allows_what_the_image_ran() {
        let text = draft(&[
            seen("/usr/sbin/nginx", "image"),
            seen("/tmp/x\n- path: /evil", "drift"),
            seen("/opt/p", "volume:plugins"),
        ]);
        let profiles = parse("draft", &text).unwrap();
        assert_eq!(profiles.len(), 1);
        assert_eq!(profiles[0].mode, Mode::Audit);
        let rules = &profiles[0].exec.as_ref().unwrap().allow;
        assert_eq!(rules.len(), 1, "{text}");
        assert_eq!(rules[0].path.as_str(), "/usr/sbin/nginx");
        assert!(!profiles[0].selector.labels.contains_key("pod-template-hash"));
        // What was decided for is a rule when the comment is taken away.
        let decided = text.replace("# decide, it is not the image's: ", "");
        let rules = parse("draft", &decided).unwrap().remove(0).exec.unwrap().allow;
        let volume = Origin::parse("volume:plugins").unwrap();
        assert!(rules.iter().any(|rule| rule.path.as_str() == "/opt/p" && rule.from.contains(&volume)));
    }

    #[test]
    fn a_recorded_path_is_never_a_pattern() {
        let text = draft(&[
            Observation { container: "*".to_owned(), ..seen("/opt/**", "image") },
            Observation { container: "*".to_owned(), ..seen("/opt/a*b\\", "drift") },
        ]);
        assert!(text.contains(r#"- path: "/opt/\\*\\*""#), "{text}");
        let decided = text.replace("# decide, it is not the image's: ", "");
        let profile = parse("draft", &decided).unwrap().remove(0);
        let exact: Vec<_> =
            profile.exec.as_ref().unwrap().allow.iter().map(|rule| rule.path.exact()).collect();
        assert_eq!(exact, [Some("/opt/**"), Some("/opt/a*b\\")]);
        let named = |name: &str| {
            let labels = BTreeMap::from([("app".to_owned(), "web".to_owned())]);
            profile.selector.matches(&ContainerFacts {
                name: name.to_owned(),
                labels,
                ..ContainerFacts::default()
            })
        };
        assert!(named("*") && !named("nginx"), "{text}");
    }

    #[test]
    fn what_no_rule_can_name_is_said_and_not_listed() {
        for (path, origin, why) in [
            ("/opt/\\xff", "image", "not UTF-8"),
            ("memfd:x", "image", "does not start with"),
            ("/a/../b", "image", "no canonical path"),
            ("/a\0b", "image", "zero byte"),
            ("/opt/\\xff", "drift", "not UTF-8"),
            ("/a", "unknown", "no rule allows bytes from"),
            ("/a", "volume:/x*\n- path: /evil", "no rule allows bytes from"),
        ] {
            let text = draft(&[seen(path, origin)]);
            assert!(parse("draft", &text).unwrap()[0].exec.as_ref().unwrap().allow.is_empty(), "{text}");
            let line = text.lines().find(|line| line.contains("# not listed: ")).unwrap();
            assert!(line.contains(why), "{text}");
            assert_eq!(why == "not UTF-8", line.ends_with(r#"write path: "/opt/\\\\xff""#), "{text}");
        }
    }

    #[test]
    fn a_draft_for_a_container_of_no_pod_is_a_cluster_profile() {
        let text = draft(&[Observation { namespace: String::new(), ..seen("/a", "image") }]);
        assert_eq!(parse("draft", &text).unwrap()[0].scope, crate::document::Scope::Cluster);
    }

    proptest! {
        /// Whatever was recorded: the draft can be read, its rule allows that path, and nothing else.
        #[test]
        fn a_drafted_rule_is_for_the_path_that_was_recorded(
            components in prop::collection::vec(r"[ab*\\]{1,4}|\PC{1,6}", 1..4),
            other in prop::collection::vec(r"[ab*\\]{1,4}", 1..4),
            of_no_image in any::<bool>(),
        ) {
            let path = format!("/{}", components.join("/").replace('\0', ""));
            prop_assume!(Pattern::of_path(&path).is_ok() && !may_have_other_bytes(&path));
            let from = if of_no_image { "drift" } else { "image" };
            let text = draft(&[seen(&path, from)]).replace("    allow: []", "    allow:").replace("# decide, it is not the image's: ", "");
            let profile = parse("draft", &text).unwrap().remove(0);
            prop_assert_eq!(profile.exec.as_ref().unwrap().allow[0].path.exact(), Some(&*path));
            let image = compile(&alone(&profile)).unwrap();
            prop_assert!(image.exec.as_ref().unwrap().globs.words().is_empty());
            let allowed = |path: &str| {
                let execution = Execution {
                    path: path.as_bytes(),
                    origin: if of_no_image { origin::DRIFT } else { origin::IMAGE },
                    session: session::WORKLOAD,
                    failure: 0,
                    caller: None,
                    arguments: None,
                };
                evaluate(&image, &execution).reason == palisade_abi::codes::reason::RULE
            };
            prop_assert!(allowed(&path), "{}", text);
            let others = [
                format!("/{}", other.join("/")), path.replace('*', "a"), path.replace("**", "a/b"), path.replace('\\', ""), format!("{path}a"),
            ];
            for other in others.iter().filter(|other| **other != path) {
                prop_assert!(!allowed(other), "{} by {}", other, text);
            }
        }

        /// Every text of a record comes out of the YAML as it went in, and none of it is anything but a text.
        #[test]
        fn every_text_is_read_back_from_a_draft(
            texts in prop::collection::vec(prop::collection::vec(any::<char>(), 1..12), 6),
            edge in prop::sample::select(vec!["\"", "\\", "\n---\n", "\r", "\u{85}", "\u{2028}", "\u{feff}", "'", "# x", ": ", "\u{fffe}", "\t"]),
        ) {
            let texts: Vec<String> = texts.into_iter().map(|text| text.into_iter().collect::<String>() + edge).collect();
            let path = format!("/{}", texts[0].replace(['\0', '/'], ""));
            prop_assume!(Pattern::of_path(&path).is_ok() && !may_have_other_bytes(&path));
            let observation = Observation {
                namespace: texts[1].clone(),
                container: texts[2].clone(),
                image: texts[3].clone(),
                labels: BTreeMap::from([(texts[4].clone(), texts[5].clone()), ("empty".to_owned(), String::new())]),
                ..seen(&path, "image")
            };
            let text = draft(std::slice::from_ref(&observation));
            let profiles = parse("draft", &text).unwrap();
            prop_assert_eq!(profiles.len(), 1);
            let profile = &profiles[0];
            prop_assert_eq!(profile.exec.as_ref().unwrap().allow[0].path.exact(), Some(&*path));
            prop_assert_eq!(&profile.scope, &crate::document::Scope::Namespace(texts[1].clone()));
            prop_assert_eq!(&profile.selector.labels, &observation.labels);
            prop_assert_eq!(profile.selector.containers[0].name.clone(), Some(escaped(&texts[2])));
        }
    }
}
