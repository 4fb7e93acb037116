//! The verdict on a policy image, as the kernel gives it.

use palisade_abi::codes::{mode, origin, reason, verdict};

use crate::image::PolicyImage;

/// A verdict and its reason, as codes of [`palisade_abi::codes`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    pub verdict: u8,
    pub reason: u8,
}

/// Judges the execution of `path` with origin `file_origin` (a code). On a volume the path is a text of
/// [`palisade_abi::volume`]. `failure` is the reason why the path is not known, or 0.
#[must_use]
pub fn evaluate(image: &PolicyImage, path: &[u8], file_origin: u8, failure: u8) -> Decision {
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
    let origins = image.exact.get(path).copied().unwrap_or(0) | image.globs.origins(path);
    if origins & (1 << u32::from(file_origin)) != 0 {
        Decision { verdict: verdict::ALLOWED, reason: reason::RULE }
    } else if file_origin == origin::UNKNOWN {
        mismatch(reason::ORIGIN_UNKNOWN)
    } else if origins != 0 {
        mismatch(reason::ORIGIN)
    } else {
        mismatch(reason::NO_RULE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{document::parse, image::compile, policy::unite, selector::ContainerFacts};

    fn image(mode: &str) -> PolicyImage {
        let text = format!(
            "apiVersion: palisade.dev/v1alpha1\nkind: ClusterProfile\nmetadata: {{name: a}}\n\
             spec: {{selector: {{}}, mode: {mode}, exec: {{allow: [{{path: /bin/a}}, {{path: /opt/**, from: [image, drift]}},
             {{path: /opt/plugins/**, from: \"volume:plugins\"}}, {{path: /tools/run, from: [host, \"volume:tools\"]}},
             {{path: /etc/hosts, from: \"volume:/etc/hosts\"}}]}}}}\n"
        );
        compile(&unite(&parse("x", &text).unwrap(), &ContainerFacts::default()).unwrap()).unwrap()
    }

    #[test]
    fn a_verdict_depends_on_path_origin_and_mode() {
        let decide = |mode, path: &str, origin| {
            let decision = evaluate(&image(mode), path.as_bytes(), origin, 0);
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
    fn a_rule_for_a_volume_is_for_that_volume_alone() {
        let decide = |path: &str, origin| {
            let decision = evaluate(&image("enforce"), path.as_bytes(), origin, 0);
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
        let decision = evaluate(&image("enforce"), b"/opt/x", origin::IMAGE, reason::PATH_TOO_LONG);
        assert_eq!((decision.verdict, decision.reason), (verdict::DENIED, reason::PATH_TOO_LONG));
    }
}
