//! Palisade's eBPF programs: one module per hook family, and below them what they share.
//!
//! A hook decides first and reports afterwards, so that no verdict depends on room in a ring. What cannot be
//! read or looked up is unknown, and in enforce mode unknown is refused; each such place is counted in
//! `ERRORS`. Nothing here knows about profiles: a decision is a lookup in maps that the agent filled.

#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]
#![expect(unsafe_code, reason = "maps, helpers and the kernel's memory; each block says why it is sound")]
#![cfg_attr(feature = "fetch-add", expect(internal_features, reason = "the only way to a BPF fetch-add"))]
#![cfg_attr(feature = "fetch-add", feature(core_intrinsics))]

mod agent;
mod area;
mod cgroups;
mod code;
mod context;
mod count;
mod exec;
#[cfg(feature = "generator")]
mod generate;
mod hooks;
mod judging;
mod kernel;
mod layers;
mod maps;
mod matching;
mod origin;
mod overlay;
mod path;
mod processes;
mod record;
mod repeat;
mod roots;
mod scratch;
mod slots;
mod standing;
mod tamper;
mod task;
mod volumes;

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";

// A panic that survives optimisation is an endless loop, which the verifier refuses: it fails at load time.
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
