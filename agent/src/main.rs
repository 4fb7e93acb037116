mod kernel;
fn main() -> anyhow::Result<()> {
    let rt = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let _g = rt.enter();
    let f = kernel::features();
    println!("{f:?}"); let l = kernel::Layout::of_running_kernel()?; println!("{:?}", l);
    let mut k = kernel::Kernel::load(&kernel::Options{unidentified: palisade_profile::document::Mode::Audit, sizes: kernel::Sizes{slots:2048,processes:32768,rules:32768,glob_states:4096,ring_bytes:8<<20}}, &f)?;
    println!("{:?} {:?}", k.tier, k.tier_reason);
    for p in &k.programs { println!("{p:?}"); }
    println!("absent {:?} {:?}", k.layout.absent, k.layout.overlay);
    k.attach()?;
    println!("attached");
    Ok(())
}
