//! The verdict on a policy image, as the kernel gives it.

use palisade_abi::{
    codes::{mode, origin, reason, verdict},
    maps::{grant, grant_to_any},
};

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
}

/// Judges an execution.
#[must_use]
pub fn evaluate(image: &PolicyImage, execution: &Execution<'_>) -> Decision {
    let Execution { path, origin, session, failure } = *execution;
    if !image.restricts_exec {
        return Decision { verdict: verdict::ALLOWED, reason: reason::NO_RULE };
    }
    let mismatch = |reason| Decision {
        verdict: if image.mode.code() == mode::AUDIT { verdict::AUDITED } else { verdict::DENIED },
        reason,
    };
    if failure != 0 {
        return mismatch(failure);
    }
    let grants = image.exact.get(path).copied().unwrap_or(0) | image.globs.grants(path);
    if grants & grant(origin, session) != 0 {
        Decision { verdict: verdict::ALLOWED, reason: reason::RULE }
    } else if origin == origin::UNKNOWN {
        mismatch(reason::ORIGIN_UNKNOWN)
    } else if grants & grant_to_any(origin) != 0 {
        mismatch(reason::SESSION)
    } else if grants != 0 {
        mismatch(reason::ORIGIN)
    } else {
        mismatch(reason::NO_RULE)
    }
}

#[cfg(test)]
mod tests {
    use palisade_abi::codes::session;

    use super::*;
    use crate::{document::parse, image::compile, policy::unite, selector::ContainerFacts};

    fn execution(path: &[u8], origin: u8) -> Execution<'_> {
        Execution { path, origin, session: session::WORKLOAD, failure: 0 }
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
    fn an_unknown_path_is_refused_even_where_a_pattern_would_match() {
        let unknown = Execution { failure: reason::PATH_TOO_LONG, ..execution(b"/opt/x", origin::IMAGE) };
        let decision = evaluate(&image("enforce"), &unknown);
        assert_eq!((decision.verdict, decision.reason), (verdict::DENIED, reason::PATH_TOO_LONG));
    }
}
