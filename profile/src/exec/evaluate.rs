//! The verdict of the section in a policy image, as the kernel gives it.

use palisade_abi::{
    codes::{code_flags, mode, origin, reason, verdict},
    policy::exec::{EXEC_GRANTS, grant, grant_to_any, library_grant},
};

use super::image::{Exact, ExactKey, Image};
use crate::image::PolicyImage;

/// A verdict and its reason, as codes of [`palisade_abi::codes`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    pub verdict: u8,
    pub reason: u8,
}

/// What is judged.
#[derive(Clone, Copy, Debug)]
pub struct Execution<'a> {
    /// Canonical; on a volume a text of [`palisade_abi::volume`].
    pub path: &'a [u8],
    /// [`origin`].
    pub origin: u8,
    /// [`palisade_abi::codes::session`].
    pub session: u8,
    /// Why the path is not known, a [`reason`]; or 0.
    pub failure: u8,
    /// The path of the program, or script, of the image that calls exec; `None` when it is not the image's.
    pub caller: Option<&'a [u8]>,
    /// The arguments, the program's name first, each ended by a zero byte; `None` when they are more than are compared, or are not
    /// known: of a script, or before they are.
    pub arguments: Option<&'a [u8]>,
}

/// What rules grant, under the conditions that hold.
struct Granted {
    /// Masks of [`grant`]s and [`library_grant`]s: what holds, what would with other arguments, and what would under any
    /// condition.
    now: u32,
    with_arguments: u32,
    any: u32,
}

fn granted(image: &Image, execution: &Execution<'_>) -> Granted {
    let Execution { path, caller, arguments, .. } = *execution;
    let anybody = |path: &[u8]| image.exact.get(&ExactKey::anybody(path));
    let globs = image.globs.grants(path);
    let mut granted = Granted { now: globs, with_arguments: 0, any: globs };
    let mut add = |rule: Option<&Exact>| {
        let Some(rule) = rule else { return };
        granted.now |= rule.grants | arguments.map_or(0, |arguments| rule.arguments.grants(arguments));
        granted.with_arguments |= rule.with_arguments;
        granted.any |= rule.any;
    };
    add(anybody(path));
    let parent = caller.and_then(anybody).map_or(0, |rule| rule.parent);
    if parent != 0 {
        add(image.exact.get(&ExactKey { path: path.to_vec(), parent }));
    }
    granted
}

/// Judges an execution.
#[must_use]
pub fn evaluate(image: &PolicyImage, execution: &Execution<'_>) -> Decision {
    let Execution { origin, session, failure, .. } = *execution;
    let Some(exec) = &image.exec else {
        return Decision { verdict: verdict::ALLOWED, reason: reason::NO_RULE };
    };
    let mismatch = |reason| Decision {
        verdict: if image.mode.code() == mode::AUDIT { verdict::AUDITED } else { verdict::DENIED },
        reason,
    };
    if failure != 0 {
        return mismatch(failure);
    }
    let Granted { now, with_arguments, any } = granted(exec, execution);
    let wanted = grant(origin, session);
    if now & wanted != 0 {
        Decision { verdict: verdict::ALLOWED, reason: reason::RULE }
    } else if origin == origin::UNKNOWN {
        mismatch(reason::ORIGIN_UNKNOWN)
    } else if with_arguments & wanted != 0 {
        mismatch(reason::ARGUMENTS)
    } else if any & wanted != 0 {
        mismatch(reason::PARENT)
    } else if any & grant_to_any(origin) != 0 {
        mismatch(reason::SESSION)
    } else if any & EXEC_GRANTS != 0 {
        mismatch(reason::ORIGIN)
    } else {
        mismatch(reason::NO_RULE)
    }
}

/// Judges memory that is to become executable: the bytes of a file (`None`: of none), `generated` when they are not, or may
/// become others than, the file's.
#[must_use]
pub fn evaluate_mapping(image: &PolicyImage, file: Option<&Execution<'_>>, generated: bool) -> Decision {
    let Some(exec) = &image.exec else {
        return Decision { verdict: verdict::ALLOWED, reason: reason::NO_RULE };
    };
    let against = match file.map_or(0, |file| against_mapped(exec, file)) {
        0 if generated && exec.flags & code_flags::JIT == 0 => reason::JIT,
        reason => reason,
    };
    if against == 0 {
        return Decision { verdict: verdict::ALLOWED, reason: reason::RULE };
    }
    let audits = image.mode.code() == mode::AUDIT;
    Decision { verdict: if audits { verdict::AUDITED } else { verdict::DENIED }, reason: against }
}

/// The reason against mapping a file executable; 0 when there is none.
fn against_mapped(image: &Image, file: &Execution<'_>) -> u8 {
    let Execution { origin, session, failure, .. } = *file;
    let in_memory = origin == origin::MEMORY;
    let any_of_image = image.flags & code_flags::LIBRARIES_OF_IMAGE != 0;
    if origin == origin::IMAGE && any_of_image {
        return 0;
    }
    if in_memory && image.flags & code_flags::MEMORY != 0 {
        return 0;
    }
    if failure != 0 {
        return if in_memory { reason::MEMORY } else { failure };
    }
    // What may be executed with certain arguments is mapped by its exec alone, which the kernel knows.
    let Granted { now, with_arguments, any } = granted(image, file);
    let any = if any_of_image { any | library_grant(origin::IMAGE) } else { any };
    if now & (grant(origin, session) | library_grant(origin)) != 0 {
        0
    } else if origin == origin::UNKNOWN {
        reason::ORIGIN_UNKNOWN
    } else if with_arguments & grant(origin, session) != 0 {
        reason::ARGUMENTS
    } else if any & grant(origin, session) != 0 {
        reason::PARENT
    } else if any & grant_to_any(origin) != 0 {
        reason::SESSION
    } else if in_memory {
        reason::MEMORY
    } else if any != 0 {
        reason::ORIGIN
    } else {
        reason::NO_RULE
    }
}

#[cfg(test)]
mod tests {
    use palisade_abi::codes::session;

    use super::*;
    use crate::{document::parse, image::compile, policy::unite, selector::ContainerFacts};

    fn execution(path: &[u8], origin: u8) -> Execution<'_> {
        Execution { path, origin, session: session::WORKLOAD, failure: 0, caller: None, arguments: Some(&[]) }
    }

    fn image(mode: &str) -> PolicyImage {
        let text = format!(
            "apiVersion: palisade.dev/v1alpha1\nkind: ClusterProfile\nmetadata: {{name: a}}\n\
             spec: {{selector: {{}}, mode: {mode}, exec: {{allow: [{{path: /bin/a}}, {{path: /opt/**, from: [image, drift]}},
             {{path: /opt/plugins/**, from: \"volume:plugins\"}}, {{path: /tools/run, from: [host, \"volume:tools\"]}},
             {{path: /etc/hosts, from: \"volume:/etc/hosts\"}},
             {{path: /bin/sh, sessions: admin}}, {{path: /sbin/**, sessions: [admin]}}]}}}}\n"
        );
        compile(&unite(&parse("x", &text).unwrap(), &ContainerFacts::default()).unwrap()).unwrap()
    }

    #[test]
    fn a_verdict_depends_on_path_origin_and_mode() {
        let decide = |mode, path: &str, origin| {
            let decision = evaluate(&image(mode), &execution(path.as_bytes(), origin));
            (decision.verdict, decision.reason)
        };
        assert_eq!(decide("enforce", "/bin/a", origin::IMAGE), (verdict::ALLOWED, reason::RULE));
        assert_eq!(decide("enforce", "/bin/a", origin::DRIFT), (verdict::DENIED, reason::ORIGIN));
        assert_eq!(decide("enforce", "/opt/x", origin::DRIFT), (verdict::ALLOWED, reason::RULE));
        assert_eq!(decide("enforce", "/bin/b", origin::IMAGE), (verdict::DENIED, reason::NO_RULE));
        assert_eq!(decide("enforce", "/bin/a", origin::UNKNOWN), (verdict::DENIED, reason::ORIGIN_UNKNOWN));
        assert_eq!(decide("audit", "/bin/b", origin::IMAGE), (verdict::AUDITED, reason::NO_RULE));
    }

    #[test]
    fn a_rule_for_a_session_is_for_that_session_alone() {
        let decide = |path: &[u8], origin, session| {
            let decision = evaluate(&image("enforce"), &Execution { session, ..execution(path, origin) });
            (decision.verdict, decision.reason)
        };
        for path in [&b"/bin/sh"[..], b"/sbin/a/b"] {
            assert_eq!(decide(path, origin::IMAGE, session::ENTERED), (verdict::ALLOWED, reason::RULE));
            assert_eq!(decide(path, origin::IMAGE, session::WORKLOAD), (verdict::DENIED, reason::SESSION));
            assert_eq!(decide(path, origin::IMAGE, session::UNKNOWN), (verdict::DENIED, reason::SESSION));
            assert_eq!(decide(path, origin::DRIFT, session::ENTERED), (verdict::DENIED, reason::ORIGIN));
        }
        assert_eq!(decide(b"/bin/a", origin::IMAGE, session::UNKNOWN), (verdict::ALLOWED, reason::RULE));
    }

    #[test]
    fn a_rule_for_a_volume_is_for_that_volume_alone() {
        let decide = |path: &str, origin| {
            let decision = evaluate(&image("enforce"), &execution(path.as_bytes(), origin));
            (decision.verdict, decision.reason)
        };
        for path in [":plugins:/opt/plugins/a/b", ":tools:/tools/run", ":/etc/hosts:/etc/hosts"] {
            assert_eq!(decide(path, origin::VOLUME), (verdict::ALLOWED, reason::RULE), "{path}");
        }
        for path in [
            ":other:/opt/plugins/a",
            ":plugins:/opt/other",
            ":tools:/tools/run2",
            ":plugins:/opt/plugins:/opt/plugins/a",
            ":/etc/host:/etc/hosts",
            // The image's rules are not the volume's.
            ":x:/bin/a",
            ":x:/opt/a",
        ] {
            assert_eq!(decide(path, origin::VOLUME).0, verdict::DENIED, "{path}");
        }
        assert_eq!(decide("/tools/run", origin::HOST), (verdict::ALLOWED, reason::RULE));
        assert_eq!(decide("/tools/run", origin::IMAGE), (verdict::DENIED, reason::ORIGIN));
        assert_eq!(decide("/opt/plugins/a", origin::DRIFT), (verdict::ALLOWED, reason::RULE));
    }

    #[test]
    fn libraries_are_the_images_unless_a_profile_says_otherwise() {
        let mapped = |exec: &str, path: &str, origin, generated| {
            let text = format!(
                "apiVersion: palisade.dev/v1alpha1\nkind: ClusterProfile\nmetadata: {{name: a}}\n\
                 spec: {{selector: {{}}, mode: enforce, exec: {{{exec}}}}}\n"
            );
            let policy = unite(&parse("x", &text).unwrap(), &ContainerFacts::default()).unwrap();
            let file = execution(path.as_bytes(), origin);
            let decision = evaluate_mapping(&compile(&policy).unwrap(), Some(&file), generated);
            if decision.verdict == verdict::ALLOWED { 0 } else { decision.reason }
        };
        let plain = "allow: [{path: /tmp/own, from: drift}]";
        assert_eq!(mapped(plain, "/lib/a.so", origin::IMAGE, false), 0);
        assert_eq!(mapped(plain, "/lib/a.so", origin::IMAGE, true), reason::JIT);
        assert_eq!(mapped(plain, "/lib/a.so", origin::DRIFT, false), reason::ORIGIN);
        assert_eq!(mapped(plain, "/tmp/own", origin::DRIFT, false), 0);
        assert_eq!(mapped(plain, "/memfd:x", origin::MEMORY, false), reason::MEMORY);
        assert_eq!(mapped(plain, "/x", origin::UNKNOWN, false), reason::ORIGIN_UNKNOWN);
        let open = "allow: [], memory: allow, jit: allow";
        assert_eq!(mapped(open, "/memfd:x", origin::MEMORY, true), 0);
        let listed = "allow: [], libraries: [{path: /lib/*.so}, {path: /opt/**, from: \"volume:plugins\"}]";
        assert_eq!(mapped(listed, "/lib/a.so", origin::IMAGE, false), 0);
        assert_eq!(mapped(listed, "/lib/a.so", origin::DRIFT, false), reason::ORIGIN);
        assert_eq!(mapped(listed, "/usr/bin/nc", origin::IMAGE, false), reason::NO_RULE);
        assert_eq!(mapped(listed, ":plugins:/opt/a.so", origin::VOLUME, false), 0);
        assert_eq!(mapped("allow: [], libraries: []", "/lib/a.so", origin::IMAGE, false), reason::NO_RULE);
        // What may be mapped may not therefore be executed.
        let policy = format!(
            "apiVersion: palisade.dev/v1alpha1\nkind: ClusterProfile\nmetadata: {{name: a}}\n\
             spec: {{selector: {{}}, mode: enforce, exec: {{{listed}}}}}\n"
        );
        let image =
            compile(&unite(&parse("x", &policy).unwrap(), &ContainerFacts::default()).unwrap()).unwrap();
        let decision = evaluate(&image, &execution(b"/lib/a.so", origin::IMAGE));
        assert_eq!((decision.verdict, decision.reason), (verdict::DENIED, reason::NO_RULE));
    }

    #[test]
    fn a_rule_may_ask_who_calls_and_with_what() {
        let text = "apiVersion: palisade.dev/v1alpha1\nkind: ClusterProfile\nmetadata: {name: a}\n\
             spec: {selector: {}, mode: enforce, exec: {allow: [{path: /bin/get, parents: [/bin/check, /bin/cron]}, \
             {path: /bin/get, args: [--version]}, {path: /bin/py, args: [/app/main.py, \"**\"], sessions: workload}, \
             {path: /bin/sh, parents: /bin/py, args: [-c, \"id *\"]}]}}\n";
        let image = compile(&unite(&parse("x", text).unwrap(), &ContainerFacts::default()).unwrap()).unwrap();
        let decide = |path: &str, caller: &str, arguments: &[u8]| {
            let caller = Some(caller.as_bytes());
            let arguments = [path.as_bytes(), b"\0", arguments].concat();
            let execution = Execution {
                caller,
                arguments: Some(&arguments),
                ..execution(path.as_bytes(), origin::IMAGE)
            };
            evaluate(&image, &execution).reason
        };
        assert_eq!(decide("/bin/get", "/bin/check", b"x\0"), reason::RULE);
        assert_eq!(decide("/bin/get", "/bin/cron", b""), reason::RULE);
        assert_eq!(decide("/bin/get", "/bin/py", b"--version\0"), reason::RULE);
        assert_eq!(decide("/bin/get", "/bin/py", b"x\0"), reason::ARGUMENTS);
        assert_eq!(decide("/bin/py", "/bin/check", b"/app/main.py\0-v\0"), reason::RULE);
        assert_eq!(decide("/bin/py", "/bin/check", b"-c\0/app/main.py\0"), reason::ARGUMENTS);
        assert_eq!(decide("/bin/sh", "/bin/py", b"-c\0id x\0"), reason::RULE);
        assert_eq!(decide("/bin/sh", "/bin/py", b"-c\0ls\0"), reason::ARGUMENTS);
        assert_eq!(decide("/bin/sh", "/bin/check", b"-c\0id x\0"), reason::PARENT);
        assert_eq!(
            decide("/bin/check", "/bin/check", b""),
            reason::NO_RULE,
            "a parent needs a rule of its own"
        );
        // Neither a program that is not the image's nor arguments that nobody knows meet a condition.
        let unknown = Execution { arguments: None, ..execution(b"/bin/get", origin::IMAGE) };
        assert_eq!(evaluate(&image, &unknown).reason, reason::ARGUMENTS);
        let other = Execution { session: session::ENTERED, ..execution(b"/bin/py", origin::IMAGE) };
        assert_eq!(evaluate(&image, &other).reason, reason::SESSION);
    }

    #[test]
    fn an_unknown_path_is_refused_even_where_a_pattern_would_match() {
        let unknown = Execution { failure: reason::PATH_TOO_LONG, ..execution(b"/opt/x", origin::IMAGE) };
        let decision = evaluate(&image("enforce"), &unknown);
        assert_eq!((decision.verdict, decision.reason), (verdict::DENIED, reason::PATH_TOO_LONG));
    }
}
