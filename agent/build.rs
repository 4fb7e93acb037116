//! Finds the eBPF objects that the agent carries.

use std::path::PathBuf;

fn main() {
    println!("cargo:rerun-if-env-changed=PALISADE_EBPF_OBJECTS");
    let folder = std::env::var_os("PALISADE_EBPF_OBJECTS").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/ebpf/plain"),
        PathBuf::from,
    );
    for (variable, file) in
        [("PALISADE_OBJECT_FETCH_ADD", "fetch-add.o"), ("PALISADE_OBJECT_LANES", "lanes.o")]
    {
        let path = folder.join(file);
        println!("cargo:rerun-if-changed={}", path.display());
        if !path.exists() {
            println!(
                "cargo:error=there is no eBPF object at {}; run `cargo xtask build` first",
                path.display()
            );
        }
        println!("cargo:rustc-env={variable}={}", path.display());
    }
}
