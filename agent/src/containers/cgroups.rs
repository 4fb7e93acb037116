//! Cgroups as the agent sees them: ids in names, and containers that ran before the agent did.

use std::{
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

/// Hexadecimal digits of a container id.
const ID_DIGITS: usize = 64;

/// Cgroups of monitors on the host, named after the container that they watch.
const MONITORS: &[&str] = &["libpod-conmon-", "crio-conmon-"];

/// The container id in a cgroup's name, whatever prefix and suffix the cgroup driver adds.
///
/// | driver | name |
/// |---|---|
/// | cgroupfs | `<id>` |
/// | systemd, containerd | `cri-containerd-<id>.scope` |
/// | systemd, CRI-O | `crio-<id>.scope` |
/// | systemd, Docker | `docker-<id>.scope` |
/// | systemd, Podman | `libpod-<id>.scope` |
pub fn container_id(name: &str) -> Option<&str> {
    if MONITORS.iter().any(|prefix| name.starts_with(prefix)) {
        return None;
    }
    let bytes = name.as_bytes();
    let is_digit = |byte: &u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(byte);
    (0..bytes.len().checked_sub(ID_DIGITS)? + 1)
        .find(|start| bytes[*start..start + ID_DIGITS].iter().all(is_digit))
        .map(|start| &name[start..start + ID_DIGITS])
}

/// A container's cgroup that exists already.
#[derive(Debug, PartialEq, Eq)]
pub struct Found {
    pub slot: u64,
    pub id: String,
    pub folder: PathBuf,
}

impl Found {
    /// Whether the cgroup is still the one that was found.
    pub fn is_there(&self) -> bool {
        cgroup_id(&self.folder) == Some(self.slot)
    }
    /// The processes in its own cgroup and in those below it, as they are now.
    pub fn members(&self) -> Vec<u32> {
        let mut processes = Vec::new();
        collect(&self.folder, &mut processes);
        processes
    }
}

/// The mount point of the unified hierarchy.
///
/// # Errors
///
/// When none is mounted.
pub fn mount_point() -> Result<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").context("cannot read /proc/self/mounts")?;
    mounts
        .lines()
        .find_map(|line| {
            let mut fields = line.split(' ');
            let (place, kind) = (fields.nth(1)?, fields.next()?);
            (kind == "cgroup2").then(|| PathBuf::from(place))
        })
        .context("no cgroup v2 hierarchy is mounted; Palisade tells containers by it")
}

/// All containers below `root`.
pub fn scan(root: &Path) -> Vec<Found> {
    let mut found = Vec::new();
    let mut open = vec![root.to_owned()];
    while let Some(folder) = open.pop() {
        // A cgroup may vanish at any time.
        let Ok(entries) = std::fs::read_dir(&folder) else { continue };
        for entry in entries.flatten() {
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            let name = entry.file_name();
            let Some(id) = name.to_str().and_then(container_id) else {
                open.push(entry.path());
                continue;
            };
            if let Some(slot) = cgroup_id(&entry.path()) {
                found.push(Found { slot, id: id.to_owned(), folder: entry.path() });
            }
        }
    }
    found
}

/// The folder of the cgroup `slot`, of which the kernel tells its path below `root`. Where that does not lead to it (the path
/// is too long to be told, or the agent sees the hierarchy from another root) it is looked for.
pub fn folder(root: &Path, path: &[u8], slot: u64) -> PathBuf {
    use std::os::unix::ffi::OsStrExt as _;
    let below = path.strip_prefix(b"/").unwrap_or(path);
    let told = root.join(std::ffi::OsStr::from_bytes(below));
    if !below.is_empty() && cgroup_id(&told) == Some(slot) {
        return told;
    }
    scan(root).into_iter().find(|found| found.slot == slot).map(|found| found.folder).unwrap_or_default()
}

/// The cgroup below `root` that the process `pid` is in, as the container `id`. `None` when it is gone, or in the
/// root, which is nobody's.
pub fn of_process(root: &Path, pid: u32, id: String) -> Option<Found> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    if path.is_empty() {
        return None;
    }
    // An agent in a container may be in a cgroup namespace of its own; then the path leads out of it, and only the
    // hierarchy itself tells.
    let folder = if path.split('/').any(|part| part == "..") { holder(root, pid)? } else { root.join(path) };
    Some(Found { slot: cgroup_id(&folder)?, id, folder })
}

/// Whether the process `pid` is in a container's cgroup, or in one below it. One that has ended counts as such.
pub fn holds_container(pid: u32) -> bool {
    let Ok(text) = std::fs::read_to_string(format!("/proc/{pid}/cgroup")) else { return true };
    let path = text.lines().find_map(|line| line.strip_prefix("0::"));
    path.is_none_or(|path| path.split('/').any(|name| container_id(name).is_some()))
}

/// The cgroup below `root` that lists the process `pid`.
fn holder(root: &Path, pid: u32) -> Option<PathBuf> {
    let mut open: Vec<PathBuf> = Vec::from([root.to_owned()]);
    while let Some(folder) = open.pop() {
        let listed = std::fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
        if folder != root && listed.lines().any(|line| line.parse() == Ok(pid)) {
            return Some(folder);
        }
        let entries = std::fs::read_dir(&folder).into_iter().flatten().flatten();
        open.extend(
            entries
                .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
                .map(|entry| entry.path()),
        );
    }
    None
}

/// The kernel's id of a cgroup is the inode number of its folder.
fn cgroup_id(path: &Path) -> Option<u64> {
    path.metadata().ok().map(|metadata| metadata.ino())
}

fn collect(folder: &Path, processes: &mut Vec<u32>) {
    let listed = std::fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
    processes.extend(listed.lines().filter_map(|line| line.parse::<u32>().ok()));
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect(&entry.path(), processes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_found_in_the_names_of_every_driver() {
        let id = "0123456789abcdef".repeat(4);
        for name in [
            id.clone(),
            format!("cri-containerd-{id}.scope"),
            format!("crio-{id}.scope"),
            format!("docker-{id}.scope"),
            format!("libpod-{id}.scope"),
        ] {
            assert_eq!(container_id(&name), Some(id.as_str()), "{name}");
        }
        for monitor in ["libpod-conmon", "crio-conmon"] {
            assert_eq!(container_id(&format!("{monitor}-{id}.scope")), None);
        }
        for name in ["system.slice", "kubepods-besteffort-pod1234.slice", &id[1..], &id.to_uppercase(), ""] {
            assert_eq!(container_id(name), None, "{name}");
        }
    }
}
