//! Virtual machines: boot, run one command, stream its output, return its exit code.

use std::{
    collections::BTreeSet,
    io::{Read as _, Write as _},
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use clap::Args;

use crate::{
    build::{self, Another},
    images::{self, Image},
    kernels::{self, Kernel},
    paths, rootfs, shell,
};

#[derive(Args)]
pub struct Options {
    /// The kernel to boot
    #[arg(long, default_value = "6.12")]
    pub kernel: Kernel,
    /// Number of virtual processors
    #[arg(long, default_value_t = 2)]
    pub smp: u32,
    /// Let the guest's clock count instructions: costs repeat from run to run (implies one processor)
    #[arg(long)]
    pub icount: bool,
    /// Emulate all processors by one thread, in turns: slower for a machine that is alone, and safe from the emulator's faults
    #[arg(long, conflicts_with = "icount")]
    pub turns: bool,
    /// Further kernel parameters, e.g. preempt=full
    #[arg(long, default_value = "")]
    pub append: String,
    /// Give up after this many seconds
    #[arg(long, default_value_t = 1800)]
    pub deadline: u64,
    /// Have the agents of the tests, each with a layout of another version (palisade-agent-of-another-state, -policy, -records), and
    /// programs with planted bugs in /palisade/objects
    #[arg(long)]
    pub test_agents: bool,
    /// Have the image of Debian's services, which `palisade-scenarios apps` needs
    #[arg(long)]
    pub apps: bool,
    /// The command and its arguments
    #[arg(last = true, required = true)]
    pub command: Vec<String>,
}

/// How the guest's processors are emulated.
#[derive(Clone, Copy)]
pub enum Processors {
    /// Each by a thread: they run at the same time, and it is the fastest for a machine that is alone.
    Parallel(u32),
    /// All by one thread, in turns: a fifth faster when there are as many machines as processors here, and they never see
    /// each other's half-written code ([`Machine::run`]).
    Turns(u32),
    /// One, whose clock counts its instructions.
    Counted,
}

/// What becomes of the guest's output while it comes.
#[derive(Clone, Copy)]
pub enum Stream<'a> {
    /// It is only kept.
    None,
    /// It goes to standard output.
    Plain,
    /// Each line goes there behind a name: machines that run beside each other can be told apart.
    Named(&'a str),
}

/// Makes what machines share, so that those that begin at the same time find it there: these kernels, the disk, and with
/// `apps` the disk with Debian's services.
pub fn prepare(binaries: &Path, kernels: impl IntoIterator<Item = Kernel>, apps: bool) -> Result<()> {
    kernels
        .into_iter()
        .collect::<BTreeSet<_>>()
        .into_iter()
        .try_for_each(|kernel| kernels::prepare(kernel).map(drop))?;
    let mut images = images::make(binaries)?;
    rootfs::prepare(&images)?;
    if apps {
        images.push(images::apps()?);
        rootfs::prepare(&images)?;
    }
    Ok(())
}

/// Does `work` on all items, two at the same time (an emulated machine waits more than it works), and begins with the
/// first ones. What came of each is in their order.
pub fn two_at_once<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let lane = || {
        let mut done = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(index) else { return done };
            done.push((index, work(item)));
        }
    };
    let mut all = std::thread::scope(|scope| {
        let other = scope.spawn(lane);
        let mut all = lane();
        match other.join() {
            Ok(more) => all.extend(more),
            Err(panic) => std::panic::resume_unwind(panic),
        }
        all
    });
    all.sort_by_key(|(index, _)| *index);
    all.into_iter().map(|(_, result)| result).collect()
}

/// A machine to boot.
pub struct Machine<'a> {
    pub kernel: Kernel,
    pub processors: Processors,
    pub append: &'a str,
    pub deadline: Duration,
    /// Whether containerd is started before the command.
    pub containerd: bool,
    pub binaries: &'a Path,
    /// Folder whose files stand under /host.
    pub host: Option<&'a Path>,
    /// Whether the image of Debian's services is there.
    pub apps: bool,
    /// Further files or folders, by where they stand under /palisade.
    pub extra: Vec<(&'a str, &'a Path)>,
}

/// What came of the command.
pub struct Outcome {
    pub code: u8,
    pub output: String,
    /// The guest's `uname -r`.
    pub release: String,
}

pub fn run(options: &Options) -> Result<ExitCode> {
    let binaries = build::run(&build::Options { release: true })?;
    let here = std::env::current_dir()?;
    let mut built = Vec::new();
    if options.test_agents {
        for another in Another::ALL {
            built.push((another.place(), build::test_agent(*another, false)?));
        }
        built.push(("objects", build::planted()?));
    }
    let extra = built.iter().map(|(place, path)| (*place, path.as_path())).collect();
    let machine = Machine {
        kernel: options.kernel,
        processors: match (options.icount, options.turns) {
            (true, _) => Processors::Counted,
            (false, true) => Processors::Turns(options.smp),
            (false, false) => Processors::Parallel(options.smp),
        },
        append: &options.append,
        deadline: Duration::from_secs(options.deadline),
        containerd: true,
        binaries: &binaries,
        host: Some(&here),
        apps: options.apps,
        extra,
    };
    let outcome = machine.run(&options.command, Stream::Plain)?;
    Ok(ExitCode::from(outcome.code))
}

impl Machine<'_> {
    /// Boots, runs `command`, and waits for its end.
    ///
    /// Emulated with several threads, a processor may run into a breakpoint with which another one just replaces code
    /// (jump labels), after the kernel has forgotten it: the kernel ends with `Oops: int3`, whoever ran. Or it hangs while it
    /// boots. Then, and only then, everything is done once more.
    pub fn run(&self, command: &[String], stream: Stream) -> Result<Outcome> {
        match self.run_once(command, stream) {
            Err(error) if [BREAKPOINT, NEVER_UP].iter().any(|fault| format!("{error:#}").contains(fault)) => {
                println!("the emulator's fault: {error:#}\nbooting once more");
                self.run_once(command, stream)
            }
            outcome => outcome,
        }
    }

    fn run_once(&self, command: &[String], stream: Stream) -> Result<Outcome> {
        let mut images = images::make(self.binaries)?;
        if self.apps {
            images.push(images::apps()?);
        }
        let disk = rootfs::prepare(&images)?;
        let bootable = kernels::prepare(self.kernel)?;
        let work = tempfile::tempdir_in(paths::cache("runs")?)?;
        let payload = self.payload(work.path(), command, &images)?;
        let exit_file = work.path().join("exit");
        let begun = Instant::now();
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
            "-M",
            "q35",
            "-m",
            "3072",
        ]);
        // The sandbox that has no KVM has no nested one either: always emulate, never take the host's CPU model.
        qemu.args(["-cpu", "max"]);
        match self.processors {
            Processors::Parallel(count) => {
                qemu.args(["-accel", "tcg,thread=multi", "-smp", &count.to_string()])
            }
            Processors::Turns(count) => {
                qemu.args(["-accel", "tcg,thread=single", "-smp", &count.to_string()])
            }
            Processors::Counted => {
                qemu.args(["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off", "-smp", "1"])
            }
        };
        qemu.arg("-kernel").arg(&bootable.image).arg("-initrd").arg(&bootable.initramfs);
        qemu.arg("-append").arg(format!(
            "console=ttyS0 quiet loglevel=1 panic=-1 mitigations=off {} {}",
            bootable.parameters, self.append
        ));
        for (path, snapshot) in [(&disk, "on"), (&payload, "on")] {
            qemu.arg("-drive").arg(format!(
                "file={},format=raw,if=virtio,snapshot={snapshot},cache=unsafe",
                path.display()
            ));
        }
        qemu.args(["-device", "virtio-rng-pci"]);
        qemu.args(["-serial", "stdio", "-serial"]).arg(format!("file:{}", exit_file.display()));
        qemu.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).env("TMPDIR", work.path());
        let mut child = qemu.spawn().context("cannot start qemu-system-x86_64")?;
        let mut console = child.stdout.take().context("qemu has no console")?;
        let mut complaints = child.stderr.take().context("qemu has no standard error")?;
        let (over, panicked) = (AtomicBool::new(false), AtomicBool::new(false));
        let (output, late) = std::thread::scope(|scope| -> Result<(Vec<u8>, bool)> {
            let panicked = &panicked;
            let reader = scope.spawn(move || copy(&mut console, stream, panicked));
            let watch = scope.spawn(|| {
                let is_up = || std::fs::metadata(&exit_file).is_ok_and(|found| found.len() > 0);
                while !over.load(Ordering::Relaxed) {
                    let elapsed = begun.elapsed();
                    if elapsed > self.deadline || (elapsed > BOOT_DEADLINE && !is_up()) {
                        return true;
                    }
                    std::thread::park_timeout(Duration::from_millis(500));
                }
                false
            });
            let late = loop {
                if watch.is_finished() {
                    child.kill()?;
                    break true;
                }
                if child.try_wait()?.is_some() {
                    break false;
                }
                if panicked.load(Ordering::Relaxed) {
                    // It should reboot by itself, which ends the emulator; not every one does.
                    std::thread::park_timeout(Duration::from_secs(5));
                    child.kill()?;
                    break false;
                }
                std::thread::park_timeout(Duration::from_millis(50));
            };
            over.store(true, Ordering::Relaxed);
            child.wait()?;
            let output = reader.join().map_err(|_| anyhow::anyhow!("reading the console failed"))??;
            Ok((output, late))
        })?;
        let output = String::from_utf8_lossy(&output).into_owned();
        let said_apart = std::fs::read_to_string(&exit_file).unwrap_or_default();
        if late && said_apart.is_empty() {
            bail!(
                "{NEVER_UP} within {} s; its console ends with:\n{}",
                BOOT_DEADLINE.as_secs(),
                tail(&output)
            );
        }
        if late {
            bail!(
                "the guest did not end within {} s; its console ends with:\n{}",
                self.deadline.as_secs(),
                tail(&output)
            );
        }
        let exit = said_apart.lines().find_map(|line| line.trim().strip_prefix("exit "));
        let Some(code) = exit.and_then(|code| code.parse().ok()) else {
            let mut said = String::new();
            complaints.read_to_string(&mut said)?;
            let oops = if output.contains(BREAKPOINT) { BREAKPOINT } else { "" };
            bail!(
                "the guest ended without an exit code {oops}; its console ends with:\n{}\n{said}",
                tail(&output)
            );
        };
        Ok(Outcome { code, output, release: bootable.release })
    }

    /// The second disk: binaries, the command, and the host's files.
    fn payload(&self, work: &Path, command: &[String], images: &[Image]) -> Result<PathBuf> {
        let root = work.join("payload");
        std::fs::create_dir_all(root.join("bin"))?;
        std::fs::create_dir_all(root.join("host"))?;
        for name in build::BINARIES {
            let from = self.binaries.join(name);
            if from.exists() {
                std::fs::copy(&from, root.join("bin").join(name))?;
            }
        }
        // For engines that have a store of their own.
        if let Some(workload) = images.iter().find(|image| image.name == images::WORKLOAD) {
            std::fs::create_dir_all(root.join("images"))?;
            std::fs::copy(&workload.archive, root.join("images/workload.tar"))?;
        }
        for (target, from) in &self.extra {
            shell::read(Command::new("cp").arg("-a").arg(from).arg(root.join(target)))?;
        }
        if self.containerd {
            std::fs::write(root.join("start-containerd"), "")?;
        }
        let words: Vec<String> = command.iter().map(|word| quote(word)).collect();
        std::fs::write(root.join("command"), format!("{}\n", words.join(" ")))?;
        if let Some(host) = self.host {
            copy_host(host, &root.join("host"))?;
        }
        let disk = work.join("payload.ext4");
        let size = shell::read(Command::new("du").args(["-sm"]).arg(&root))?;
        let megabytes: u64 = size.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or(256);
        shell::quiet(
            Command::new("mkfs.ext4")
                .args(["-q", "-F", "-O", "^has_journal", "-d"])
                .arg(&root)
                .arg(&disk)
                .arg(format!("{}M", megabytes + megabytes / 4 + 32)),
            "payload",
        )?;
        Ok(disk)
    }
}

/// Copies what a user means by "the current directory": in a git checkout what git tracks or would, else all.
fn copy_host(from: &Path, to: &Path) -> Result<()> {
    const MOST_MEGABYTES: u64 = 512;
    let listed = shell::read(
        Command::new("git")
            .args(["ls-files", "--cached", "--others", "--exclude-standard"])
            .current_dir(from),
    );
    let files = match listed {
        Ok(listed) => listed,
        Err(_) => shell::read(Command::new("find").args([".", "-xdev", "-type", "f"]).current_dir(from))?,
    };
    let mut bytes = 0;
    for file in files.lines() {
        let source = from.join(file);
        let Ok(metadata) = source.symlink_metadata() else { continue };
        if !metadata.is_file() {
            continue;
        }
        bytes += metadata.len();
        if bytes > MOST_MEGABYTES << 20 {
            bail!("{} holds more than {MOST_MEGABYTES} MiB; run this from a smaller folder", from.display());
        }
        let target = to.join(file);
        if let Some(folder) = target.parent() {
            std::fs::create_dir_all(folder)?;
        }
        std::fs::copy(&source, &target)?;
    }
    Ok(())
}

const PANIC: &[u8] = b"Kernel panic - not syncing";
/// How long a guest may take until its runtime answers; most take half a minute.
const BOOT_DEADLINE: Duration = Duration::from_secs(400);
const NEVER_UP: &str = "the guest did not come up";
/// What the kernel says when it meets a breakpoint that nobody knows.
const BREAKPOINT: &str = "Oops: int3";

/// Reads everything, and passes it on as `stream` says. Says when the guest's kernel has given up.
pub fn copy(console: &mut impl std::io::Read, stream: Stream, panicked: &AtomicBool) -> Result<Vec<u8>> {
    let mut all = Vec::new();
    let mut said = 0;
    let mut buffer = [0; 4096];
    loop {
        let read = console.read(&mut buffer)?;
        if read == 0 {
            return Ok(all);
        }
        let part: Vec<u8> = buffer[..read].iter().copied().filter(|byte| *byte != b'\r').collect();
        all.extend(&part);
        match stream {
            Stream::None => {}
            Stream::Plain => {
                let mut out = std::io::stdout().lock();
                out.write_all(&part)?;
                out.flush()?;
            }
            Stream::Named(name) => {
                let mut out = std::io::stdout().lock();
                while let Some(length) = all[said..].iter().position(|byte| *byte == b'\n') {
                    let line = &all[said..said + length];
                    writeln!(out, "{name} | {}", String::from_utf8_lossy(line))?;
                    said += length + 1;
                }
            }
        }
        let recent = &all[all.len().saturating_sub(2 * buffer.len())..];
        if recent.windows(PANIC.len()).any(|found| found == PANIC) {
            panicked.store(true, Ordering::Relaxed);
        }
    }
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(30)..].join("\n")
}

fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::two_at_once;

    #[test]
    fn what_is_done_two_at_once_is_done_once_each_and_in_order() {
        let items: Vec<u32> = (0..9).collect();
        assert_eq!(two_at_once(&items, |item| item * 2), [0, 2, 4, 6, 8, 10, 12, 14, 16]);
        assert!(two_at_once(&[], |(): &()| ()).is_empty());
    }

    #[test]
    fn two_are_under_way_at_the_same_time() {
        // Neither passes before the other has come.
        let barrier = Barrier::new(2);
        two_at_once(&[(), ()], |()| barrier.wait());
    }
}
