//! How the agent is, for `palisade-agent status` and for Prometheus: what the kernel numbered and what became of it, what waits, and
//! what speaks against the programs.

use std::{
    collections::BTreeMap, fmt::Write as _, io::Read as _, os::unix::net::UnixStream, path::Path,
    process::ExitCode, time::Duration,
};

use anyhow::{Context as _, Result};
use palisade_profile::text::{printable, visible_json};
use serde::{Deserialize, Serialize};

use crate::config::Config;

/// One moment of a running agent. Counts are since it began, but for containers', which are since they began.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    pub version: String,
    pub node: String,
    /// "full" or "fallback".
    pub tier: String,
    /// Whether the self-probe finds that what profiles say is enforced.
    pub enforces: bool,
    pub uptime_seconds: u64,
    pub delivery: Delivery,
    /// Records that are missing and counted, by cause, whether that has been said already or not.
    pub lost: BTreeMap<String, u64>,
    /// By "exec", "code" or "tampering", and verdict.
    pub verdicts: BTreeMap<String, BTreeMap<String, u64>>,
    /// Errors inside the kernel programs, and runs of them that the kernel skipped.
    pub errors: BTreeMap<String, u64>,
    pub containers: Vec<ContainerStatus>,
}

/// What is between the agent and the collector.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Delivery {
    /// The collector that it streams to; absent while there is none.
    pub collector: Option<String>,
    /// Why there is none, or why it takes nothing; empty otherwise.
    pub problem: String,
    pub waiting_records: u64,
    /// On the node's disk; 0 of 0 when there is no spool.
    pub spool_bytes: u64,
    pub most_spool_bytes: u64,
    /// Why nothing can be written there; empty otherwise.
    pub spool_problem: String,
    /// Before they are on the disk, or while they cannot be.
    pub memory_bytes: u64,
    pub most_memory_bytes: u64,
    /// How long the first of them has waited.
    pub oldest_seconds: f64,
    pub acknowledged: u64,
    /// Batches that were sent, again or not, and their bytes on the wire.
    pub sent_batches: u64,
    pub sent_bytes: u64,
}

/// The balance of a container that runs: `made` is the sum of the other four.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ContainerStatus {
    pub slot: u64,
    pub id: String,
    pub namespace: String,
    pub pod: String,
    pub name: String,
    pub mode: String,
    pub revision: String,
    pub made: u64,
    /// The collector has them.
    pub delivered: u64,
    /// Gap records count them, which the collector has.
    pub lost: u64,
    /// On the node's disk, or in memory while there is none, and not yet acknowledged; gap records and what they count among them.
    pub spooled: u64,
    /// In the ring or in the agent; or lost and not yet said.
    pub on_the_way: u64,
}

/// How long an agent may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Asks the agent and prints what it says.
///
/// # Errors
///
/// When no agent answers.
pub fn run(config: &Config, json: bool) -> Result<ExitCode> {
    let socket = config.socket().context("with socket: none the agent cannot be asked")?;
    let status = ask(socket).with_context(|| {
        format!("no agent answers at {}; is it running, and is this its configuration?", socket.display())
    })?;
    if json {
        println!("{}", visible_json(&serde_json::to_string_pretty(&status)?));
    } else {
        print!("{}", table(&status));
    }
    Ok(if status.enforces { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn ask(socket: &Path) -> Result<Status> {
    let mut stream = UnixStream::connect(socket).map_err(|error| match error.kind() {
        std::io::ErrorKind::PermissionDenied => anyhow::anyhow!("only root may ask; run this as root"),
        _ => error.into(),
    })?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    serde_json::from_slice(&answer).context("what answers is no agent of this version")
}

/// For people.
fn table(status: &Status) -> String {
    let Status {
        version,
        node,
        tier,
        enforces,
        uptime_seconds,
        delivery,
        lost,
        verdicts,
        errors,
        containers,
    } = status;
    let mut text = String::new();
    let enforcing = if *enforces { "yes" } else { "NO: the self-probe fails, or has not been made yet" };
    let mut row = |name: &str, value: &str| {
        let _ = writeln!(text, "{name:<10} {}", printable(value));
    };
    row("agent", &format!("{version} on {node}, {tier} tier, up {}", duration(*uptime_seconds)));
    row("enforces", enforcing);
    let Delivery {
        collector,
        problem,
        waiting_records,
        spool_bytes,
        most_spool_bytes,
        spool_problem,
        memory_bytes,
        most_memory_bytes,
        oldest_seconds,
        acknowledged,
        sent_batches,
        sent_bytes,
    } = delivery;
    let collector = match collector {
        Some(collector) if problem.is_empty() => collector.clone(),
        Some(collector) => format!("{collector}, which takes nothing: {problem}"),
        None => format!("NONE: {problem}"),
    };
    row("collector", &collector);
    row("waiting", &format!("{waiting_records} records, the oldest for {oldest_seconds:.1} s"));
    let share = |bytes: &u64, most: &u64| bytes * 100 / (*most).max(1);
    let spool = match spool_problem.as_str() {
        "" if *most_spool_bytes == 0 => {
            "NONE: records wait in memory, and go with an agent that is killed".to_owned()
        }
        "" => format!("{} % of its bytes", share(spool_bytes, most_spool_bytes)),
        problem => format!("TAKES NOTHING, records wait in memory: {problem}"),
    };
    row("spool", &spool);
    row("memory", &format!("{} % of the queue", share(memory_bytes, most_memory_bytes)));
    row("delivered", &format!("{acknowledged} records, in {sent_batches} batches of {sent_bytes} bytes"));
    row("lost", &counts(lost));
    for (kind, counted) in verdicts {
        row(kind, &counts(counted));
    }
    row("errors", &counts(errors));
    if !containers.is_empty() {
        let heads =
            ["NAMESPACE", "POD", "CONTAINER", "MODE", "MADE", "DELIVERED", "SPOOLED", "LOST", "ON THE WAY"];
        let rows: Vec<[String; 9]> = containers
            .iter()
            .map(|container| {
                let name = if container.name.is_empty() { &container.id } else { &container.name };
                let number = |number: u64| number.to_string();
                [
                    container.namespace.clone(),
                    container.pod.clone(),
                    name.clone(),
                    container.mode.clone(),
                    number(container.made),
                    number(container.delivered),
                    number(container.spooled),
                    number(container.lost),
                    number(container.on_the_way),
                ]
                // What a runtime calls a container is nobody's promise.
                .map(|cell| printable(&cell))
            })
            .collect();
        let widths: Vec<usize> = (0..heads.len())
            .map(|column| {
                rows.iter().map(|row| row[column].chars().count()).fold(heads[column].len(), usize::max)
            })
            .collect();
        let mut line = |cells: &[&str]| {
            let cells: Vec<String> =
                cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
            let _ = writeln!(text, "{}", cells.join("  ").trim_end());
        };
        line(&[]);
        line(&heads);
        for row in &rows {
            line(&row.each_ref().map(String::as_str));
        }
    }
    text
}

fn counts(of: &BTreeMap<String, u64>) -> String {
    if of.is_empty() {
        return "none".to_owned();
    }
    of.iter().map(|(name, count)| format!("{name} {count}")).collect::<Vec<_>>().join(", ")
}

fn duration(seconds: u64) -> String {
    match (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60, seconds % 60) {
        (0, 0, 0, seconds) => format!("{seconds} s"),
        (0, 0, minutes, seconds) => format!("{minutes} min {seconds} s"),
        (0, hours, minutes, _) => format!("{hours} h {minutes} min"),
        (days, hours, ..) => format!("{days} d {hours} h"),
    }
}

/// For Prometheus: text format 0.0.4.
pub fn metrics(status: &Status) -> String {
    let Status {
        version,
        node: _,
        tier,
        enforces,
        uptime_seconds,
        delivery,
        lost,
        verdicts,
        errors,
        containers,
    } = status;
    let mut text = String::new();
    let mut metric = |name: &str, kind: &str, help: &str, values: &[(String, f64)]| {
        let _ = writeln!(text, "# HELP palisade_{name} {help}\n# TYPE palisade_{name} {kind}");
        for (labels, value) in values {
            let _ = writeln!(text, "palisade_{name}{labels} {value}");
        }
    };
    let one = |value: f64| [(String::new(), value)];
    let labelled = |label: &str, counted: &BTreeMap<String, u64>| -> Vec<(String, f64)> {
        counted.iter().map(|(name, count)| (format!("{{{label}=\"{name}\"}}"), *count as f64)).collect()
    };
    metric(
        "info",
        "gauge",
        "The agent's version and tier.",
        &[(format!("{{version=\"{version}\",tier=\"{tier}\"}}"), 1.0)],
    );
    metric(
        "enforces",
        "gauge",
        "Whether the self-probe finds that profiles are enforced.",
        &one(f64::from(*enforces)),
    );
    metric("uptime_seconds", "gauge", "Since the agent began.", &one(*uptime_seconds as f64));
    let connected = delivery.collector.is_some() && delivery.problem.is_empty();
    metric("collector_connected", "gauge", "Whether a collector takes records.", &one(f64::from(connected)));
    metric(
        "waiting_records",
        "gauge",
        "Records that wait for the collector.",
        &one(delivery.waiting_records as f64),
    );
    for (name, bytes, most) in [
        ("spool", delivery.spool_bytes, delivery.most_spool_bytes),
        ("memory", delivery.memory_bytes, delivery.most_memory_bytes),
    ] {
        let help = format!("Their bytes in the {name}.");
        metric(&format!("{name}_bytes"), "gauge", &help, &one(bytes as f64));
        let help = format!("Most bytes that may wait in the {name}.");
        metric(&format!("{name}_bytes_limit"), "gauge", &help, &one(most as f64));
    }
    let works = delivery.most_spool_bytes > 0 && delivery.spool_problem.is_empty();
    metric("spool_works", "gauge", "Whether the spool takes records.", &one(f64::from(works)));
    metric(
        "waiting_oldest_seconds",
        "gauge",
        "How long the first of them has waited.",
        &one(delivery.oldest_seconds),
    );
    metric(
        "records_acknowledged_total",
        "counter",
        "Records that the collector has.",
        &one(delivery.acknowledged as f64),
    );
    metric("sent_bytes_total", "counter", "Bytes of batches on the wire.", &one(delivery.sent_bytes as f64));
    metric("sent_batches_total", "counter", "Batches on the wire.", &one(delivery.sent_batches as f64));
    metric(
        "records_lost_total",
        "counter",
        "Records that are missing and counted.",
        &labelled("cause", lost),
    );
    let judged: Vec<(String, f64)> = verdicts
        .iter()
        .flat_map(|(kind, counted)| {
            counted.iter().map(move |(verdict, count)| {
                (format!("{{kind=\"{kind}\",verdict=\"{verdict}\"}}"), *count as f64)
            })
        })
        .collect();
    metric("verdicts_total", "counter", "What was judged, and how.", &judged);
    metric("kernel_errors_total", "counter", "Errors inside the kernel programs.", &labelled("site", errors));
    let mut modes: BTreeMap<String, u64> = BTreeMap::new();
    for container in containers {
        *modes.entry(container.mode.clone()).or_default() += 1;
    }
    metric("containers", "gauge", "Containers that run, by mode.", &labelled("mode", &modes));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status() -> Status {
        let counted = |name: &str, count| BTreeMap::from([(name.to_owned(), count)]);
        Status {
            version: "0.1.0".to_owned(),
            node: "worker-1".to_owned(),
            tier: "full".to_owned(),
            enforces: true,
            uptime_seconds: 3 * 3600 + 62,
            delivery: Delivery {
                collector: Some("https://collector.example:7443/".to_owned()),
                problem: String::new(),
                waiting_records: 12,
                spool_bytes: 1 << 20,
                most_spool_bytes: 16 << 20,
                spool_problem: String::new(),
                memory_bytes: 0,
                most_memory_bytes: 1 << 20,
                oldest_seconds: 0.25,
                acknowledged: 4000,
                sent_batches: 20,
                sent_bytes: 40_000,
            },
            lost: counted("ring-full", 44),
            verdicts: BTreeMap::from([("exec".to_owned(), counted("denied", 3))]),
            errors: BTreeMap::new(),
            containers: vec![ContainerStatus {
                namespace: "shop".to_owned(),
                pod: "web-1".to_owned(),
                name: "ngi\u{1b}[31mnx".to_owned(),
                mode: "enforce".to_owned(),
                made: 100,
                delivered: 90,
                lost: 4,
                spooled: 2,
                on_the_way: 4,
                ..ContainerStatus::default()
            }],
        }
    }

    #[test]
    fn people_see_what_is_wrong_first() {
        let text = table(&status());
        assert!(
            text.contains("agent      0.1.0 on worker-1, full tier, up 3 h 1 min\nenforces   yes\n"),
            "{text}"
        );
        assert!(text.contains("waiting    12 records, the oldest for 0.2 s\nspool      6 % of its bytes\nmemory     0 % of the queue\n"), "{text}");
        assert!(text.contains("exec       denied 3\nerrors     none\n"), "{text}");
        assert!(
            text.contains("shop       web-1  ngi\\u{1b}[31mnx  enforce  100   90         2        4     4\n"),
            "{text}"
        );
        let problem = "the store takes nothing: disk full".to_owned();
        let spool_problem = "disk full".to_owned();
        let none = Delivery { spool_bytes: 0, most_spool_bytes: 0, ..status().delivery };
        let text = table(&Status { delivery: none, ..status() });
        assert!(text.contains("spool      NONE: records wait in memory"), "{text}");
        let full = Delivery { problem, spool_problem, ..status().delivery };
        let stuck = Status { enforces: false, delivery: full.clone(), ..status() };
        let text = table(&stuck);
        assert!(
            text.contains("enforces   NO: ") && text.contains("which takes nothing: the store"),
            "{text}"
        );
        assert!(text.contains("spool      TAKES NOTHING, records wait in memory: disk full"), "{text}");
        let hostile = Delivery { problem: "full\nenforces   yes\u{9b}2J\u{61c}".to_owned(), ..full.clone() };
        let text = table(&Status { delivery: hostile, ..status() });
        assert!(text.contains(": full\\u{a}enforces   yes\\u{9b}2J\\u{61c}\n"), "{text}");
        let text = table(&Status { delivery: Delivery { collector: None, ..full }, ..status() });
        assert!(text.contains("collector  NONE: the store takes nothing"), "{text}");
    }

    #[test]
    fn metrics_are_in_the_text_format() {
        let text = metrics(&status());
        for line in [
            "palisade_info{version=\"0.1.0\",tier=\"full\"} 1",
            "palisade_enforces 1",
            "palisade_collector_connected 1",
            "palisade_waiting_oldest_seconds 0.25",
            "palisade_spool_bytes_limit 16777216",
            "palisade_spool_works 1",
            "palisade_records_lost_total{cause=\"ring-full\"} 44",
            "palisade_verdicts_total{kind=\"exec\",verdict=\"denied\"} 3",
            "# TYPE palisade_kernel_errors_total counter",
            "palisade_containers{mode=\"enforce\"} 1",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
        for line in text.lines() {
            let fits = line.starts_with("# HELP palisade_")
                || line.starts_with("# TYPE palisade_")
                || line.rsplit_once(' ').is_some_and(|(name, value)| {
                    name.starts_with("palisade_") && value.parse::<f64>().is_ok()
                });
            assert!(fits, "{line}");
        }
    }
}
