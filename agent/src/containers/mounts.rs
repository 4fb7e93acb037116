//! Mounts of containers: which of them are volumes, and how those are named.
//!
//! The kernel's table of mounts says what is mounted where; the runtime's description of the container says on whose
//! behalf. What names a volume, in this order:
//!
//! | source of the mount | name |
//! |---|---|
//! | `…/pods/<pod uid>/volumes/<plugin>/<name>` | the volume's in the pod; of a claim, the persistent volume's |
//! | `…/pods/<pod uid>/volume-subpaths/<name>/…` | the same |
//! | `…/volumes/<name>/_data` | the named volume of Docker or Podman |
//! | anything else (a host path, an image, `/etc/hosts`) | the path at which it is mounted |
//!
//! The folders are those of the kubelet (`pkg/kubelet/kubelet_getters.go` of Kubernetes).

use std::path::{Path, PathBuf};

use palisade_abi::{state::VOLUME_NAME_CAPACITY, volume::MARK};
use palisade_profile::origin::VolumeName;
use palisade_proto::runtime::nri;
use serde_json::Value;

use crate::kernel::Mounted;

/// A mount as a runtime describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Described {
    pub destination: PathBuf,
    pub source: PathBuf,
}

/// A mount of a container that is a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    pub name: VolumeName,
    pub mounted: Mounted,
    /// Whether the kubelet replaces its files as a whole: [`palisade_abi::codes::volume_flags::REPLACED_WHOLE`].
    pub replaced_whole: bool,
}

/// File systems that are windows into the kernel: what is on them is no file of anybody's.
const PSEUDO: &[&str] = &[
    "autofs",
    "binfmt_misc",
    "bpf",
    "cgroup",
    "cgroup2",
    "configfs",
    "debugfs",
    "devpts",
    "devtmpfs",
    "efivarfs",
    "fusectl",
    "hugetlbfs",
    "mqueue",
    "nsfs",
    "proc",
    "pstore",
    "ramfs",
    "securityfs",
    "selinuxfs",
    "sysfs",
    "tracefs",
];
/// Plugins of the kubelet that replace a volume's files as a whole.
const REPLACING: &[&str] = &[
    "kubernetes.io~configmap",
    "kubernetes.io~secret",
    "kubernetes.io~projected",
    "kubernetes.io~downward-api",
];
/// Memory, unless the runtime says that it mounted one of a pod there.
const MEMORY: &str = "tmpfs";
/// The shared memory of a pod, which runtimes bind like a volume.
const SHARED_MEMORY: &str = "/dev/shm";

/// The binds of a container as NRI describes it.
pub fn of_nri(mounts: &[nri::Mount]) -> Vec<Described> {
    let binds =
        mounts.iter().filter(|mount| is_bind(&mount.r#type, mount.options.iter().map(String::as_str)));
    binds
        .map(|mount| Described { destination: (&mount.destination).into(), source: (&mount.source).into() })
        .collect()
}

/// The binds of a container by its OCI runtime specification.
pub fn of_spec(spec: &Value) -> Vec<Described> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mounts = spec["mounts"].as_array().into_iter().flatten();
    let binds = mounts.filter(|mount| {
        let options = mount["options"].as_array().into_iter().flatten().filter_map(Value::as_str);
        is_bind(mount["type"].as_str().unwrap_or_default(), options)
    });
    binds
        .map(|mount| Described {
            destination: text(&mount["destination"]).into(),
            source: text(&mount["source"]).into(),
        })
        .collect()
}

/// What Docker says it mounted.
pub fn of_docker(container: &Value) -> Vec<Described> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mounts = container["Mounts"].as_array().into_iter().flatten();
    mounts
        .filter(|mount| mount["Type"] != MEMORY)
        .map(|mount| Described {
            destination: text(&mount["Destination"]).into(),
            source: text(&mount["Source"]).into(),
        })
        .collect()
}

fn is_bind<'a>(kind: &str, mut options: impl Iterator<Item = &'a str>) -> bool {
    kind == "bind" || options.any(|option| option == "bind" || option == "rbind")
}

/// Whether a mount can be a volume by what it is.
pub fn may_be_volume(mounted: &Mounted) -> bool {
    mounted.point != Path::new("/") && !PSEUDO.contains(&mounted.filesystem.as_str())
}

/// The name that the source of a mount has, if it is a volume of the pod `pod_uid` or one with a name of its own, and
/// whether its files are replaced as a whole.
fn name_of_source(source: &Path, pod_uid: &str) -> Option<(VolumeName, bool)> {
    let parts: Vec<&str> = source.iter().map(|part| part.to_str().unwrap_or_default()).collect();
    let of_pod = parts.windows(2).rposition(|pair| !pod_uid.is_empty() && pair == ["pods", pod_uid]);
    let (name, replaced_whole) = match of_pod.map(|at| &parts[at + 2..]) {
        Some(["volumes", plugin, name]) => (name, REPLACING.contains(plugin)),
        Some(["volumes", _, name, ..] | ["volume-subpaths", name, ..]) => (name, false),
        Some(_) => return None,
        None => match parts.as_slice() {
            [.., "volumes", name, "_data"] => (name, false),
            _ => return None,
        },
    };
    Some((VolumeName::parse(name)?, replaced_whole))
}

/// Whether `mounted` is a volume, and its name. `described` is the runtime's word on the very mount, if it has one;
/// `trusted` says that nothing but the runtime can have mounted it.
pub fn volume(
    mounted: &Mounted,
    described: Option<&Described>,
    pod_uid: &str,
    trusted: bool,
) -> Option<Volume> {
    let called = |name, replaced_whole| Volume { name, mounted: mounted.clone(), replaced_whole };
    if !may_be_volume(mounted) {
        return None;
    }
    if described.is_none() && (!trusted || mounted.filesystem == MEMORY) {
        return None;
    }
    let by_source = described.and_then(|described| name_of_source(&described.source, pod_uid));
    if let Some((name, replaced_whole)) = by_source {
        return Some(called(name, replaced_whole));
    }
    if mounted.filesystem == MEMORY && mounted.point == Path::new(SHARED_MEMORY) {
        return None;
    }
    Some(called(VolumeName::parse(mounted.point.to_str()?)?, false))
}

impl Volume {
    /// The text in front of the path below the mount's root, and how many bytes of it are the name with its marks.
    /// `None` when it is too long for the kernel.
    pub fn text(&self) -> Option<(String, usize)> {
        let mark = char::from(MARK);
        let named = format!("{mark}{}{mark}", self.name.as_str());
        let whole = format!("{named}{}", self.mounted.point.to_str()?);
        (whole.len() <= VOLUME_NAME_CAPACITY).then_some((whole, named.len()))
    }
}

/// The text of the file at `path` of the superblock `device`, by the mount of `volumes` that it is on. This is for what
/// the kernel recorded before it knew them.
pub fn rename(volumes: &[Volume], device: &str, path: &[u8]) -> Option<Vec<u8>> {
    use std::os::unix::ffi::OsStrExt as _;
    let path = Path::new(std::ffi::OsStr::from_bytes(path));
    let on = volumes
        .iter()
        .filter(|volume| volume.mounted.device == device && path.starts_with(&volume.mounted.root));
    let nearest = on.max_by_key(|volume| volume.mounted.root.as_os_str().len())?;
    let (text, _) = nearest.text()?;
    let mut below = path.strip_prefix(&nearest.mounted.root).ok()?;
    if nearest.replaced_whole
        && let Some(first) = below.iter().next()
        && first.as_bytes().starts_with(b"..")
    {
        below = below.strip_prefix(first).ok()?;
    }
    let mut text = text.into_bytes();
    if !below.as_os_str().is_empty() {
        text.push(b'/');
        text.extend(below.as_os_str().as_bytes());
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "5f0c";

    fn mounted(filesystem: &str, point: &str) -> Mounted {
        Mounted {
            id: 1,
            parent: 0,
            device: "8:1".to_owned(),
            root: "/".into(),
            point: point.into(),
            filesystem: filesystem.to_owned(),
        }
    }

    fn described(source: &str) -> Described {
        Described { destination: "/unused".into(), source: source.into() }
    }

    fn named(source: &str, filesystem: &str, point: &str) -> Option<String> {
        volume(&mounted(filesystem, point), Some(&described(source)), UID, true)
            .map(|volume| volume.name.as_str().to_owned())
    }

    /// Sources as a kubelet makes them (kubelet_getters.go, subpath_linux.go) and engines do.
    #[test]
    fn a_volume_has_the_pods_name_or_its_mount_point() {
        let of_pod = "/var/lib/kubelet/pods/5f0c/";
        for (source, filesystem, point, expected) in [
            ("volumes/kubernetes.io~empty-dir/cache", "ext4", "/cache", "cache"),
            ("volumes/kubernetes.io~empty-dir/memory", "tmpfs", "/memory", "memory"),
            (
                "volumes/kubernetes.io~projected/kube-api-access-x",
                "tmpfs",
                "/run/secrets/s",
                "kube-api-access-x",
            ),
            ("volumes/kubernetes.io~csi/pvc-1/mount", "xfs", "/data", "pvc-1"),
            ("volumes/kubernetes.io~empty-dir/cache/below", "ext4", "/below", "cache"),
            ("volume-subpaths/logs/web/0", "ext4", "/var/log", "logs"),
            ("etc-hosts", "ext4", "/etc/hosts", "/etc/hosts"),
            ("containers/web/9f86d0", "ext4", "/dev/termination-log", "/dev/termination-log"),
        ] {
            assert_eq!(
                named(&format!("{of_pod}{source}"), filesystem, point).as_deref(),
                Some(expected),
                "{source}"
            );
        }
        assert_eq!(named("/srv/host", "ext4", "/srv",).as_deref(), Some("/srv"));
        assert_eq!(named("/var/lib/docker/volumes/db/_data", "ext4", "/db").as_deref(), Some("db"));
        // Another pod's folder, mounted as a host path, is not this pod's volume.
        let other = "/var/lib/kubelet/pods/ffff/volumes/kubernetes.io~empty-dir/cache";
        assert_eq!(named(other, "ext4", "/theirs").as_deref(), Some("/theirs"));
    }

    #[test]
    fn what_is_no_volume_has_no_name() {
        assert_eq!(named("proc", "proc", "/proc"), None);
        assert_eq!(named("/x", "overlay", "/"), None);
        assert_eq!(named("/run/containerd/s/shm", "tmpfs", "/dev/shm"), None);
        // A colon would end the name early.
        assert_eq!(named("/srv", "ext4", "/a:b"), None);
        // Nobody mentioned these.
        assert_eq!(volume(&mounted("tmpfs", "/dev"), None, UID, true), None);
        assert_eq!(volume(&mounted("ext4", "/added"), None, UID, false), None);
        // A driver's hook did, before the workload ran.
        let found = volume(&mounted("ext4", "/usr/bin/nvidia-smi"), None, UID, true);
        assert_eq!(found.unwrap().name.as_str(), "/usr/bin/nvidia-smi");
    }

    #[test]
    fn only_what_the_kubelet_replaces_whole_hides_a_folder() {
        let replaced = |source: &str| {
            let source = described(&format!("/var/lib/kubelet/pods/{UID}/volumes/{source}"));
            volume(&mounted("tmpfs", "/v"), Some(&source), UID, true).unwrap().replaced_whole
        };
        assert!(replaced("kubernetes.io~configmap/scripts"));
        assert!(!replaced("kubernetes.io~empty-dir/scripts"));
        // A subPath leads to one of its files or folders.
        assert!(!replaced("kubernetes.io~configmap/scripts/..2026/run.sh"));
    }

    #[test]
    fn descriptions_of_all_runtimes_name_their_binds() {
        let spec = serde_json::json!({"mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/data", "type": "bind", "source": "/srv", "options": ["rbind", "ro"]},
            {"destination": "/odd", "type": "none", "source": "/odd", "options": ["bind"]}]});
        let places = |found: Vec<Described>| -> Vec<String> {
            found.iter().map(|found| found.destination.display().to_string()).collect()
        };
        assert_eq!(places(of_spec(&spec)), ["/data", "/odd"]);
        assert!(of_spec(&Value::Null).is_empty());
        let docker = serde_json::json!({"Mounts": [
            {"Type": "volume", "Name": "db", "Source": "/var/lib/docker/volumes/db/_data", "Destination": "/db"},
            {"Type": "tmpfs", "Source": "", "Destination": "/tmp"}]});
        assert_eq!(places(of_docker(&docker)), ["/db"]);
        let bind = nri::Mount {
            destination: "/data".to_owned(),
            r#type: "bind".to_owned(),
            source: "/srv".to_owned(),
            options: Vec::new(),
        };
        assert_eq!(places(of_nri(&[bind, nri::Mount::default()])), ["/data"]);
    }

    #[test]
    fn what_was_recorded_too_early_is_named_by_the_nearest_mount() {
        let volume = |name: &str, root: &str, point: &str| Volume {
            name: VolumeName::parse(name).unwrap(),
            mounted: Mounted { root: root.into(), ..mounted("ext4", point) },
            replaced_whole: false,
        };
        let volumes = [volume("data", "/v/data", "/data"), volume("logs", "/v/data/logs", "/var/log")];
        let renamed = |device: &str, path: &str| {
            rename(&volumes, device, path.as_bytes()).map(|text| String::from_utf8(text).unwrap())
        };
        assert_eq!(renamed("8:1", "/v/data/bin/x").as_deref(), Some(":data:/data/bin/x"));
        assert_eq!(renamed("8:1", "/v/data/logs/x").as_deref(), Some(":logs:/var/log/x"));
        assert_eq!(renamed("8:1", "/v/data").as_deref(), Some(":data:/data"));
        assert_eq!(renamed("8:1", "/v/database"), None);
        assert_eq!(renamed("8:2", "/v/data/x"), None);
    }
}
