//! Everything around the code: set-up, build, virtual machines, demo, tests and benches, one command each.

mod bench;
mod build;
#[cfg(test)]
mod circles;
mod debian;
mod demo;
mod dependencies;
mod fuzz;
mod images;
mod kernels;
mod licences;
#[cfg(test)]
mod manifests;
mod matrix;
mod native;
mod paths;
#[cfg(test)]
mod places;
mod rootfs;
mod setup;
mod shell;
mod test;
mod vm;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Builds, runs and tests Palisade. Every command sets up what it needs.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install what is missing: Debian packages, the eBPF compiler, bpf-linker
    Setup,
    /// Build the eBPF objects and all binaries
    Build(build::Options),
    /// Run a command as root in a virtual machine with Palisade and containerd
    ///
    /// Palisade's binaries are on the PATH, containerd runs, the test images are imported, and the files of the
    /// current directory stand under /host. The command's output is streamed and its exit code returned.
    Vm(vm::Options),
    /// Run a scenario on this machine's own kernel, with a containerd of its own
    ///
    /// Example: cargo xtask native -- generator --count 200000 --rate 500
    Native(native::Options),
    /// Run the test rings
    Test(test::Options),
    /// Show Palisade at work: containers that behave and containers that attack
    Demo(demo::Options),
    /// Load every program on every supported kernel and write docs/kernels.md
    Matrix(matrix::Options),
    /// Make the image that deploy/kubernetes/palisade.yaml names
    Image(images::Options),
    /// Fuzz every parser of hostile bytes
    Fuzz(fuzz::Options),
    /// Measure performance
    #[command(subcommand)]
    Bench(bench::Bench),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Setup => setup::run().map(|()| ExitCode::SUCCESS),
        Command::Build(options) => build::run(&options).map(|_| ExitCode::SUCCESS),
        Command::Vm(options) => vm::run(&options),
        Command::Native(options) => native::run(&options),
        Command::Test(options) => test::run(&options),
        Command::Demo(options) => demo::run(&options),
        Command::Matrix(options) => matrix::run(&options),
        Command::Image(options) => images::run(&options),
        Command::Fuzz(options) => fuzz::run(&options),
        Command::Bench(bench) => bench::run(&bench),
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
