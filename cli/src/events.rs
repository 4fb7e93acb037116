//! `palisade events`.

use std::{
    io::{IsTerminal as _, Write as _},
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result};
use clap::Args;
use palisade_profile::text::{CUT, visible_json, word, words};
use palisade_proto::v1::{EventsRequest, Record, query_client::QueryClient, record::Event};
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
    /// Canonical path of the executable
    #[arg(long, default_value = "")]
    executable: String,
    /// Verdict; may be given several times
    #[arg(long, value_parser = ["allowed", "audited", "denied"])]
    verdict: Vec<String>,
    /// Kind of event; may be given several times [default: exec gap coverage session node-state tampering code]
    #[arg(long, value_parser = ["fork", "exec", "exit", "gap", "coverage", "session", "node-state", "tampering", "code", "refusal"])]
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
        ["exec", "gap", "coverage", "session", "node-state", "tampering", "code", "refusal"]
            .map(str::to_owned)
            .to_vec()
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
    let (verdict, executable, detail) = describe(record);
    let paint = match verdict.split(' ').next() {
        Some("denied") if colour => "\u{1b}[31m",
        Some("audited") if colour => "\u{1b}[33m",
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

/// Verdict, executable and the rest, in words.
fn describe(record: &Record) -> (String, String, String) {
    match &record.event {
        Some(Event::Exec(exec)) => {
            let verdict = if exec.verdict == "denied" {
                format!("denied ({})", exec.action)
            } else {
                exec.verdict.clone()
            };
            let mut detail = words(&exec.arguments);
            if exec.verdict != "allowed" {
                detail = format!("{}: {detail}", exec.reason);
            }
            detail = format!("[{}] {detail}", word(&exec.origin));
            if exec.elevated {
                detail = format!("ELEVATED {detail}");
            }
            if exec.escaped {
                detail = format!("ESCAPED {detail}");
            }
            if !exec.script.is_empty() {
                detail = format!("script {} {detail}", word(&exec.script));
            }
            if exec.arguments_truncated {
                detail = format!("{detail} {CUT}");
            }
            (verdict, exec.executable.clone(), detail)
        }
        Some(Event::Fork(fork)) => {
            let process = fork.process.clone().unwrap_or_default();
            (
                "fork".to_owned(),
                process.parent_executable,
                format!("pid {} of {}", process.pid, process.parent_pid),
            )
        }
        Some(Event::Exit(exit)) => {
            let how = if exit.signal == 0 {
                format!("status {}", exit.status)
            } else {
                format!("signal {}", exit.signal)
            };
            let pid = exit.process.as_ref().map_or(0, |process| process.pid);
            ("exit".to_owned(), exit.executable.clone(), format!("pid {pid} {how}"))
        }
        Some(Event::Gap(gap)) => {
            ("GAP".to_owned(), String::new(), format!("{} records missing: {}", gap.count, gap.cause))
        }
        Some(Event::Coverage(coverage)) => {
            let container = record.container.clone().unwrap_or_default();
            let profiles = if container.profiles.is_empty() {
                "no profile".to_owned()
            } else {
                format!("{} revision {}", container.profiles.join(", "), container.revision)
            };
            (
                coverage.change.clone(),
                String::new(),
                format!("{} by {profiles}, {} tier", container.mode, coverage.tier),
            )
        }
        Some(Event::Session(session)) => {
            let what = if session.change == "end" {
                let how = if session.signal == 0 {
                    format!("status {}", session.status)
                } else {
                    format!("signal {}", session.signal)
                };
                format!("{} execs, {} not allowed, {how}", session.execs, session.not_allowed)
            } else {
                let terminal = if session.terminal.is_empty() {
                    String::new()
                } else {
                    format!(" on {}", word(&session.terminal))
                };
                format!("by {}{terminal}: {}", word(&session.entered_by_comm), words(&session.arguments))
            };
            (
                format!("session {}", session.change),
                session.executable.clone(),
                format!("{} {} {what}", session.kind, session.id),
            )
        }
        Some(Event::Tampering(tampering)) => {
            let verdict = if tampering.verdict == "denied" {
                format!("denied ({})", tampering.action)
            } else {
                tampering.verdict.clone()
            };
            let pid = tampering.process.as_ref().map_or(0, |process| process.pid);
            let what = match tampering.act.as_str() {
                "signal" => format!("signal {} to the agent", tampering.signal),
                "limit" => format!("limit {} of the agent", tampering.resource),
                "open-map" | "open-program" => format!("{} {}", tampering.act, tampering.object),
                "remove-pin" | "unmount" => tampering.act.clone(),
                act => format!("{act} the agent"),
            };
            (verdict, tampering.executable.clone(), format!("TAMPERING by pid {pid}: {what}"))
        }
        Some(Event::Code(code)) => {
            let verdict = if code.verdict == "denied" {
                format!("denied ({})", code.action)
            } else {
                code.verdict.clone()
            };
            let what = match code.act.as_str() {
                "trace" | "be-traced" => format!("{} {}", code.act, code.target_pid),
                act if code.protection.is_empty() => act.to_owned(),
                act => format!("{act} {}", code.protection),
            };
            let file = if code.origin.is_empty() {
                String::new()
            } else {
                format!(" [{}] {}", word(&code.origin), word(&code.file))
            };
            (verdict, code.executable.clone(), format!("code: {what}{file}: {}", code.reason))
        }
        Some(Event::NodeState(state)) => {
            (format!("claim {}", state.claim), state.tier.clone(), state.failures.join("; "))
        }
        Some(Event::Refusal(refusal)) => (
            "refused".to_owned(),
            refusal.peer.clone(),
            format!("{} peers at {}: {}", refusal.count, refusal.address, refusal.why),
        ),
        None => ("unknown".to_owned(), String::new(), "a kind that this build does not know".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use palisade_profile::text::is_hidden;
    use palisade_proto::v1::{
        Code, Container, Coverage, Gap, NodeState, ProcessExec, ProcessExit, ProcessFork, Refusal, Session,
        Tampering,
    };

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
            shown(&exec(ProcessExec {
                verdict: "audited".to_owned(),
                reason: "no-rule".to_owned(),
                origin: "image".to_owned(),
                executable: "/bin/sh".to_owned(),
                arguments,
                ..Default::default()
            }))
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

    /// Whatever the collector says, in every field of every kind.
    #[test]
    fn nothing_of_a_record_reaches_the_terminal_hidden() {
        let bad = || "x\u{1b}[2J\n\u{61c}\u{200b}\u{2060}\u{feff}\u{ad}\u{e0041}\u{fe0f}".to_owned();
        let events = [
            Event::Exec(ProcessExec {
                executable: bad(),
                origin: bad(),
                verdict: bad(),
                action: bad(),
                reason: bad(),
                script: bad(),
                arguments: vec![bad()],
                ..Default::default()
            }),
            Event::Exec(ProcessExec { verdict: "denied".to_owned(), action: bad(), ..Default::default() }),
            Event::Fork(ProcessFork {
                process: Some(palisade_proto::v1::Process { parent_executable: bad(), ..Default::default() }),
            }),
            Event::Exit(ProcessExit { executable: bad(), ..Default::default() }),
            Event::Gap(Gap { cause: bad(), ..Default::default() }),
            Event::Coverage(Coverage { change: bad(), tier: bad(), ..Default::default() }),
            Event::Session(Session {
                change: bad(),
                kind: bad(),
                id: bad(),
                terminal: bad(),
                entered_by_comm: bad(),
                executable: bad(),
                arguments: vec![bad()],
                ..Default::default()
            }),
            Event::Tampering(Tampering {
                act: bad(),
                verdict: bad(),
                executable: bad(),
                ..Default::default()
            }),
            Event::Tampering(Tampering {
                act: "open-map".to_owned(),
                verdict: "denied".to_owned(),
                action: bad(),
                ..Default::default()
            }),
            Event::Code(Code {
                act: bad(),
                protection: bad(),
                file: bad(),
                origin: bad(),
                reason: bad(),
                verdict: "denied".to_owned(),
                action: bad(),
                executable: bad(),
                ..Default::default()
            }),
            Event::NodeState(NodeState { claim: bad(), tier: bad(), failures: vec![bad()] }),
            Event::Refusal(Refusal { peer: bad(), address: bad(), why: bad(), ..Default::default() }),
        ];
        for event in events {
            let record = Record {
                node: bad(),
                container: Some(Container {
                    namespace: bad(),
                    pod: bad(),
                    name: bad(),
                    mode: bad(),
                    revision: bad(),
                    profiles: vec![bad()],
                    ..Default::default()
                }),
                event: Some(event),
                ..Default::default()
            };
            let line = shown(&record);
            assert!(!line.trim_end_matches('\n').contains(is_hidden), "{line:?}");
        }
        let nameless = Container { id: bad(), class: bad(), ..Default::default() };
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
