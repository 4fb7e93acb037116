//! `palisade profile`.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, Result, bail};
use palisade_profile::{
    document, image,
    learn::{self, Act, Observation},
    policy,
    text::{printable, visible_json},
};
use serde_json::{Value, json};

/// Reads a file, or standard input for `-`; returns the name to show.
pub(crate) fn read(path: &Path) -> Result<(String, String)> {
    if path == Path::new("-") {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).context("cannot read standard input")?;
        return Ok(("<stdin>".to_owned(), text));
    }
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok((path.display().to_string(), text))
}

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
    let (name, text) = read(from_events)?;
    let mut observations = Vec::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let value: Value = serde_json::from_str(line).with_context(|| {
            format!(
                "{name}:{}: this is not a JSON record; give the output of `palisade events --json`",
                number + 1
            )
        })?;
        observations.extend(observations_of(&value).into_iter().flatten());
    }
    if observations.is_empty() {
        bail!("{name} holds no exec of an identified container; a profile cannot be drafted from nothing");
    }
    std::io::stdout().lock().write_all(learn::draft(&observations).as_bytes())?;
    Ok(())
}

/// What was executed in an identified container, the script and its interpreter, and code that came by other means; what was
/// refused or is the runtime's own is left out.
fn observations_of(record: &Value) -> Option<Vec<Observation>> {
    let event = |name: &str| record.get(name).filter(|event| !event.is_null());
    let exec = event("exec").or_else(|| event("code"))?;
    let container = record.get("container")?;
    let text =
        |value: &Value, key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    if !container.get("identified").and_then(Value::as_bool).unwrap_or(false)
        || text(container, "class") == "sandbox"
        || text(exec, "verdict") == "denied"
        || text(exec, "reason") == "runtime-step"
    {
        return None;
    }
    let labels: BTreeMap<String, String> = container
        .get("labels")
        .and_then(Value::as_object)
        .map(|labels| {
            labels.iter().filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned()))).collect()
        })
        .unwrap_or_default();
    let entered = record.pointer("/session_of/kind").and_then(Value::as_str);
    let seen = |act: Act, path: &str, origin: &str| Observation {
        act,
        namespace: text(container, "namespace"),
        pod: text(container, "pod"),
        labels: labels.clone(),
        container: text(container, "name"),
        image: text(container, "image"),
        path: text(exec, path),
        origin: text(exec, origin),
        entered: entered.is_some_and(|kind| kind == "admin" || kind == "probe"),
    };
    if event("exec").is_none() {
        let act = match text(exec, "reason").as_str() {
            "jit-not-allowed" => Act::Needs("jit"),
            "memory-not-allowed" => Act::Needs("memory"),
            "trace-not-allowed" => Act::Needs("trace"),
            // No field allows that.
            "allowed-executable" => return None,
            _ => Act::Mapped,
        };
        return Some(vec![seen(act, "file", "origin")]);
    }
    let mut found =
        vec![seen(Act::Executed, "executable", "origin"), seen(Act::Executed, "script", "script_origin")];
    found.retain(|observation| !observation.path.is_empty());
    Some(found)
}
