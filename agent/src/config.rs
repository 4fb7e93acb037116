//! The agent's configuration: read whole and checked before anything is touched.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use palisade_abi::codes::mode;
use palisade_transport::{
    dial::Target,
    files::Files,
    local::{self, Purpose},
    name::Name,
};
use serde::{Deserialize, Deserializer};

use crate::{delivery::Limits, kernel::Sizes};

/// With less than this a file of tables has room for nothing else.
const SMALLEST_SPOOL: u64 = 8 << 20;

/// What happens to what a container executes before it is identified.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Unidentified {
    /// It runs and is recorded.
    Audit,
    /// It is refused.
    Deny,
    /// It is stopped before its first instruction, and let go or killed once the container is identified.
    Hold,
}

impl Unidentified {
    /// The code that the kernel programs know.
    pub fn mode(self) -> u8 {
        match self {
            Self::Audit => mode::AUDIT,
            Self::Deny => mode::ENFORCE,
            Self::Hold => mode::HOLD,
        }
    }
}

/// What happens to what an unidentified container executes while no agent renews the lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WhenAgentAbsent {
    Audit,
    Deny,
}

impl WhenAgentAbsent {
    /// The code that the kernel programs know.
    pub fn mode(self) -> u8 {
        match self {
            Self::Audit => mode::AUDIT,
            Self::Deny => mode::ENFORCE,
        }
    }
}

/// What happens when a container tampers with the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SelfProtection {
    /// It is recorded.
    Audit,
    /// It is refused and recorded.
    Enforce,
}

impl SelfProtection {
    /// The code that the kernel programs know.
    pub fn mode(self) -> u8 {
        match self {
            Self::Audit => mode::AUDIT,
            Self::Enforce => mode::ENFORCE,
        }
    }
}

#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Config {
    /// Name of the node in records; absent: the host's name.
    pub node: Option<String>,
    /// Where collectors listen: `https://` with `tls`, or `unix://` without. Those after the first are for when it cannot be had.
    #[serde(deserialize_with = "one_or_several")]
    pub collector: Vec<String>,
    /// Certificates; the own one is for this node.
    pub tls: Option<Files>,
    /// Folder of profiles.
    pub profiles: PathBuf,
    pub unidentified: Unidentified,
    pub when_agent_absent: WhenAgentAbsent,
    /// Seconds after its last sign of life that the agent counts as absent.
    pub agent_lease_seconds: u64,
    pub runtimes: Runtimes,
    /// Where the unified cgroup hierarchy is mounted; absent: found in /proc/mounts.
    pub cgroups: Option<PathBuf>,
    pub queue: Queue,
    pub spool: Spool,
    /// Folder on the host's bpffs in which enforcement outlives the agent; "none": it ends with the agent.
    pub pins: PathBuf,
    pub maps: MapSizes,
    /// What happens when a container signals the agent, traces it, opens its maps, or takes away its pins.
    pub self_protection: SelfProtection,
    /// Seconds between two proofs that enforcement works.
    pub self_probe_seconds: u64,
    /// Seconds to deliver what is left after SIGTERM.
    pub drain_seconds: u64,
    /// Where root asks for the agent's status; "none": nowhere.
    pub socket: PathBuf,
    /// Where Prometheus asks; absent: nowhere. Whoever reaches it may read it.
    pub metrics: Option<SocketAddr>,
}

/// An address, or a list of them.
fn one_or_several<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected an address or a list of addresses")]
    enum Addresses {
        One(String),
        Several(Vec<String>),
    }
    Ok(match Addresses::deserialize(deserializer)? {
        Addresses::One(address) => vec![address],
        Addresses::Several(addresses) => addresses,
    })
}

/// Where container runtimes are asked. What is not there is skipped.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Runtimes {
    /// Sockets of the Node Resource Interface: the runtime tells of a container before it starts, and waits.
    pub nri: Vec<PathBuf>,
    /// Sockets of the Kubernetes runtime interface.
    pub cri: Vec<PathBuf>,
    /// Sockets of containerd's own interface.
    pub containerd: Vec<PathBuf>,
    /// Sockets of Docker's engine.
    pub docker: Vec<PathBuf>,
    /// Folders in which Podman and CRI-O keep containers.
    pub storage: Vec<PathBuf>,
}

/// Bounds of what waits for the disk, or for the collector where there is none.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Queue {
    pub bytes: usize,
}

/// Where records wait for the collector, and how many.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Spool {
    /// Folder on the node's disk; "none": they wait in memory, and an agent that is killed takes them with it.
    pub path: PathBuf,
    /// Of the file.
    pub bytes: u64,
    /// How long they wait at most, of the time that an agent runs; 0: for ever.
    pub days: u32,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct MapSizes {
    pub slots: u32,
    pub processes: u32,
    pub rules: u32,
    /// Of glob automata over all revisions in force.
    pub glob_bytes: u32,
    /// Mounts of containers, at a time.
    pub volumes: u32,
    /// Different names of mounts, each with its place.
    pub volume_names: u32,
    pub ring_bytes: u32,
}

impl Runtimes {
    /// Every socket and folder.
    pub fn sockets(&self) -> impl Iterator<Item = &PathBuf> {
        [&self.nri, &self.cri, &self.containerd, &self.docker, &self.storage].into_iter().flatten()
    }
}

impl Default for Runtimes {
    fn default() -> Self {
        let paths = |list: &[&str]| list.iter().map(PathBuf::from).collect();
        Self {
            nri: paths(&["/var/run/nri/nri.sock"]),
            cri: paths(&[
                "/run/containerd/containerd.sock",
                "/run/crio/crio.sock",
                "/run/cri-dockerd.sock",
                "/run/k3s/containerd/containerd.sock",
            ]),
            containerd: paths(&["/run/containerd/containerd.sock", "/run/k3s/containerd/containerd.sock"]),
            docker: paths(&["/var/run/docker.sock"]),
            storage: paths(&["/var/lib/containers/storage"]),
        }
    }
}

impl Default for Queue {
    fn default() -> Self {
        Self { bytes: 16 << 20 }
    }
}

impl Default for Spool {
    fn default() -> Self {
        Self { path: "/var/lib/palisade/spool".into(), bytes: 1 << 30, days: 7 }
    }
}

impl Default for MapSizes {
    fn default() -> Self {
        Self {
            slots: 1024,
            processes: 16384,
            rules: 16384,
            glob_bytes: 1 << 20,
            volumes: 8192,
            volume_names: 1024,
            ring_bytes: 4 << 20,
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            node: None,
            collector: vec![Purpose::Deliver.address(local::FOLDER.as_ref())],
            tls: None,
            profiles: PathBuf::from("/etc/palisade/profiles"),
            unidentified: Unidentified::Audit,
            when_agent_absent: WhenAgentAbsent::Audit,
            agent_lease_seconds: 10,
            runtimes: Runtimes::default(),
            cgroups: None,
            queue: Queue::default(),
            spool: Spool::default(),
            maps: MapSizes::default(),
            pins: "/sys/fs/bpf/palisade".into(),
            self_protection: SelfProtection::Enforce,
            self_probe_seconds: 10,
            drain_seconds: 10,
            socket: "/run/palisade/agent.sock".into(),
            metrics: None,
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
            .context(
                "the configuration is not valid; known fields are node, collector, tls, profiles, unidentified, \
             whenAgentAbsent, agentLeaseSeconds, runtimes, cgroups, queue, spool, pins, maps, selfProtection, \
                 selfProbeSeconds, drainSeconds, socket and metrics",
            )
    }

    /// # Errors
    ///
    /// When the values cannot be used together or at all.
    pub fn validate(&self) -> Result<()> {
        self.targets()?;
        let MapSizes { slots, processes, rules, glob_bytes, volumes, volume_names, ring_bytes } = self.maps;
        for (name, value) in [
            ("slots", slots),
            ("processes", processes),
            ("rules", rules),
            ("volumes", volumes),
            ("volumeNames", volume_names),
        ] {
            if value == 0 || value > 1 << 20 {
                bail!("maps.{name}: {value} is not between 1 and 1048576");
            }
        }
        if !(1 << 10..=1 << 28).contains(&glob_bytes) {
            bail!("maps.globBytes: {glob_bytes} is not between 1024 and 268435456");
        }
        if !ring_bytes.is_power_of_two() || !(1 << 16..=1 << 30).contains(&ring_bytes) {
            bail!("maps.ringBytes: {ring_bytes} is not a power of two between 65536 and 1073741824");
        }
        if self.pins().is_some_and(|folder| !folder.is_absolute() || folder.parent().is_none()) {
            bail!(
                "pins: {} is no folder below a bpffs; write /sys/fs/bpf/palisade, or none",
                self.pins.display()
            );
        }
        if self.socket().is_some_and(|socket| !socket.is_absolute()) {
            bail!("socket: {} does not start with '/'; write a whole path, or none", self.socket.display());
        }
        if !(1..=3600).contains(&self.self_probe_seconds) {
            bail!("selfProbeSeconds: {} is not between 1 and 3600", self.self_probe_seconds);
        }
        if self.queue.bytes < 1 << 16 {
            bail!("queue.bytes: {} is too small; write at least 65536", self.queue.bytes);
        }
        if !self.spool.path.is_absolute() && self.spool.path != Path::new("none") {
            bail!(
                "spool.path: {} does not start with '/'; write a whole path, or none",
                self.spool.path.display()
            );
        }
        if !(SMALLEST_SPOOL..=1 << 40).contains(&self.spool.bytes) {
            bail!(
                "spool.bytes: {} is not between {SMALLEST_SPOOL} and 1099511627776; write none under spool.path to have none",
                self.spool.bytes
            );
        }
        if !(2..=3600).contains(&self.agent_lease_seconds) {
            bail!("agentLeaseSeconds: {} is not between 2 and 3600", self.agent_lease_seconds);
        }
        if self.node.as_ref().is_some_and(|node| node.is_empty() || node.len() > 253) {
            bail!("node: must have 1 to 253 bytes");
        }
        Ok(())
    }

    /// Whether the certificate is for an agent, and for this node.
    ///
    /// # Errors
    ///
    /// When it is not, or cannot be read.
    pub fn check_identity(&self) -> Result<()> {
        if let Some(files) = &self.tls {
            let name = files.name().context("tls")?;
            let Name::Node(certified) = &name else {
                bail!("tls.certificate: is for {name}, not for a node's agent");
            };
            if self.node.as_ref().is_some_and(|node| node != certified) {
                bail!(
                    "node: is not {certified}, for which tls.certificate is; leave it out, the certificate names the node"
                );
            }
        }
        Ok(())
    }

    /// Where records wait, and how many.
    pub fn limits(&self) -> Limits {
        let days = u64::from(self.spool.days);
        Limits {
            memory: self.queue.bytes,
            folder: (self.spool.path != Path::new("none")).then(|| self.spool.path.clone()),
            disk: self.spool.bytes,
            age: (days > 0).then(|| Duration::from_secs(days * 24 * 3600)),
        }
    }

    /// Where records go.
    ///
    /// # Errors
    ///
    /// When there is no address, or one and the certificates do not go together.
    pub fn targets(&self) -> Result<Vec<Target>> {
        if self.collector.is_empty() {
            bail!("collector: the list is empty; write at least one address");
        }
        let target = |address| Target::new(address, self.tls.clone()).context("collector");
        self.collector.iter().map(|address| target(address)).collect()
    }

    /// What the node is called in records: as its certificate says, as it is configured, or as the host calls itself.
    pub fn node_name(&self) -> String {
        match self.tls.as_ref().map(Files::name) {
            Some(Ok(Name::Node(name))) => name,
            _ => self
                .node
                .clone()
                .unwrap_or_else(|| rustix::system::uname().nodename().to_string_lossy().into_owned()),
        }
    }

    /// Where programs and maps are pinned; `None` when they are not to outlive the agent.
    pub fn pins(&self) -> Option<&Path> {
        (self.pins != Path::new("none")).then_some(&self.pins)
    }

    /// Where root asks for the agent's status.
    pub fn socket(&self) -> Option<&Path> {
        (self.socket != Path::new("none")).then_some(&self.socket)
    }

    /// What the maps are to hold.
    pub fn sizes(&self) -> Sizes {
        let MapSizes { slots, processes, rules, glob_bytes, volumes, volume_names, ring_bytes } = self.maps;
        Sizes { slots, processes, rules, glob_bytes, volumes, volume_names, ring_bytes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(text: &str) -> String {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("agent.yaml");
        std::fs::write(&path, text).unwrap();
        match Config::read(Some(&path)) {
            Err(error) => format!("{error:#}"),
            Ok(config) => format!("{:#}", config.validate().unwrap_err()),
        }
    }

    #[test]
    fn a_misspelt_field_is_named() {
        assert!(problem("unidentifed: deny\n").contains("unidentifed"), "{}", problem("unidentifed: deny\n"));
    }

    #[test]
    fn tcp_without_tls_is_refused_with_both_remedies() {
        for address in ["http://127.0.0.1:7443", "http://localhost:7443", "http://192.0.2.1:7443"] {
            let error = problem(&format!("collector: {address}\n"));
            for word in ["collector: ", "unix:///run/palisade/collector/", "https://", "palisade pki"] {
                assert!(error.contains(word), "{address}: {error}");
            }
        }
        assert!(problem("collector: https://192.0.2.1:7443\n").contains("name the certificates"));
    }

    #[test]
    fn a_collector_is_an_address_or_a_list_of_them() {
        let read = |text: &str| -> Config { marked_yaml::from_yaml(0, text).unwrap() };
        let one = "unix:///run/one.sock";
        assert_eq!(read(&format!("collector: {one}\n")).collector, [one]);
        let two = format!("collector: [{one}, unix:///run/two.sock]\n");
        assert_eq!(read(&two).targets().unwrap().len(), 2);
        assert!(problem("collector: []\n").contains("at least one"), "{}", problem("collector: []\n"));
        assert!(problem(&format!("collector: [{one}, http://192.0.2.1:1]\n")).contains("without TLS"));
        let wrong = problem("collector: {host: a}\n");
        assert!(
            wrong.contains("an address or a list of addresses") && wrong.contains("agent.yaml"),
            "{wrong}"
        );
    }

    #[test]
    fn sizes_out_of_bounds_are_refused_with_the_field() {
        assert!(problem("maps: {ringBytes: 100000}\n").contains("maps.ringBytes"));
        assert!(problem("maps: {slots: 0}\n").contains("maps.slots"));
    }

    #[test]
    fn the_example_says_the_defaults() {
        let text = include_str!("../../deploy/examples/agent.yaml");
        let example: Config = marked_yaml::from_yaml(0, text).unwrap();
        example.validate().unwrap();
        assert_eq!(format!("{example:?}"), format!("{:?}", Config::default()));
    }

    #[test]
    fn the_defaults_are_valid() {
        Config::default().validate().unwrap();
    }
}
