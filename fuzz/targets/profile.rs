//! Profiles as anybody may write them: read, unite, compile, and judge with what came of it.

#![no_main]

use libfuzzer_sys::fuzz_target;
use palisade_abi::codes::origin;
use palisade_profile::{document, evaluate::evaluate, image, policy};

fuzz_target!(|text: &str| {
    let Ok(profiles) = document::parse("fuzz", text) else { return };
    for profile in &profiles {
        let Ok(image) = image::compile(&policy::alone(profile)) else { continue };
        for rule in profile.exec.iter().flatten() {
            let path = rule.path.as_str();
            let decision = evaluate(&image, path.as_bytes(), origin::IMAGE, 0);
            // A path without wildcards that is allowed from the image is allowed.
            if rule.path.is_exact() && rule.from.contains(&document::Origin::Image) {
                assert_eq!(decision.verdict, palisade_abi::codes::verdict::ALLOWED, "{path}");
            }
        }
    }
});
