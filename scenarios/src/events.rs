//! Reading records back out of the collector's store, as an analyst does.

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::{attacks, cri::until, node::Node};

/// Every stored record that `arguments` select.
pub fn query(node: &Node, arguments: &[&str]) -> Result<Vec<Value>> {
    let mut words = vec!["events", "--json"];
    words.extend(arguments);
    node.palisade(&words)?
        .lines()
        .map(|line| serde_json::from_str(line).with_context(|| format!("not JSON: {line}")))
        .collect()
}

/// Execs whose arguments hold the word "payload" and `nonce`: what an attack tried, not its preparation.
pub fn payloads(node: &Node, nonce: &str) -> Result<Vec<Value>> {
    // Not the whole past, which grows: nothing was executed with a word before it was made up.
    let since = attacks::age(nonce).map(|age| format!("{}s", age.as_secs() + 5));
    let mut words = vec!["--kind", "exec"];
    words.extend(since.iter().flat_map(|since| ["--since", since]));
    let records = query(node, &words)?;
    let found = of_payload(&records, nonce);
    node.execs.replace(records);
    Ok(found)
}

fn of_payload(records: &[Value], nonce: &str) -> Vec<Value> {
    let is_wanted = |record: &&Value| has_argument(record, "payload") && has_argument(record, nonce);
    records.iter().filter(is_wanted).cloned().collect()
}

/// Whether an exec has `word` among its arguments.
pub fn has_argument(record: &Value, word: &str) -> bool {
    record["exec"]["arguments"]
        .as_array()
        .is_some_and(|arguments| arguments.iter().any(|argument| argument == word))
}

/// Waits for the record of the payload that has `nonce`; there must be one only.
pub async fn exactly_one(node: &Node, nonce: &str) -> Result<Value> {
    // Of acts one after the other, one question brings the records of many.
    let mut found = of_payload(&node.execs.borrow(), nonce);
    if found.is_empty() {
        found = until(&format!("a record of {nonce}"), async || {
            let found = payloads(node, nonce)?;
            Ok((!found.is_empty()).then_some(found))
        })
        .await?;
    }
    if found.len() != 1 {
        bail!("{} records of one act: {found:?}", found.len());
    }
    found.pop().context("no record")
}

/// Waits until the container is in `mode`.
pub async fn in_mode(node: &Node, container: &str, mode: &str) -> Result<Value> {
    until(&format!("{container} is in mode {mode}"), async || {
        let records = node.palisade(&["coverage", "--json"])?;
        for line in records.lines() {
            let record: Value = serde_json::from_str(line)?;
            if record["container"]["id"] == container && record["container"]["mode"] == mode {
                return Ok(Some(record));
            }
        }
        Ok(None)
    })
    .await
}

/// What became of the records of a container.
pub struct Balance {
    pub made: u64,
    /// Those that gap records count.
    pub counted: u64,
}

/// Everything that was numbered in an ended container is stored or counted by a gap, exactly.
pub async fn balance(node: &Node, container: &str) -> Result<Balance> {
    let ended = until("the container's last record", async || {
        let records = query(node, &["--kind", "coverage", "--container", container])?;
        Ok(records.into_iter().find(|record| record["coverage"]["change"] == "ended"))
    })
    .await?;
    let made = ended["coverage"]["records_made"].as_u64().context("records_made")?;
    let records = query(node, &["--all", "--container", container])?;
    let stored = records.iter().filter(|record| record["sequence"].as_u64() > Some(0)).count() as u64;
    let counted: u64 = records.iter().filter_map(|record: &Value| record["gap"]["count"].as_u64()).sum();
    println!("   {made} records made, {stored} stored, {counted} counted");
    ensure!(stored + counted == made, "{made} records were made: {stored} are stored and {counted} counted");
    Ok(Balance { made, counted })
}
