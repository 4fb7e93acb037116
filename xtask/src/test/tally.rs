//! What passed, what failed, what took how long, and whether that was longer than it may.

use std::{
    process::ExitCode,
    sync::Mutex,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

/// Sums up the cases of all rings. Parts that run beside each other share it.
#[derive(Default)]
pub struct Tally(Mutex<Sums>);

#[derive(Default)]
struct Sums {
    passed: u32,
    failed: u32,
    times: Vec<Time>,
}

struct Time {
    name: String,
    took: Duration,
    /// What it may take; `None` where nothing was set.
    budget: Option<Duration>,
}

impl Tally {
    /// Runs one case and counts it.
    pub fn case<T>(&self, name: &str, work: impl FnOnce() -> Result<T>) -> Option<T> {
        let begun = Instant::now();
        let result = work();
        let mut sums = self.sums();
        match result {
            Ok(value) => {
                sums.passed += 1;
                println!("ok   {name} ({} s)", begun.elapsed().as_secs());
                Some(value)
            }
            Err(error) => {
                sums.failed += 1;
                println!("FAIL {name}: {error:#}");
                None
            }
        }
    }

    /// Adds the counts of a program that reports its own cases: what it printed, and its exit code.
    pub fn add(&self, name: &str, result: Result<(String, i32)>) {
        let counted = result.and_then(|(output, code)| {
            let (passed, failed) = counts(&output).with_context(|| format!("{name} printed no result"))?;
            if passed + failed == 0 || (failed == 0) != (code == 0) {
                bail!("{name}: {passed} passed, {failed} failed, exit code {code}");
            }
            Ok((passed, failed))
        });
        let mut sums = self.sums();
        match counted {
            Ok((passed, failed)) => {
                sums.passed += passed;
                sums.failed += failed;
            }
            Err(error) => {
                sums.failed += 1;
                println!("FAIL {error:#}");
            }
        }
    }

    /// Notes what a part took.
    pub fn time(&self, name: &str, took: Duration, budget: Option<Duration>) {
        self.sums().times.push(Time { name: name.to_owned(), took, budget });
    }

    /// Does `work` and notes what it took.
    pub fn timed<T>(&self, name: &str, budget: Option<Duration>, work: impl FnOnce() -> T) -> T {
        let begun = Instant::now();
        let result = work();
        self.time(name, begun.elapsed(), budget);
        result
    }

    /// Prints what took how long, what took longer than it may, and the closing line.
    pub fn close(self) -> ExitCode {
        let sums = self.0.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        println!();
        for Time { name, took, budget } in &sums.times {
            let late = match budget {
                Some(budget) if took > budget => format!("   over its budget of {} s", budget.as_secs()),
                _ => String::new(),
            };
            println!("{:>6} s  {name}{late}", took.as_secs());
        }
        println!("{} passed, {} failed", sums.passed, sums.failed);
        if sums.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }

    fn sums(&self) -> std::sync::MutexGuard<'_, Sums> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// The sum of all lines of the form "N passed, N failed"; `None` when there is none.
pub fn counts(output: &str) -> Option<(u32, u32)> {
    let numbers = |line: &str| -> Option<(u32, u32)> {
        let (passed, rest) = line.trim().split_once(" passed, ")?;
        let failed = rest.strip_suffix(" failed")?;
        Some((passed.parse().ok()?, failed.parse().ok()?))
    };
    output.lines().filter_map(numbers).reduce(|sum, more| (sum.0 + more.0, sum.1 + more.1))
}
