//! Generates the code; the .proto files are compiled by a library, so no system compiler is needed.

use std::path::PathBuf;

/// Ours: records and services.
const OURS: &[&str] = &["palisade/v1/record.proto", "palisade/v1/delivery.proto", "palisade/v1/query.proto"];
/// The container runtimes': what the agent speaks of their interfaces.
const RUNTIME: &[&str] = &[
    "runtime/nri.proto",
    "runtime/ttrpc.proto",
    "runtime/containers.proto",
    "runtime/images.proto",
    "runtime/events.proto",
    "runtime/namespaces.proto",
    "runtime/tasks.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=palisade");
    println!("cargo:rerun-if-changed=runtime");
    let descriptors = protox::compile(OURS, ["."])?;
    let output = PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(output.join("descriptors.bin"), prost::Message::encode_to_vec(&descriptors))?;
    tonic_prost_build::configure()
        .bytes(".palisade.v1.Batch")
        .bytes(".palisade.v1.EventsResponse")
        .btree_map(".")
        .compile_fds(descriptors)?;
    tonic_prost_build::configure()
        .build_server(false)
        .bytes(".ttrpc")
        .btree_map(".")
        .compile_fds(protox::compile(RUNTIME, ["."])?)?;
    Ok(())
}
