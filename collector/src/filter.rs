//! Which records a query is about.

use palisade_profile::glob::text_matches;
use palisade_proto::v1::{EventsRequest, Record, record::Event};

/// The kind of a record as queries name it.
pub fn kind(record: &Record) -> &'static str {
    match &record.event {
        Some(Event::Fork(_)) => "fork",
        Some(Event::Exec(_)) => "exec",
        Some(Event::Exit(_)) => "exit",
        Some(Event::Gap(_)) => "gap",
        Some(Event::Coverage(_)) => "coverage",
        Some(Event::NodeState(_)) => "node-state",
        Some(Event::Session(_)) => "session",
        Some(Event::Tampering(_)) => "tampering",
        Some(Event::Code(_)) => "code",
        Some(Event::Refusal(_)) => "refusal",
        None => "unknown",
    }
}

/// Whether `record` is asked for.
pub fn matches(request: &EventsRequest, record: &Record) -> bool {
    let EventsRequest {
        node,
        namespace,
        pod,
        container,
        executable,
        verdicts,
        kinds,
        since,
        until,
        sessions,
        ..
    } = request;
    let text =
        |pattern: &str, text: &str| pattern.is_empty() || text_matches(pattern.as_bytes(), text.as_bytes());
    let of = |field: fn(&palisade_proto::v1::Container) -> &str| record.container.as_ref().map_or("", field);
    let (path, verdict) = match &record.event {
        Some(Event::Exec(exec)) => (exec.executable.as_str(), exec.verdict.as_str()),
        Some(Event::Exit(exit)) => (exit.executable.as_str(), ""),
        Some(Event::Session(session)) => (session.executable.as_str(), ""),
        Some(Event::Tampering(tampering)) => (tampering.executable.as_str(), tampering.verdict.as_str()),
        Some(Event::Code(code)) => (code.executable.as_str(), code.verdict.as_str()),
        _ => ("", ""),
    };
    let session = match (&record.event, &record.session_of) {
        (Some(Event::Session(session)), _) => Some((&session.kind, &session.id)),
        (_, Some(reference)) => Some((&reference.kind, &reference.id)),
        _ => None,
    };
    text(node, &record.node)
        && text(namespace, of(|container| &container.namespace))
        && text(pod, of(|container| &container.pod))
        && (text(container, of(|container| &container.name))
            || text(container, of(|container| &container.id)))
        && text(executable, path)
        && (verdicts.is_empty() || verdicts.iter().any(|wanted| wanted == verdict))
        && (kinds.is_empty() || kinds.iter().any(|wanted| wanted == kind(record)))
        && (sessions.is_empty()
            || session.is_some_and(|(kind, id)| sessions.contains(kind) || sessions.contains(id)))
        && (*since == 0 || record.time >= *since)
        && (*until == 0 || record.time < *until)
}

#[cfg(test)]
mod tests {
    use palisade_proto::v1::{Container, ProcessExec, SessionReference};

    use super::*;

    #[test]
    fn every_field_of_a_query_restricts() {
        let record = Record {
            node: "n1".to_owned(),
            time: 100,
            container: Some(Container {
                name: "nginx".to_owned(),
                pod: "web-1".to_owned(),
                namespace: "shop".to_owned(),
                ..Default::default()
            }),
            session_of: Some(SessionReference { id: "b-7-1".to_owned(), kind: "admin".to_owned() }),
            event: Some(Event::Exec(ProcessExec {
                executable: "/usr/sbin/nginx".to_owned(),
                verdict: "denied".to_owned(),
                ..Default::default()
            })),
            ..Default::default()
        };
        let all = EventsRequest::default();
        assert!(matches(&all, &record));
        let yes = EventsRequest {
            node: "n*".to_owned(),
            namespace: "shop".to_owned(),
            pod: "web-*".to_owned(),
            container: "nginx".to_owned(),
            executable: "/usr/*".to_owned(),
            verdicts: vec!["denied".to_owned()],
            kinds: vec!["exec".to_owned()],
            since: 100,
            until: 101,
            sessions: vec!["admin".to_owned()],
            ..Default::default()
        };
        assert!(matches(&yes, &record));
        assert!(matches(&EventsRequest { sessions: vec!["b-7-1".to_owned()], ..all.clone() }, &record));
        for no in [
            EventsRequest { node: "m".to_owned(), ..all.clone() },
            EventsRequest { namespace: "x".to_owned(), ..all.clone() },
            EventsRequest { pod: "x".to_owned(), ..all.clone() },
            EventsRequest { container: "x".to_owned(), ..all.clone() },
            EventsRequest { executable: "/bin/*".to_owned(), ..all.clone() },
            EventsRequest { verdicts: vec!["allowed".to_owned()], ..all.clone() },
            EventsRequest { kinds: vec!["exit".to_owned()], ..all.clone() },
            EventsRequest { since: 101, ..all.clone() },
            EventsRequest { sessions: vec!["probe".to_owned(), "b-7-2".to_owned()], ..all.clone() },
            EventsRequest { until: 100, ..all },
        ] {
            assert!(!matches(&no, &record), "{no:?}");
        }
    }
}
