//! Running programs, and saying what takes how long.

use std::{
    fs::File,
    io::Write as _,
    path::PathBuf,
    process::{Command, Stdio},
    sync::mpsc,
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

/// A long step: says that it begins, every ten seconds that it goes on, and how long it took.
pub fn step<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let begun = Instant::now();
    eprintln!("[ .... ] {what}");
    let (done, wait) = mpsc::channel::<()>();
    let result = std::thread::scope(|scope| {
        scope.spawn(move || {
            while wait.recv_timeout(Duration::from_secs(10)) == Err(mpsc::RecvTimeoutError::Timeout) {
                eprintln!("[{:>4} s] {what}", begun.elapsed().as_secs());
            }
        });
        let result = work();
        drop(done);
        result
    });
    let outcome = if result.is_ok() { "done" } else { "failed" };
    eprintln!("[{:>4} s] {what}: {outcome}", begun.elapsed().as_secs());
    result.with_context(|| what.to_owned())
}

/// Runs `command` with its output in a log file, whose end is shown when it fails.
pub fn quiet(command: &mut Command, log: &str) -> Result<()> {
    let path = log_path(log)?;
    let file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    let mut copy = file.try_clone()?;
    writeln!(copy, "{command:?}")?;
    let status = command
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .status()
        .with_context(|| format!("cannot start {}", command.get_program().display()))?;
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
