//! End-to-end behaviour: a real kernel, a real runtime, real containers, asserted from outside.
//!
//! Runs as root on a node where containerd answers and the test images are imported, with Palisade's binaries on
//! the PATH. Every scenario has a control: the same act without a profile succeeds.

mod apps;
mod attacks;
mod bench;
mod bench_delivery;
mod bench_mmap;
mod bench_programs;
mod bench_start;
mod claims;
mod code;
mod conditions;
mod containerd;
mod counters;
mod cri;
mod daemonset;
mod demo;
mod differential;
mod disturbed;
mod elevation;
mod engines;
mod events;
mod exec;
mod fake_runtime;
mod faults;
mod gate;
mod generator;
mod layers;
mod limits;
mod members;
mod node;
mod noisy;
mod outlives;
mod outside;
mod overlay;
mod peers;
mod pinned;
mod planted;
mod powercut;
mod proxy;
mod races;
mod random;
mod report;
mod rootfs;
mod skipped;
mod smoke;
mod soak;
mod starts;
mod switches;
mod tampering;
mod tls;
mod torn;
mod users;
mod volumes;
mod who;

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Runs end-to-end scenarios on this node.
///
/// The last line is "N passed, N failed"; the exit code is 0 when none failed.
#[derive(Parser)]
#[command(name = "palisade-scenarios")]
struct Arguments {
    /// CRI socket of the container runtime
    #[arg(long, default_value = "/run/containerd/containerd.sock", global = true)]
    cri: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Code that was never executed: mapped, made at run time, written into other processes
    Code,
    /// What the kernel decides and what `profile` says, on profiles and files drawn at random: no difference
    Differential {
        /// Acts of one kind, origin and verdict, over all containers
        #[arg(long, default_value_t = 40)]
        per_cell: usize,
        /// Repeat what an earlier run drew
        #[arg(long)]
        seed: Option<u64>,
    },
    /// Revisions that are switched under load: each verdict is that of the revision which its record names
    Switches {
        /// Changes of the profile; each switches every container
        #[arg(long, default_value_t = 25)]
        changes: usize,
        #[arg(long, default_value_t = 4)]
        containers: usize,
        /// Repeat what an earlier run drew
        #[arg(long)]
        seed: Option<u64>,
    },
    /// A name that changes while it is executed, beside containers that flood the ring
    Races {
        /// Executions of the name
        #[arg(long, default_value_t = 1000)]
        count: u64,
    },
    /// A file whose folder moves while it is executed: its path is never half the old one and half the new one
    Torn {
        /// Executions
        #[arg(long, default_value_t = 5000)]
        count: u64,
    },
    /// Processes by the hundred from several at once, of which kernels since 7.0 skip some: all are on record or counted as lost
    Skipped,
    /// A program of a container that the kernel starts outside of it, and cgroups that a container names like one
    Outside,
    /// Options of overlayfs under which a file of the image has another name, or other attributes
    Overlay,
    /// Layers of images that are written to below the file systems of containers
    Layers,
    /// Set-user-id programs: recorded, and refused where the profile says so
    Elevation,
    /// A container that floods the ring, and one beside it that loses nothing by that
    Noisy,
    /// Peers of the collector that are broken or hostile, and users of its machine; needs no container runtime
    Peers,
    /// Deliver one record: what `peers` has other users do
    #[command(hide = true)]
    Deliver {
        #[arg(long)]
        collector: String,
        #[arg(long)]
        node: String,
    },
    /// Delivery under mutual TLS, with certificates that `palisade pki` made
    Tls,
    /// Rules that ask for a file's SHA-256
    Pinned,
    /// Rules that ask which program calls exec, and with which arguments
    Conditions,
    /// nginx, Redis, PostgreSQL, Python and Java under profiles that were drafted from what they did
    Apps {
        /// Only services whose name holds this
        #[arg(long, default_value = "")]
        only: String,
    },
    /// Rules for the workload alone, and for those who enter from outside
    Who,
    /// One allowed and one denied exec, and the right origin: the check of every kernel
    Smoke,
    /// The exec allowlist against every known way around it, under enforce, audit and without a profile
    Exec {
        /// Only these attacks
        #[arg(long)]
        only: Vec<String>,
        /// In audit mode none that needs a container of its own
        #[arg(long)]
        short: bool,
    },
    /// Entrypoints that are not allowed, with every runtime, interface and moment: none runs
    ///
    /// Stops the guest's containerd and starts its own, so it comes last.
    Starts {
        /// Containers per cell
        #[arg(long, default_value_t = 20)]
        count: usize,
        /// Only the runtime that is running
        #[arg(long)]
        here: bool,
        /// Only what differs most
        #[arg(long)]
        short: bool,
        /// Only cases whose name holds this
        #[arg(long, default_value = "")]
        only: String,
    },
    /// The shipped manifest with its security context, run through the runtime interface
    Daemonset,
    /// Plain `ctr run`, Podman and Docker
    Engines {
        /// Archive of the workload's image
        #[arg(long, default_value = "/palisade/images/workload.tar")]
        archive: PathBuf,
    },
    /// The runtime restarts, the agent hangs, is killed, or is not understood: no container starts unguarded
    ///
    /// Stops the guest's containerd and starts its own, so it comes late.
    Disturbed {
        /// Only what differs most
        #[arg(long)]
        short: bool,
        /// Only cases whose name holds this
        #[arg(long, default_value = "")]
        only: String,
    },
    /// The agent is killed at random moments, stopped, taken over, uninstalled: what is refused stays refused
    Outlives {
        /// Times that it is killed
        #[arg(long, default_value_t = 50)]
        kills: u32,
        /// Times that it is killed while two configurations take turns
        #[arg(long, default_value_t = 10)]
        turns: u32,
        /// Another build of the agent, which takes turns with this one after each step of an upgrade and back; may be given again
        ///
        /// What its layouts let be taken over must be, and what is left in its ring must be read or counted.
        #[arg(long)]
        other: Vec<PathBuf>,
        /// Attacks meanwhile, at least
        #[arg(long, default_value_t = 1000)]
        attacks: u64,
        /// Repeat the moments of an earlier run
        #[arg(long)]
        seed: Option<u64>,
        /// Kill it after two steps of an upgrade instead of each
        #[arg(long)]
        short: bool,
    },
    /// Pins and programs are tampered with: the agent notices, withdraws its claim, and mends them
    Claims,
    /// Containers that turn on the agent: its process, its maps and programs, their pins
    Tampering,
    /// Volumes of every kind: each file named by its volume and by its path in the pod
    ///
    /// Stops the guest's containerd and starts its own, so it comes late.
    Volumes {
        /// Only what differs most
        #[arg(long)]
        short: bool,
        /// Only the runtime that is running
        #[arg(long)]
        here: bool,
    },
    /// Thousands of containers and profiles, full maps, an agent with 64 MiB: verdicts stay right
    Limits {
        #[arg(long, default_value_t = 10_000)]
        containers: usize,
        #[arg(long, default_value_t = 1_000)]
        profiles: usize,
        /// Executions whose outcome is compared with what the profiles say
        #[arg(long, default_value_t = 400)]
        executions: usize,
        /// Limit of the agent's memory in MiB, kernel maps included; 10,000 containers under 1,000 profiles need more than 64
        #[arg(long, default_value_t = 128)]
        memory: u64,
    },
    /// Nested cgroups, moved processes, nsenter, the host's namespaces, sessions: each in the right container
    Members {
        /// Processes that are moved into a container while they execute something
        #[arg(long, default_value_t = 100)]
        arrivals: u64,
    },
    /// Containers that ran before the agent and have another root than the runtime gave them: only the runtime's is the image
    Rootfs,
    /// Numbered execs: each is stored or counted
    Generator {
        #[arg(long, default_value_t = 5000)]
        count: u64,
        /// Execs per second, at most
        #[arg(long, default_value_t = 500.0)]
        rate: f64,
    },
    /// Wrong configuration, no rights, no BTF, full disks, a collector that goes away: what is said, and how soon
    Faults,
    /// The collector's disk as it is after a power cut at any moment: every acknowledged record is there; needs dmsetup and the kernel's
    /// dm-log-writes
    Powercut {
        /// Moments at which the power is cut
        #[arg(long, default_value_t = 25)]
        cuts: usize,
        #[arg(long, default_value_t = 150)]
        batches: u64,
        /// What is drawn is the same again
        #[arg(long)]
        seed: Option<u64>,
    },
    /// Delivery while everything fails that can; at the end the records of each container add up to what the kernel has numbered
    Soak {
        #[arg(long, default_value_t = 8)]
        minutes: u64,
        /// What is drawn is the same again
        #[arg(long)]
        seed: Option<u64>,
    },
    /// The exec scenario must fail against programs with a planted bug
    Planted {
        /// An agent that loads its programs from --objects
        #[arg(long)]
        agent: PathBuf,
        /// Folder of objects in which bugs can be switched on
        #[arg(long)]
        objects: PathBuf,
    },
    /// Show Palisade at work
    Demo,
    /// The agent's share of a container's start; run it under the instruction clock
    BenchStart {
        #[arg(long, default_value_t = 10)]
        count: u32,
        #[arg(long, default_value_t = 3)]
        repeats: u32,
    },
    /// Execs per second and the agent's share; run it under the instruction clock
    BenchExec {
        #[arg(long, default_value_t = 2000)]
        count: u64,
        #[arg(long, default_value_t = 3)]
        repeats: u32,
        /// Further rules of the container's profile
        #[arg(long, default_value_t = 0)]
        rules: usize,
        /// Further profiles, which name no container
        #[arg(long, default_value_t = 0)]
        profiles: usize,
    },
    /// Records from the ring to the collector's disk, as many as can be, for `cargo xtask bench delivery`
    BenchDelivery {
        /// An agent that loads its programs from --objects
        #[arg(long)]
        agent: PathBuf,
        #[arg(long)]
        objects: PathBuf,
        /// Records a second
        #[arg(long, default_value_t = 100_000)]
        rate: u64,
        #[arg(long, default_value_t = 300)]
        seconds: u64,
        /// Without a collector
        #[arg(long)]
        down: bool,
    },
    /// What the agent adds to the start of a dynamically linked program and of a Java virtual machine, for `cargo xtask bench mmap`
    BenchMmap {
        #[arg(long, default_value_t = 200)]
        count: u64,
        #[arg(long, default_value_t = 3)]
        repeats: u32,
    },
}

fn main() -> ExitCode {
    match start(Arguments::parse()) {
        Ok(code) => code,
        Err(error) => {
            println!("FAIL set-up: {error:#}");
            println!("0 passed, 1 failed");
            ExitCode::FAILURE
        }
    }
}

fn start(arguments: Arguments) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let cri = arguments.cri;
    runtime.block_on(async {
        match arguments.command {
            Command::Code => code::run(&cri).await,
            Command::Differential { per_cell, seed } => {
                differential::run(&cri, &differential::Options { per_cell, seed }).await
            }
            Command::Switches { changes, containers, seed } => {
                switches::run(&cri, &switches::Options { changes, containers, seed }).await
            }
            Command::Layers => layers::run(&cri).await,
            Command::Elevation => elevation::run(&cri).await,
            Command::Races { count } => races::run(&cri, count).await,
            Command::Torn { count } => torn::run(&cri, count).await,
            Command::Skipped => skipped::run(&cri).await,
            Command::Outside => outside::run(&cri).await,
            Command::Overlay => overlay::run(&cri).await,
            Command::Pinned => pinned::run(&cri).await,
            Command::Apps { only } => apps::run(&cri, &only).await,
            Command::Noisy => noisy::run(&cri).await,
            Command::Peers => peers::run(&cri).await,
            Command::Deliver { collector, node } => users::deliver_one(&collector, &node).await,
            Command::Tls => tls::run(&cri).await,
            Command::Conditions => conditions::run(&cri).await,
            Command::Who => who::run(&cri).await,
            Command::Smoke => smoke::run(&cri).await,
            Command::Exec { only, short } => exec::run(&cri, &exec::Options { only, short }).await,
            Command::Starts { count, here, short, only } => {
                starts::run(&cri, &starts::Options { count, here, short, only }).await
            }
            Command::Daemonset => daemonset::run(&cri).await,
            Command::Engines { archive } => engines::run(&cri, &archive).await,
            Command::Disturbed { only, short } => disturbed::run(&only, short).await,
            Command::Limits { containers, profiles, executions, memory } => {
                limits::run(&limits::Options { containers, profiles, executions, memory }).await
            }
            Command::Members { arrivals } => members::run(&cri, arrivals).await,
            Command::Rootfs => rootfs::run(&cri).await,
            Command::Outlives { kills, turns, other, attacks, seed, short } => {
                outlives::run(&cri, &outlives::Options { kills, turns, others: other, attacks, seed, short })
                    .await
            }
            Command::Claims => claims::run(&cri).await,
            Command::Tampering => tampering::run(&cri).await,
            Command::Volumes { here, short } => volumes::run(&cri, here, short).await,
            Command::Generator { count, rate } => generator::run(&cri, count, rate).await,
            Command::Faults => faults::run(&cri).await,
            Command::Powercut { cuts, batches, seed } => {
                powercut::run(&cri, &powercut::Options { cuts, batches, seed }).await
            }
            Command::Soak { minutes, seed } => soak::run(&cri, &soak::Options { minutes, seed }).await,
            Command::Planted { agent, objects } => planted::run(&cri, &agent, &objects).await,
            Command::Demo => demo::run(&cri).await,
            Command::BenchStart { count, repeats } => bench_start::run(&cri, count, repeats).await,
            Command::BenchExec { count, repeats, rules, profiles } => {
                bench::run(&cri, count, repeats, bench::Scale { rules, profiles }).await
            }
            Command::BenchDelivery { agent, objects, rate, seconds, down } => {
                let options = bench_delivery::Options { agent, objects, rate, seconds, down };
                bench_delivery::run(&cri, &options).await
            }
            Command::BenchMmap { count, repeats } => bench_mmap::run(&cri, count, repeats).await,
        }
    })
}
