//! A record in words: what stands in a line about it, beside its time and whose it is.

use crate::common::{Common, Verdict};

/// What a line says. Its texts may hide characters: whoever prints them makes these visible.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// What was decided, or what has happened.
    pub verdict: String,
    /// The program that it is about, or who else it is about.
    pub executable: String,
    /// The rest.
    pub detail: String,
}

impl Line {
    pub(crate) fn new(verdict: impl Into<String>, executable: &str, detail: String) -> Self {
        Self { verdict: verdict.into(), executable: executable.to_owned(), detail }
    }

    /// Of an act about which something was decided.
    pub(crate) fn judged(of: Common<'_>, executable: &str, detail: String) -> Self {
        let verdict = match of.decision() {
            Some(decision) if of.verdict() == Some(Verdict::Denied) => {
                format!("{} ({})", decision.verdict, decision.action)
            }
            Some(decision) => decision.verdict.clone(),
            None => String::new(),
        };
        Self::new(verdict, executable, detail)
    }

    pub(crate) fn unknown() -> Self {
        Self::new("unknown", "", "a kind that this build does not know".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use palisade_proto::record_from_json;
    use serde_json::{Value, json};

    use super::*;
    use crate::View;

    /// A line of each kind, and of each of its forms, as it is printed.
    #[test]
    fn lines_are_golden() {
        let denied = json!({"verdict": "denied", "action": "refused", "reason": "no-rule"});
        let allowed = json!({"verdict": "allowed", "action": "none", "reason": "rule"});
        let lines = [
            (
                json!({"decision": allowed, "exec": {"executable": "/bin/ls", "origin": "image", "arguments": ["ls", "a b"]}}),
                ["allowed", "/bin/ls", "[image] ls \"a b\""],
            ),
            (
                json!({"decision": denied, "actor": {"executable": "/bin/sh"}, "exec": {
                    "executable": "/bin/x", "origin": "drift", "arguments": ["x"], "script": "/s.sh", "elevated": true, "escaped": true,
                    "arguments_truncated": true,
                }}),
                ["denied (refused)", "/bin/x", "script /s.sh ESCAPED ELEVATED [drift] no-rule: x …"],
            ),
            (
                json!({"actor": {"pid": 7, "parent_pid": 3, "executable": "/bin/sh"}, "fork": {}}),
                ["fork", "/bin/sh", "pid 7 of 3"],
            ),
            (
                json!({"actor": {"pid": 7, "executable": "/bin/sh"}, "exit": {"status": 2}}),
                ["exit", "/bin/sh", "pid 7 status 2"],
            ),
            (json!({"actor": {"pid": 7}, "exit": {"signal": 9}}), ["exit", "", "pid 7 signal 9"]),
            (
                json!({"gap": {"count": 12, "cause": "ring-full"}}),
                ["GAP", "", "12 records missing: ring-full"],
            ),
            (
                json!({
                    "container": {"mode": "enforce", "profiles": ["shop/web", "all"], "revision": "0123"},
                    "coverage": {"change": "identified", "tier": "full"},
                }),
                ["identified", "", "enforce by shop/web, all revision 0123, full tier"],
            ),
            (
                json!({"container": {"mode": "none"}, "coverage": {"change": "ended", "tier": "full"}}),
                ["ended", "", "none by no profile, full tier"],
            ),
            (
                json!({"session": {
                    "change": "start", "kind": "admin", "id": "b-7-1", "executable": "/bin/sh", "arguments": ["sh", "-i"],
                    "entered_by_comm": "runc:[2:INIT]", "terminal": "pts0",
                }}),
                ["session start", "/bin/sh", "admin b-7-1 by runc:[2:INIT] on pts0: sh -i"],
            ),
            (
                json!({"session": {"change": "end", "kind": "admin", "id": "b-7-1", "execs": 3, "not_allowed": 1, "signal": 9}}),
                ["session end", "", "admin b-7-1 3 execs, 1 not allowed, signal 9"],
            ),
            (
                json!({"decision": denied, "actor": {"pid": 7, "executable": "/bin/x"}, "tampering": {"act": "signal", "signal": 9}}),
                ["denied (refused)", "/bin/x", "TAMPERING by pid 7: signal 9 to the agent"],
            ),
            (
                json!({"decision": {"verdict": "audited"}, "tampering": {"act": "open-map", "object": 4}}),
                ["audited", "", "TAMPERING by pid 0: open-map 4"],
            ),
            (
                json!({"decision": denied, "tampering": {"act": "schedule"}}),
                ["denied (refused)", "", "TAMPERING by pid 0: schedule the agent"],
            ),
            (
                json!({"decision": {"verdict": "audited", "reason": "origin-not-allowed"}, "actor": {"executable": "/bin/x"}, "code": {
                    "act": "map", "protection": "r-x", "file": "/tmp/a.so", "origin": "drift",
                }}),
                ["audited", "/bin/x", "code: map r-x [drift] /tmp/a.so: origin-not-allowed"],
            ),
            (
                json!({"decision": {"verdict": "audited", "reason": "trace-not-allowed"}, "code": {"act": "trace", "target_pid": 5}}),
                ["audited", "", "code: trace 5: trace-not-allowed"],
            ),
            (
                json!({"node_state": {"claim": "withdrawn", "failures": ["a", "b"], "tier": "full"}}),
                ["claim withdrawn", "full", "a; b"],
            ),
            (
                json!({"refusal": {"peer": "node/a", "address": "192.0.2.1", "why": "late", "count": 5}}),
                ["refused", "node/a", "5 peers at 192.0.2.1: late"],
            ),
            (json!({}), ["unknown", "", "a kind that this build does not know"]),
        ];
        for (record, [verdict, executable, detail]) in lines {
            let found = line(&record);
            assert_eq!(
                [found.verdict, found.executable, found.detail],
                [verdict, executable, detail],
                "{record}"
            );
        }
    }

    fn line(record: &Value) -> Line {
        View::new(&record_from_json(&record.to_string()).unwrap()).line()
    }
}
