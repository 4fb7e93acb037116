//! The collector's configuration: read whole and checked before anything is touched.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use palisade_proto::batch;
use palisade_transport::{
    files::Files,
    local::{self, Rights},
    name::Name,
};
use serde::Deserialize;

use crate::retention::Retention;

/// Largest message that is accepted, in bytes: a batch, and what is around it.
pub const LARGEST_MESSAGE: usize = batch::MOST_COMPRESSED + (4 << 10);

#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Config {
    /// TCP address, which goes with `tls` alone.
    pub listen: Option<SocketAddr>,
    /// Certificates: agents and readers must then show one of theirs.
    pub tls: Option<Files>,
    /// The unix sockets of a collector without `tls`; absent: all defaults.
    pub sockets: Option<Sockets>,
    pub store: PathBuf,
    /// A segment of the log is closed when it is larger than this.
    pub segment_bytes: u64,
    pub retention: Retention,
}

/// Where agents and readers of this machine come, and who they may be.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Sockets {
    pub folder: PathBuf,
    /// Who may ask besides root: a name of /etc/group, or a number; absent: the collector's own group.
    pub group: Option<String>,
    /// Numbers of users that may deliver besides root. They must be in the group, too.
    pub agents: Vec<u32>,
}

impl Default for Sockets {
    fn default() -> Self {
        Self { folder: local::FOLDER.into(), group: None, agents: Vec::new() }
    }
}

impl Sockets {
    /// # Errors
    ///
    /// When the folder is no whole path, or the group is not known.
    pub fn rights(&self) -> Result<Rights> {
        if !self.folder.is_absolute() {
            bail!("sockets.folder: {} does not start with '/'; write a whole path", self.folder.display());
        }
        let group = match &self.group {
            None => None,
            Some(group) => {
                let known = std::fs::read_to_string(GROUPS).unwrap_or_default();
                Some(group_number(group, &known).with_context(|| {
                    format!(
                        "sockets.group: no group {group:?} is in {GROUPS}; make it with groupadd, or write its number"
                    )
                })?)
            }
        };
        Ok(Rights { folder: self.folder.clone(), group, group_delivers: !self.agents.is_empty() })
    }
}

/// Groups of this machine. What a directory service knows besides can be given by number.
const GROUPS: &str = "/etc/group";

/// The number of a group, which may be given as such.
fn group_number(group: &str, known: &str) -> Option<u32> {
    let by_name = known.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(group)).then(|| fields.nth(1)?.parse().ok())?
    });
    // The last number means "no group" to the kernel.
    by_name.or_else(|| group.parse().ok()).filter(|number| *number != u32::MAX)
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: None,
            tls: None,
            sockets: None,
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
            .context("the configuration is not valid; known fields are listen, tls, sockets, store, segmentBytes and retention")
    }

    /// # Errors
    ///
    /// When the values cannot be used together or at all.
    pub fn validate(&self) -> Result<()> {
        match (&self.tls, self.listen) {
            (None, Some(listen)) => bail!(
                "listen: {listen} would be TCP without TLS, open to every user and to every pod in the host's network; \
                 either leave listen out, and agents and readers of this machine come by the unix sockets in {}, \
                 or name certificates under tls (`palisade pki` makes them)",
                self.sockets().folder.display()
            ),
            (None, None) => drop(self.sockets().rights()?),
            (Some(_), None) => {
                bail!("listen: is absent, and tls goes with an address; write one, as 0.0.0.0:7443")
            }
            (Some(_), Some(_)) if self.sockets.is_some() => {
                bail!("sockets: are for a collector without tls; leave them out")
            }
            (Some(files), Some(_)) => {
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

    /// The sockets as they are configured.
    pub fn sockets(&self) -> Sockets {
        self.sockets.clone().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(text: &str) -> String {
        let read = |text: &str| -> Result<Config> {
            marked_yaml::from_yaml(0, text).map_err(|error| anyhow::anyhow!("{error}"))
        };
        format!("{:#}", read(text).and_then(|config| config.validate()).unwrap_err())
    }

    #[test]
    fn the_defaults_are_valid() {
        Config::default().validate().unwrap();
        assert_eq!(Config::default().sockets().folder, Path::new("/run/palisade/collector"));
    }

    #[test]
    fn the_example_says_the_defaults() {
        let text = include_str!("../../deploy/examples/collector.yaml");
        let example: Config = marked_yaml::from_yaml(0, text).unwrap();
        example.validate().unwrap();
        let written = Config { sockets: Some(Sockets::default()), ..Config::default() };
        assert_eq!(format!("{example:?}"), format!("{written:?}"));
    }

    #[test]
    fn tcp_without_tls_is_refused_with_both_remedies() {
        for address in ["127.0.0.1:7443", "\"[::1]:7443\"", "0.0.0.0:7443"] {
            let error = problem(&format!("listen: {address}\nsockets: {{folder: /run/elsewhere}}\n"));
            for word in ["listen: ", "unix sockets in /run/elsewhere", "under tls", "palisade pki"] {
                assert!(error.contains(word), "{address}: {error}");
            }
        }
    }

    #[test]
    fn sockets_and_tls_exclude_each_other() {
        let tls = "tls: {ca: a, certificate: b, key: c}\n";
        assert!(problem(tls).starts_with("listen: is absent"), "{}", problem(tls));
        let both = format!("{tls}listen: 0.0.0.0:7443\nsockets: {{}}\n");
        assert!(problem(&both).starts_with("sockets: are for"), "{}", problem(&both));
    }

    #[test]
    fn what_is_wrong_with_sockets_is_said_with_the_field() {
        for (text, says) in [
            ("folder: run/palisade", "sockets.folder: run/palisade does not start"),
            ("group: no such group", "sockets.group: no group \"no such group\" is in /etc/group"),
            ("group: 4294967295", "sockets.group: "),
            ("agents: [-1]", "agents"),
            ("agnets: [1]", "agnets"),
        ] {
            let error = problem(&format!("sockets: {{{text}}}\n"));
            assert!(error.contains(says), "{text}: {error}");
        }
    }

    #[test]
    fn a_group_is_a_name_or_a_number() {
        let known = "root:x:0:\nbroken\npalisade:x:990:ana,bo\n1000:x:7:\nbad:x:many:\n";
        for (group, number) in [
            ("palisade", Some(990)),
            ("root", Some(0)),
            ("4242", Some(4242)),
            ("1000", Some(7)),
            ("bad", None),
            ("broken", None),
            ("ana", None),
            ("", None),
            ("-1", None),
        ] {
            assert_eq!(group_number(group, known), number, "{group}");
        }
        let read: Config = marked_yaml::from_yaml(0, "sockets: {group: 4242, agents: [990]}\n").unwrap();
        let rights = read.sockets().rights().unwrap();
        assert_eq!((rights.group, rights.group_delivers), (Some(4242), true));
        assert!(!Sockets::default().rights().unwrap().group_delivers);
    }
}
