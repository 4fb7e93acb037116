//! What this node can and cannot do, found by trying, and which promise therefore holds.

use std::process::ExitCode;

use palisade_profile::text::{printable_lines, visible_json};
use serde::Serialize;

use crate::{
    config::{Config, SelfProtection, Unidentified},
    containers::{cgroups, cri},
    kernel::{self, Kernel, LoadError, Pins, Tier},
};

/// Exit codes.
const FULL: u8 = 0;
const NOTHING: u8 = 1;
const FALLBACK: u8 = 3;

#[derive(Serialize)]
struct Check {
    name: &'static str,
    ok: bool,
    found: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    remedy: String,
}

#[derive(Serialize)]
struct Promise {
    promise: &'static str,
    holds: bool,
    because: String,
}

#[derive(Serialize)]
struct ProgramLine {
    name: String,
    verified_instructions: Option<u32>,
    translated_bytes: Option<u32>,
}

#[derive(Serialize)]
struct Report {
    /// "full", "fallback" or "nothing".
    tier: &'static str,
    kernel: String,
    checks: Vec<Check>,
    promises: Vec<Promise>,
    programs: Vec<ProgramLine>,
    absent_kernel_fields: Vec<&'static str>,
}

/// Examines the node and prints the report.
pub async fn run(config: &Config, json: bool) -> ExitCode {
    let report = examine(config).await;
    if json {
        println!("{}", visible_json(&serde_json::to_string_pretty(&report).unwrap_or_default()));
    } else {
        print(&report);
    }
    ExitCode::from(match report.tier {
        "full" => FULL,
        "fallback" => FALLBACK,
        _ => NOTHING,
    })
}

async fn examine(config: &Config) -> Report {
    let features = kernel::features();
    let mut checks = Vec::new();
    let mut check = |name, ok, found: String, remedy: &str| {
        let remedy = if ok { String::new() } else { remedy.to_owned() };
        checks.push(Check { name, ok, found, remedy });
    };
    check(
        "rights",
        rustix::process::geteuid().is_root(),
        format!("uid {}", rustix::process::geteuid().as_raw()),
        "run as root on the host, or with the capabilities of the DaemonSet",
    );
    check(
        "program type raw_tracepoint",
        features.raw_tracepoint,
        if features.raw_tracepoint { "accepted" } else { "refused" }.to_owned(),
        "a kernel with CONFIG_BPF_SYSCALL, and CAP_BPF with CAP_PERFMON or root",
    );
    check(
        "program type lsm",
        features.lsm,
        if features.lsm { "accepted" } else { "refused" }.to_owned(),
        "a kernel with CONFIG_BPF_LSM, 5.7 or later",
    );
    let active = features.lsm_is_active();
    check(
        "security modules",
        active.is_ok() || !features.lsm,
        features.security_modules.as_ref().map_or_else(|| "not readable".to_owned(), |list| list.join(",")),
        "add bpf to the kernel's lsm= parameter, after those that are there",
    );
    check(
        "atomic fetch-add",
        true,
        if features.fetch_add { "one counter per container" } else { "not there: a counter per processor" }
            .to_owned(),
        "",
    );
    let root = config.cgroups.clone().map_or_else(cgroups::mount_point, Ok);
    check(
        "cgroup v2",
        root.is_ok(),
        match &root {
            Ok(path) => path.display().to_string(),
            Err(error) => error.to_string(),
        },
        "mount the unified hierarchy, also beside version 1",
    );
    let mut runtime = Err("no socket of the configuration exists".to_owned());
    for socket in config.runtimes.cri.iter().filter(|socket| socket.exists()) {
        runtime = match cri::version(socket).await {
            Ok(version) => Ok(format!("{version} at {}", socket.display())),
            Err(error) => Err(format!("{error:#}")),
        };
        if runtime.is_ok() {
            break;
        }
    }
    check(
        "container runtime",
        runtime.is_ok(),
        runtime.clone().unwrap_or_else(|error| error),
        "name the runtime's CRI socket under runtimes.cri in the configuration",
    );
    let nri =
        config.runtimes.nri.iter().find(|socket| std::os::unix::net::UnixStream::connect(socket).is_ok());
    let before = before_the_first_instruction(nri.is_some(), config.unidentified);
    check(
        "told before a start (NRI)",
        nri.is_some() || before.0,
        match nri {
            Some(socket) => format!("{} answers", socket.display()),
            None => {
                format!("no socket answers; unidentified: {:?} holds", config.unidentified).to_lowercase()
            }
        },
        "enable NRI in the runtime (containerd 1.7 and later, CRI-O), or set unidentified: hold",
    );
    let pins = config.pins().map(|folder| {
        let above = folder.parent().unwrap_or(folder);
        if Pins::is_bpffs(above) { Ok(folder) } else { Err(format!("{} is not a bpffs", above.display())) }
    });
    let outlives = match &pins {
        Some(Ok(folder)) => (true, format!("pinned below {}", folder.display())),
        Some(Err(error)) => (false, error.clone()),
        None => (false, "pins: none".to_owned()),
    };
    check(
        "bpffs",
        !matches!(pins, Some(Err(_))),
        outlives.1.clone(),
        "mount -t bpf bpf /sys/fs/bpf, or write pins: none",
    );
    // Not beside what is in force: for itself, and gone when the report is made.
    let loaded = Kernel::open(&config.sizes(), &features, None);
    check(
        "kernel layout (BTF)",
        !matches!(loaded, Err(LoadError::Btf(_))),
        match &loaded {
            Err(LoadError::Btf(error)) => error.to_string(),
            Ok(kernel) => match kernel.layout.as_ref().map(|layout| layout.absent.join(", ")) {
                Some(absent) if !absent.is_empty() => format!("without {absent}"),
                _ => "every field found".to_owned(),
            },
            Err(_) => "not reached".to_owned(),
        },
        "a kernel with CONFIG_DEBUG_INFO_BTF",
    );
    check(
        "programs",
        loaded.is_ok(),
        match &loaded {
            Ok(kernel) => {
                format!("{} pass the verifier, origins proven on a scratch overlay", kernel.programs.len())
            }
            Err(error) => error.to_string(),
        },
        "see the message; a kernel that is not in docs/kernels.md may need a newer build",
    );
    let tier = loaded.as_ref().ok().filter(|_| root.is_ok()).map(|kernel| kernel.tier);
    let reason = loaded.as_ref().ok().and_then(|kernel| kernel.tier_reason.clone());
    Report {
        tier: tier.map_or("nothing", Tier::as_str),
        kernel: features.release.clone(),
        promises: promises(tier, reason.as_deref(), runtime.is_ok(), before, &outlives, config),
        programs: loaded
            .as_ref()
            .map(|kernel| {
                kernel
                    .programs
                    .iter()
                    .map(|program| ProgramLine {
                        name: program.name.clone(),
                        verified_instructions: program.verified_instructions,
                        translated_bytes: program.translated_bytes,
                    })
                    .collect()
            })
            .unwrap_or_default(),
        absent_kernel_fields: loaded
            .as_ref()
            .ok()
            .and_then(|kernel| kernel.layout.as_ref())
            .map(|layout| layout.absent.clone())
            .unwrap_or_default(),
        checks,
    }
}

/// Whether a container's policy is in force before its first instruction, and why.
fn before_the_first_instruction(nri: bool, unidentified: Unidentified) -> (bool, &'static str) {
    match (unidentified, nri) {
        (Unidentified::Hold, _) => (true, "what is not identified is stopped until it is"),
        (Unidentified::Deny, _) => (true, "what is not identified is refused"),
        (Unidentified::Audit, true) => (
            true,
            "the runtime tells of a container before its start; should it ever be late, it runs and is recorded",
        ),
        (Unidentified::Audit, false) => (
            false,
            "without NRI an entrypoint may run before its container is identified; set unidentified: hold",
        ),
    }
}

fn promises(
    tier: Option<Tier>,
    reason: Option<&str>,
    runtime: bool,
    before: (bool, &str),
    outlives: &(bool, String),
    config: &Config,
) -> Vec<Promise> {
    let Config { unidentified, self_protection, .. } = *config;
    let loaded = tier.is_some();
    let full = tier == Some(Tier::Full);
    let say = |promise, holds, because: &str| Promise { promise, holds, because: because.to_owned() };
    vec![
        say(
            "refused before it happens",
            full,
            match tier {
                Some(Tier::Full) => "a denied exec returns EPERM",
                Some(Tier::Fallback) => {
                    reason.unwrap_or("a denied exec is killed before its first instruction")
                }
                None => "the programs do not load",
            },
        ),
        say(
            "killed before the first instruction",
            loaded,
            if loaded { "the tracepoint judges every exec again" } else { "the programs do not load" },
        ),
        say(
            "scripts are judged by their own path",
            full,
            if full { "the hook sees every pass" } else { "the tracepoint sees the interpreter only" },
        ),
        say(
            "libraries and other code are judged",
            full,
            if full { "mmap, mprotect and tracing have hooks" } else { "only what is executed is seen" },
        ),
        say(
            "named by what it is",
            loaded,
            if loaded {
                "path inside the superblock, origin by overlay layer"
            } else {
                "the programs do not load"
            },
        ),
        say("in force before the first instruction", loaded && before.0, before.1),
        say(
            "what is held stays held",
            full || unidentified != Unidentified::Hold,
            match (unidentified, full) {
                (Unidentified::Hold, true) => "signals and tracers of others are refused",
                (Unidentified::Hold, false) => {
                    "without LSM programs, a process that sees it and has the right to signal it can let it go"
                }
                _ => "nothing is held",
            },
        ),
        say(
            "containers cannot touch the agent",
            full && self_protection == SelfProtection::Enforce,
            match (self_protection, full) {
                (_, false) => "without LSM programs nobody can refuse that",
                (SelfProtection::Audit, true) => "selfProtection: audit only records it",
                (SelfProtection::Enforce, true) => {
                    "signals, tracing, its maps and pins; see docs/threat-model.md"
                }
            },
        ),
        say(
            "containers have names",
            runtime,
            if runtime {
                "the runtime answers"
            } else {
                "no runtime answers, so every container stays unidentified"
            },
        ),
        say("in force while the agent is away", loaded && outlives.0, &outlives.1),
    ]
}

fn print(report: &Report) {
    println!("kernel {}\n", report.kernel);
    for check in &report.checks {
        println!(
            "  {} {:<28} {}",
            if check.ok { "ok  " } else { "FAIL" },
            check.name,
            printable_lines(&check.found)
        );
        if !check.remedy.is_empty() {
            println!("       {:<28} -> {}", "", printable_lines(&check.remedy));
        }
    }
    println!("\npromises on this node");
    for promise in &report.promises {
        println!(
            "  {} {:<38} {}",
            if promise.holds { "yes " } else { "no  " },
            promise.promise,
            printable_lines(&promise.because)
        );
    }
    println!(
        "\ntier: {}",
        match report.tier {
            "full" => "full (enforce refuses with EPERM)",
            "fallback" => "fallback (enforce kills at exec)",
            _ => "nothing (the agent will not start)",
        }
    );
}
