//! What this kernel can do, found by trying.

use std::{os::fd::FromRawFd as _, path::Path};

use aya::{programs::ProgramType, sys::is_program_supported};

/// The kernel's abilities that the choice of tier and object depends on.
#[derive(Clone, Debug)]
pub struct Features {
    /// `uname -r`.
    pub release: String,
    /// The active security modules, in order; `None` when securityfs is not to be had.
    pub security_modules: Option<Vec<String>>,
    /// Atomic fetch-add in programs (5.12).
    pub fetch_add: bool,
    pub raw_tracepoint: bool,
    pub lsm: bool,
}

impl Features {
    /// Whether BPF LSM programs would be called, or why not.
    pub fn lsm_is_active(&self) -> Result<(), String> {
        if !self.lsm {
            return Err("the kernel refuses programs of type LSM".to_owned());
        }
        match &self.security_modules {
            Some(modules) if modules.iter().any(|module| module == "bpf") => Ok(()),
            Some(modules) => Err(format!(
                "bpf is not among the active security modules ({}); add it to the kernel's lsm= parameter",
                modules.join(",")
            )),
            None => Err("the list of active security modules cannot be read (securityfs)".to_owned()),
        }
    }
}

/// Tries everything.
pub fn features() -> Features {
    Features {
        release: rustix::system::uname().release().to_string_lossy().into_owned(),
        security_modules: security_modules(),
        fetch_add: has_fetch_add(),
        raw_tracepoint: is_program_supported(ProgramType::RawTracePoint).unwrap_or(false),
        lsm: is_program_supported(ProgramType::Lsm(aya::programs::LsmAttachType::Mac)).unwrap_or(false),
    }
}

/// Reads the list, from a private mount of securityfs when none is mounted.
fn security_modules() -> Option<Vec<String>> {
    const LIST: &str = "/sys/kernel/security/lsm";
    let read = |path: &Path| {
        let text = std::fs::read_to_string(path).ok()?;
        Some(text.trim().split(',').map(str::to_owned).collect())
    };
    read(Path::new(LIST)).or_else(|| {
        let folder = tempfile::tempdir().ok()?;
        rustix::mount::mount(
            "securityfs",
            folder.path(),
            "securityfs",
            rustix::mount::MountFlags::RDONLY,
            None,
        )
        .ok()?;
        let list = read(&folder.path().join("lsm"));
        let _best_effort = rustix::mount::unmount(folder.path(), rustix::mount::UnmountFlags::DETACH);
        list
    })
}

/// Loads `r0 = 0; *(u64 *)(r10 - 8) = 0; r1 = 1; r1 = atomic_fetch_add(r10 - 8, r1); exit`.
fn has_fetch_add() -> bool {
    // Encoding of `struct bpf_insn`: opcode, registers (source << 4 | destination), offset, immediate.
    let instructions: [(u8, u8, i16, i32); 5] = [
        (0xb7, 0x00, 0, 0),
        (0x7a, 0x0a, -8, 0),
        (0xb7, 0x01, 0, 1),
        (0xdb, 0x1a, -8, 0x01),
        (0x95, 0x00, 0, 0),
    ];
    let code: Vec<u8> = instructions
        .iter()
        .flat_map(|(opcode, registers, offset, immediate)| {
            let mut bytes = vec![*opcode, *registers];
            bytes.extend(offset.to_le_bytes());
            bytes.extend(immediate.to_le_bytes());
            bytes
        })
        .collect();
    const BPF_PROG_LOAD: libc::c_long = 5;
    const BPF_PROG_TYPE_RAW_TRACEPOINT: u32 = 17;
    /// The head of `union bpf_attr` for `BPF_PROG_LOAD`.
    #[repr(C)]
    struct Load {
        program_type: u32,
        instructions: u32,
        code: u64,
        license: u64,
        rest: [u64; 12],
    }
    let load = Load {
        program_type: BPF_PROG_TYPE_RAW_TRACEPOINT,
        instructions: instructions.len() as u32,
        code: code.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        rest: [0; 12],
    };
    // SAFETY: the structure is initialised, its pointers live until the call returns, and its size is passed.
    let result = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const load, size_of::<Load>()) };
    if result < 0 {
        return false;
    }
    // SAFETY: the kernel just returned this descriptor, which nobody else owns.
    drop(unsafe { std::os::fd::OwnedFd::from_raw_fd(result as i32) });
    true
}
