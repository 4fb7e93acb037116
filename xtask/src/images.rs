//! Container images for demo and tests, made without a registry: OCI layouts in a tar archive.

use std::{
    fs::File,
    io::Write as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use clap::Args;
use serde_json::json;
use sha2::{Digest as _, Sha256};

use crate::{
    debian::{Index, Package},
    paths, shell,
};

/// An image as `ctr images import` takes it.
pub struct Image {
    pub name: String,
    pub archive: PathBuf,
}

/// The image that behaves and attacks.
pub const WORKLOAD: &str = "palisade.test/workload:1";
/// The image of the manifest, as the tests name it.
pub const PALISADE: &str = "palisade.test/palisade:1";

/// Agent, collector and command, without what only a debugger reads.
fn palisade(binaries: &Path, root: &Path) -> Result<()> {
    for folder in ["usr/bin", "etc/palisade", "var/lib/palisade", "tmp", "proc", "sys", "dev", "run"] {
        std::fs::create_dir_all(root.join(folder))?;
    }
    for name in ["palisade-agent", "palisade-collector", "palisade"] {
        let target = root.join("usr/bin").join(name);
        shell::read(
            std::process::Command::new("strip")
                .arg("--strip-debug")
                .arg("-o")
                .arg(&target)
                .arg(binaries.join(name)),
        )?;
        executable(&target)?;
    }
    Ok(())
}

/// A program whose first system call makes the file that its first argument names, and whose second ends it with
/// status 42: an ELF header, one loadable segment at 0x400000, and the code. No library runs before it.
const MARK: &[u8] = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0\
    \x78\0\x40\0\0\0\0\0\x40\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x40\0\x38\0\x01\0\0\0\0\0\0\0\
    \x01\0\0\0\x05\0\0\0\0\0\0\0\0\0\0\0\0\0\x40\0\0\0\0\0\0\0\x40\0\0\0\0\0\
    \x9a\0\0\0\0\0\0\0\x9a\0\0\0\0\0\0\0\0\x10\0\0\0\0\0\0\
    \x48\x8b\x7c\x24\x10\
    \xbe\x41\0\0\0\
    \xba\xb6\x01\0\0\
    \xb8\x02\0\0\0\
    \x0f\x05\
    \xbf\x2a\0\0\0\
    \xb8\x3c\0\0\0\
    \x0f\x05";

/// The same with a segment that ends with a page: as an interpreter, older kernels clear the rest of the last one, which is not
/// writable.
fn whole_page(program: &[u8]) -> Vec<u8> {
    const PAGE: usize = 0x1000;
    let mut program = program.to_vec();
    program.resize(PAGE, 0);
    // Size in the file and in memory, of the one segment.
    for size in [96, 104] {
        program[size..size + 8].copy_from_slice(&(PAGE as u64).to_le_bytes());
    }
    program
}

/// A program that the kernel leaves to `interpreter`, by a path of at most 63 bytes: an ELF header, the name, and a page of nothing
/// at 0x600000.
fn interpreted_by(interpreter: &str) -> Vec<u8> {
    const HEADER: usize = 64;
    const PROGRAM_HEADER: usize = 56;
    const NAME: usize = HEADER + 2 * PROGRAM_HEADER;
    const BASE: u64 = 0x60_0000;
    let mut name = interpreter.as_bytes().to_vec();
    name.resize(64, 0);
    let size = (NAME + name.len()) as u64;
    let mut bytes = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    // ET_EXEC, x86-64, version 1; entry, program headers, no sections, flags; sizes and counts.
    bytes.extend(b"\x02\0\x3e\0\x01\0\0\0");
    for word in [BASE + NAME as u64, HEADER as u64, 0] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(b"\0\0\0\0\x40\0\x38\0\x02\0\0\0\0\0\0\0");
    // PT_INTERP, readable; PT_LOAD, readable and executable.
    let length = interpreter.len() as u64 + 1;
    for (kind, flags, at, length, align) in
        [(3_u32, 4_u32, NAME as u64, length, 1_u64), (1, 5, 0, size, 0x1000)]
    {
        bytes.extend(kind.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        for word in [at, BASE + at, BASE + at, length, length, align] {
            bytes.extend(word.to_le_bytes());
        }
    }
    bytes.extend(name);
    bytes
}

#[derive(Args)]
pub struct Options {
    /// Name and tag of the image
    #[arg(long, default_value = "palisade:0.1.0")]
    name: String,
    /// Archive to write, an OCI layout in a tar file
    #[arg(long, default_value = "palisade.tar")]
    output: PathBuf,
}

/// Makes the image of the manifest, for `ctr images import`, `podman load` or `skopeo copy oci-archive:…`.
pub fn run(options: &Options) -> Result<std::process::ExitCode> {
    let binaries = crate::build::run(&crate::build::Options { release: true })?;
    let made = image(&options.name, &["/usr/bin/palisade-agent", "run"], |root| palisade(&binaries, root))?;
    std::fs::copy(&made.archive, &options.output)
        .with_context(|| format!("cannot write {}", options.output.display()))?;
    println!("{} holds {}", options.output.display(), options.name);
    Ok(std::process::ExitCode::SUCCESS)
}

/// Fetches what of the images comes from Debian.
pub fn fetch() -> Result<()> {
    nginx_files().map(drop)
}

/// Makes all images. Their content decides their names on disk, so an equal image is made once.
pub fn make(binaries: &Path) -> Result<Vec<Image>> {
    let fixture = binaries.join("palisade-fixture");
    let mut images = Vec::new();
    images.push(image("palisade.test/pause:1", &["/pause"], |root| install(&fixture, &root.join("pause")))?);
    images.push(image(WORKLOAD, &["/usr/bin/workload", "sleep"], |root| {
        base(root)?;
        // Distinct files, so that each is judged by itself.
        for name in ["workload", "attacker", "third"] {
            install(&fixture, &root.join("usr/bin").join(name))?;
        }
        // A file for each way to take an executable from a workload.
        let spoiled = root.join("usr/libexec/palisade");
        std::fs::create_dir_all(&spoiled)?;
        for name in ["write", "chmod", "link", "remove", "rename", "replace", "bind"] {
            std::fs::write(spoiled.join(name), "#!/usr/bin/workload payload\n")?;
            executable(&spoiled.join(name))?;
        }
        // Many paths of the image.
        let names = ["one", "two", "three"];
        for folder in names.iter().flat_map(|a| names.map(|b| format!("usr/libexec/tree/{a}/{b}"))) {
            std::fs::create_dir_all(root.join(&folder))?;
            for name in names {
                std::fs::write(root.join(&folder).join(name), MARK)?;
                executable(&root.join(&folder).join(name))?;
            }
        }
        let interpreted = root.join("usr/bin/attached-interpreter");
        std::fs::write(&interpreted, interpreted_by("/tmp/attack/interpreter"))?;
        executable(&interpreted)?;
        for (name, mode) in [("elevating", 0o4755), ("elevating-group", 0o2755)] {
            let elevating = root.join("usr/bin").join(name);
            std::fs::write(&elevating, MARK)?;
            set_mode(&elevating, mode)?;
        }
        std::fs::write(root.join(CAPABLE), MARK)?;
        executable(&root.join(CAPABLE))?;
        for (path, bytes) in [
            ("usr/bin/mark", MARK.to_vec()),
            ("usr/bin/loader", whole_page(MARK)),
            // For who writes to a layer of the image.
            ("usr/libexec/layered", MARK.to_vec()),
        ] {
            std::fs::write(root.join(path), bytes)?;
            executable(&root.join(path))?;
        }
        std::os::unix::fs::symlink("mark", root.join("usr/bin/link-to-mark"))?;
        let steps = root.join("usr/bin/steps");
        std::fs::write(&steps, "#!/usr/bin/workload steps\n/usr/libexec/tree/two/two/two\n")?;
        executable(&steps)?;
        let script = root.join("usr/bin/script");
        std::fs::write(&script, "#!/usr/bin/workload payload\n")?;
        executable(&script)
    })?);
    images.push(image(PALISADE, &["/usr/bin/palisade-agent", "run"], |root| palisade(binaries, root))?);
    let nginx = nginx_files()?;
    images.push(image("palisade.test/nginx:1", &["/usr/sbin/nginx", "-g", "daemon off;"], |root| {
        shell::read(std::process::Command::new("cp").arg("-a").arg(nginx.join(".")).arg(root))?;
        install(Path::new("/bin/busybox"), &root.join("usr/bin/busybox"))?;
        for name in ["sh", "cp", "cat", "id", "ls", "chmod", "wget", "sleep"] {
            std::os::unix::fs::symlink("busybox", root.join("usr/bin").join(name))?;
        }
        for folder in ["tmp", "run", "var/log/nginx", "var/lib/nginx", "var/www", "proc", "sys", "dev"] {
            std::fs::create_dir_all(root.join(folder))?;
        }
        std::fs::write(root.join("var/www/index.html"), "guarded by Palisade\n")?;
        std::fs::write(root.join("etc/nginx/nginx.conf"), NGINX)?;
        std::fs::write(
            root.join("etc/passwd"),
            "root:x:0:0::/:/bin/sh\nwww-data:x:33:33::/var/www:/bin/sh\n",
        )?;
        std::fs::write(root.join("etc/group"), "root:x:0:\nwww-data:x:33:\n")?;
        Ok(())
    })?);
    Ok(images)
}

/// Services of Debian, as its packages have them.
pub const APPS: &str = "palisade.test/apps:1";
const APPS_PACKAGES: &str = "nginx-light,redis-server,postgresql,python3,openjdk-21-jre-headless";
const APPS_SUITE: &str = "trixie";
/// A library that leaves a mark when it is loaded.
const DROPPED: &str = include_str!("../guest/dropped.c");

/// The image of the services. It is large, so it is not made again as long as its recipe is the same.
pub fn apps() -> Result<Image> {
    let recipe =
        paths::fingerprint(&[APPS_SUITE.as_bytes(), APPS_PACKAGES.as_bytes(), DROPPED.as_bytes(), MARK]);
    let made = paths::cache("apps")?.join(format!("{recipe}.tar"));
    if !made.exists() {
        shell::step("make the image of Debian's services", || {
            let work = tempfile::tempdir_in(paths::cache("apps")?)?;
            let (root, sources) = (work.path().join("root"), work.path().join("sources.list"));
            Index::open()?;
            std::fs::write(&sources, Index::sources_of(APPS_SUITE)?)?;
            shell::quiet(
                std::process::Command::new("mmdebstrap")
                    .args(["--variant=minbase", &format!("--include={APPS_PACKAGES}")])
                    .args([
                        "--dpkgopt=path-exclude=/usr/share/doc/*",
                        "--dpkgopt=path-exclude=/usr/share/man/*",
                    ])
                    .args(["--dpkgopt=path-exclude=/usr/share/locale/*"])
                    // Where Java's package puts links, whether or not manuals are wanted.
                    .arg("--setup-hook=mkdir -p \"$1/usr/share/man/man1\"")
                    .arg(APPS_SUITE)
                    .arg(&root)
                    .arg(&sources),
                "mmdebstrap-apps",
            )?;
            let own = root.join("usr/lib/palisade");
            std::fs::create_dir_all(&own)?;
            std::fs::write(root.join("usr/bin/mark"), MARK)?;
            executable(&root.join("usr/bin/mark"))?;
            let source = work.path().join("dropped.c");
            std::fs::write(&source, DROPPED)?;
            shell::read(
                std::process::Command::new("cc")
                    .args(["-shared", "-fPIC", "-nostdlib", "-O1", "-fno-stack-protector", "-o"])
                    .arg(own.join("dropped.so"))
                    .arg(&source),
            )?;
            let made_now = image(APPS, &["/bin/false"], |target| {
                for part in ["dev", "proc", "sys"] {
                    std::fs::remove_dir_all(root.join(part))?;
                    std::fs::create_dir(root.join(part))?;
                }
                shell::read(std::process::Command::new("cp").arg("-a").arg(root.join(".")).arg(target))
                    .map(drop)
            })?;
            std::fs::rename(made_now.archive, &made)?;
            Ok(())
        })?;
    }
    Ok(Image { name: APPS.to_owned(), archive: made })
}

const NGINX: &str = "user www-data;\nworker_processes 1;\nerror_log stderr;\npid /run/nginx.pid;\n\
    events { worker_connections 64; }\n\
    http { access_log off; server { listen 127.0.0.1:18080; root /var/www; } }\n";

/// Debian's nginx with the libraries it needs, unpacked once.
fn nginx_files() -> Result<PathBuf> {
    const PACKAGES: &[&str] =
        &["nginx", "nginx-common", "libc6", "libcrypt1", "libpcre2-8-0", "libssl3t64", "zlib1g", "libzstd1"];
    let recipe = paths::fingerprint(&[PACKAGES.join(" ").as_bytes()]);
    let folder = paths::cache("nginx")?.join(recipe);
    let files = folder.join("files");
    if !folder.join("complete").exists() {
        shell::step("fetch nginx for its image", || {
            let index = Index::open()?;
            for link in ["bin", "sbin", "lib", "lib64"] {
                std::fs::create_dir_all(files.join("usr").join(link))?;
                let _already_there = std::os::unix::fs::symlink(format!("usr/{link}"), files.join(link));
            }
            let packages = PACKAGES
                .iter()
                .map(|name| index.newest_in(name, "trixie"))
                .collect::<Result<Vec<Package>>>()?;
            index.unpack(&packages, &files)?;
            for part in ["usr/share/doc", "usr/share/man", "usr/share/locale"] {
                let _may_be_absent = std::fs::remove_dir_all(files.join(part));
            }
            std::fs::write(folder.join("complete"), "")?;
            Ok(())
        })?;
    }
    Ok(files)
}

fn base(root: &Path) -> Result<()> {
    for folder in ["usr/bin", "tmp", "etc", "proc", "sys", "dev", "run", "mnt", "var"] {
        std::fs::create_dir_all(root.join(folder))?;
    }
    // As in most images: what is mounted below it stands elsewhere than its description says.
    std::os::unix::fs::symlink("/run", root.join("var/run"))?;
    std::fs::write(root.join("etc/passwd"), "root:x:0:0::/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n")?;
    Ok(())
}

fn install(from: &Path, to: &Path) -> Result<()> {
    if let Some(folder) = to.parent() {
        std::fs::create_dir_all(folder)?;
    }
    std::fs::copy(from, to).with_context(|| format!("cannot copy {}", from.display()))?;
    executable(to)
}

fn executable(path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    Ok(std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755))?)
}

fn set_mode(path: &Path, mode: u32) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    Ok(std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?)
}

/// The file of an image that has a capability: `CAP_NET_RAW`, permitted and effective, as `struct vfs_cap_data` of
/// include/uapi/linux/capability.h has it.
const CAPABLE: &str = "usr/bin/capable";
const NET_RAW: &[u8; 20] = b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

/// Makes one image with a single layer that `fill` writes.
fn image(name: &str, command: &[&str], fill: impl FnOnce(&Path) -> Result<()>) -> Result<Image> {
    let root = tempfile::tempdir()?;
    fill(root.path()).with_context(|| format!("making the image {name}"))?;
    let mut builder = tar::Builder::new(Vec::new());
    builder.follow_symlinks(false);
    append(&mut builder, root.path(), Path::new(""))?;
    let layer = builder.into_inner()?;
    let layer_digest = digest(&layer);
    let config = serde_json::to_vec(&json!({
        "architecture": "amd64",
        "os": "linux",
        "config": {"Entrypoint": command, "Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{layer_digest}")]},
    }))?;
    let descriptor = |kind: &str, bytes: &[u8]| {
        json!({"mediaType": format!("application/vnd.oci.image.{kind}"),
               "digest": format!("sha256:{}", digest(bytes)), "size": bytes.len()})
    };
    let manifest = serde_json::to_vec(&json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor("config.v1+json", &config),
        "layers": [descriptor("layer.v1.tar", &layer)],
    }))?;
    let mut entry = descriptor("manifest.v1+json", &manifest);
    entry["annotations"] =
        json!({"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name});
    let index = serde_json::to_vec(&json!({"schemaVersion": 2, "manifests": [entry]}))?;
    // The same for Docker's engine, which reads a list of its own.
    let docker = serde_json::to_vec(&json!([{
        "Config": format!("blobs/sha256/{}", digest(&config)),
        "RepoTags": [name],
        "Layers": [format!("blobs/sha256/{layer_digest}")],
    }]))?;
    let archive =
        paths::cache("images")?.join(format!("{}.tar", digest(&[index.as_slice(), &docker].concat())));
    if !archive.exists() {
        let partial = archive.with_extension("partial");
        let mut tar = tar::Builder::new(File::create(&partial)?);
        add(&mut tar, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        add(&mut tar, "index.json", &index)?;
        add(&mut tar, "manifest.json", &docker)?;
        for blob in [&layer, &config, &manifest] {
            add(&mut tar, &format!("blobs/sha256/{}", digest(blob)), blob)?;
        }
        tar.into_inner()?.flush()?;
        std::fs::rename(&partial, &archive)?;
    }
    Ok(Image { name: name.to_owned(), archive })
}

fn add(tar: &mut tar::Builder<File>, path: &str, bytes: &[u8]) -> Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(bytes.len() as u64);
    header.set_mode(0o644);
    header.set_mtime(0);
    Ok(tar.append_data(&mut header, path, bytes)?)
}

/// Appends a folder's content in a fixed order with fixed times and owners, so that equal files give equal bytes.
fn append(builder: &mut tar::Builder<Vec<u8>>, root: &Path, folder: &Path) -> Result<()> {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
    let mut entries: Vec<_> = std::fs::read_dir(root.join(folder))?.collect::<std::io::Result<_>>()?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let relative = folder.join(entry.file_name());
        let metadata = entry.path().symlink_metadata()?;
        let mut header = tar::Header::new_gnu();
        header.set_mtime(0);
        // Services run as users of their own; who is not root cannot make files for others anyway.
        let owned = |id: u32| if rustix::process::geteuid().is_root() { u64::from(id) } else { 0 };
        header.set_uid(owned(metadata.uid()));
        header.set_gid(owned(metadata.gid()));
        header.set_mode(metadata.permissions().mode() & 0o7777);
        if metadata.is_symlink() {
            header.set_entry_type(tar::EntryType::Symlink);
            header.set_size(0);
            builder.append_link(&mut header, &relative, std::fs::read_link(entry.path())?)?;
        } else if metadata.is_dir() {
            header.set_entry_type(tar::EntryType::Directory);
            header.set_mode(match metadata.permissions().mode() & 0o7777 {
                // The mode that a folder has by itself depends on who makes it.
                0o700 | 0o750 | 0o1777 => metadata.permissions().mode() & 0o7777,
                _ if relative == Path::new("tmp") => 0o1777,
                _ => 0o755,
            });
            header.set_size(0);
            builder.append_data(&mut header, relative.join(""), std::io::empty())?;
            append(builder, root, &relative)?;
        } else {
            let bytes = std::fs::read(entry.path())?;
            header.set_size(bytes.len() as u64);
            if relative == Path::new(CAPABLE) {
                builder.append_pax_extensions([("SCHILY.xattr.security.capability", NET_RAW.as_slice())])?;
            }
            builder.append_data(&mut header, &relative, bytes.as_slice())?;
        }
    }
    Ok(())
}

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
