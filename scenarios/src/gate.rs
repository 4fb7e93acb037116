//! Where the fixture's `after` waits until it is let through, without looking again and again: hundreds that look would
//! keep a node too busy to end any of them.

use std::{
    fs::OpenOptions,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use rustix::{
    fs::{CWD, FileType, Mode, OFlags, mknodat},
    io::Errno,
};

use crate::cri::until;

/// A pipe that a process waits to read from.
pub struct Gate(PathBuf);

impl Gate {
    /// Makes one at `path`, which the one that waits must be able to reach.
    pub fn new(path: &Path) -> Result<Self> {
        mknodat(CWD, path, FileType::Fifo, Mode::from_raw_mode(0o644), 0)
            .with_context(|| format!("cannot make the pipe {}", path.display()))?;
        Ok(Self(path.to_owned()))
    }

    /// Lets through who waits, once there is one.
    pub async fn open(&self) -> Result<()> {
        until(&format!("somebody waits at {}", self.0.display()), async || {
            let flags = OFlags::NONBLOCK.bits().cast_signed();
            match OpenOptions::new().write(true).custom_flags(flags).open(&self.0) {
                Ok(_closed_at_once) => Ok(Some(())),
                Err(error) if error.raw_os_error() == Some(Errno::NXIO.raw_os_error()) => Ok(None),
                Err(error) => Err(error.into()),
            }
        })
        .await
    }
}
