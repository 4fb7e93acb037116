//! `palisade explain`: why something was refused, and what would allow it.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::Write,
    path::PathBuf,
    process::ExitCode,
};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use palisade_audit::{
    View,
    refusal::{Key, Refusal},
};
use palisade_profile::{
    document::{self, Profile},
    explain::{Explanation, explain},
    policy::{self, Policy},
    text::{printable, visible_json, word},
};
use serde_json::{Value, json};

use crate::{
    input::{read, records},
    table::moment,
};

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

#[derive(Default)]
struct Group {
    count: u64,
    first: u64,
    last: u64,
    pods: BTreeSet<String>,
    /// What was done, of the first one.
    shown: String,
}

impl Group {
    fn add(&mut self, time: u64, pod: String, shown: String) {
        if self.count == 0 || time < self.first {
            self.first = time;
            self.shown = shown;
        }
        self.last = self.last.max(time);
        self.count += 1;
        self.pods.insert(pod);
    }
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let profiles = profiles(&options.profiles)?;
    let mut groups: BTreeMap<Key, Group> = BTreeMap::new();
    let name = records(&options.records, |record| {
        if let Some(Refusal { key, time, pod, shown }) = View::new(record).refusal() {
            groups.entry(key).or_default().add(time, pod, shown);
        }
    })?;
    let mut out = std::io::stdout().lock();
    let mut ordered: Vec<(&Key, &Group)> = groups.iter().collect();
    ordered.sort_by_key(|(_, group)| std::cmp::Reverse(group.count));
    for (key, group) in &ordered {
        let policy = policy::unite(&profiles, &key.facts());
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
    line("as", &group.shown)?;
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

    fn refusal(record: &Value) -> Refusal {
        View::new(&palisade_proto::record_from_json(&record.to_string()).unwrap()).refusal().unwrap()
    }

    fn record(path: &str, reason: &str, time: u64) -> Value {
        json!({
            "time": time, "session_of": {"kind": "workload"},
            "container": {
                "namespace": "shop", "name": "nginx", "pod": format!("web-{time}"), "image": "web:1",
                "labels": {"app": "web"}, "profiles": ["shop/web"],
            },
            "decision": {"verdict": "denied", "reason": reason, "mode": "enforce", "revision": "000000000000"},
            "exec": {"executable": path, "origin": "image", "arguments": [path, "-c", "id\u{1b}[2J"]},
        })
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
            let Refusal { key, time, pod, shown } = refusal(&record("/bin/sh", "session-not-allowed", time));
            groups.entry(key).or_default().add(time, pod, shown);
        }
        let [(key, group)] = groups.into_iter().collect::<Vec<_>>().try_into().ok().unwrap();
        assert_eq!((group.count, group.first, group.last, group.pods.len()), (3, 3, 9, 3));
        let policy = policy::unite(&profiles, &key.facts()).unwrap();
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
    fn nothing_of_a_record_reaches_the_terminal_hidden() {
        let bad = "/x\u{1b}]0;\u{7}\n\u{202e}\u{61c}\u{ad}\u{feff}\u{e0041}";
        for reason in ["no-rule", "arguments-not-allowed", "parent-not-allowed", bad] {
            let mut value = record(bad, reason, 1);
            let exec = value["exec"].as_object_mut().unwrap();
            for field in ["caller", "rule_by_link"] {
                exec.insert(field.to_owned(), json!(bad));
            }
            exec.insert("arguments_truncated".to_owned(), json!(false));
            for field in ["namespace", "name", "pod", "image"] {
                value["container"][field] = json!(bad);
            }
            value["container"]["profiles"] = json!([bad]);
            value["session_of"]["kind"] = json!(bad);
            (value["decision"]["mode"], value["decision"]["revision"]) = (json!(bad), json!(bad));
            let Refusal { mut key, time, pod, shown } = refusal(&value);
            key.verdict.push_str(bad);
            let explanation = explain(None, &key.refused());
            let mut group = Group::default();
            group.add(time, pod, shown);
            let mut out = Vec::new();
            tell(&mut out, &key, &group, None, &explanation).unwrap();
            let text = String::from_utf8(out).unwrap();
            assert!(text.lines().all(|line| !line.contains(is_hidden)), "{text:?}");
            assert!(text.lines().skip(1).all(|line| line.is_empty() || line.starts_with("  ")), "{text:?}");
        }
    }
}
