//! A first profile from what was recorded.
//!
//! What comes from the image is allowed; about all else an author must decide, so it stands there as a comment.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
};

use crate::{document::API_VERSION, session::Session};

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
            let _ = writeln!(text, "# image: {}", one_line(image));
        }
        let _ = writeln!(text, "apiVersion: {API_VERSION}\nkind: Profile");
        let _ = writeln!(text, "metadata: {{name: {name}, namespace: {}}}", quoted(namespace));
        let _ = writeln!(text, "spec:\n  selector:");
        if labels.is_empty() {
            let _ = writeln!(text, "    podSelector: {{}}");
        } else {
            let _ = writeln!(text, "    podSelector:\n      matchLabels:");
            for (key, value) in labels {
                let _ = writeln!(text, "        {}: {}", quoted(key), quoted(value));
            }
        }
        let _ = writeln!(text, "    containers: [{{name: {}}}]", quoted(container));
        let _ = writeln!(text, "  mode: audit\n  exec:");
        let is_image = |origin: &str| origin == "image";
        if !paths.keys().any(|(_, origin)| is_image(origin)) {
            let _ = writeln!(text, "    allow: []");
        } else {
            let _ = writeln!(text, "    allow:");
        }
        for ((path, _), entered) in paths.iter().filter(|((_, origin), _)| is_image(origin)) {
            let path = quoted(path);
            let _ = if *entered {
                writeln!(text, "      - {{path: {path}, sessions: {}}}", Session::Admin.as_str())
            } else {
                writeln!(text, "      - path: {path}")
            };
        }
        for (path, origin) in paths.keys().filter(|(_, origin)| !is_image(origin)) {
            let rule = format!("- {{path: {}, from: {}}}", quoted(path), quoted(origin));
            let _ = writeln!(text, "      # decide, it is not the image's: {rule}");
        }
        if !libraries.is_empty() {
            let _ = writeln!(text, "    libraries:\n      - path: /**");
        }
        for (path, origin) in libraries {
            let rule = format!("- {{path: {}, from: {}}}", quoted(path), quoted(origin));
            let _ = writeln!(text, "      # decide, it was loaded and is not the image's: {rule}");
        }
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

fn one_line(text: &str) -> String {
    text.escape_debug().to_string()
}

/// A YAML scalar in double quotes, whatever the text holds.
pub(crate) fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for character in text.chars() {
        match character {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            // Marks of the direction of writing too: a terminal or an editor would show another text.
            control
                if control.is_control()
                    || matches!(control, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}') =>
            {
                let _ = write!(out, "\\U{:08x}", u32::from(control));
            }
            other => out.push(other),
        }
    }
    out.push('"');
    out
}

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
    let name = joined.join("-").trim_matches('-').to_owned();
    if name.is_empty() { "workload".to_owned() } else { name }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::document::{Mode, parse};

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
        let rules = parse("draft", &text).unwrap().remove(0).exec.unwrap();
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
        let read = |text: &str| parse("draft", text).unwrap().remove(0).code;
        assert!(
            !read(&text).jit && read(&text).flags() == crate::code::CodeRules::default().flags(),
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
        let rules = profiles[0].exec.as_ref().unwrap();
        assert_eq!(rules.len(), 1, "{text}");
        assert_eq!(rules[0].path.as_str(), "/usr/sbin/nginx");
        assert!(!profiles[0].selector.labels.contains_key("pod-template-hash"));
        // What was decided for is a rule when the comment is taken away.
        let decided = text.replace("# decide, it is not the image's: ", "");
        let rules = parse("draft", &decided).unwrap().remove(0).exec.unwrap();
        let volume = crate::document::Origin::parse("volume:plugins").unwrap();
        assert!(rules.iter().any(|rule| rule.path.as_str() == "/opt/p" && rule.from.contains(&volume)));
    }
}
