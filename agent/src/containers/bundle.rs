//! The runtime's word on the root filesystem of a container.
//!
//! An OCI runtime is started on a *bundle*: a folder of the host whose `config.json` names the root filesystem. The process that
//! watches over the container leads to it: the nearest one above the container's first that belongs to no container.
//!
//! | engine | watched by | bundle |
//! |---|---|---|
//! | containerd, Docker | `containerd-shim-…`, one for a pod | `../<id>` of its working directory, `…/io.containerd.runtime.v2.task/<namespace>/<id>` |
//! | CRI-O, Podman | `conmon` | its argument `-b` |
//!
//! Nothing counts here that a container can answer for: neither its own root directory nor its table of mounts. Names in the
//! host's table of mounts do not count either, since a volume with bidirectional propagation lets a container add some.

use std::{
    fs::File,
    io::{BufRead as _, BufReader, Read as _},
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    },
    path::{Component, Path, PathBuf},
};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, StatxFlags, fstat, makedev, openat, openat2, statx,
};
use serde_json::Value;

use crate::{
    kernel::{Mounted, mount_of, mounted},
    processes,
};

/// Processes above a container's first that are looked at.
const MOST_ABOVE: usize = 16;
/// What is read of the arguments of a process.
const MOST_ARGUMENTS: u64 = 1 << 17;
/// The longest description of a container that is read.
const MOST_CONFIG: u64 = 16 << 20;
/// What is read of a table of mounts.
const MOST_TABLE: u64 = 16 << 20;
/// What containerd calls the folders of the bundles of its shims, up to the version of the interface.
const SHIMS: &str = "io.containerd.runtime.";
const CONFIG: &str = "config.json";
/// `STATX_ATTR_MOUNT_ROOT` of include/uapi/linux/stat.h.
const MOUNT_ROOT: u64 = 0x2000;

/// A root directory, held open so that its filesystem's number cannot become another's.
#[derive(Debug)]
pub struct Root {
    file: OwnedFd,
    major: u32,
    minor: u32,
    inode: u64,
    /// The type of its filesystem, and where it is mounted; for people.
    filesystem: String,
    point: PathBuf,
}

impl Root {
    fn new(file: OwnedFd, mount: Option<&Mounted>) -> Result<Self> {
        let found = statx(&file, c"", AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC, StatxFlags::INO)?;
        Ok(Self {
            file,
            major: found.stx_dev_major,
            minor: found.stx_dev_minor,
            inode: found.stx_ino,
            filesystem: mount.map_or_else(|| "?".to_owned(), |mount| mount.filesystem.clone()),
            point: mount.map(|mount| mount.point.clone()).unwrap_or_default(),
        })
    }

    /// Where it can be entered, in procfs.
    pub fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.file.as_raw_fd()).into()
    }

    /// Device number, as stat(2) has it, and inode.
    pub fn directory(&self) -> (u64, u64) {
        (makedev(self.major, self.minor), self.inode)
    }

    /// Device of its filesystem in the kernel's encoding.
    pub fn device(&self) -> u64 {
        u64::from(self.major) << 20 | u64::from(self.minor)
    }

    pub fn is_overlay(&self) -> bool {
        self.filesystem == "overlay"
    }

    /// Whether `other` is on the same filesystem: two that are there at the same time have different numbers. Other
    /// filesystems than overlays may be shared by containers; then only the very directory tells.
    pub fn is_same_filesystem(&self, other: &Self) -> bool {
        let same = (self.major, self.minor) == (other.major, other.minor);
        same && (self.is_overlay() || self.inode == other.inode)
    }

    /// For people.
    pub fn describe(&self) -> String {
        format!("{} {}:{}", self.filesystem, self.major, self.minor)
    }

    /// The same with the place where it is mounted.
    pub fn describe_with_place(&self) -> String {
        format!("{} at {}", self.describe(), self.point.display())
    }
}

/// The root directory that the process `pid` has now.
///
/// # Errors
///
/// When it has ended.
pub fn of_process(pid: u32) -> Result<Root> {
    let path = format!("/proc/{pid}/root");
    let file = open_folder(Path::new(&path))?;
    // Only for people: a container answers for its table.
    let mount = mount_of(&file).ok().and_then(|id| entries(pid, id).ok()?.into_iter().next());
    Root::new(file, mount.as_ref())
}

/// The root filesystem that the runtime has made for the container `id`, whose first process is `first`. `is_containers` tells
/// whether a process belongs to a container: its word counts nothing.
///
/// # Errors
///
/// When nothing that watches over the container has a bundle of it, when that cannot be read, or when something is mounted
/// over the root filesystem.
pub fn find(first: u32, id: &str, is_containers: impl Fn(u32) -> bool) -> Result<Root> {
    ensure!(is_one_name(id), "its id is no name of a folder: {id:?}");
    let (start, mut above) = processes::start_and_parent(first).context("its first process has ended")?;
    for _ in 0..MOST_ABOVE {
        if above <= 1 {
            break;
        }
        if !is_containers(above)
            && let Some(bundle) = bundle_of(above, id)?
        {
            let root = root_of(above, &bundle)?;
            ensure!(processes::is_same((first, start)), "its first process has ended");
            return Ok(root);
        }
        let Some((_, next)) = processes::start_and_parent(above) else { break };
        above = next;
    }
    bail!(
        "no process above its first has the bundle that it was started on: the runtime's monitor is gone or unknown"
    )
}

/// The bundle of the container `id`, if it is the process `pid` that watches over it.
fn bundle_of(pid: u32, id: &str) -> Result<Option<OwnedFd>> {
    let process = PathBuf::from(format!("/proc/{pid}"));
    let owner = std::fs::metadata(&process).map(|found| found.uid()).ok();
    if owner != Some(rustix::process::geteuid().as_raw()) {
        // Nobody but root runs containers that are guarded.
        return Ok(None);
    }
    let mut arguments = Vec::new();
    File::open(process.join("cmdline"))?.take(MOST_ARGUMENTS).read_to_end(&mut arguments)?;
    if let Some(path) = named_by(&arguments, id) {
        let root = open_folder(&process.join("root"))?;
        return below(&root, &path).map(Some);
    }
    let Ok(folder) = std::fs::read_link(process.join("cwd")) else { return Ok(None) };
    if !is_of_a_shim(&folder) {
        return Ok(None);
    }
    let folder = open_folder(&process.join("cwd"))?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let path = Path::new("..").join(id);
    openat(&folder, &path, flags, Mode::empty())
        .map(Some)
        .with_context(|| format!("the runtime's shim {pid} has no bundle {}", path.display()))
}

/// The root filesystem that a bundle names. The process `pid` sees it mounted.
fn root_of(pid: u32, bundle: &OwnedFd) -> Result<Root> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let config =
        openat2(bundle, CONFIG, flags, Mode::empty(), INSIDE).context("its bundle has no config.json")?;
    let kind = FileType::from_raw_mode(fstat(&config)?.st_mode);
    ensure!(kind == FileType::RegularFile, "the config.json of its bundle is no regular file");
    let mut text = Vec::new();
    File::from(config).take(MOST_CONFIG).read_to_end(&mut text)?;
    let path = named_root(&text).context("the config.json of its bundle names no root filesystem")?;
    let file = if path.is_absolute() {
        below(&open_folder(Path::new(&format!("/proc/{pid}/root")))?, &path)?
    } else {
        openat2(bundle, &path, FOLDER, Mode::empty(), INSIDE)
            .with_context(|| format!("its bundle has no {}", path.display()))?
    };
    let table = entries(pid, mount_of(&file)?)?;
    let Some(mount) = table.first() else { bail!("its root filesystem is in no table of mounts") };
    let attributes = statx(&file, c"", AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC, StatxFlags::INO)?;
    if attributes.stx_attributes.bits() & MOUNT_ROOT != 0 {
        ensure!(
            !is_over_another(&table),
            "something is mounted over the root filesystem at {}",
            mount.point.display()
        );
    }
    Root::new(file, Some(mount))
}

const FOLDER: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);
/// Neither out of a folder nor by a link.
const INSIDE: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS);

fn open_folder(path: &Path) -> Result<OwnedFd> {
    openat(CWD, path, FOLDER, Mode::empty()).with_context(|| format!("cannot open {}", path.display()))
}

/// The folder at an absolute path below `root`.
fn below(root: &OwnedFd, path: &Path) -> Result<OwnedFd> {
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    openat2(root.as_fd(), path, FOLDER, Mode::empty(), resolve)
        .with_context(|| format!("cannot open {}", path.display()))
}

/// The mount with the number `id` in the table of the process `pid`, and then the one that it is mounted on.
fn entries(pid: u32, id: i32) -> Result<Vec<Mounted>> {
    let path = format!("/proc/{pid}/mountinfo");
    let file = File::open(&path).with_context(|| format!("cannot read {path}"))?;
    let mut table = Vec::new();
    for line in BufReader::new(file.take(MOST_TABLE)).split(b'\n') {
        table.extend(mounted(&line?));
    }
    Ok(with_parent(table, id))
}

fn with_parent(table: Vec<Mounted>, id: i32) -> Vec<Mounted> {
    let Some(own) = table.iter().find(|mount| mount.id == id).cloned() else { return Vec::new() };
    let parent = table.into_iter().find(|mount| mount.id == own.parent);
    [own].into_iter().chain(parent).collect()
}

/// Whether a mount, the first of these, stands in the very place of the one that it is mounted on. Who may mount on the root
/// of a container and has it shared with the host, can do that.
fn is_over_another(table: &[Mounted]) -> bool {
    matches!(table, [own, parent] if own.point == parent.point)
}

/// Whether `id` can be the name of a folder and nothing else.
fn is_one_name(id: &str) -> bool {
    let mut parts = Path::new(id).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(name)), None) if name == id)
}

/// The bundle of the container `id` that the arguments of a process name: those of conmon, or of the OCI runtime itself.
fn named_by(arguments: &[u8], id: &str) -> Option<PathBuf> {
    let words: Vec<&[u8]> = arguments.split(|byte| *byte == 0).collect();
    if !words.contains(&id.as_bytes()) {
        return None;
    }
    let path = words.iter().enumerate().find_map(|(at, word)| match *word {
        b"-b" | b"--bundle" => words.get(at + 1).copied(),
        _ => word.strip_prefix(b"--bundle="),
    })?;
    let path = PathBuf::from(std::ffi::OsStr::from_bytes(path));
    path.is_absolute().then_some(path)
}

/// Whether a working directory is the bundle of a shim of containerd's.
fn is_of_a_shim(folder: &Path) -> bool {
    let kind = folder.parent().and_then(Path::parent).and_then(Path::file_name);
    kind.is_some_and(|kind| kind.as_bytes().starts_with(SHIMS.as_bytes()))
}

/// The root filesystem in the description of a container: a path, or relative to the bundle.
fn named_root(config: &[u8]) -> Option<PathBuf> {
    let config: Value = serde_json::from_slice(config).ok()?;
    config["root"]["path"].as_str().filter(|path| !path.is_empty()).map(PathBuf::from)
}

#[cfg(test)]
mod tests {
    use std::{
        io::BufRead as _,
        process::{Child, Command, Stdio},
    };

    use super::*;

    const ID: &str = "6f1c8e";

    fn arguments(words: &[&str]) -> Vec<u8> {
        words.iter().flat_map(|word| word.bytes().chain([0])).collect()
    }

    #[test]
    fn a_monitor_names_the_bundle_of_its_container_alone() {
        let bundle = "/run/containers/storage/overlay-containers/6f1c8e/userdata";
        // As Podman 5, CRI-O and containerd's shim start them, shortened.
        let podman = [
            "/usr/bin/conmon",
            "--api-version",
            "1",
            "-c",
            ID,
            "-u",
            ID,
            "-r",
            "/usr/bin/crun",
            "-b",
            bundle,
        ];
        let crio = ["/usr/bin/conmon", "-b", bundle, "-c", ID, "--exit-dir", "/var/run/crio/exits", "-u", ID];
        let runc = [
            "runc",
            "--root",
            "/run/containerd/runc/k8s.io",
            "create",
            "--bundle",
            bundle,
            "--pid-file",
            "p",
            ID,
        ];
        let joined = format!("--bundle={bundle}");
        let other = ["crun", "create", joined.as_str(), ID];
        for words in [&podman[..], &crio, &runc, &other] {
            assert_eq!(named_by(&arguments(words), ID).as_deref(), Some(Path::new(bundle)), "{words:?}");
            assert_eq!(named_by(&arguments(words), "another"), None, "{words:?}");
        }
        assert_eq!(named_by(&arguments(&["conmon", "-c", ID, "-b", "relative"]), ID), None);
        assert_eq!(named_by(&arguments(&["conmon", "-c", ID, "-b"]), ID), None);
        assert_eq!(named_by(b"", ID), None);
    }

    #[test]
    fn only_containerds_folders_are_those_of_a_shim() {
        for (folder, expected) in [
            ("/run/containerd/io.containerd.runtime.v2.task/k8s.io/6f1c8e", true),
            ("/run/k3s/containerd/io.containerd.runtime.v2.task/k8s.io/6f1c8e", true),
            ("/run/docker/containerd/daemon/io.containerd.runtime.v2.task/moby/6f1c8e", true),
            ("/srv/volume/6f1c8e", false),
            ("/run/containerd/io.containerd.runtime.v2.task/k8s.io/6f1c8e/rootfs/x", false),
            ("/", false),
        ] {
            assert_eq!(is_of_a_shim(Path::new(folder)), expected, "{folder}");
        }
    }

    #[test]
    fn an_id_leads_nowhere_else() {
        for (id, expected) in [
            (ID, true),
            ("plain-ctr", true),
            ("", false),
            ("..", false),
            (".", false),
            ("a/b", false),
            ("/a", false),
            ("a/", false),
        ] {
            assert_eq!(is_one_name(id), expected, "{id:?}");
        }
    }

    /// `config.json` as containerd, Docker and Podman write it, shortened.
    #[test]
    fn the_description_names_the_root_filesystem() {
        let named = |text: &str| named_root(text.as_bytes()).map(|path| path.display().to_string());
        let config =
            |path: &str| format!(r#"{{"ociVersion":"1.1.0","root":{{"path":"{path}","readonly":true}}}}"#);
        for path in [
            "rootfs",
            "/var/lib/docker/overlay2/9f86d0/merged",
            "/var/lib/containers/storage/overlay/9f86d0/merged",
        ] {
            assert_eq!(named(&config(path)).as_deref(), Some(path));
        }
        for text in
            ["", "{}", r#"{"root":{}}"#, r#"{"root":{"path":""}}"#, r#"{"root":{"path":7}}"#, "[", "null"]
        {
            assert_eq!(named(text), None, "{text}");
        }
    }

    /// The host's table: a bundle, what a container with a shared root has mounted over it, and what it has mounted
    /// below a volume with bidirectional propagation, under the same names.
    #[test]
    fn what_is_mounted_over_a_root_filesystem_does_not_pass_for_it() {
        let bundle = "/run/containerd/io.containerd.runtime.v2.task/k8s.io/6f1c8e/rootfs";
        let lines = [
            "22 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw".to_owned(),
            "25 22 0:23 / /run rw shared:5 - tmpfs tmpfs rw".to_owned(),
            format!(
                "90 25 0:52 / {bundle} rw shared:40 - overlay overlay rw,lowerdir=/l,upperdir=/u,workdir=/w"
            ),
            format!(
                "91 22 0:60 / /srv/volume{bundle} rw shared:41 - overlay overlay rw,lowerdir=/l,upperdir=/u,workdir=/w"
            ),
            format!(
                "92 90 0:61 / {bundle} rw shared:42 - overlay overlay rw,lowerdir=/l,upperdir=/u,workdir=/w"
            ),
        ];
        let table: Vec<Mounted> = lines.iter().filter_map(|line| mounted(line.as_bytes())).collect();
        let of = |id| with_parent(table.clone(), id);
        assert!(!is_over_another(&of(90)));
        assert!(!is_over_another(&of(91)), "no path leads there");
        assert!(is_over_another(&of(92)));
        assert_eq!(of(90).first().map(|mount| mount.device.as_str()), Some("0:52"));
        // The first of all has no parent in the table.
        assert!(!is_over_another(&of(22)));
        assert!(of(7).is_empty());
    }

    /// A shell that stands for a monitor, and its child for a container's first process.
    struct Monitor {
        shell: Child,
        first: u32,
        state: tempfile::TempDir,
    }

    impl Monitor {
        fn start() -> Self {
            let state = tempfile::tempdir().unwrap();
            let bundles = state.path().join("io.containerd.runtime.v2.task/k8s.io");
            for (id, root) in [("sandbox", "rootfs"), (ID, "rootfs")] {
                std::fs::create_dir_all(bundles.join(id).join("rootfs")).unwrap();
                let config = serde_json::json!({"root": {"path": root}}).to_string();
                std::fs::write(bundles.join(id).join(CONFIG), config).unwrap();
            }
            // It ends with its input.
            let mut shell = Command::new("sh")
                .args(["-c", "exec 3<&0; cat <&3 >/dev/null & echo $!; wait"])
                .current_dir(bundles.join("sandbox"))
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let mut line = String::new();
            BufReader::new(shell.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
            Self { first: line.trim().parse().unwrap(), shell, state }
        }

        fn bundle(&self, id: &str) -> PathBuf {
            self.state.path().join("io.containerd.runtime.v2.task/k8s.io").join(id)
        }
    }

    impl Drop for Monitor {
        fn drop(&mut self) {
            let _gone_already = rustix::process::kill_process(
                rustix::process::Pid::from_raw(self.first.cast_signed()).unwrap(),
                rustix::process::Signal::KILL,
            );
            let _reaped = self.shell.wait();
        }
    }

    #[test]
    fn the_shim_of_a_pod_leads_to_the_bundle_of_each_of_its_containers() {
        let monitor = Monitor::start();
        let folder = |path: &Path| std::fs::metadata(path).map(|found| (found.dev(), found.ino())).unwrap();
        for id in ["sandbox", ID] {
            let root = find(monitor.first, id, |_| false).unwrap();
            assert_eq!(root.directory(), folder(&monitor.bundle(id).join("rootfs")), "{id}");
            assert!(root.is_same_filesystem(&root));
        }
        assert!(find(monitor.first, "another", |_| false).is_err());
        assert!(find(monitor.first, "..", |_| false).is_err());
        let by_container = find(monitor.first, ID, |_| true).unwrap_err();
        assert!(
            format!("{by_container:#}").contains("no process above"),
            "a container's own processes have no say"
        );
        let sandbox = find(monitor.first, "sandbox", |_| false).unwrap();
        let own = of_process(monitor.first).unwrap();
        assert!(!sandbox.is_same_filesystem(&own), "{} {}", sandbox.describe(), own.describe());
        assert!(own.is_same_filesystem(&of_process(std::process::id()).unwrap()));
    }

    #[test]
    fn a_bundle_does_not_lead_out_of_itself_by_a_link() {
        let monitor = Monitor::start();
        let root = monitor.bundle(ID).join("rootfs");
        std::fs::remove_dir(&root).unwrap();
        std::os::unix::fs::symlink("/", &root).unwrap();
        assert!(find(monitor.first, ID, |_| false).is_err());
        let config = monitor.bundle("sandbox").join(CONFIG);
        std::fs::write(&config, r#"{"root":{"path":"../../.."}}"#).unwrap();
        assert!(find(monitor.first, "sandbox", |_| false).is_err());
        // Docker, CRI-O and Podman have it elsewhere.
        let elsewhere = tempfile::tempdir().unwrap();
        std::fs::write(&config, serde_json::json!({"root": {"path": elsewhere.path()}}).to_string()).unwrap();
        let found = find(monitor.first, "sandbox", |_| false).unwrap();
        assert_eq!(found.directory().1, std::fs::metadata(elsewhere.path()).unwrap().ino());
    }
}
