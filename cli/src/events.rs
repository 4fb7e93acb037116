//! `palisade events`.

use std::{
    io::{IsTerminal as _, Write as _},
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result};
use clap::{Args, builder::PossibleValuesParser};
use palisade_audit::{Kind, Line, Verdict, View};
use palisade_profile::text::{visible_json, word};
use palisade_proto::v1::{EventsRequest, Record, query_client::QueryClient};
use prost::Message as _;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::{
    Collector,
    table::{line, moment},
};

#[derive(Args)]
pub(crate) struct Options {
    #[command(flatten)]
    collector: Collector,
    /// Go on with what arrives, until interrupted
    #[arg(long, short)]
    follow: bool,
    /// Print one JSON object a line
    #[arg(long)]
    json: bool,
    /// Only the last so many
    #[arg(long, short = 'n')]
    last: Option<u64>,
    /// Node; * stands for any run of characters and \* for that character, here and below
    #[arg(long, default_value = "")]
    node: String,
    /// Namespace of the pod
    #[arg(long, short = 'N', default_value = "")]
    namespace: String,
    /// Name of the pod
    #[arg(long, default_value = "")]
    pod: String,
    /// Name or id of the container
    #[arg(long, default_value = "")]
    container: String,
    /// Canonical path of the program: what was executed, what a session began with; else what the acting process executes
    #[arg(long, default_value = "")]
    executable: String,
    /// Canonical path of what the acting process executes; of an exec, of what called it
    #[arg(long, default_value = "")]
    actor_executable: String,
    /// Verdict; may be given several times
    #[arg(long, value_parser = PossibleValuesParser::new(Verdict::ALL.iter().map(|verdict| verdict.name())))]
    verdict: Vec<String>,
    #[arg(long, help = kinds_help(), value_parser = PossibleValuesParser::new(Kind::ALL.iter().map(|kind| kind.name())))]
    kind: Vec<String>,
    /// Session: its kind (workload, probe, admin, unknown) or its id; may be given several times
    ///
    /// Who did what by hand in a container: --session admin --container NAME
    #[arg(long)]
    session: Vec<String>,
    /// Events of every kind
    #[arg(long, conflicts_with = "kind")]
    all: bool,
    /// Not before: an RFC 3339 time, or how long ago as 90s, 15m, 6h, 2d
    #[arg(long, value_parser = parse_time)]
    since: Option<u64>,
    /// Before: likewise
    #[arg(long, value_parser = parse_time)]
    until: Option<u64>,
}

fn kinds_help() -> String {
    let shown: Vec<&str> = Kind::shown().collect();
    format!("Kind of event; may be given several times [default: {}]", shown.join(" "))
}

/// Nanoseconds since the Unix epoch of what a person wrote.
fn parse_time(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is neither a time like 2026-01-31T12:00:00Z nor an age like 15m");
    if let Ok(time) = OffsetDateTime::parse(text, &Rfc3339) {
        return u64::try_from(time.unix_timestamp_nanos()).map_err(|_| wrong());
    }
    let unit = match text.chars().last() {
        Some('s') => 1,
        Some('m') => 60,
        Some('h') => 3600,
        Some('d') => 86400,
        _ => return Err(wrong()),
    };
    let number: u64 = text[..text.len() - 1].parse().map_err(|_| wrong())?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64);
    Ok(now.saturating_sub(number.saturating_mul(unit).saturating_mul(1_000_000_000)))
}

pub(crate) async fn run(options: Options) -> Result<()> {
    let kinds = if options.all {
        Vec::new()
    } else if options.kind.is_empty() {
        Kind::shown().map(str::to_owned).collect()
    } else {
        options.kind
    };
    let request = EventsRequest {
        node: options.node,
        namespace: options.namespace,
        pod: options.pod,
        container: options.container,
        executable: options.executable,
        verdicts: options.verdict,
        kinds,
        since: options.since.unwrap_or(0),
        until: options.until.unwrap_or(0),
        follow: options.follow,
        last: options.last.unwrap_or(0),
        sessions: options.session,
        actor_executable: options.actor_executable,
    };
    let mut client = QueryClient::new(options.collector.connect().await?);
    let mut answers = client.events(request).await.context("the collector refuses the query")?.into_inner();
    let mut out = std::io::stdout().lock();
    let is_terminal = out.is_terminal();
    if !options.json {
        line(&mut out, WIDTHS, HEADS.iter().copied())?;
    }
    while let Some(answer) = answers.message().await.context("the collector ended the answer")? {
        for bytes in answer.records {
            if options.json {
                let value = palisade_proto::record_to_json(&bytes).context("the collector sent no record")?;
                writeln!(out, "{}", visible_json(&value.to_string()))?;
            } else {
                let record = Record::decode(bytes).context("the collector sent no record")?;
                show(&mut out, &record, is_terminal)?;
            }
        }
        out.flush()?;
    }
    Ok(())
}

const HEADS: &[&str] = &["TIME", "NODE", "NAMESPACE", "POD", "CONTAINER", "VERDICT", "EXECUTABLE", "DETAIL"];
const WIDTHS: &[usize] = &[23, 12, 10, 14, 12, 17, 28, 0];

fn show(out: &mut impl std::io::Write, record: &Record, colour: bool) -> Result<()> {
    let container = record.container.clone().unwrap_or_default();
    let view = View::new(record);
    let Line { verdict, executable, detail } = view.line();
    let paint = match view.verdict() {
        Some(Verdict::Denied) if colour => "\u{1b}[31m",
        Some(Verdict::Audited) if colour => "\u{1b}[33m",
        _ => "",
    };
    let name = if container.name.is_empty() {
        match container.class.as_str() {
            "sandbox" => "(sandbox)".to_owned(),
            _ => container.id.chars().take(12).collect(),
        }
    } else {
        container.name
    };
    let cells = [
        moment(record.time),
        record.node.clone(),
        container.namespace,
        container.pod,
        name,
        verdict,
        if executable.is_empty() { executable } else { word(&executable) },
        detail,
    ];
    write!(out, "{paint}")?;
    line(out, WIDTHS, cells.iter().map(String::as_str))?;
    if !paint.is_empty() {
        write!(out, "\u{1b}[0m")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use palisade_profile::text::{CUT, is_hidden};
    use palisade_proto::{
        record_from_json, record_to_json,
        v1::{Container, Decision, ProcessExec, record::Event},
    };
    use serde_json::{Value, json};

    use super::*;

    fn shown(record: &Record) -> String {
        let mut out = Vec::new();
        show(&mut out, record, false).unwrap();
        String::from_utf8(out).unwrap()
    }

    fn exec(exec: ProcessExec) -> Record {
        Record { event: Some(Event::Exec(exec)), ..Default::default() }
    }

    #[test]
    fn arguments_that_differ_look_different() {
        let of = |arguments: &[&str]| {
            let arguments = arguments.iter().map(|argument| (*argument).to_owned()).collect();
            let decision = Decision {
                verdict: "audited".to_owned(),
                reason: "no-rule".to_owned(),
                ..Default::default()
            };
            shown(&Record {
                decision: Some(decision),
                ..exec(ProcessExec {
                    origin: "image".to_owned(),
                    executable: "/bin/sh".to_owned(),
                    arguments,
                    ..Default::default()
                })
            })
        };
        assert!(of(&["sh", "-c", "a b", ""]).ends_with("[image] no-rule: sh -c \"a b\" \"\"\n"));
        assert!(of(&["sh", "-c", "a", "b", ""]).ends_with("[image] no-rule: sh -c a b \"\"\n"));
        let forged = exec(ProcessExec { executable: "/x  [image] sh".to_owned(), ..Default::default() });
        assert!(shown(&forged).contains(" \"/x  [image] sh\" "), "{}", shown(&forged));
        let cut = |arguments: &[&str], arguments_truncated| {
            let arguments = arguments.iter().map(|argument| (*argument).to_owned()).collect();
            shown(&exec(ProcessExec { arguments, arguments_truncated, ..Default::default() }))
        };
        assert_ne!(cut(&["a", CUT], false), cut(&["a"], true));
    }

    const BAD: &str = "x\u{1b}[2J\n\u{61c}\u{200b}\u{2060}\u{feff}\u{ad}\u{e0041}\u{fe0f}";

    /// Puts that in the place of every text.
    fn spoil(value: &mut Value) {
        match value {
            Value::String(text) => BAD.clone_into(text),
            Value::Object(fields) => {
                // Lists of messages, which no line shows.
                let of_texts = |name: &str| !["ancestors", "volumes"].contains(&name);
                fields.iter_mut().filter(|(name, _)| of_texts(name)).for_each(|(_, field)| spoil(field));
            }
            Value::Array(list) => list.push(json!(BAD)),
            _ => {}
        }
    }

    /// Whatever the collector says, in every field of every kind.
    #[test]
    fn nothing_of_a_record_reaches_the_terminal_hidden() {
        for kind in Kind::ALL {
            let event = kind.name().replace('-', "_");
            let empty = json!({event: {}, "container": {}, "session_of": {}, "actor": {}, "decision": {}});
            let empty = record_from_json(&empty.to_string()).unwrap();
            let mut json = record_to_json(&empty.encode_to_vec()).unwrap();
            spoil(&mut json);
            for verdict in [BAD, "denied", "allowed"] {
                json["decision"]["verdict"] = json!(verdict);
                let line = shown(&record_from_json(&json.to_string()).unwrap());
                assert!(!line.trim_end_matches('\n').contains(is_hidden), "{line:?}");
                // It is there, and made visible.
                assert!(line.contains("x\\u{1b}[2J\\u{a}"), "{line:?}");
            }
        }
        let nameless = Container { id: BAD.to_owned(), class: BAD.to_owned(), ..Default::default() };
        let line = shown(&Record { container: Some(nameless), ..Default::default() });
        assert!(!line.trim_end_matches('\n').contains(is_hidden), "{line:?}");
    }

    #[test]
    fn times_are_read_as_people_write_them() {
        assert_eq!(parse_time("1970-01-01T00:00:01Z"), Ok(1_000_000_000));
        assert!(parse_time("15m").unwrap() > 1_600_000_000_000_000_000);
        for wrong in ["yesterday", "m", "", "5"] {
            assert!(parse_time(wrong).is_err(), "{wrong}");
        }
    }
}
