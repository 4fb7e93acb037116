//! The collector's configuration: read whole and checked before anything is touched.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use palisade_proto::batch;
use palisade_transport::{files::Files, name::Name};
use serde::Deserialize;

use crate::retention::Retention;

/// Largest message that is accepted, in bytes: a batch, and what is around it.
pub const LARGEST_MESSAGE: usize = batch::MOST_COMPRESSED + (4 << 10);

#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Config {
    /// Loopback only without `tls`.
    pub listen: SocketAddr,
    /// Certificates: agents and readers must then show one of theirs.
    pub tls: Option<Files>,
    pub store: PathBuf,
    /// A segment of the log is closed when it is larger than this.
    pub segment_bytes: u64,
    pub retention: Retention,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 7443)),
            tls: None,
            store: PathBuf::from("/var/lib/palisade/store"),
            segment_bytes: 64 << 20,
            retention: Retention::default(),
        }
    }
}

impl Config {
    /// Reads `path`, or takes the defaults.
    ///
    /// # Errors
    ///
    /// When the file cannot be read or is not a configuration; the message has the place.
    pub fn read(path: Option<&Path>) -> Result<Self> {
        let Some(path) = path else { return Ok(Self::default()) };
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read the configuration {}", path.display()))?;
        marked_yaml::from_yaml(0, &text)
            .map_err(|error| anyhow::anyhow!("{}: {error}", path.display()))
            .context("the configuration is not valid; known fields are listen, tls, store, segmentBytes and retention")
    }

    /// # Errors
    ///
    /// When the values cannot be used together or at all.
    pub fn validate(&self) -> Result<()> {
        match &self.tls {
            None if !self.listen.ip().is_loopback() => bail!(
                "listen: {} is not a loopback address; without TLS records are only taken from this machine, \
                 so write 127.0.0.1:{}, or name certificates under tls",
                self.listen,
                self.listen.port()
            ),
            None => {}
            Some(files) => {
                let name = files.name().context("tls")?;
                if name != Name::Collector {
                    bail!("tls.certificate: is for {name}, not for a collector");
                }
            }
        }
        if self.segment_bytes < 1 << 16 {
            bail!("segmentBytes: {} is too small; write at least 65536", self.segment_bytes);
        }
        if (1..self.segment_bytes.saturating_mul(2)).contains(&self.retention.bytes) {
            bail!(
                "retention.bytes: {} is less than two segments of {} (segmentBytes); write more, or 0 for no bound",
                self.retention.bytes,
                self.segment_bytes
            );
        }
        Ok(())
    }
}
