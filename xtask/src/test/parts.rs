//! What the tests consist of: each part, what it protects, where it belongs, and what it may take.
//!
//! One table: the runner follows it, `cargo xtask test --list` prints it, and docs/tests.md shows it.

use std::{fmt::Write as _, time::Duration};

use serde_json::json;

use super::Ring;
use crate::kernels::Kernel;

/// A part of a ring.
pub struct Part {
    pub name: &'static str,
    pub ring: Ring,
    /// What is broken when it fails.
    pub protects: &'static str,
    /// Seconds that it may take on two cores, beside the part that runs at the same time: by default, and with `--full`. `None`
    /// where it does not run.
    pub budget: Option<u64>,
    pub full: Option<u64>,
    /// Folders whose change may break it, for `--changed`.
    pub touched_by: &'static [&'static str],
    pub work: Work,
}

/// How a part is carried out.
pub enum Work {
    /// cargo and what it builds.
    Cargo,
    /// A virtual machine.
    Boot(Boot),
    /// This machine's own kernel.
    Native,
}

/// A virtual machine of its own, and what runs in it.
pub struct Boot {
    pub kernel: Kernel,
    /// Further kernel parameters.
    pub append: &'static str,
    /// Whether the image of Debian's services is there.
    pub apps: bool,
    /// Whether the agents of the tests are there, and programs with planted bugs.
    pub test_agent: bool,
    pub scenarios: &'static [Scenario],
}

/// Arguments of `palisade-scenarios`.
pub struct Scenario {
    pub by_default: Option<&'static str>,
    pub full: &'static str,
}

/// The same in both runs.
const fn always(words: &'static str) -> Scenario {
    Scenario { by_default: Some(words), full: words }
}

/// Shorter by default.
const fn shorter(by_default: &'static str, full: &'static str) -> Scenario {
    Scenario { by_default: Some(by_default), full }
}

/// Only with `--full`.
const fn only_full(words: &'static str) -> Scenario {
    Scenario { by_default: None, full: words }
}

const KERNEL_SIDE: &[&str] = &["agent-ebpf", "agent-abi", "agent", "profile", "scenarios", "xtask"];
const DELIVERY: &[&str] =
    &["agent", "agent-abi", "audit", "collector", "transport", "proto", "cli", "scenarios", "xtask"];
const NODE: &[&str] = &[
    "agent-ebpf",
    "agent-abi",
    "agent",
    "audit",
    "profile",
    "proto",
    "collector",
    "transport",
    "deploy",
    "scenarios",
    "xtask",
];

const fn boot(kernel: Kernel, scenarios: &'static [Scenario]) -> Boot {
    Boot { kernel, append: "", apps: false, test_agent: false, scenarios }
}

/// A boot of another kernel: every program loads there, and decides one exec each way.
const fn matrix(kernel: Kernel, name: &'static str) -> Part {
    Part {
        name,
        ring: Ring::Matrix,
        protects: "every program loads; one exec allowed, two refused, origins right",
        budget: Some(150),
        full: Some(150),
        touched_by: KERNEL_SIDE,
        work: Work::Boot(boot(kernel, &[])),
    }
}

/// What of the verdicts depends on the kernel most.
const ATTACKS: &[Scenario] =
    &[only_full("exec"), only_full("code"), only_full("conditions"), only_full("skipped")];

const fn attacks(kernel: Kernel, append: &'static str, name: &'static str) -> Part {
    Part {
        name,
        ring: Ring::Scenarios,
        protects: "promises 1, 2 and 5 on this kernel",
        budget: None,
        full: Some(1500),
        touched_by: KERNEL_SIDE,
        work: Work::Boot(Boot { append, ..boot(kernel, ATTACKS) }),
    }
}

/// The parts of the rings, in the order in which they begin: of those that run beside each other the longest first.
pub const PARTS: &[Part] = &[
    Part {
        name: "format, licences, lints",
        ring: Ring::Unit,
        protects: "the house: one format, one lint table, dependencies whose licence and source are known",
        budget: Some(120),
        full: Some(120),
        touched_by: &[""],
        work: Work::Cargo,
    },
    Part {
        name: "unit tests",
        ring: Ring::Unit,
        protects: "the pure core: parsing, compiling, evaluating, codecs, queues; golden formats",
        budget: Some(150),
        full: Some(150),
        touched_by: &[""],
        work: Work::Cargo,
    },
    Part {
        name: "fuzz targets",
        ring: Ring::Fuzz,
        protects: "parsers of hostile bytes: no panic, no hang, no memory without bounds",
        budget: Some(200),
        full: Some(700),
        touched_by: &["fuzz", "agent-abi", "profile", "proto", "collector", "agent", "xtask"],
        work: Work::Cargo,
    },
    Part {
        name: "node",
        ring: Ring::Scenarios,
        protects: "promise 3 and the claim: who belongs to a container, tampering, limits, other engines, the manifest",
        budget: Some(800),
        full: Some(2400),
        touched_by: NODE,
        work: Work::Boot(boot(
            Kernel::V6_12,
            &[
                always("tampering"),
                always("noisy"),
                shorter(
                    "limits --containers 300 --profiles 100 --executions 100 --memory 64",
                    "limits --containers 10000 --profiles 1000 --memory 96",
                ),
                shorter("members --arrivals 10", "members --arrivals 300"),
                always("rootfs"),
                always("outside"),
                always("engines"),
                always("daemonset"),
                // The last two stop the containerd that the others use.
                shorter("disturbed --short", "disturbed"),
                shorter("volumes --short", "volumes"),
            ],
        )),
    },
    Part {
        name: "verdicts",
        ring: Ring::Scenarios,
        protects: "promises 1, 2, 5 and 6: what is refused, by which name, whatever way leads there",
        budget: Some(700),
        full: Some(2400),
        touched_by: KERNEL_SIDE,
        work: Work::Boot(boot(
            Kernel::V6_12,
            &[
                shorter("exec --short", "exec"),
                always("code"),
                shorter("differential --per-cell 3", "differential --per-cell 40"),
                always("conditions"),
                always("elevation"),
                always("layers"),
                always("overlay"),
                always("who"),
                shorter("generator --count 150", "generator"),
                always("claims"),
            ],
        )),
    },
    Part {
        name: "kills",
        ring: Ring::Scenarios,
        protects: "promises 4 and 7: refused and accounted for while the agent is killed and upgraded",
        budget: Some(450),
        full: Some(1800),
        touched_by: NODE,
        work: Work::Boot(Boot {
            test_agent: true,
            ..boot(
                Kernel::V6_12,
                &[
                    always("faults"),
                    shorter(
                        "outlives --other palisade-agent-of-another-state --kills 6 --turns 4 --attacks 150 --short",
                        "outlives --other palisade-agent-of-another-state --other palisade-agent-of-another-policy --other palisade-agent-of-another-records",
                    ),
                ],
            )
        }),
    },
    Part {
        name: "starts",
        ring: Ring::Scenarios,
        protects: "promise 3: the profile is in force before the first instruction, with every runtime and interface",
        budget: Some(350),
        full: Some(5400),
        touched_by: NODE,
        work: Work::Boot(boot(Kernel::V6_12, &[shorter("starts --short --count 2", "starts --count 50")])),
    },
    Part {
        name: "planted bugs",
        ring: Ring::Planted,
        protects: "the tests themselves: each bug that is put into the programs is noticed",
        budget: Some(400),
        full: Some(400),
        touched_by: KERNEL_SIDE,
        work: Work::Boot(Boot {
            test_agent: true,
            ..boot(
                Kernel::V6_12,
                &[always("planted --agent palisade-agent-of-another-state --objects /palisade/objects")],
            )
        }),
    },
    Part {
        name: "services",
        ring: Ring::Scenarios,
        protects: "profiles that are drafted from real services hold and do not break them; acknowledged records survive a power cut",
        budget: Some(300),
        full: Some(900),
        touched_by: NODE,
        work: Work::Boot(Boot {
            apps: true,
            ..boot(Kernel::V6_12, &[always("apps"), shorter("powercut --cuts 5", "powercut")])
        }),
    },
    matrix(Kernel::V5_10, "matrix 5.10"),
    matrix(Kernel::V6_1, "matrix 6.1"),
    matrix(Kernel::V6_12, "matrix 6.12"),
    matrix(Kernel::Newest, "matrix newest"),
    Part {
        name: "matrix native",
        ring: Ring::Matrix,
        protects: "every program of the fallback tier loads on this machine's kernel",
        budget: Some(60),
        full: Some(60),
        touched_by: KERNEL_SIDE,
        work: Work::Native,
    },
    Part {
        name: "scenarios natively",
        ring: Ring::Native,
        protects: "the fallback tier on real hardware speed; delivery under faults, mutual TLS, hostile peers",
        budget: Some(500),
        full: Some(2400),
        touched_by: DELIVERY,
        work: Work::Native,
    },
    attacks(Kernel::Newest, "", "attacks, newest"),
    attacks(Kernel::V5_10, "", "attacks, 5.10"),
    attacks(Kernel::V6_1, "", "attacks, 6.1"),
    attacks(Kernel::V6_12, "preempt=full", "attacks, 6.12 preempt=full"),
];

/// What runs natively, one after the other.
pub const NATIVE: &[Scenario] = &[
    always("exec"),
    always("who"),
    always("pinned"),
    always("conditions"),
    always("noisy"),
    always("peers"),
    always("tls"),
    shorter("switches --changes 10", "switches"),
    shorter("races --count 3000", "races --count 10000"),
    shorter("torn --count 2000", "torn"),
    always("faults"),
    shorter("starts --here --count 10", "starts --here"),
    shorter("soak --minutes 1", "soak --minutes 30"),
];

impl Part {
    /// What it may take in this run; `None` when it is not in it.
    pub fn budget(&self, full: bool) -> Option<Duration> {
        if full { self.full } else { self.budget }.map(Duration::from_secs)
    }

    /// Whether a change of one of these files may break it.
    pub fn is_touched_by(&self, files: &[String]) -> bool {
        let common = ["Cargo.lock", "Cargo.toml"];
        files.iter().any(|file| {
            common.contains(&file.as_str())
                || self
                    .touched_by
                    .iter()
                    .any(|folder| folder.is_empty() || file.starts_with(&format!("{folder}/")))
        })
    }

    fn words(&self, full: bool) -> Vec<&'static str> {
        let scenarios = match &self.work {
            Work::Boot(boot) => boot.scenarios,
            Work::Native if self.ring == Ring::Native => NATIVE,
            Work::Native | Work::Cargo => &[],
        };
        scenarios.iter().filter_map(|scenario| scenario.words(full)).collect()
    }
}

impl Scenario {
    /// Its arguments in this run; `None` when it is not in it.
    pub fn words(&self, full: bool) -> Option<&'static str> {
        if full { Some(self.full) } else { self.by_default }
    }
}

/// The table of docs/tests.md.
pub fn table() -> String {
    let mut text =
        String::from("| part | ring | protects | by default, s | `--full`, s |\n|---|---|---|---:|---:|\n");
    let seconds = |budget: Option<u64>| budget.map_or_else(|| "–".to_owned(), |budget| budget.to_string());
    for part in PARTS {
        let ring = format!("{:?}", part.ring).to_lowercase();
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "| {} | `{ring}` | {} | {} | {} |",
            part.name,
            part.protects,
            seconds(part.budget),
            seconds(part.full)
        );
    }
    text.push_str("\n| part | what runs by default | what else with `--full` |\n|---|---|---|\n");
    for part in PARTS {
        let (short, full) = (part.words(false), part.words(true));
        if full.is_empty() {
            continue;
        }
        let list =
            |words: Vec<&str>| words.iter().map(|words| format!("`{words}`")).collect::<Vec<_>>().join(", ");
        let more = full.into_iter().filter(|words| !short.contains(words)).collect();
        let _ = writeln!(text, "| {} | {} | {} |", part.name, list(short.clone()), list(more));
    }
    text
}

/// The same for machines, one object a line.
pub fn json_lines() -> String {
    let line = |part: &Part| {
        let object = json!({
            "part": part.name,
            "ring": format!("{:?}", part.ring).to_lowercase(),
            "protects": part.protects,
            "budget_seconds": part.budget,
            "full_budget_seconds": part.full,
            "touched_by": part.touched_by,
            "scenarios": part.words(false),
            "full_scenarios": part.words(true),
        });
        format!("{object}\n")
    };
    PARTS.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_shows_the_table() {
        let path = crate::paths::repository().join("docs/tests.md");
        let document = std::fs::read_to_string(path).unwrap();
        assert!(document.contains(&table()), "docs/tests.md lacks what `cargo xtask test --list` prints");
    }

    #[test]
    fn every_scenario_is_in_the_full_run_and_every_ring_in_the_default_run() {
        for ring in <Ring as clap::ValueEnum>::value_variants() {
            assert!(PARTS.iter().any(|part| part.ring == *ring && part.budget.is_some()), "{ring:?}");
        }
        for part in PARTS {
            assert!(part.full.is_some(), "{} is not in the full run", part.name);
        }
    }

    #[test]
    fn a_change_touches_what_depends_on_it() {
        let touched = |file: &str| -> Vec<&str> {
            let files = [file.to_owned()];
            PARTS.iter().filter(|part| part.is_touched_by(&files)).map(|part| part.name).collect()
        };
        assert_eq!(touched("docs/exec.md"), ["format, licences, lints", "unit tests"]);
        let names = touched("agent-ebpf/src/exec/judge.rs");
        assert!(names.contains(&"planted bugs") && !names.contains(&"scenarios natively"), "{names:?}");
        assert_eq!(touched("Cargo.lock").len(), PARTS.len());
        assert!(!touched("agent-abix/src").contains(&"planted bugs"));
    }
}
