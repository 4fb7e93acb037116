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
mod ready;
mod records;
mod sessions;
mod status;
mod uninstall;

use std::{path::PathBuf, process::ExitCode, sync::LazyLock};

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand};
use palisade_profile::text::{log_field, printable_lines};
use tracing_subscriber::{EnvFilter, field::MakeExt as _, fmt::format::debug_fn};

use crate::config::Config;

/// Guards the containers of this node.
#[derive(Parser)]
#[command(name = "palisade-agent", version, long_version = long_version())]
struct Arguments {
    /// Configuration file; absent means all defaults
    #[arg(long, global = true, env = "PALISADE_AGENT_CONFIG")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

/// With the versions of what an upgrade takes over: between builds of the same, nothing is found out anew.
fn long_version() -> &'static str {
    static TEXT: LazyLock<String> =
        LazyLock::new(|| format!("{}\nlayouts: {}", env!("CARGO_PKG_VERSION"), palisade_abi::VERSIONS));
    &TEXT
}

#[derive(Subcommand)]
enum Command {
    /// Put the programs in force and deliver records until SIGTERM
    ///
    /// Exit codes: 0 after SIGTERM or SIGINT, 1 when it cannot start.
    Run {
        /// Where the collector listens, instead of the configured addresses; given again: another, for when it cannot be had
        #[arg(long)]
        collector: Vec<String>,
        /// Name of the node in records, instead of the configured one
        #[arg(long, env = "PALISADE_NODE")]
        node: Option<String>,
        /// Folder of profiles, instead of the configured one
        #[arg(long)]
        profiles: Option<PathBuf>,
    },
    /// Stop the agent and take everything out of force that any version of it put there
    ///
    /// Profiles, configuration and stored records stay. Exit codes: 0 done, 1 something stays.
    Uninstall {
        /// Stop the agent only: what it put in force stays in force, without anybody to identify new containers
        #[arg(long)]
        keep_enforcing: bool,
    },
    /// Tell whether the running agent enforces: for a readiness probe
    ///
    /// Exit codes: 0 it does, 1 it does not, or there is none.
    Ready,
    /// Tell how the running agent is: whether it enforces, what it delivers, what is lost, and the balance of each container
    ///
    /// Exit codes: 0 it enforces, 1 it does not, or there is none.
    Status {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Act as the agent's self-probe demands: execute a program, and say if that is refused
    #[command(hide = true)]
    SelfProbe {
        /// Send the agent a signal that does it no harm before, and say if that is refused
        #[arg(long)]
        signal: bool,
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
    // Containers, runtimes and peers choose much of what is in a log.
    let fields = debug_fn(|out, field, value| log_field(out, field.name(), value)).delimited(" ");
    tracing_subscriber::fmt().with_env_filter(filter).fmt_fields(fields).with_writer(std::io::stderr).init();
    start(Arguments::parse()).unwrap_or_else(|error| {
        eprintln!("{}", printable_lines(&format!("palisade-agent: {error:#}")));
        ExitCode::FAILURE
    })
}

/// Says that it is ready, waits for a word, and then does what must be refused: signals the agent if it is to, and executes a
/// program.
fn act(signal: bool) -> ExitCode {
    use std::io::Write as _;
    use std::os::unix::process::CommandExt as _;
    let mut output = std::io::stdout();
    let _nobody_waits = output.write_all(b".").and_then(|()| output.flush());
    let mut word = String::new();
    let _a_word_or_the_end = std::io::stdin().read_line(&mut word);
    let let_through = signal
        && rustix::process::getppid()
            .is_some_and(|agent| rustix::process::kill_process(agent, rustix::process::Signal::CONT).is_ok());
    let error = std::process::Command::new("/proc/self/exe").arg("--version").exec();
    let refused = error.raw_os_error() == Some(libc::EPERM);
    ExitCode::from(match (refused, let_through) {
        (true, false) => agent::REFUSED,
        (true, true) => agent::SIGNAL_LET_THROUGH,
        (false, _) => 1,
    })
}

fn start(arguments: Arguments) -> Result<ExitCode> {
    if let Command::SelfProbe { signal } = arguments.command {
        return Ok(act(signal));
    }
    let mut config = Config::read(arguments.config.as_deref())?;
    if let Command::Run { collector, node, profiles } = &arguments.command {
        if let Some(node) = node {
            config.node = Some(node.clone());
        }
        if !collector.is_empty() {
            config.collector.clone_from(collector);
        }
        if let Some(profiles) = profiles {
            config.profiles.clone_from(profiles);
        }
    }
    let checked = config.validate();
    match &arguments.config {
        Some(path) => checked.with_context(|| path.display().to_string())?,
        None => checked?,
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the asynchronous runtime")?;
    runtime.block_on(async {
        match arguments.command {
            Command::Run { .. } => agent::run(config).await.map(|()| ExitCode::SUCCESS),
            Command::Doctor { json } => Ok(doctor::run(&config, json).await),
            Command::Ready => ready::run(&config),
            Command::Status { json } => status::run(&config, json),
            Command::SelfProbe { signal } => Ok(act(signal)),
            Command::Uninstall { keep_enforcing } => uninstall::run(&config, keep_enforcing),
        }
    })
}
