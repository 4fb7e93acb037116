//! The rules of evolution, checked: what was released once keeps its number, name and type, or its number is reserved for ever.
//!
//! `palisade/v1/released.txt` has a line for each field and method of the last release. What was added since is not in it yet; with a release
//! `cargo test -p palisade-proto -- --ignored` writes it anew.

use std::collections::BTreeSet;

use prost_reflect::{Cardinality, DescriptorPool, MessageDescriptor};

const RELEASED: &str = include_str!("../palisade/v1/released.txt");

fn pool() -> DescriptorPool {
    DescriptorPool::decode(super::DESCRIPTORS).expect("the build has made them")
}

/// A line for each field and method.
fn lines(pool: &DescriptorPool) -> BTreeSet<String> {
    let mut lines = BTreeSet::new();
    for message in pool.all_messages().filter(is_ours) {
        for field in message.fields() {
            let many = match field.cardinality() {
                Cardinality::Repeated => "repeated ",
                Cardinality::Optional | Cardinality::Required => "",
            };
            let (number, kind, name) = (field.number(), field.kind(), field.name());
            let one_of = field.containing_oneof().map(|of| format!(" of {}", of.name())).unwrap_or_default();
            lines.insert(format!("{}: {number} = {many}{kind:?} {name}{one_of}", message.full_name()));
        }
    }
    for method in pool.services().flat_map(|service| service.methods().collect::<Vec<_>>()) {
        lines.insert(format!(
            "{}: {} -> {}, streams {} {}",
            method.full_name(),
            method.input().full_name(),
            method.output().full_name(),
            method.is_client_streaming(),
            method.is_server_streaming()
        ));
    }
    lines
}

fn is_ours(message: &MessageDescriptor) -> bool {
    message.full_name().starts_with("palisade.")
}

/// Released lines that are broken.
fn broken(pool: &DescriptorPool) -> Vec<&'static str> {
    let now = lines(pool);
    let reserved = |line: &str| -> Option<bool> {
        let (message, rest) = line.split_once(": ")?;
        let number: u32 = rest.split(' ').next()?.parse().ok()?;
        let message = pool.get_message_by_name(message)?;
        Some(
            message.get_field(number).is_none()
                && message.reserved_ranges().any(|range| range.contains(&number)),
        )
    };
    RELEASED.lines().filter(|line| !now.contains(*line) && reserved(line) != Some(true)).collect()
}

#[test]
fn what_was_released_is_still_understood() {
    let broken = broken(&pool());
    assert!(broken.is_empty(), "changed since the release, or gone without being reserved: {broken:#?}");
    assert!(RELEASED.lines().count() > 100);
}

#[test]
fn a_change_is_noticed() {
    let mut files: prost_types::FileDescriptorSet =
        prost::Message::decode(super::DESCRIPTORS).expect("they are ours");
    let hello = files
        .file
        .iter_mut()
        .flat_map(|file| &mut file.message_type)
        .find(|message| message.name() == "Hello")
        .expect("there is one");
    hello.field[3].number = Some(77);
    let pool = DescriptorPool::from_file_descriptor_set(files).expect("it is still valid");
    assert_eq!(broken(&pool), ["palisade.v1.Hello: 4 = string agent_version"]);
}

#[test]
#[ignore = "writes the schema of a release"]
fn release() {
    let lines: Vec<String> = lines(&pool()).into_iter().collect();
    std::fs::write("palisade/v1/released.txt", lines.join("\n") + "\n").expect("it can be written");
}
