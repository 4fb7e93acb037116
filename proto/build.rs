//! Generates the code; the .proto files are compiled by a library, so no system compiler is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=palisade");
    let files = ["palisade/v1/record.proto", "palisade/v1/delivery.proto", "palisade/v1/query.proto"];
    let descriptors = protox::compile(files, ["."])?;
    let output = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(output.join("descriptors.bin"), prost::Message::encode_to_vec(&descriptors))?;
    tonic_prost_build::configure()
        .bytes(".palisade.v1.Batch")
        .bytes(".palisade.v1.EventsResponse")
        .btree_map(".")
        .compile_fds(descriptors)?;
    Ok(())
}
