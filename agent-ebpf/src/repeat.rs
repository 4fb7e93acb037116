//! Loops. Where the kernel has `bpf_loop` (5.17), the verifier looks at the body of one once instead of once a turn.
//!
//! Kernels before 6.7 take what they find in the first turn for what every turn finds, and remove what that leaves out. So whatever
//! changes from turn to turn is kept in a map's memory ([`crate::scratch::Turns`]), of which the verifier assumes nothing; on the stack
//! is only what stays the same, and an outcome that any turn may set.

/// What a body returns to be called again.
pub const AGAIN: i64 = 0;
/// What it returns to end the loop.
pub const DONE: i64 = 1;

/// A body: takes the number of the turn, from 0, and what the loop is about.
pub type Body<T> = unsafe extern "C" fn(u64, *mut T) -> i64;

/// Calls `body` at most `turns` times.
#[inline(always)]
pub fn repeat<T>(turns: u32, about: &mut T, body: Body<T>) {
    #[cfg(feature = "fetch-add")]
    if crate::maps::setting!(have_loop) == 1 {
        let about: *mut T = about;
        // SAFETY: the body takes what is passed on to it, which lives on the stack until the helper returns.
        unsafe {
            aya_ebpf::helpers::generated::bpf_loop(turns, body as *const () as *mut _, about.cast(), 0);
        }
        return;
    }
    let mut turn = 0;
    while turn < turns {
        // SAFETY: as above.
        if unsafe { body(u64::from(turn), about) } != AGAIN {
            return;
        }
        turn += 1;
    }
}
