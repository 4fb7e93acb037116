//! Why an execution was refused, what comes nearest among the rules, and which rule would allow it.

use palisade_abi::codes::{origin, reason};

use crate::{
    exec::condition::{Arguments, Condition},
    glob::{Pattern, escaped},
    origin::Origin,
    policy::Policy,
    read::distance,
    session::{Session, Sessions},
    text::{may_have_other_bytes, yaml},
};

/// What was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Act {
    /// An execution.
    Execute,
    /// Memory that was to become executable.
    Map,
    /// Tracing another process, or writing to the memory of a running one.
    Trace,
}

/// What was refused, in the words of its record.
#[derive(Clone, Copy, Debug)]
pub struct Refused<'a> {
    pub act: Act,
    /// The file; empty where there is none.
    pub path: &'a str,
    /// `image`, `drift`, `volume:NAME`, …
    pub origin: &'a str,
    /// `workload`, `admin`, `probe`, `unknown`.
    pub session: &'a str,
    /// [`reason`] by name.
    pub reason: &'a str,
    /// What called exec; empty when that is not known.
    pub caller: &'a str,
    /// The path of a rule, as it is written, that leads to it by a symbolic link; empty when there is none.
    pub rule_by_link: &'a str,
    /// The program's name first; `None` when not all of them are known.
    pub arguments: Option<&'a [String]>,
}

/// What there is to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// What the reason means, in a sentence.
    pub meaning: &'static str,
    /// Rules that come nearest, the best first; at most [`MOST_NEAR`].
    pub near: Vec<Near>,
    /// What would allow it, and the field to which it belongs; or why there is none.
    pub rule: Result<Addition, &'static str>,
    /// What to think of before that rule is added.
    pub caution: Option<&'static str>,
}

/// What to add to a profile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Addition {
    pub field: &'static str,
    /// YAML, as it stands below the field.
    pub text: String,
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
    let mut near = match policy {
        Some(policy) if by_rules(refused.reason) => nearest(policy, refused),
        _ => Vec::new(),
    };
    if !refused.rule_by_link.is_empty() {
        let path = refused.rule_by_link.to_owned();
        near.retain(|other| other.path != path);
        let difference = "is a symbolic link to it: rules name what a link leads to".to_owned();
        near.insert(0, Near { path, difference });
        near.truncate(MOST_NEAR);
    }
    let rule = match switch(refused.reason) {
        Some(text) => Ok(Addition { field: "spec.exec", text: format!("{text}: allow") }),
        None if !by_rules(refused.reason) => Err(NOT_BY_A_RULE),
        None => rule(policy, refused),
    };
    let caution = match (refused.origin, &rule) {
        (_, Ok(_)) if refused.act == Act::Execute && is(refused.reason, reason::PARENT) => Some(
            "a program that runs what others tell it (a shell, an interpreter) makes everybody who may run it a parent",
        ),
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
        (_, Ok(_)) if refused.act == Act::Trace => {
            Some("who may trace a process may make it do whatever it is allowed to do")
        }
        ("", Ok(_)) => Some(
            "code that a process makes itself is in no list: what it does is then up to whoever controls the process",
        ),
        _ => None,
    };
    Explanation { meaning: meaning(refused.reason), near, rule, caution }
}

const NOT_BY_A_RULE: &str = "no rule changes that";

/// Whether a rule could have made another verdict of it.
fn by_rules(text: &str) -> bool {
    [reason::NO_RULE, reason::ORIGIN, reason::SESSION, reason::PARENT, reason::ARGUMENTS, reason::INTERPRETER]
        .into_iter()
        .any(|code| is(text, code))
}

fn is(text: &str, code: u8) -> bool {
    reason::name(code) == Some(text)
}

/// The field of `spec.exec` that allows it as a whole.
fn switch(text: &str) -> Option<&'static str> {
    [
        (reason::MEMORY, "memory"),
        (reason::JIT, "jit"),
        (reason::TRACE, "trace"),
        (reason::ELEVATION, "elevation"),
    ]
    .into_iter()
    .find(|(code, _)| is(text, *code))
    .map(|(_, field)| field)
}

fn meaning(text: &str) -> &'static str {
    let code = reason::ALL.iter().find(|(_, name)| *name == text).map_or(0, |(code, _)| *code);
    match code {
        reason::NO_RULE => "no rule names this path",
        reason::ORIGIN => "rules name this path, but not for bytes that come from there",
        reason::SESSION => {
            "rules name this path, but not for processes that came into the container as this one did"
        }
        reason::PARENT => "rules name this path, but not for the program that executed it",
        reason::ARGUMENTS => {
            "rules name this path, but not with these arguments; those of a script, and more than 1,024 bytes, are never compared"
        }
        reason::MEMORY => {
            "code in a file that is in memory alone (memfd, shared memory, a tmpfs that is no volume), which the profile does not allow"
        }
        reason::JIT => {
            "code that is in no file, or differs from its file: made at run time, which the profile does not allow"
        }
        reason::TRACE => {
            "tracing a process, or writing to the memory of a running one, which the profile does not allow"
        }
        reason::ELEVATION => {
            "the program would have rights that its caller has not (set-user-id, set-group-id, file capabilities), which the \
             profile denies"
        }
        reason::PROTECTED => {
            "the file is an executable of the image that a rule allows: changed, removed, renamed or hidden, it could not run any more"
        }
        reason::INTERPRETER => {
            "the program that loads it (its ELF interpreter) is not the unmodified file to which that name leads in the image, and no rule \
             allows it: it would run with the caller's arguments in the place of what was executed"
        }
        reason::PATH_CHANGES => {
            "files were renamed while its path was looked at, again and again, so that it has none; trying again may do"
        }
        reason::LAYER => {
            "the file is in a layer of an image, which containers share: changed there, it would pass for unmodified"
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
    Condition,
    Session,
    Origin,
    Name,
    Letters(usize),
}

fn nearest(policy: &Policy, refused: &Refused<'_>) -> Vec<Near> {
    let mut found: Vec<(Rank, Near)> = Vec::new();
    let Some(exec) = &policy.exec else { return Vec::new() };
    if refused.act == Act::Map {
        for (pattern, origins) in exec.code.libraries.iter().flatten() {
            if pattern.matches(refused.path) {
                let allowed: Vec<String> = origins.iter().map(ToString::to_string).collect();
                let difference =
                    format!("in libraries: is for {}, this is {}", allowed.join(", "), refused.origin);
                found.push((Rank::Origin, Near { path: pattern.as_str().to_owned(), difference }));
            }
        }
    }
    for (pattern, digest) in exec.pinned.keys() {
        if pattern.exact() == Some(refused.path) {
            let difference = format!("is for the image's file with SHA-256 {digest} alone");
            found.push((Rank::Origin, Near { path: pattern.as_str().to_owned(), difference }));
        }
    }
    for (pattern, origins) in &exec.allowed {
        let path = pattern.as_str();
        let compared = if pattern.matches(refused.path) {
            match origins.iter().find(|(origin, _)| origin.to_string() == refused.origin) {
                Some((_, who)) => {
                    who.iter().for_each(|(condition, sessions)| {
                        let (rank, difference) = otherwise(condition, *sessions, refused);
                        found.push((rank, Near { path: path.to_owned(), difference }));
                    });
                    None
                }
                None => {
                    let allowed: Vec<String> = origins.keys().map(ToString::to_string).collect();
                    Some((Rank::Origin, format!("is for {}, this is {}", allowed.join(", "), refused.origin)))
                }
            }
        } else if pattern.exact().is_some_and(|exact| name(exact) == name(refused.path)) {
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

/// What a rule for the same path and origin says otherwise.
fn otherwise(condition: &Condition, sessions: Sessions, refused: &Refused<'_>) -> (Rank, String) {
    if condition.is_none() {
        return (Rank::Session, format!("is for {}, this is {}", list(sessions), refused.session));
    }
    let for_whom = if sessions.is_any() { String::new() } else { format!("for {} ", list(sessions)) };
    let caller = match (&condition.parent, refused.caller) {
        (Some(parent), caller) if parent.exact() != Some(caller) && !caller.is_empty() => {
            format!(", this is {caller}")
        }
        _ => String::new(),
    };
    (Rank::Condition, format!("is {for_whom}{condition}{caller}"))
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
    let text = pattern.exact()?;
    let comparable =
        text.len().max(path.len()) <= LONGEST_COMPARED && text.len().abs_diff(path.len()) <= MOST_DIFFERENT;
    comparable.then(|| distance(text, path)).filter(|count| *count <= MOST_DIFFERENT)
}

/// The narrowest rule that would allow it.
fn rule(policy: Option<&Policy>, refused: &Refused<'_>) -> Result<Addition, &'static str> {
    let pattern = Pattern::of_path(refused.path).map_err(|_| "its path cannot be written in a rule")?;
    if may_have_other_bytes(refused.path) {
        return Err(crate::learn::OTHER_BYTES);
    }
    let origin = Origin::parse(refused.origin).filter(|found| found.code() != origin::UNKNOWN);
    let origin = origin.ok_or("no rule allows bytes of unknown origin")?;
    let path = yaml(pattern.as_str());
    let mut fields = vec![format!("path: {path}")];
    if origin != Origin::Image {
        fields.push(format!("from: {}", yaml(refused.origin)));
    }
    if refused.act == Act::Map {
        let rule = format!("{{{}}}", fields.join(", "));
        // A list takes the place of what holds without one: every file of the image.
        return Ok(match policy.and_then(|policy| policy.exec.as_ref()?.code.libraries.as_ref()) {
            Some(_) => Addition { field: "spec.exec.libraries", text: format!("- {rule}") },
            None => Addition { field: "spec.exec", text: format!("libraries: [{{path: /**}}, {rule}]") },
        });
    }
    match refused.session {
        "admin" | "probe" => fields.push(format!("sessions: {}", Session::Admin.as_str())),
        "workload" if is(refused.reason, reason::SESSION) => {
            fields.push(format!("sessions: {}", Session::Workload.as_str()));
        }
        _ => {}
    }
    fields.extend(conditions(policy, refused)?);
    let text =
        if fields.len() == 1 { format!("- {}", fields[0]) } else { format!("- {{{}}}", fields.join(", ")) };
    Ok(Addition { field: "spec.exec.allow", text })
}

/// The conditions without which the rule would be for more than what was refused for the lack of one.
fn conditions(policy: Option<&Policy>, refused: &Refused<'_>) -> Result<Vec<String>, &'static str> {
    let for_parent = is(refused.reason, reason::PARENT);
    let for_arguments = is(refused.reason, reason::ARGUMENTS);
    if !for_parent && !for_arguments {
        return Ok(Vec::new());
    }
    // Rules for the same file may ask for both.
    let rules = policy.and_then(|policy| Some(&policy.exec.as_ref()?.allowed));
    let asked = |wanted: &dyn Fn(&Condition) -> bool| {
        let of_path =
            rules.into_iter().flatten().filter(|(pattern, _)| pattern.exact() == Some(refused.path));
        of_path.flat_map(|(_, origins)| origins.values()).flat_map(|who| who.keys()).any(wanted)
    };
    let mut fields = Vec::new();
    if for_parent || asked(&|condition| condition.parent.is_some()) {
        let caller = Pattern::of_path(refused.caller).ok().filter(|_| !may_have_other_bytes(refused.caller));
        let caller = caller.ok_or(
            "who executed it is not known as a program of the image, so a rule without `parents` would be for everybody",
        )?;
        fields.push(format!("parents: {}", yaml(caller.as_str())));
    }
    if for_arguments || asked(&|condition| condition.arguments.is_some()) {
        fields.extend(arguments(refused).ok_or(
            "its arguments cannot be written in a rule: not all are known, they are too long, or not text",
        )?);
    }
    Ok(fields)
}

/// The fields for these arguments and no others, where they can be written.
fn arguments(refused: &Refused<'_>) -> Option<Vec<String>> {
    let all = refused.arguments?;
    if all.iter().any(|argument| may_have_other_bytes(argument)) {
        return None;
    }
    let (called, arguments) = all.split_first()?;
    let by_itself = *called == refused.path || *called == name(refused.path);
    let names = if by_itself { Vec::new() } else { vec![escaped(called)] };
    // A field has no empty text.
    if names.iter().any(String::is_empty) {
        return None;
    }
    let patterns =
        Arguments::parse(names, arguments.iter().map(|argument| escaped(argument)).collect()).ok()?;
    let list = |texts: &[String]| texts.iter().map(|text| yaml(text)).collect::<Vec<_>>().join(", ");
    let mut fields = vec![format!("args: [{}]", list(patterns.patterns()))];
    if !patterns.names().is_empty() {
        fields.push(format!("names: [{}]", list(patterns.names())));
    }
    Some(fields)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        document::parse,
        exec::evaluate::{Execution, evaluate, evaluate_mapping},
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
                         - {path: /opt/**, from: \"volume:plugins\"}\n      - {path: /usr/bin/py, parents: /bin/cron, args: [\"*.py\"]}";

    fn refused<'a>(
        act: Act,
        path: &'a str,
        origin: &'a str,
        session: &'a str,
        reason: &'a str,
    ) -> Refused<'a> {
        Refused {
            act,
            path,
            origin,
            session,
            reason,
            caller: "/bin/init",
            rule_by_link: "",
            arguments: Some(&[]),
        }
    }

    fn near(path: &str, origin: &str, session: &str) -> Vec<String> {
        let refused = refused(Act::Execute, path, origin, session, "no-rule");
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
        assert_eq!(
            near("/usr/bin/py", "image", "workload"),
            ["/usr/bin/py is when /bin/cron executes it with the arguments [\"*.py\"], this is /bin/init"]
        );
        assert!(near("/bin/something", "image", "workload").is_empty());
    }

    #[test]
    fn a_rule_that_is_a_link_is_the_nearest() {
        let refused = Refused {
            rule_by_link: "/usr/bin/curl",
            ..refused(Act::Execute, "/usr/local/bin/curl", "image", "workload", "no-rule")
        };
        let near = explain(Some(&policy(RULES)), &refused).near;
        assert_eq!(near.len(), 1);
        assert!(near[0].path == "/usr/bin/curl" && near[0].difference.contains("symbolic link"), "{near:?}");
    }

    #[test]
    fn there_is_no_rule_for_what_no_rule_can_allow() {
        let without = |path, origin, reason| {
            let act = Act::Execute;
            explain(None, &refused(act, path, origin, "workload", reason)).rule.unwrap_err()
        };
        assert_eq!(without("/a", "image", "path-too-deep"), NOT_BY_A_RULE);
        assert_eq!(without("/a", "image", "escaped-to-host"), NOT_BY_A_RULE);
        assert!(without("/a", "unknown", "no-rule").contains("unknown origin"));
        assert!(without("/a\\xff", "image", "no-rule").contains("not UTF-8"));
        assert!(without("memfd:x", "memory", "no-rule").contains("cannot be written"));
    }

    #[test]
    fn every_reason_has_a_meaning() {
        let not_refused = [reason::RULE, reason::NO_PROFILE, reason::RUNTIME, reason::ADMITTED];
        for (code, name) in reason::ALL.iter().filter(|(code, _)| !not_refused.contains(code)) {
            assert!(!meaning(name).contains("does not know the reason"), "{code}: {name}");
        }
    }

    #[test]
    fn code_that_is_not_executed_is_allowed_by_fields_of_its_own() {
        let addition = |act, path, origin, reason| {
            let found = explain(Some(&policy(RULES)), &refused(act, path, origin, "workload", reason));
            found.rule.map(|addition| format!("{}: {}", addition.field, addition.text)).unwrap()
        };
        assert_eq!(addition(Act::Map, "", "", "jit-not-allowed"), "spec.exec: jit: allow");
        assert_eq!(addition(Act::Trace, "", "", "trace-not-allowed"), "spec.exec: trace: allow");
        assert_eq!(
            addition(Act::Map, "/tmp/a.so", "drift", "origin-not-allowed"),
            "spec.exec: libraries: [{path: /**}, {path: \"/tmp/a.so\", from: \"drift\"}]"
        );
    }

    /// Texts that mean something in a pattern, or in YAML.
    const COMPONENT: &str = "[a-z \"'{}:,#*\\\\\n\u{ad}\\-]{1,6}|[ab*\\\\]{1,3}";
    const ARGUMENT: &str = "[a-z \"'{}:,#*\\\\\n\u{ad}\\-]{0,6}|[ab*\\\\]{0,3}";

    fn path(most: usize) -> impl Strategy<Value = String> {
        prop::collection::vec(COMPONENT, 1..=most).prop_map(|components| format!("/{}", components.join("/")))
    }

    proptest! {
        /// What the explanation says would allow it does, and allows nothing else.
        #[test]
        fn the_rule_allows_what_was_refused(
            path in path(4),
            origin in prop::sample::select(vec!["image", "drift", "memory", "host", "volume:data"]),
            session in prop::sample::select(vec![("workload", 1_u8), ("admin", 2), ("unknown", 0)]),
            (mapped, reason) in prop_oneof![
                Just((true, reason::NO_RULE)),
                prop::sample::select(vec![reason::NO_RULE, reason::PARENT, reason::ARGUMENTS]).prop_map(|reason| (false, reason)),
            ],
            caller in path(2),
            called in prop::option::of(COMPONENT),
            rest in prop::collection::vec(ARGUMENT, 0..3),
            other_path in path(4),
            other_caller in path(2),
            other_rest in prop::collection::vec(ARGUMENT, 0..3),
        ) {
            let arguments = [vec![called.unwrap_or_else(|| path.clone())], rest].concat();
            let act = if mapped { Act::Map } else { Act::Execute };
            let code = reason;
            let reason = reason::name(reason).unwrap();
            let refused = Refused {
                caller: &caller,
                arguments: Some(&arguments),
                ..refused(act, &path, origin, session.0, reason)
            };
            let rule = explain(Some(&policy(RULES)), &refused).rule;
            prop_assume!(rule.is_ok());
            let rule = rule.unwrap();
            // Libraries without a list are every file of the image.
            let whole = mapped && origin == "image";
            let policy = match rule.field {
                "spec.exec.allow" => policy(&rule.text),
                _ => policy(&format!("[]\n    {}", rule.text)),
            };
            let origin = Origin::parse(origin).unwrap();
            let image = compile(&policy).unwrap();
            let allowed = |path: &str, caller: &str, arguments: &[String]| {
                let judged = match &origin {
                    Origin::Volume(name) => format!(":{}:{path}", name.as_str()),
                    _ => path.to_owned(),
                };
                let joined: Vec<u8> = arguments.iter().flat_map(|argument| argument.bytes().chain([0])).collect();
                let execution = Execution {
                    path: judged.as_bytes(),
                    origin: origin.code(),
                    session: session.1,
                    failure: 0,
                    caller: Some(caller.as_bytes()),
                    arguments: Some(&joined),
                };
                let decision = match act {
                    Act::Map => evaluate_mapping(&image, Some(&execution), false),
                    _ => evaluate(&image, &execution),
                };
                decision.verdict == palisade_abi::codes::verdict::ALLOWED
            };
            prop_assert!(allowed(&path, &caller, &arguments), "{:?}", policy);
            let others = [other_path, path.replace('*', "a"), path.replace("**", "a/b"), path.replace('\\', "")];
            for other in others.iter().filter(|other| **other != path && !whole) {
                prop_assert!(!allowed(other, &caller, &arguments), "{} by {:?}", other, policy);
            }
            for other in [&other_caller, &caller.replace('*', "a")] {
                prop_assert!(code != reason::PARENT || *other == caller || !allowed(&path, other, &arguments), "{:?}", policy);
            }
            let with_rest = |rest: Vec<String>| [vec![arguments[0].clone()], rest].concat();
            let starless = arguments.iter().skip(1).map(|argument| argument.replace('*', "a")).collect();
            let called = [vec![arguments[0].replace('*', "a")], arguments[1..].to_vec()].concat();
            for other in [with_rest(other_rest), with_rest(starless), called] {
                let by_name = other[0] == path || other[0] == name(&path);
                if code == reason::ARGUMENTS && other != arguments && !(by_name && other[1..] == arguments[1..]) {
                    prop_assert!(!allowed(&path, &caller, &other), "{:?} by {:?}", other, policy);
                }
            }
        }
    }
}
