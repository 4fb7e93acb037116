//! What a draft of a profile takes from a record.

use palisade_abi::codes::reason;
use palisade_profile::learn::Act;
pub use palisade_profile::learn::Observation;

use crate::common::{Common, Verdict};

/// What was seen, as its event has it.
pub(crate) struct Seen<'a> {
    pub act: Act,
    pub path: &'a str,
    pub origin: &'a str,
}

/// What counts of what was seen: nothing that was refused or is the runtime's own, nor what nobody has identified.
pub(crate) fn of(record: Common<'_>, seen: Vec<Seen<'_>>) -> Vec<Observation> {
    let (Some(container), Some(_)) = (record.container(), record.decision()) else {
        return Vec::new();
    };
    let is_runtimes = record.reason() == Some(reason::RUNTIME);
    if !container.identified
        || container.class == "sandbox"
        || record.verdict() == Some(Verdict::Denied)
        || is_runtimes
    {
        return Vec::new();
    }
    let entered = record.session().is_some_and(|(kind, _)| kind == "admin" || kind == "probe");
    let observation = |Seen { act, path, origin }: Seen<'_>| Observation {
        act,
        namespace: container.namespace.clone(),
        pod: container.pod.clone(),
        labels: container.labels.clone(),
        container: container.name.clone(),
        image: container.image.clone(),
        path: path.to_owned(),
        origin: origin.to_owned(),
        entered,
    };
    seen.into_iter().map(observation).collect()
}

#[cfg(test)]
mod tests {
    use palisade_proto::record_from_json;
    use serde_json::{Value, json};

    use super::*;
    use crate::View;

    fn seen(record: &Value) -> Vec<(Act, String, bool)> {
        let record = record_from_json(&record.to_string()).unwrap();
        let observations = View::new(&record).observations().into_iter();
        observations.map(|seen| (seen.act, seen.path, seen.entered)).collect()
    }

    #[test]
    fn an_exec_and_its_script_are_seen_and_what_was_refused_is_not() {
        let record = json!({
            "container": {"identified": true}, "session_of": {"kind": "admin"}, "decision": {"verdict": "audited", "reason": "no-rule"},
            "exec": {"executable": "/bin/sh", "script": "/s.sh"},
        });
        let both = [(Act::Executed, "/bin/sh".to_owned(), true), (Act::Executed, "/s.sh".to_owned(), true)];
        assert_eq!(seen(&record), both);
        for (place, value) in [
            ("/decision/verdict", json!("denied")),
            ("/decision/reason", json!("runtime-step")),
            ("/container/identified", json!(false)),
            ("/container/class", json!("sandbox")),
        ] {
            let mut other = record.clone();
            other["container"]["class"] = json!("container");
            *other.pointer_mut(place).unwrap() = value;
            assert_eq!(seen(&other), [], "{place}");
        }
    }

    #[test]
    fn code_needs_its_file_or_a_field() {
        let of = |reason: &str| {
            let record = json!({
                "container": {"identified": true}, "decision": {"verdict": "audited", "reason": reason},
                "code": {"act": "map", "file": "/a.so"},
            });
            seen(&record).into_iter().map(|(act, ..)| act).collect::<Vec<_>>()
        };
        assert_eq!(of("jit-not-allowed"), [Act::Needs("jit")]);
        assert_eq!(of("memory-not-allowed"), [Act::Needs("memory")]);
        assert_eq!(of("trace-not-allowed"), [Act::Needs("trace")]);
        assert_eq!(of("origin-not-allowed"), [Act::Mapped]);
        assert_eq!(of("allowed-executable"), []);
    }
}
