//! A ring buffer as something to wait for.

use std::os::fd::{AsRawFd, RawFd};

use anyhow::{Context as _, Result};
use aya::maps::{MapData, RingBuf};
use tokio::io::{Interest, unix::AsyncFd};

struct Pollable(RingBuf<MapData>);

impl AsRawFd for Pollable {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// The reading end of one ring.
pub struct Ring {
    inner: AsyncFd<Pollable>,
}

impl Ring {
    pub(super) fn new(ring: RingBuf<MapData>) -> Result<Self> {
        // SAFETY: the descriptor belongs to the ring inside, which the AsyncFd owns and never replaces.
        let inner = unsafe { AsyncFd::register_with_interest(Pollable(ring), Interest::READABLE) }
            .map_err(std::io::Error::from)
            .context("cannot wait for the kernel's ring")?;
        Ok(Self { inner })
    }

    /// Waits until the kernel wakes the reader.
    pub async fn readable(&mut self) -> Result<()> {
        self.inner.readable_mut().await?.clear_ready();
        Ok(())
    }

    /// Hands up to `most` entries to `take` and returns how many there were.
    pub fn drain(&mut self, most: usize, mut take: impl FnMut(&[u8])) -> usize {
        let ring = &mut self.inner.get_mut().0;
        let mut count = 0;
        while count < most {
            let Some(entry) = ring.next() else { break };
            take(&entry);
            count += 1;
        }
        count
    }
}
