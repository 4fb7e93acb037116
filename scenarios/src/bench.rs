use std::{path::Path, process::ExitCode};
pub async fn run(_cri: &Path, _count: u64, _repeats: u32) -> anyhow::Result<ExitCode> {
    anyhow::bail!("later")
}
