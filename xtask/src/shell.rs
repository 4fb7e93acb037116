//! Running programs, and saying what takes how long.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    path::PathBuf,
    process::{Command, Stdio},
    sync::{
        atomic::{AtomicU32, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use crate::paths;

/// Runs `command` and returns what it printed.
pub fn read(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {}", command.get_program().display()))?;
    if !output.status.success() {
        bail!(
            "{command:?} ended with {}:\n{}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim_end()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// How far a step is, in parts of which it knows the number. Both are 0 while that is not known.
#[derive(Default)]
pub struct Progress {
    done: AtomicU32,
    all: AtomicU32,
}

impl Progress {
    fn set(&self, (done, all): (u32, u32)) {
        self.done.store(done, Ordering::Relaxed);
        self.all.store(all, Ordering::Relaxed);
    }

    fn text(&self) -> String {
        match self.all.load(Ordering::Relaxed) {
            0 => String::new(),
            all => format!(", {} of {all} crates", self.done.load(Ordering::Relaxed)),
        }
    }
}

/// A long step: says that it begins, every ten seconds that it goes on, and how long it took.
pub fn step<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    counted_step(what, |_| work())
}

/// The same, of one that knows how far it is.
pub fn counted_step<T>(what: &str, work: impl FnOnce(&Progress) -> Result<T>) -> Result<T> {
    let begun = Instant::now();
    eprintln!("[ .... ] {what}");
    let (done, wait) = mpsc::channel::<()>();
    let progress = Progress::default();
    let result = std::thread::scope(|scope| {
        let progress = &progress;
        scope.spawn(move || {
            while wait.recv_timeout(Duration::from_secs(10)) == Err(mpsc::RecvTimeoutError::Timeout) {
                eprintln!("[{:>4} s] {what}{}", begun.elapsed().as_secs(), progress.text());
            }
        });
        let result = work(progress);
        drop(done);
        result
    });
    let outcome = if result.is_ok() { "done" } else { "failed" };
    eprintln!("[{:>4} s] {what}: {outcome}", begun.elapsed().as_secs());
    result.with_context(|| what.to_owned())
}

/// Runs a build of cargo's as [`quiet`] does, and notes how many crates are done.
pub fn cargo(command: &mut Command, log: &str, progress: &Progress) -> Result<()> {
    // What it shows on a terminal, also where there is none.
    command.env("CARGO_TERM_PROGRESS_WHEN", "always").env("CARGO_TERM_PROGRESS_WIDTH", "80");
    logged(command, log, |line| match crates(line) {
        Some(counts) => {
            progress.set(counts);
            false
        }
        None => true,
    })
}

/// "Building [=====>   ] 12/240: serde, tokio": what is done, and of how much.
fn crates(line: &str) -> Option<(u32, u32)> {
    let (_, counts) = line.trim().strip_prefix("Building [")?.split_once("] ")?;
    let (done, all) = counts.split(':').next()?.trim().split_once('/')?;
    Some((done.parse().ok()?, all.parse().ok()?))
}

/// Runs `command` with its output in a log file, whose end is shown when it fails.
pub fn quiet(command: &mut Command, log: &str) -> Result<()> {
    logged(command, log, |_| true)
}

/// Runs `command` with those lines of its output that `keep` wants in a log file, whose end is shown when it fails.
fn logged(command: &mut Command, log: &str, mut keep: impl FnMut(&str) -> bool) -> Result<()> {
    let path = log_path(log)?;
    let mut file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    writeln!(file, "{command:?}")?;
    let (mut output, input) = std::io::pipe()?;
    command.stdin(Stdio::null()).stdout(input.try_clone()?).stderr(input);
    let child = command.spawn().with_context(|| format!("cannot start {}", command.get_program().display()));
    // The command keeps the pipe's other end, which would never close.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = child?;
    let mut rest = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let read = output.read(&mut buffer)?;
        rest.extend_from_slice(&buffer[..read]);
        while let Some(end) = rest.iter().position(|byte| matches!(byte, b'\n' | b'\r')) {
            let line: Vec<u8> = rest.drain(..=end).take(end).collect();
            let line = String::from_utf8_lossy(&line);
            if keep(&line) {
                writeln!(file, "{line}")?;
            }
        }
        if read == 0 {
            file.write_all(&rest)?;
            break;
        }
    }
    let status = child.wait()?;
    if status.success() {
        return Ok(());
    }
    let text = std::fs::read(&path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let tail: Vec<&str> = text.lines().rev().take(40).collect();
    let tail: Vec<&str> = tail.into_iter().rev().collect();
    bail!(
        "{} ended with {status}; the end of {}:\n{}",
        command.get_program().display(),
        path.display(),
        tail.join("\n")
    )
}

/// Runs `command` on this terminal.
pub fn loud(command: &mut Command) -> Result<()> {
    let status =
        command.status().with_context(|| format!("cannot start {}", command.get_program().display()))?;
    if !status.success() {
        bail!("{command:?} ended with {status}");
    }
    Ok(())
}

fn log_path(name: &str) -> Result<PathBuf> {
    let folder = paths::target().join("xtask-logs");
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    Ok(folder.join(format!("{name}.log")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cargo_shows_on_a_terminal_tells_how_many_crates_are_done() {
        assert_eq!(crates("    Building [=====>      ] 12/240: serde, tokio"), Some((12, 240)));
        assert_eq!(crates("   Compiling serde v1.0.0 [1/2]"), None);
        assert_eq!(crates("    Building [>"), None);
    }
}
