//! A network between agent and collector that can be made slow, silent, or cut.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Result;

/// Bytes that are passed on at once.
const CHUNK: usize = 16 << 10;
/// How often a connection that passes nothing looks whether it may.
const LOOK: Duration = Duration::from_millis(10);

#[derive(Default)]
struct State {
    connections: Mutex<Vec<TcpStream>>,
    /// Nothing passes, and nobody is told.
    silent: AtomicBool,
    /// Milliseconds that each chunk waits at most, drawn for each direction by itself.
    slow: AtomicU64,
    draws: AtomicU64,
    ended: AtomicBool,
}

impl State {
    /// A number below `bound`, different each time.
    fn draw(&self, bound: u64) -> u64 {
        let mixed = self.draws.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        let mixed = (mixed ^ (mixed >> 31)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed >> 33) % bound.max(1)
    }
}

/// A proxy in front of one address, until it is dropped.
pub struct Proxy {
    pub address: SocketAddr,
    state: Arc<State>,
}

impl Proxy {
    pub fn start(target: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = listener.local_addr()?;
        let state = Arc::new(State::default());
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if shared.ended.load(Ordering::Relaxed) {
                    return;
                }
                // Nobody at the other end: nobody here.
                let Ok(other) = TcpStream::connect(target) else { continue };
                let _never_mind = stream.set_nodelay(true).and_then(|()| other.set_nodelay(true));
                for (from, to) in [(&stream, &other), (&other, &stream)] {
                    let (Ok(from), Ok(to), Ok(kept)) = (from.try_clone(), to.try_clone(), from.try_clone())
                    else {
                        continue;
                    };
                    shared.connections.lock().unwrap_or_else(PoisonError::into_inner).push(kept);
                    let shared = Arc::clone(&shared);
                    std::thread::spawn(move || pass(&shared, from, to));
                }
            }
        });
        Ok(Self { address, state })
    }

    /// Cuts all connections, wherever they are.
    pub fn cut(&self) {
        for connection in self.state.connections.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            let _gone = connection.shutdown(Shutdown::Both);
        }
    }

    pub fn be_silent(&self, silent: bool) {
        self.state.silent.store(silent, Ordering::Relaxed);
    }

    /// Up to so many milliseconds for each chunk.
    pub fn be_slow(&self, most: u64) {
        self.state.slow.store(most, Ordering::Relaxed);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.state.ended.store(true, Ordering::Relaxed);
        self.cut();
        // So that it looks.
        let _gone = TcpStream::connect(self.address);
    }
}

fn pass(state: &State, mut from: TcpStream, mut to: TcpStream) {
    let mut chunk = vec![0; CHUNK];
    while let Ok(length @ 1..) = from.read(&mut chunk) {
        let slow = state.slow.load(Ordering::Relaxed);
        if slow > 0 {
            std::thread::sleep(Duration::from_millis(state.draw(slow)));
        }
        while state.silent.load(Ordering::Relaxed) && !state.ended.load(Ordering::Relaxed) {
            std::thread::sleep(LOOK);
        }
        if to.write_all(&chunk[..length]).is_err() {
            break;
        }
    }
    let _gone = to.shutdown(Shutdown::Both);
    let _gone = from.shutdown(Shutdown::Both);
}
