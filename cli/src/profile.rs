//! `palisade profile`.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Result, bail};
use palisade_audit::View;
use palisade_profile::{
    document, image, learn, policy,
    text::{printable, visible_json},
};
use serde_json::json;

use crate::input::{read, records};

/// Checks every file, also after one with faults.
pub(crate) fn lint(files: &[PathBuf], json: bool) -> Result<ExitCode> {
    let mut faults = 0;
    let mut profiles = 0;
    let mut out = std::io::stdout().lock();
    for path in files {
        let (name, text) = read(path)?;
        match document::parse(&name, &text) {
            Ok(found) => {
                profiles += found.len();
                for profile in &found {
                    if let Err(error) = image::compile(&policy::alone(profile)) {
                        faults += 1;
                        if json {
                            let value = json!({"file": name, "field": "spec.exec.allow", "message": error.to_string()});
                            writeln!(out, "{}", visible_json(&value.to_string()))?;
                        } else {
                            writeln!(out, "{}", printable(&format!("{name}: {error}")))?;
                        }
                    }
                }
            }
            Err(problems) => {
                for problem in problems {
                    faults += 1;
                    if json {
                        let value = json!({
                            "file": problem.file, "line": problem.line, "column": problem.column,
                            "field": problem.field, "message": problem.message, "remedy": problem.remedy,
                        });
                        writeln!(out, "{}", visible_json(&value.to_string()))?;
                    } else {
                        writeln!(out, "{}", printable(&problem.to_string()))?;
                    }
                }
            }
        }
    }
    if !json {
        writeln!(out, "{profiles} profiles are good, {faults} faults")?;
    }
    Ok(if faults == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Drafts profiles from recorded execs.
pub(crate) fn init(from_events: &Path) -> Result<()> {
    let mut observations = Vec::new();
    let name = records(from_events, |record| observations.extend(View::new(record).observations()))?;
    if observations.is_empty() {
        bail!("{name} holds no exec of an identified container; a profile cannot be drafted from nothing");
    }
    std::io::stdout().lock().write_all(learn::draft(&observations).as_bytes())?;
    Ok(())
}
