//! Profiles as anybody may write them: read, unite, compile, and judge with what came of it.

#![no_main]

use libfuzzer_sys::fuzz_target;
use palisade_abi::codes::{origin, session};
use palisade_profile::{
    document,
    exec::evaluate::{Execution, evaluate},
    image,
    origin::Origin,
    policy,
};

fuzz_target!(|text: &str| {
    let Ok(profiles) = document::parse("fuzz", text) else { return };
    for profile in &profiles {
        let Ok(image) = image::compile(&policy::alone(profile)) else { continue };
        for rule in profile.exec.iter().flat_map(|exec| &exec.allow) {
            let exact = rule.path.exact();
            let path = exact.unwrap_or(rule.path.as_str());
            let execution = Execution {
                path: path.as_bytes(),
                origin: origin::IMAGE,
                session: session::WORKLOAD,
                failure: 0,
                caller: None,
                arguments: None,
            };
            let decision = evaluate(&image, &execution);
            // A path without wildcards that is allowed from the image is allowed.
            let for_workload = rule.sessions.codes().any(|code| code == session::WORKLOAD);
            let always = rule.parents.is_empty() && rule.arguments.is_none() && rule.sha256.is_none();
            if always && exact.is_some() && for_workload && rule.from.contains(&Origin::Image) {
                assert_eq!(decision.verdict, palisade_abi::codes::verdict::ALLOWED, "{path}");
            }
        }
    }
});
