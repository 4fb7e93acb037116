//! What passed and what failed.

use std::{process::ExitCode, time::Instant};

use anyhow::Result;

/// Collects outcomes and prints each as it comes.
pub struct Report {
    passed: u32,
    failures: Vec<String>,
    quiet: bool,
    only: String,
}

impl Report {
    pub fn new() -> Self {
        Self { passed: 0, failures: Vec::new(), quiet: false, only: String::new() }
    }

    /// Runs the cases whose name holds `only`, and no others.
    pub fn of(only: &str) -> Self {
        Self { only: only.to_owned(), ..Self::new() }
    }

    /// Counts, but prints nothing: for runs that are meant to fail.
    pub fn quiet() -> Self {
        Self { quiet: true, ..Self::new() }
    }

    /// Runs one case.
    pub async fn case(&mut self, name: &str, work: impl Future<Output = Result<()>>) {
        if !name.contains(&self.only) {
            return;
        }
        let begun = Instant::now();
        let result = work.await;
        let seconds = begun.elapsed().as_secs_f64();
        match result {
            Ok(()) => {
                self.passed += 1;
                if !self.quiet {
                    println!("ok   {name} ({seconds:.1} s)");
                }
            }
            Err(error) => {
                let failure = format!("{name} ({seconds:.1} s): {error:#}");
                if !self.quiet {
                    println!("FAIL {failure}");
                }
                self.failures.push(failure);
            }
        }
    }

    pub fn failed(&self) -> usize {
        self.failures.len()
    }

    /// What failed, and why.
    pub fn into_failures(self) -> Vec<String> {
        self.failures
    }

    /// The closing line, and the exit code.
    pub fn close(self) -> ExitCode {
        println!("{} passed, {} failed", self.passed, self.failures.len());
        if self.failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}
