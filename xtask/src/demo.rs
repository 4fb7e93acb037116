//! `cargo xtask demo`: natively in whatever tier this kernel has, or in a virtual machine.

use std::{process::ExitCode, time::Duration};

use anyhow::Result;
use clap::Args;

use crate::{
    build, images,
    kernels::Kernel,
    native::Containerd,
    vm::{Machine, Processors, Stream},
};

#[derive(Args)]
pub struct Options {
    /// In a virtual machine, where the kernel has the full tier
    #[arg(long)]
    vm: bool,
    /// The virtual machine's kernel
    #[arg(long, default_value = "6.12", requires = "vm")]
    kernel: Kernel,
}

pub fn run(options: &Options) -> Result<ExitCode> {
    let binaries = build::run(&build::Options { release: true })?;
    if options.vm {
        let machine = Machine {
            kernel: options.kernel,
            processors: Processors::Parallel(2),
            append: "",
            deadline: Duration::from_secs(900),
            containerd: true,
            binaries: &binaries,
            host: None,
            apps: false,
            extra: Vec::new(),
        };
        let outcome = machine.run(&["palisade-scenarios".to_owned(), "demo".to_owned()], Stream::Plain)?;
        return Ok(ExitCode::from(outcome.code));
    }
    let containerd = Containerd::start(&images::make(&binaries)?)?;
    let (code, _) = containerd.run(&binaries, &["palisade-scenarios", "demo"], Stream::Plain)?;
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)))
}
