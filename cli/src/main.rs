//! The command that profile authors and analysts type.

mod coverage;
mod events;
mod explain;
mod input;
mod pki;
mod profile;
mod table;

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result};
use clap::{CommandFactory as _, Parser, Subcommand};
use palisade_profile::text::printable;
use palisade_transport::{
    dial::Target,
    files::Files,
    local::{self, Purpose},
};

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
    /// Address of the collector: unix:///PATH of its socket on this machine, or https://HOST:PORT
    #[arg(long, env = "PALISADE_COLLECTOR", default_value_t = Purpose::Ask.address(local::FOLDER.as_ref()), global = true)]
    collector: String,
    /// Certificates of the authorities that are trusted, PEM; with an address that begins with https://
    #[arg(long, env = "PALISADE_CA", global = true, requires_all = ["certificate", "key"])]
    ca: Option<PathBuf>,
    /// A reader's certificate, PEM
    #[arg(long, env = "PALISADE_CERTIFICATE", global = true)]
    certificate: Option<PathBuf>,
    /// Its private key, PEM
    #[arg(long, env = "PALISADE_KEY", global = true)]
    key: Option<PathBuf>,
}

impl Collector {
    /// Connects; a collector that is gone or hangs is noticed.
    pub(crate) async fn connect(&self) -> Result<tonic::transport::Channel> {
        let patience = std::time::Duration::from_secs(10);
        let files = match (&self.ca, &self.certificate, &self.key) {
            (Some(ca), Some(certificate), Some(key)) => Some(Files {
                ca: ca.clone(),
                certificate: certificate.clone(),
                key: key.clone(),
                revoked: None,
            }),
            _ => None,
        };
        let target =
            Target::new(&self.collector, files).context("--collector, --ca, --certificate, --key")?;
        target
            .connect(|endpoint| {
                endpoint
                    .connect_timeout(patience)
                    .http2_keep_alive_interval(patience)
                    .keep_alive_timeout(patience)
                    .keep_alive_while_idle(true)
            })
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
    /// Make certificates for agents, collector and readers, for a demo or a small site
    ///
    /// Example: palisade pki init && palisade pki collector collector.example && palisade pki node worker-1
    #[command(subcommand)]
    Pki(pki::Pki),
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
    /// Reads the output of `palisade events --json` and prints one profile in mode audit for each workload. A rule is for the path
    /// that was recorded and no other: a `*` in a name stands there as `\\*`. A path that no rule can name is a comment that says why.
    /// Example: palisade events --namespace shop --json | palisade profile init --from-events -
    Init {
        /// File with one JSON record a line; - for standard input
        #[arg(long)]
        from_events: PathBuf,
    },
}

fn main() -> ExitCode {
    start(Arguments::parse()).unwrap_or_else(|error| {
        // A reader of the output that went away, as `head` does, is not a fault. A collector that did is one: what comes of the
        // connection is no bare error of input and output.
        let output = error.downcast_ref::<std::io::Error>();
        if output.is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe) {
            return ExitCode::SUCCESS;
        }
        // A collector's words may be part of it.
        eprintln!("{}", printable(&format!("palisade: {error:#}")));
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
        Command::Pki(command) => pki::run(command).map(|()| ExitCode::SUCCESS),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Arguments::command(), "palisade", &mut std::io::stdout());
            Ok(ExitCode::SUCCESS)
        }
    }
}
