//! Why an execution was refused, what comes nearest among the rules, and which rule would allow it.

use palisade_abi::codes::{origin, reason};

use crate::{
    document::{Origin, distance},
    glob::Pattern,
    learn::quoted,
    policy::Policy,
    session::{Session, Sessions},
};

/// A refused execution, in the words of its record.
#[derive(Clone, Copy, Debug)]
pub struct Refused<'a> {
    pub path: &'a str,
    /// `image`, `drift`, `volume:NAME`, …
    pub origin: &'a str,
    /// `workload`, `admin`, `probe`, `unknown`.
    pub session: &'a str,
    /// [`reason`] by name.
    pub reason: &'a str,
}

/// What there is to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// What the reason means, in a sentence.
    pub meaning: &'static str,
    /// Rules that come nearest, the best first; at most [`MOST_NEAR`].
    pub near: Vec<Near>,
    /// A rule for `spec.exec.allow` that would allow it; or why there is none.
    pub rule: Result<String, &'static str>,
    /// What to think of before that rule is added.
    pub caution: Option<&'static str>,
}

/// A rule that comes near.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Near {
    pub path: String,
    /// What it says otherwise.
    pub difference: String,
}

pub const MOST_NEAR: usize = 3;

/// A longer path is not compared letter by letter.
const LONGEST_COMPARED: usize = 256;
/// Most letters that may differ.
const MOST_DIFFERENT: usize = 3;

/// Explains a refusal under `policy`, where that is known.
#[must_use]
pub fn explain(policy: Option<&Policy>, refused: &Refused<'_>) -> Explanation {
    let near = match policy {
        Some(policy) if by_rules(refused.reason) => nearest(policy, refused),
        _ => Vec::new(),
    };
    let rule = if by_rules(refused.reason) { rule(refused) } else { Err(NOT_BY_A_RULE) };
    let caution = match (refused.origin, &rule) {
        ("drift", Ok(_)) => Some(
            "the file was written or changed since the container started: the rule allows whatever is written there",
        ),
        ("memory", Ok(_)) => {
            Some("the bytes are in no file of the image: the rule allows whatever is put there")
        }
        (text, Ok(_)) if text.starts_with("volume:") => {
            Some("the rule trusts whoever can write to the volume")
        }
        ("host", Ok(_)) => Some("the file is the host's: who can change it there decides what runs here"),
        _ => None,
    };
    Explanation { meaning: meaning(refused.reason), near, rule, caution }
}

const NOT_BY_A_RULE: &str = "no rule changes that";

/// Whether a rule could have made another verdict of it.
fn by_rules(text: &str) -> bool {
    [reason::NO_RULE, reason::ORIGIN, reason::SESSION]
        .into_iter()
        .any(|code| reason::name(code) == Some(text))
}

fn meaning(text: &str) -> &'static str {
    let code = reason::ALL.iter().find(|(_, name)| *name == text).map_or(0, |(code, _)| *code);
    match code {
        reason::NO_RULE => "no rule names this path",
        reason::ORIGIN => "rules name this path, but not for bytes that come from there",
        reason::SESSION => {
            "rules name this path, but not for processes that came into the container as this one did"
        }
        reason::ORIGIN_UNKNOWN => {
            "where its bytes come from cannot be told: the file system is none of the container's mounts, or one that this build \
             does not know"
        }
        reason::PATH_TOO_LONG => "its path is longer than 1,024 bytes, which is never allowed",
        reason::PATH_TOO_DEEP => "its path has more than 64 components, which is never allowed",
        reason::WALK_INCOMPLETE => {
            "it has no path: a file without a name (memfd, deleted), or one outside its file system"
        }
        reason::READ_FAILED => "the kernel's structures could not be read",
        reason::LOOKUP_MISSED => {
            "an entry that must be in the kernel's maps was not; the agent's log says more"
        }
        reason::NO_SCRATCH => "too many executions were judged at the same time",
        reason::ESCAPED => {
            "the process is in the host's mount namespace or root directory: it left its container"
        }
        reason::UNIDENTIFIED => {
            "nobody had said yet which container it is; see unidentified: in the agent's configuration"
        }
        reason::AGENT_ABSENT => {
            "the container started while no agent ran; see whenAgentAbsent: in the agent's configuration"
        }
        _ => "this build does not know the reason",
    }
}

/// How near a rule is; the smallest is the best.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    Session,
    Origin,
    Name,
    Letters(usize),
}

fn nearest(policy: &Policy, refused: &Refused<'_>) -> Vec<Near> {
    let mut found: Vec<(Rank, Near)> = Vec::new();
    for (pattern, origins) in policy.exec.iter().flatten() {
        let path = pattern.as_str();
        let compared = if pattern.matches(refused.path) {
            match origins.iter().find(|(origin, _)| origin.to_string() == refused.origin) {
                Some((_, sessions)) => {
                    Some((Rank::Session, format!("is for {}, this is {}", list(*sessions), refused.session)))
                }
                None => {
                    let allowed: Vec<String> = origins.keys().map(ToString::to_string).collect();
                    Some((Rank::Origin, format!("is for {}, this is {}", allowed.join(", "), refused.origin)))
                }
            }
        } else if pattern.is_exact() && name(path) == name(refused.path) {
            Some((Rank::Name, "has the same name elsewhere".to_owned()))
        } else {
            letters(pattern, refused.path)
                .map(|count| (Rank::Letters(count), "is written almost like it".to_owned()))
        };
        if let Some((rank, difference)) = compared {
            found.push((rank, Near { path: path.to_owned(), difference }));
        }
    }
    found.sort_by(|(a, _), (b, _)| a.cmp(b));
    found.truncate(MOST_NEAR);
    found.into_iter().map(|(_, near)| near).collect()
}

fn list(sessions: Sessions) -> String {
    let names = Session::ALL.into_iter().filter(|session| sessions.has(*session)).map(Session::as_str);
    names.collect::<Vec<_>>().join(", ")
}

fn name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// In how many letters a path is another one, where they are few.
fn letters(pattern: &Pattern, path: &str) -> Option<usize> {
    let text = pattern.as_str();
    let comparable = pattern.is_exact()
        && text.len().max(path.len()) <= LONGEST_COMPARED
        && text.len().abs_diff(path.len()) <= MOST_DIFFERENT;
    comparable.then(|| distance(text, path)).filter(|count| *count <= MOST_DIFFERENT)
}

/// The narrowest rule that would allow it.
fn rule(refused: &Refused<'_>) -> Result<String, &'static str> {
    let pattern = Pattern::parse(refused.path).map_err(|_| "its path cannot be written in a rule")?;
    if !pattern.is_exact() {
        return Err("its path has a '*', which stands for anything in a rule");
    }
    let origin = Origin::parse(refused.origin).filter(|found| found.code() != origin::UNKNOWN);
    let origin = origin.ok_or("no rule allows bytes of unknown origin")?;
    let path = quoted(refused.path);
    let mut fields = vec![format!("path: {path}")];
    if origin != Origin::Image {
        fields.push(format!("from: {}", quoted(refused.origin)));
    }
    match refused.session {
        "admin" | "probe" => fields.push(format!("sessions: {}", Session::Admin.as_str())),
        "workload" if Some(refused.reason) == reason::name(reason::SESSION) => {
            fields.push(format!("sessions: {}", Session::Workload.as_str()));
        }
        _ => {}
    }
    Ok(if fields.len() == 1 { format!("- {}", fields[0]) } else { format!("- {{{}}}", fields.join(", ")) })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        document::parse,
        evaluate::{Execution, evaluate},
        image::compile,
        policy::alone,
    };

    fn policy(rules: &str) -> Policy {
        let text = format!(
            "apiVersion: palisade.dev/v1alpha1\nkind: ClusterProfile\nmetadata: {{name: a}}\nspec:\n  selector: {{}}\n  mode: \
             enforce\n  exec:\n    allow:\n      {rules}\n"
        );
        alone(&parse("x", &text).unwrap()[0])
    }

    const RULES: &str = "- path: /usr/bin/curl\n      - {path: /bin/sh, sessions: admin}\n      - path: /usr/sbin/nginx\n      \
                         - {path: /opt/**, from: \"volume:plugins\"}";

    fn near(path: &str, origin: &str, session: &str) -> Vec<String> {
        let refused = Refused { path, origin, session, reason: "no-rule" };
        let found = explain(Some(&policy(RULES)), &refused).near;
        found.into_iter().map(|near| format!("{} {}", near.path, near.difference)).collect()
    }

    #[test]
    fn the_nearest_rule_is_named_with_what_it_says_otherwise() {
        assert_eq!(near("/usr/bin/curl", "drift", "workload"), ["/usr/bin/curl is for image, this is drift"]);
        assert_eq!(near("/bin/sh", "image", "workload"), ["/bin/sh is for admin, this is workload"]);
        assert_eq!(
            near("/usr/local/bin/curl", "image", "workload"),
            ["/usr/bin/curl has the same name elsewhere"]
        );
        assert_eq!(
            near("/usr/sbin/nginy", "image", "workload"),
            ["/usr/sbin/nginx is written almost like it"]
        );
        assert_eq!(near("/opt/x", "image", "workload"), ["/opt/** is for volume:plugins, this is image"]);
        assert!(near("/bin/something", "image", "workload").is_empty());
    }

    #[test]
    fn there_is_no_rule_for_what_no_rule_can_allow() {
        let without = |path, origin, reason| {
            explain(None, &Refused { path, origin, session: "workload", reason }).rule.unwrap_err()
        };
        assert_eq!(without("/a", "image", "path-too-deep"), NOT_BY_A_RULE);
        assert_eq!(without("/a", "image", "escaped-to-host"), NOT_BY_A_RULE);
        assert!(without("/a", "unknown", "no-rule").contains("unknown origin"));
        assert!(without("/a*", "image", "no-rule").contains("'*'"));
        assert!(without("memfd:x", "memory", "no-rule").contains("cannot be written"));
    }

    #[test]
    fn every_reason_has_a_meaning() {
        let not_refused = [reason::RULE, reason::NO_PROFILE, reason::RUNTIME, reason::ADMITTED];
        for (code, name) in reason::ALL.iter().filter(|(code, _)| !not_refused.contains(code)) {
            assert!(!meaning(name).contains("does not know the reason"), "{code}: {name}");
        }
    }

    proptest! {
        /// What the explanation says would allow it, does.
        #[test]
        fn the_rule_allows_what_was_refused(
            path in "(/[a-z \"'{}:,#\\-]{1,6}){1,4}",
            origin in prop::sample::select(vec!["image", "drift", "memory", "host", "volume:data"]),
            session in prop::sample::select(vec![("workload", 1_u8), ("admin", 2), ("unknown", 0)]),
        ) {
            let refused = Refused { path: &path, origin, session: session.0, reason: "no-rule" };
            let rule = explain(Some(&policy(RULES)), &refused).rule;
            prop_assume!(rule.is_ok());
            let policy = policy(&rule.unwrap());
            let origin = Origin::parse(origin).unwrap();
            let judged = match &origin {
                Origin::Volume(name) => format!(":{}:{path}", name.as_str()),
                _ => path.clone(),
            };
            let execution =
                Execution { path: judged.as_bytes(), origin: origin.code(), session: session.1, failure: 0 };
            let decision = evaluate(&compile(&policy).unwrap(), &execution);
            prop_assert_eq!(decision.verdict, palisade_abi::codes::verdict::ALLOWED, "{:?}", policy);
        }
    }
}
