//! `palisade explain`: why something was refused, and what would allow it.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::Write,
    path::PathBuf,
    process::ExitCode,
};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use palisade_profile::{
    document::{self, Profile},
    explain::{Act, Explanation, Refused, explain},
    policy::{self, Policy},
    selector::ContainerFacts,
    text::{printable, visible_json, word, words},
};
use serde_json::{Value, json};

use crate::{profile::read, table::moment};

/// Where profiles are, unless the command line says otherwise.
const PROFILES: &str = "/etc/palisade/profiles";

#[derive(Args)]
pub(crate) struct Options {
    /// File with one JSON record a line, as `palisade events --json` prints them; - for standard input
    #[arg(default_value = "-")]
    records: PathBuf,
    /// Profile files, or folders of them [default: /etc/palisade/profiles, if it is there]
    #[arg(long)]
    profiles: Vec<PathBuf>,
    /// Print one JSON object for each group of equal refusals
    #[arg(long)]
    json: bool,
}

/// What makes refusals equal.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    act: Act,
    namespace: String,
    container: String,
    image: String,
    labels: BTreeMap<String, String>,
    path: String,
    origin: String,
    session: String,
    reason: String,
    /// What called exec, where the reason has to do with that.
    caller: String,
    rule_by_link: String,
    /// The arguments, the program's name first, where the reason has to do with them and they are known.
    arguments: Option<Vec<String>>,
    verdict: String,
    mode: String,
    revision: String,
    profiles: Vec<String>,
}

impl Key {
    fn refused(&self) -> Refused<'_> {
        Refused {
            act: self.act,
            path: &self.path,
            origin: &self.origin,
            session: &self.session,
            reason: &self.reason,
            caller: &self.caller,
            rule_by_link: &self.rule_by_link,
            arguments: self.arguments.as_deref(),
        }
    }
}

#[derive(Default)]
struct Group {
    count: u64,
    first: u64,
    last: u64,
    pods: BTreeSet<String>,
    /// Of the first one.
    arguments: String,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let profiles = profiles(&options.profiles)?;
    let (name, text) = read(&options.records)?;
    let mut groups: BTreeMap<Key, Group> = BTreeMap::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let record: Value = serde_json::from_str(line).with_context(|| {
            format!(
                "{name}:{}: this is not a JSON record; give the output of `palisade events --json`",
                number + 1
            )
        })?;
        let Some((key, time, pod, arguments)) = refusal(&record) else { continue };
        let group = groups.entry(key).or_default();
        if group.count == 0 || time < group.first {
            group.first = time;
            group.arguments = arguments;
        }
        group.last = group.last.max(time);
        group.count += 1;
        group.pods.insert(pod);
    }
    let mut out = std::io::stdout().lock();
    let mut ordered: Vec<(&Key, &Group)> = groups.iter().collect();
    ordered.sort_by_key(|(_, group)| std::cmp::Reverse(group.count));
    for (key, group) in &ordered {
        let policy = policy_of(&profiles, key);
        let explanation = explain(policy.as_ref(), &key.refused());
        if options.json {
            writeln!(out, "{}", visible_json(&as_json(key, group, &explanation).to_string()))?;
        } else {
            tell(&mut out, key, group, policy.as_ref(), &explanation)?;
        }
    }
    if ordered.is_empty() && !options.json {
        writeln!(out, "{name} holds nothing that was refused, or would be")?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What a record says of a refusal, or of what would be one: what makes it equal to others, its time, pod and arguments.
fn refusal(record: &Value) -> Option<(Key, u64, String, String)> {
    let event = |name: &str| record.get(name).filter(|event| !event.is_null());
    let text = |value: &Value, field: &str| value[field].as_str().unwrap_or_default().to_owned();
    let (exec, act) = match (event("exec"), event("code")) {
        (Some(exec), _) => (exec, Act::Execute),
        (_, Some(code)) if !text(code, "file").is_empty() || text(code, "reason") == "jit-not-allowed" => {
            (code, Act::Map)
        }
        (_, Some(code)) => (code, Act::Trace),
        _ => return None,
    };
    let container = record.get("container")?;
    let verdict = text(exec, "verdict");
    if verdict != "denied" && verdict != "audited" {
        return None;
    }
    let of_script = exec["verdict_of_script"].as_bool().unwrap_or(false);
    let (path, origin) = match act {
        Act::Execute if of_script => ("script", "script_origin"),
        Act::Execute
            if text(exec, "reason") == "interpreter-not-allowed" && !text(exec, "interpreter").is_empty() =>
        {
            ("interpreter", "interpreter_origin")
        }
        Act::Execute => ("executable", "origin"),
        Act::Map | Act::Trace => ("file", "origin"),
    };
    let texts = |value: &Value| -> Vec<String> {
        value.as_array().into_iter().flatten().filter_map(|word| Some(word.as_str()?.to_owned())).collect()
    };
    let labels = container["labels"].as_object().into_iter().flatten();
    let reason = text(exec, "reason");
    let of_arguments = reason == "arguments-not-allowed";
    let of_condition = of_arguments || reason == "parent-not-allowed";
    let all = !of_script && !exec["arguments_truncated"].as_bool().unwrap_or(true);
    let arguments = texts(&exec["arguments"]);
    let shown = match act {
        Act::Execute => words(&arguments),
        Act::Map | Act::Trace => format!("{} by {}", text(exec, "act"), word(&text(exec, "executable"))),
    };
    let key = Key {
        act,
        namespace: text(container, "namespace"),
        container: text(container, "name"),
        image: text(container, "image"),
        labels: labels.filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned()))).collect(),
        path: text(exec, path),
        origin: text(exec, origin),
        session: text(&record["session_of"], "kind"),
        caller: if of_condition { text(exec, "caller") } else { String::new() },
        rule_by_link: text(exec, "rule_by_link"),
        arguments: (of_arguments && all).then_some(arguments),
        reason,
        verdict,
        mode: text(exec, "decided_mode"),
        revision: text(exec, "decided_revision"),
        profiles: texts(&container["profiles"]),
    };
    let time = record["time"].as_u64().unwrap_or(0);
    Some((key, time, text(container, "pod"), shown))
}

/// Every profile of files and folders.
fn profiles(places: &[PathBuf]) -> Result<Vec<Profile>> {
    let default = PathBuf::from(PROFILES);
    let places = match places {
        [] if default.is_dir() => std::slice::from_ref(&default),
        given => given,
    };
    let mut files = Vec::new();
    for place in places {
        if place.is_dir() {
            let entries =
                std::fs::read_dir(place).with_context(|| format!("cannot list {}", place.display()))?;
            let mut found: Vec<PathBuf> = entries.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
            found.retain(|path| {
                path.extension().is_some_and(|extension| extension == "yaml" || extension == "yml")
            });
            found.sort();
            files.extend(found);
        } else {
            files.push(place.clone());
        }
    }
    let mut profiles = Vec::new();
    for file in files {
        let (name, text) = read(&file)?;
        match document::parse(&name, &text) {
            Ok(found) => profiles.extend(found),
            Err(problems) => {
                for problem in &problems {
                    eprintln!("{}", printable(&problem.to_string()));
                }
                bail!("{name} has {} faults; without them what it allows can be told", problems.len());
            }
        }
    }
    Ok(profiles)
}

fn policy_of(profiles: &[Profile], key: &Key) -> Option<Policy> {
    let facts = ContainerFacts {
        namespace: key.namespace.clone(),
        name: key.container.clone(),
        image: key.image.clone(),
        labels: key.labels.clone(),
        ..ContainerFacts::default()
    };
    policy::unite(profiles, &facts)
}

fn as_json(key: &Key, group: &Group, explanation: &Explanation) -> Value {
    let near: Vec<Value> = explanation
        .near
        .iter()
        .map(|near| json!({"path": near.path, "difference": near.difference}))
        .collect();
    json!({
        "verdict": key.verdict, "count": group.count, "first": group.first, "last": group.last,
        "namespace": key.namespace, "container": key.container, "image": key.image, "pods": group.pods,
        "path": key.path, "origin": key.origin, "session": key.session, "reason": key.reason,
        "meaning": explanation.meaning, "mode": key.mode, "revision": key.revision, "profiles": key.profiles,
        "near": near, "rule": explanation.rule.as_ref().ok().map(|rule| &rule.text),
        "field": explanation.rule.as_ref().ok().map(|rule| rule.field), "no_rule": explanation.rule.as_ref().err(),
        "caution": explanation.caution,
    })
}

fn tell(
    out: &mut impl Write,
    key: &Key,
    group: &Group,
    policy: Option<&Policy>,
    explanation: &Explanation,
) -> Result<()> {
    let times = if group.count == 1 { "once".to_owned() } else { format!("{} times", group.count) };
    writeln!(out, "{} {times}: {}", printable(&key.verdict), printable(&path_of(key)))?;
    let pods: Vec<&str> = group.pods.iter().map(String::as_str).collect();
    let mut line = |head: &str, text: &str| writeln!(out, "  {head:<9} {}", printable(text));
    line("where", &format!("{}/{}, container {}", key.namespace, pods.join(" "), key.container))?;
    let first = moment(group.first);
    let when = if group.count == 1 { first } else { format!("{first} to {}", moment(group.last)) };
    line("when", &when)?;
    line("as", &group.arguments)?;
    let compared = if key.path.is_empty() {
        format!("code in no file, session {}", key.session)
    } else {
        format!("{} from {}, session {}", path_of(key), word(&key.origin), key.session)
    };
    line("compared", &compared)?;
    line("because", &format!("{}: {}", key.reason, explanation.meaning))?;
    if !key.revision.is_empty() {
        let by = format!("{}, revision {}, mode {}", key.profiles.join(" + "), key.revision, key.mode);
        line("by", &by)?;
    }
    match policy {
        None if !key.revision.is_empty() => {
            line("nearest", "not known; name the profiles with --profiles")?;
        }
        Some(policy) if !key.revision.is_empty() && policy.revision_name() != key.revision => {
            let now = policy.revision_name();
            line(
                "note",
                &format!("the profiles at hand are another revision, {now}; the rest is about that"),
            )?;
        }
        _ => {}
    }
    for near in &explanation.near {
        line("nearest", &format!("{}, which {}", word(&near.path), near.difference))?;
    }
    match &explanation.rule {
        Ok(rule) => {
            line("to allow", &format!("add to {}:", rule.field))?;
            // YAML, in which nothing is hidden.
            writeln!(out, "      {}", rule.text)?;
        }
        Err(why) => line("to allow", why)?,
    }
    if let Some(caution) = explanation.caution {
        writeln!(out, "  {:<9} {caution}", "caution")?;
    }
    writeln!(out)?;
    Ok(())
}

/// What was refused as a word; nothing for what is no file.
fn path_of(key: &Key) -> String {
    if key.path.is_empty() { String::new() } else { word(&key.path) }
}

#[cfg(test)]
mod tests {
    use palisade_profile::text::is_hidden;

    use super::*;

    const PROFILE: &str = "apiVersion: palisade.dev/v1alpha1\nkind: Profile\nmetadata: {name: web, namespace: shop}\nspec:\n  \
                           selector: {podSelector: {matchLabels: {app: web}}}\n  mode: enforce\n  exec:\n    allow:\n      - \
                           path: /usr/sbin/nginx\n      - {path: /bin/sh, sessions: admin}\n";

    fn record(path: &str, reason: &str, time: u64) -> String {
        json!({
            "time": time, "session_of": {"kind": "workload"},
            "container": {
                "namespace": "shop", "name": "nginx", "pod": format!("web-{time}"), "image": "web:1",
                "labels": {"app": "web"}, "profiles": ["shop/web"],
            },
            "exec": {
                "verdict": "denied", "reason": reason, "executable": path, "origin": "image",
                "arguments": [path, "-c", "id\u{1b}[2J"], "decided_mode": "enforce",
                "decided_revision": "000000000000",
            },
        })
        .to_string()
    }

    #[test]
    fn equal_refusals_are_told_once_with_what_would_allow_them() {
        let folder = std::env::temp_dir().join(format!("palisade-explain-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("web.yaml"), PROFILE).unwrap();
        let profiles = profiles(std::slice::from_ref(&folder)).unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
        let mut groups: BTreeMap<Key, Group> = BTreeMap::new();
        for time in [5, 3, 9] {
            let value = serde_json::from_str(&record("/bin/sh", "session-not-allowed", time)).unwrap();
            let (key, ..) = refusal(&value).unwrap();
            groups.entry(key).or_default().count += 1;
        }
        let [(key, group)] = groups.into_iter().collect::<Vec<_>>().try_into().ok().unwrap();
        assert_eq!(group.count, 3);
        let policy = policy_of(&profiles, &key).unwrap();
        let explanation = explain(Some(&policy), &key.refused());
        let mut out = Vec::new();
        tell(&mut out, &key, &group, Some(&policy), &explanation).unwrap();
        let text = String::from_utf8(out).unwrap();
        for wanted in [
            "denied 3 times: /bin/sh",
            "nearest   /bin/sh, which is for admin, this is workload",
            "- {path: \"/bin/sh\", sessions: workload}",
            "the profiles at hand are another revision",
        ] {
            assert!(text.contains(wanted), "{wanted}: {text}");
        }
    }

    #[test]
    fn what_was_allowed_is_no_refusal() {
        let value: Value = serde_json::from_str(&record("/bin/sh", "no-rule", 1)).unwrap();
        let mut allowed = value.clone();
        allowed["exec"]["verdict"] = json!("allowed");
        assert!(refusal(&value).is_some());
        assert!(refusal(&allowed).is_none());
        assert!(refusal(&json!({"gap": {"count": 1}, "container": {}})).is_none());
    }

    #[test]
    fn nothing_of_a_record_reaches_the_terminal_hidden() {
        let bad = "/x\u{1b}]0;\u{7}\n\u{202e}\u{61c}\u{ad}\u{feff}\u{e0041}";
        for reason in ["no-rule", "arguments-not-allowed", "parent-not-allowed", bad] {
            let mut value: Value = serde_json::from_str(&record(bad, reason, 1)).unwrap();
            let exec = value["exec"].as_object_mut().unwrap();
            for field in ["caller", "decided_mode", "decided_revision", "rule_by_link"] {
                exec.insert(field.to_owned(), json!(bad));
            }
            exec.insert("arguments_truncated".to_owned(), json!(false));
            for field in ["namespace", "name", "pod", "image"] {
                value["container"][field] = json!(bad);
            }
            value["container"]["profiles"] = json!([bad]);
            value["session_of"]["kind"] = json!(bad);
            let (mut key, _, pod, arguments) = refusal(&value).unwrap();
            key.verdict.push_str(bad);
            let explanation = explain(None, &key.refused());
            let group = Group { count: 1, arguments, pods: BTreeSet::from([pod]), ..Group::default() };
            let mut out = Vec::new();
            tell(&mut out, &key, &group, None, &explanation).unwrap();
            let text = String::from_utf8(out).unwrap();
            assert!(text.lines().all(|line| !line.contains(is_hidden)), "{text:?}");
            assert!(text.lines().skip(1).all(|line| line.is_empty() || line.starts_with("  ")), "{text:?}");
        }
    }

    #[test]
    fn arguments_that_differ_look_different() {
        let of = |arguments: Value| {
            let mut value: Value = serde_json::from_str(&record("/bin/sh", "no-rule", 1)).unwrap();
            value["exec"]["arguments"] = arguments;
            refusal(&value).unwrap().3
        };
        assert_eq!(of(json!(["sh", "-c", "a b", ""])), "sh -c \"a b\" \"\"");
        assert_ne!(of(json!(["a b"])), of(json!(["a", "b"])));
    }
}
