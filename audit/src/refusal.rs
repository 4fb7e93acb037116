//! What was refused, or would be: what an explanation needs of a record, and what makes two of them equal.

use std::collections::BTreeMap;

use palisade_profile::{
    explain::{self, Act},
    selector::ContainerFacts,
};

use crate::common::{Common, Verdict};

/// What was refused, as its event has it.
pub(crate) struct Refused<'a> {
    pub act: Act,
    /// The file by which the verdict came about, and its origin; empty where there is none.
    pub path: &'a str,
    pub origin: &'a str,
    /// What called exec, where the reason has to do with that.
    pub caller: &'a str,
    pub rule_by_link: &'a str,
    /// The arguments, where the reason has to do with them and they are known.
    pub arguments: Option<&'a [String]>,
    /// What was done, in words.
    pub shown: String,
}

/// What makes refusals equal.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    pub act: Act,
    pub namespace: String,
    pub container: String,
    pub image: String,
    pub labels: BTreeMap<String, String>,
    pub path: String,
    pub origin: String,
    pub session: String,
    pub reason: String,
    /// What called exec, where the reason has to do with that.
    pub caller: String,
    pub rule_by_link: String,
    /// The arguments, the program's name first, where the reason has to do with them and they are known.
    pub arguments: Option<Vec<String>>,
    pub verdict: String,
    pub mode: String,
    pub revision: String,
    pub profiles: Vec<String>,
}

/// One refusal.
#[derive(Clone, Debug)]
pub struct Refusal {
    pub key: Key,
    pub time: u64,
    pub pod: String,
    /// What was done, in words.
    pub shown: String,
}

impl Key {
    /// What there is to explain.
    #[must_use]
    pub fn refused(&self) -> explain::Refused<'_> {
        explain::Refused {
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

    /// By what profiles select the container.
    #[must_use]
    pub fn facts(&self) -> ContainerFacts {
        ContainerFacts {
            namespace: self.namespace.clone(),
            name: self.container.clone(),
            image: self.image.clone(),
            labels: self.labels.clone(),
            ..ContainerFacts::default()
        }
    }
}

/// The refusal that a record is of, if it is of one.
pub(crate) fn of(record: Common<'_>, refused: Refused<'_>) -> Option<Refusal> {
    let (container, decision) = (record.container()?, record.decision()?);
    if !matches!(record.verdict(), Some(Verdict::Audited | Verdict::Denied)) {
        return None;
    }
    let Refused { act, path, origin, caller, rule_by_link, arguments, shown } = refused;
    let key = Key {
        act,
        namespace: container.namespace.clone(),
        container: container.name.clone(),
        image: container.image.clone(),
        labels: container.labels.clone(),
        path: path.to_owned(),
        origin: origin.to_owned(),
        session: record.session().map_or_else(String::new, |(kind, _)| kind.to_owned()),
        reason: decision.reason.clone(),
        caller: caller.to_owned(),
        rule_by_link: rule_by_link.to_owned(),
        arguments: arguments.map(<[String]>::to_vec),
        verdict: decision.verdict.clone(),
        mode: decision.mode.clone(),
        revision: decision.revision.clone(),
        profiles: container.profiles.clone(),
    };
    Some(Refusal { key, time: record.0.time, pod: container.pod.clone(), shown })
}

#[cfg(test)]
mod tests {
    use palisade_proto::record_from_json;
    use serde_json::{Value, json};

    use super::*;
    use crate::View;

    fn refusal(record: &Value) -> Option<Refusal> {
        View::new(&record_from_json(&record.to_string()).unwrap()).refusal()
    }

    fn exec(reason: &str) -> Value {
        json!({
            "time": 5, "session_of": {"kind": "workload"},
            "container": {"namespace": "shop", "name": "nginx", "pod": "web-1", "labels": {"app": "web"}, "profiles": ["shop/web"]},
            "decision": {"verdict": "denied", "reason": reason, "mode": "enforce", "revision": "0123"},
            "exec": {
                "executable": "/bin/sh", "origin": "image", "arguments": ["sh", "-c", "a b", ""], "caller": "/usr/sbin/nginx",
                "script": "/s.sh", "script_origin": "drift", "interpreter": "/lib/ld.so", "interpreter_origin": "memory",
            },
        })
    }

    #[test]
    fn what_was_allowed_is_no_refusal() {
        let mut record = exec("no-rule");
        assert!(refusal(&record).is_some());
        record["decision"]["verdict"] = json!("allowed");
        assert!(refusal(&record).is_none());
        assert!(refusal(&json!({"gap": {"count": 1}, "container": {}})).is_none());
        // What is tried on the agent is no matter of profiles.
        let tampering =
            json!({"tampering": {"act": "signal"}, "container": {}, "decision": {"verdict": "denied"}});
        assert!(refusal(&tampering).is_none());
    }

    #[test]
    fn a_refusal_is_of_the_file_by_which_it_came_about() {
        let of = |record: &Value| {
            let Key { path, origin, .. } = refusal(record).unwrap().key;
            (path, origin)
        };
        let expected = |path: &str, origin: &str| (path.to_owned(), origin.to_owned());
        let mut record = exec("no-rule");
        assert_eq!(of(&record), expected("/bin/sh", "image"));
        assert_eq!(of(&exec("interpreter-not-allowed")), expected("/lib/ld.so", "memory"));
        record["exec"]["verdict_of_script"] = json!(true);
        assert_eq!(of(&record), expected("/s.sh", "drift"));
    }

    #[test]
    fn caller_and_arguments_count_where_the_reason_has_to_do_with_them() {
        let of = |reason| {
            let Key { caller, arguments, .. } = refusal(&exec(reason)).unwrap().key;
            (!caller.is_empty(), arguments.is_some())
        };
        assert_eq!(of("no-rule"), (false, false));
        assert_eq!(of("parent-not-allowed"), (true, false));
        assert_eq!(of("arguments-not-allowed"), (true, true));
        for cut in ["arguments_truncated", "verdict_of_script"] {
            let mut record = exec("arguments-not-allowed");
            record["exec"][cut] = json!(true);
            assert_eq!(refusal(&record).unwrap().key.arguments, None, "{cut}");
        }
    }

    #[test]
    fn what_was_done_is_told_in_words() {
        assert_eq!(refusal(&exec("no-rule")).unwrap().shown, "sh -c \"a b\" \"\"");
        let code = |reason: &str, file: &str| {
            let record = json!({
                "container": {}, "actor": {"executable": "/a b"}, "decision": {"verdict": "audited", "reason": reason},
                "code": {"act": "map", "file": file},
            });
            let found = refusal(&record).unwrap();
            (found.key.act, found.shown)
        };
        assert_eq!(code("origin-not-allowed", "/x"), (Act::Map, "map by \"/a b\"".to_owned()));
        assert_eq!(code("jit-not-allowed", "").0, Act::Map);
        assert_eq!(code("trace-not-allowed", "").0, Act::Trace);
    }
}
