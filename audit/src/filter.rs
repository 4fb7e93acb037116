//! Which records a query is about.

use palisade_profile::glob::text_matches;
use palisade_proto::v1::{Container, EventsRequest, Record};

use crate::View;

/// Whether `record` is asked for.
#[must_use]
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
        actor_executable,
        follow: _,
        last: _,
    } = request;
    let view = View::new(record);
    let text =
        |pattern: &str, text: &str| pattern.is_empty() || text_matches(pattern.as_bytes(), text.as_bytes());
    let of = |field: fn(&Container) -> &str| view.container().map_or("", field);
    let verdict = || view.decision().map_or("", |decision| &decision.verdict);
    text(node, &record.node)
        && text(namespace, of(|container| &container.namespace))
        && text(pod, of(|container| &container.pod))
        && (text(container, of(|container| &container.name))
            || text(container, of(|container| &container.id)))
        && text(executable, view.executable())
        && text(actor_executable, view.actor_executable())
        && (verdicts.is_empty() || verdicts.iter().any(|wanted| wanted == verdict()))
        && (kinds.is_empty()
            || view.kind().is_some_and(|kind| kinds.iter().any(|wanted| wanted == kind.name())))
        && (sessions.is_empty()
            || view
                .session()
                .is_some_and(|(kind, id)| sessions.iter().any(|wanted| wanted == kind || wanted == id)))
        && (*since == 0 || record.time >= *since)
        && (*until == 0 || record.time < *until)
}

#[cfg(test)]
mod tests {
    use palisade_proto::v1::{
        Decision, Process, ProcessExec, ProcessExit, Session, SessionReference, record::Event,
    };

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
            actor: Some(Process { executable: "/bin/sh".to_owned(), ..Default::default() }),
            decision: Some(Decision { verdict: "denied".to_owned(), ..Default::default() }),
            event: Some(Event::Exec(ProcessExec {
                executable: "/usr/sbin/nginx".to_owned(),
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
            actor_executable: "/bin/*".to_owned(),
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
            EventsRequest { actor_executable: "/usr/*".to_owned(), ..all.clone() },
            EventsRequest { verdicts: vec!["allowed".to_owned()], ..all.clone() },
            EventsRequest { kinds: vec!["exit".to_owned()], ..all.clone() },
            EventsRequest { since: 101, ..all.clone() },
            EventsRequest { sessions: vec!["probe".to_owned(), "b-7-2".to_owned()], ..all.clone() },
            EventsRequest { until: 100, ..all },
        ] {
            assert!(!matches(&no, &record), "{no:?}");
        }
    }

    /// The subject of an exec and of a session is what was executed, of all else it is the actor's program.
    #[test]
    fn an_executable_is_that_which_a_record_is_about() {
        let shell = EventsRequest { executable: "/bin/sh".to_owned(), ..Default::default() };
        let of = |event| Record {
            actor: Some(Process { executable: "/bin/sh".to_owned(), ..Default::default() }),
            event: Some(event),
            ..Default::default()
        };
        let executable = "/bin/ls".to_owned();
        assert!(matches(&shell, &of(Event::Exit(ProcessExit::default()))));
        assert!(!matches(
            &shell,
            &of(Event::Exec(ProcessExec { executable: executable.clone(), ..Default::default() }))
        ));
        let session = Session { executable, kind: "probe".to_owned(), ..Default::default() };
        let list = EventsRequest {
            executable: "/bin/ls".to_owned(),
            sessions: vec!["probe".to_owned()],
            ..Default::default()
        };
        assert!(matches(&list, &of(Event::Session(session))), "a session is of itself");
    }
}
