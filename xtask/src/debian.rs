//! Packages of any Debian suite, from whatever mirror this machine uses.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::{paths, shell};

/// Suites that kernels and runtimes are taken from.
const SUITES: &[&str] = &["bullseye", "bookworm", "trixie", "sid"];
/// Suites that also have a security archive.
const SECURED: &[&str] = &["bullseye", "bookworm", "trixie"];

/// A private package index over several suites, apart from the machine's own.
pub struct Index {
    root: PathBuf,
}

/// One package as the index describes it.
#[derive(Clone)]
pub struct Package {
    pub name: String,
    pub version: String,
}

impl Index {
    /// Opens the index; fetches it when there is none or it is older than a day.
    pub fn open() -> Result<Self> {
        let index = Self { root: paths::cache("debian")? };
        let stamp = index.root.join("updated");
        let fresh = stamp
            .metadata()
            .and_then(|metadata| metadata.modified())
            .is_ok_and(|time| time.elapsed().is_ok_and(|age| age.as_secs() < 24 * 3600));
        if !fresh {
            std::fs::create_dir_all(index.root.join("lists/partial"))?;
            std::fs::create_dir_all(index.root.join("archives/partial"))?;
            std::fs::write(index.root.join("sources.list"), sources()?)?;
            let updated = shell::step("fetch Debian's package lists", || {
                shell::quiet(index.apt("apt-get").arg("update"), "lists")
            });
            match updated {
                Ok(()) => std::fs::write(&stamp, "")?,
                Err(error) if stamp.exists() => eprintln!("using the older package lists: {error:#}"),
                Err(error) => return Err(error),
            }
        }
        Ok(index)
    }

    fn apt(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let option = |key: &str, path: &Path| format!("{key}={}", path.display());
        command
            .args(["-o", &option("Dir::Etc::sourcelist", &self.root.join("sources.list"))])
            .args(["-o", "Dir::Etc::sourceparts=/dev/null"])
            .args(["-o", &option("Dir::State::lists", &self.root.join("lists"))])
            .args(["-o", &option("Dir::Cache", &self.root)])
            .args(["-o", "Dir::State::status=/dev/null", "-o", "APT::Sandbox::User=root"]);
        command
    }

    /// The newest version of any package whose name matches `pattern` (a regular expression).
    pub fn newest(&self, pattern: &str) -> Result<Option<Package>> {
        let names = shell::read(self.apt("apt-cache").args(["search", "--names-only", pattern]))?;
        let names: Vec<&str> = names.lines().filter_map(|line| line.split_whitespace().next()).collect();
        if names.is_empty() {
            return Ok(None);
        }
        // Of all of them at once: each call reads the whole index.
        let versions = shell::read(self.apt("apt-cache").arg("madison").args(&names))?;
        let package = |line: &str| {
            let mut fields = line.split('|').map(str::trim);
            Some(Package { name: fields.next()?.to_owned(), version: fields.next()?.to_owned() })
        };
        Ok(versions.lines().filter_map(package).max_by(|a, b| compare(&a.version, &b.version)))
    }

    /// The newest version of one package in `suite`.
    pub fn newest_in(&self, name: &str, suite: &str) -> Result<Package> {
        let versions = shell::read(self.apt("apt-cache").args(["madison", name]))?;
        versions
            .lines()
            .filter_map(|line| {
                let fields: Vec<&str> = line.split('|').map(str::trim).collect();
                let source = fields.get(2)?;
                let of_suite = source.split_whitespace().any(|word| {
                    word.split('/')
                        .next()
                        .is_some_and(|found| found == suite || found == format!("{suite}-security"))
                });
                of_suite.then(|| Package { name: name.to_owned(), version: fields[1].to_owned() })
            })
            .max_by(|a, b| compare(&a.version, &b.version))
            .with_context(|| format!("Debian {suite} has no package {name}"))
    }

    /// The direct dependencies of `package` whose names start with `prefix`.
    pub fn dependencies(&self, package: &Package, prefix: &str) -> Result<Vec<Package>> {
        let id = format!("{}={}", package.name, package.version);
        let text = shell::read(self.apt("apt-cache").args(["show", &id]))?;
        let line = text.lines().find_map(|line| line.strip_prefix("Depends: ")).unwrap_or_default();
        Ok(line
            .split(',')
            .filter_map(|entry| entry.split_whitespace().next())
            .filter(|name| name.starts_with(prefix))
            .map(|name| Package { name: name.to_owned(), version: package.version.clone() })
            .collect())
    }

    /// Downloads `packages` and unpacks them into `target`.
    pub fn unpack(&self, packages: &[Package], target: &Path) -> Result<()> {
        let downloads = tempfile::tempdir_in(&self.root)?;
        let mut command = self.apt("apt-get");
        command.arg("download").current_dir(downloads.path());
        for package in packages {
            command.arg(format!("{}={}", package.name, package.version));
        }
        shell::quiet(&mut command, "download")?;
        std::fs::create_dir_all(target)?;
        let mut count = 0;
        for entry in std::fs::read_dir(downloads.path())? {
            shell::quiet(Command::new("dpkg-deb").arg("-x").arg(entry?.path()).arg(target), "unpack")?;
            count += 1;
        }
        if count != packages.len() {
            bail!("asked for {} packages and got {count}", packages.len());
        }
        Ok(())
    }

    /// Lines for a sources list of one suite, as mmdebstrap takes them.
    pub fn sources_of(suite: &str) -> Result<String> {
        Ok(sources()?
            .lines()
            .filter(|line| line.contains(&format!(" {suite} ")))
            .map(|line| format!("{line}\n"))
            .collect())
    }
}

fn compare(a: &str, b: &str) -> std::cmp::Ordering {
    let newer = |relation| {
        Command::new("dpkg")
            .args(["--compare-versions", a, relation, b])
            .status()
            .is_ok_and(|status| status.success())
    };
    if newer("gt") {
        std::cmp::Ordering::Greater
    } else if newer("lt") {
        std::cmp::Ordering::Less
    } else {
        std::cmp::Ordering::Equal
    }
}

/// A sources list for all suites, from the mirrors that this machine's own sources name.
fn sources() -> Result<String> {
    let targets = shell::read(Command::new("apt-get").args([
        "indextargets",
        "--format",
        "$(REPO_URI) $(RELEASE) $(ORIGIN)",
        "Created-By: Packages",
    ]))?;
    let mut main = None;
    let mut security = None;
    for line in targets.lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [uri, release, "Debian"] = fields.as_slice() else { continue };
        if release.ends_with("-security") {
            security.get_or_insert((*uri).to_owned());
        } else if !release.contains('-') {
            main.get_or_insert((*uri).to_owned());
        }
    }
    let main = main.context(
        "this machine's apt sources name no Debian archive; add one to /etc/apt/sources.list.d and run apt-get update",
    )?;
    let keyring = "/usr/share/keyrings/debian-archive-keyring.gpg";
    let mut list = String::new();
    for suite in SUITES {
        list.push_str(&format!("deb [signed-by={keyring}] {main} {suite} main\n"));
    }
    if let Some(security) = security {
        for suite in SECURED {
            list.push_str(&format!("deb [signed-by={keyring}] {security} {suite}-security main\n"));
        }
    }
    Ok(list)
}
