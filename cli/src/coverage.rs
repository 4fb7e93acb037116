//! `palisade coverage`.

use std::io::Write as _;

use anyhow::{Context as _, Result};
use clap::Args;
use palisade_audit::View;
use palisade_profile::text::visible_json;
use palisade_proto::v1::{CoverageRequest, Record, query_client::QueryClient};
use prost::Message as _;

use crate::{
    Collector,
    table::{self, moment},
};

#[derive(Args)]
pub(crate) struct Options {
    #[command(flatten)]
    collector: Collector,
    /// Containers that have ended, too
    #[arg(long)]
    ended: bool,
    /// Print one JSON object a line
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(options: Options) -> Result<()> {
    let mut client = QueryClient::new(options.collector.connect().await?);
    let request = CoverageRequest { ended: options.ended };
    let mut answers = client.coverage(request).await.context("the collector refuses the query")?.into_inner();
    let mut containers = Vec::new();
    while let Some(answer) = answers.message().await.context("the collector ended the answer")? {
        containers.extend(answer.containers);
    }
    let mut out = std::io::stdout().lock();
    if options.json {
        for record in containers {
            let value = palisade_proto::record_to_json(&record.encode_to_vec())?;
            writeln!(out, "{}", visible_json(&value.to_string()))?;
        }
        return Ok(());
    }
    let rows: Vec<Vec<String>> = containers.iter().map(row).collect();
    table::print(
        &mut out,
        &[
            "NODE",
            "NAMESPACE",
            "POD",
            "CONTAINER",
            "MODE",
            "PROFILES",
            "REVISION",
            "TIER",
            "IN FORCE SINCE",
            "FIRST EXEC",
            "OBJECTION",
        ],
        &rows,
    )
}

fn row(record: &Record) -> Vec<String> {
    let container = record.container.clone().unwrap_or_default();
    let view = View::new(record);
    let coverage = view.coverage().cloned().unwrap_or_default();
    let name = if container.class == "sandbox" { "(sandbox)".to_owned() } else { container.name };
    vec![
        record.node.clone(),
        container.namespace,
        container.pod,
        name,
        if view.has_ended() { "ended".to_owned() } else { container.mode },
        if container.profiles.is_empty() { "-".to_owned() } else { container.profiles.join(",") },
        if container.revision.is_empty() { "-".to_owned() } else { container.revision },
        coverage.tier,
        moment(coverage.in_force_since),
        moment(coverage.first_exec),
        if coverage.objection.is_empty() { "-".to_owned() } else { coverage.objection },
    ]
}
