//! The node agent: parse, wire, run.

mod agent;
mod config;
mod containers;
mod delivery;
mod doctor;
mod kernel;
mod losses;
mod policies;
mod processes;
mod records;
mod sessions;

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::config::Config;

/// Guards the containers of this node.
#[derive(Parser)]
#[command(name = "palisade-agent", version)]
struct Arguments {
    /// Configuration file; absent means all defaults
    #[arg(long, global = true, env = "PALISADE_AGENT_CONFIG")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Put the programs in force and deliver records until SIGTERM
    ///
    /// Exit codes: 0 after SIGTERM or SIGINT, 1 when it cannot start.
    Run {
        /// Where the collector listens, instead of the configured address
        #[arg(long)]
        collector: Option<String>,
        /// Name of the node in records, instead of the configured one
        #[arg(long, env = "PALISADE_NODE")]
        node: Option<String>,
        /// Folder of profiles, instead of the configured one
        #[arg(long)]
        profiles: Option<PathBuf>,
    },
    /// Tell what this node can enforce
    ///
    /// Exit codes: 0 full tier, 3 fallback tier, 1 nothing.
    Doctor {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
}

fn main() -> ExitCode {
    let filter = EnvFilter::try_from_env("PALISADE_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    start(Arguments::parse()).unwrap_or_else(|error| {
        eprintln!("palisade-agent: {error:#}");
        ExitCode::FAILURE
    })
}

fn start(arguments: Arguments) -> Result<ExitCode> {
    let mut config = Config::read(arguments.config.as_deref())?;
    if let Command::Run { collector, node, profiles } = &arguments.command {
        if let Some(node) = node {
            config.node = Some(node.clone());
        }
        if let Some(collector) = collector {
            config.collector.clone_from(collector);
        }
        if let Some(profiles) = profiles {
            config.profiles.clone_from(profiles);
        }
    }
    config.validate()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the asynchronous runtime")?;
    runtime.block_on(async {
        match arguments.command {
            Command::Run { .. } => agent::run(config).await.map(|()| ExitCode::SUCCESS),
            Command::Doctor { json } => Ok(doctor::run(&config, json).await),
        }
    })
}
