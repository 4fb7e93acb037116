//! The command that profile authors and analysts type.

#![forbid(unsafe_code)]

mod coverage;
mod events;
mod explain;
mod profile;
mod table;

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result};
use clap::{CommandFactory as _, Parser, Subcommand};

/// Reads the audit trail and writes profiles.
///
/// Exit codes: 0 done, 1 a fault was found or the command failed, 2 the command line is wrong.
#[derive(Parser)]
#[command(name = "palisade", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

/// Where the collector is.
#[derive(clap::Args, Clone)]
pub(crate) struct Collector {
    /// Address of the collector
    #[arg(long, env = "PALISADE_COLLECTOR", default_value = "http://127.0.0.1:7443", global = true)]
    collector: String,
}

impl Collector {
    /// Connects; a collector that is gone or hangs is noticed.
    pub(crate) async fn connect(&self) -> Result<tonic::transport::Channel> {
        let patience = std::time::Duration::from_secs(10);
        tonic::transport::Endpoint::from_shared(self.collector.clone())
            .with_context(|| format!("--collector: {:?} is not an address", self.collector))?
            .connect_timeout(patience)
            .http2_keep_alive_interval(patience)
            .keep_alive_timeout(patience)
            .keep_alive_while_idle(true)
            .connect()
            .await
            .with_context(|| {
                format!("cannot reach the collector at {}; give its address with --collector", self.collector)
            })
    }
}

#[derive(Subcommand)]
enum Command {
    /// Show recorded events: a table on a terminal, with --json one object a line
    Events(Box<events::Options>),
    /// Show which container is under which profile, revision and mode
    Coverage(coverage::Options),
    /// Tell why something was refused: what was compared, the nearest rules, and the rule that would allow it
    ///
    /// Equal refusals are told once, the most frequent first. Records in mode audit are explained as well.
    /// Example: palisade events --namespace shop --verdict denied --json | palisade explain --profiles web.yaml
    Explain(explain::Options),
    /// Check and draft profiles
    #[command(subcommand)]
    Profile(Profile),
    /// Print a completion script for a shell
    Completions {
        /// bash, zsh, fish, elvish or powershell
        shell: clap_complete::Shell,
    },
}

#[derive(Subcommand)]
enum Profile {
    /// Check profile files; every fault is named with file, line, column, field and remedy
    Lint {
        /// Profile files; - for standard input
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// Print one JSON object a fault
        #[arg(long)]
        json: bool,
    },
    /// Draft profiles from what was recorded
    ///
    /// Reads the output of `palisade events --json` and prints one profile in mode audit for each workload.
    /// Example: palisade events --namespace shop --json | palisade profile init --from-events -
    Init {
        /// File with one JSON record a line; - for standard input
        #[arg(long)]
        from_events: PathBuf,
    },
}

fn main() -> ExitCode {
    start(Arguments::parse()).unwrap_or_else(|error| {
        // A reader that went away, as `head` does, is not a fault.
        if error.chain().any(|cause| {
            cause
                .downcast_ref::<std::io::Error>()
                .is_some_and(|io| io.kind() == std::io::ErrorKind::BrokenPipe)
        }) {
            return ExitCode::SUCCESS;
        }
        eprintln!("palisade: {error:#}");
        ExitCode::FAILURE
    })
}

fn start(arguments: Arguments) -> Result<ExitCode> {
    let ask = || {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("cannot start the asynchronous runtime")
    };
    match arguments.command {
        Command::Events(options) => ask()?.block_on(events::run(*options)).map(|()| ExitCode::SUCCESS),
        Command::Coverage(options) => ask()?.block_on(coverage::run(options)).map(|()| ExitCode::SUCCESS),
        Command::Explain(options) => explain::run(&options),
        Command::Profile(Profile::Lint { files, json }) => profile::lint(&files, json),
        Command::Profile(Profile::Init { from_events }) => {
            profile::init(&from_events).map(|()| ExitCode::SUCCESS)
        }
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Arguments::command(), "palisade", &mut std::io::stdout());
            Ok(ExitCode::SUCCESS)
        }
    }
}
