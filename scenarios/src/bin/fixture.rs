//! What runs inside the test images: a workload that behaves, and an attacker that prepares an execution which an
//! allowlist must refuse, then tries it.
//!
//! The exit code tells the outcome from outside: 42 when the payload ran, the `errno` of a refused exec, 77 when
//! the kernel cannot do what the attack needs, 137 when the process was killed.

use std::{
    ffi::CString,
    fs, io,
    os::unix::{ffi::OsStrExt as _, fs::PermissionsExt as _},
    path::Path,
    time::{Duration, Instant},
};

const PAYLOAD_RAN: i32 = 42;
const NOT_POSSIBLE: i32 = 77;
const USAGE: i32 = 64;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let name = arguments.first().map(|path| path.rsplit('/').next().unwrap_or(path)).unwrap_or_default();
    let words: Vec<&str> = arguments.iter().skip(1).map(String::as_str).collect();
    let code = match (name, words.as_slice()) {
        ("pause", _) | (_, ["sleep", ..]) => wait_for_ever(),
        (_, ["true", ..]) => 0,
        (_, ["payload", ..]) => PAYLOAD_RAN,
        (_, ["attack", attack, nonce]) => attack_by_name(attack, nonce),
        (_, ["run", path, rest @ ..]) => execute(Path::new(path), rest),
        (_, ["after", file, program, rest @ ..]) => after(Path::new(file), Path::new(program), rest),
        (_, ["wake", pid]) => wake(pid),
        (_, ["rebind", from, to, program, rest @ ..]) => {
            rebind(Path::new(from), Path::new(to), Path::new(program), rest)
        }
        (_, ["escape", program, rest @ ..]) => escape(Path::new(program), rest),
        (_, ["generate", path, nonce, count, rate]) => generate(path, nonce, count, rate),
        (_, ["loop", path, count]) => exec_loop(path, count),
        _ => {
            eprintln!("unknown: {words:?}");
            USAGE
        }
    };
    std::process::exit(code);
}

/// Waits until killed. Reaps orphans, since it may be the first process of a pid namespace.
fn wait_for_ever() -> ! {
    // SAFETY: setting a disposition to "ignore" runs no handler; children are then reaped by the kernel.
    unsafe {
        libc::signal(libc::SIGCHLD, libc::SIG_IGN);
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGTERM);
        libc::sigaddset(&raw mut set, libc::SIGINT);
        libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
        let mut signal = 0;
        libc::sigwait(&raw const set, &raw mut signal);
    }
    std::process::exit(0)
}

/// Executes `program` in this process once `file` exists.
fn after(file: &Path, program: &Path, rest: &[&str]) -> i32 {
    while !file.exists() {
        std::thread::sleep(Duration::from_millis(20));
    }
    execute(program, rest)
}

/// Tries to let a stopped process go: by a signal, by a file descriptor that sends one, as a tracer. Returns 0 when
/// nobody objected to one of these.
fn wake(pid: &str) -> i32 {
    let Ok(pid) = pid.parse::<libc::pid_t>() else { return USAGE };
    let mut ends = [0; 2];
    // SAFETY: the calls take numbers, descriptors that are open, and a place for two of them.
    unsafe {
        if libc::kill(pid, libc::SIGCONT) == 0 || libc::ptrace(libc::PTRACE_SEIZE, pid, 0, 0) == 0 {
            return 0;
        }
        // F_SETSIG of fcntl(2) on Linux, which the library does not name.
        const F_SETSIG: libc::c_int = 10;
        if libc::pipe(ends.as_mut_ptr()) != 0
            || libc::fcntl(ends[0], libc::F_SETOWN, pid) != 0
            || libc::fcntl(ends[0], F_SETSIG, libc::SIGCONT) != 0
            || libc::fcntl(ends[0], libc::F_SETFL, libc::O_ASYNC) != 0
            || libc::write(ends[1], [0_u8].as_ptr().cast(), 1) != 1
        {
            return NOT_POSSIBLE;
        }
    }
    1
}

/// Puts the folder `from` in the place of `to`, as anybody can in a user namespace of his own, and executes `program`.
fn rebind(from: &Path, to: &Path, program: &Path, rest: &[&str]) -> i32 {
    match enter_user_namespace().and_then(|()| bind(from, to)) {
        Ok(()) => execute(program, rest),
        Err(error) => {
            eprintln!("rebind {}: {error}", from.display());
            NOT_POSSIBLE
        }
    }
}

/// Enters the mount namespace of the first process, as `nsenter -t 1 -m` does, and executes `program` there.
fn escape(program: &Path, rest: &[&str]) -> i32 {
    let Ok(namespace) = fs::File::open("/proc/1/ns/mnt") else { return NOT_POSSIBLE };
    // SAFETY: the call takes a descriptor that is open and no pointer; this process has one thread.
    if unsafe { libc::setns(std::os::fd::AsRawFd::as_raw_fd(&namespace), libc::CLONE_NEWNS) } != 0 {
        return NOT_POSSIBLE;
    }
    execute(program, rest)
}

/// Executes `path` in this process. Returns the errno when that fails.
fn execute(path: &Path, rest: &[&str]) -> i32 {
    let program = c_string(path);
    let mut owned = vec![program.clone()];
    owned.extend(rest.iter().map(|word| c_string(Path::new(word))));
    let mut pointers: Vec<_> = owned.iter().map(|word| word.as_ptr()).collect();
    pointers.push(std::ptr::null());
    // SAFETY: program and arguments are terminated strings that live until the call returns.
    unsafe { libc::execv(program.as_ptr(), pointers.as_ptr()) };
    let error = io::Error::last_os_error();
    eprintln!("exec {}: {error}", path.display());
    error.raw_os_error().unwrap_or(USAGE)
}

fn c_string(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).unwrap_or_default()
}

fn attack_by_name(attack: &str, nonce: &str) -> i32 {
    match prepare(attack, nonce) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("{attack}: {error}");
            NOT_POSSIBLE
        }
    }
}

/// The two allowed programs of the test image, and one that is not.
const ALLOWED: &str = "/usr/bin/workload";
const THIRD: &str = "/usr/bin/third";

fn prepare(attack: &str, nonce: &str) -> io::Result<i32> {
    let payload = ["payload", nonce];
    let scratch = Path::new("/tmp/attack");
    fs::create_dir_all(scratch)?;
    Ok(match attack {
        "none" => execute(Path::new(ALLOWED), &payload),
        "third" => execute(Path::new(THIRD), &payload),
        "script" => execute(Path::new("/usr/bin/script"), &payload),
        "copy" => {
            let copy = scratch.join("workload");
            install(&fs::read(ALLOWED)?, &copy)?;
            execute(&copy, &payload)
        }
        "copy-over" => {
            // The allowed path itself, with other bytes.
            let bytes = fs::read(THIRD)?;
            fs::remove_file(ALLOWED)?;
            install(&bytes, Path::new(ALLOWED))?;
            execute(Path::new(ALLOWED), &payload)
        }
        "rename" => {
            fs::rename(THIRD, ALLOWED)?;
            execute(Path::new(ALLOWED), &payload)
        }
        "hardlink" => {
            fs::remove_file(ALLOWED)?;
            fs::hard_link(THIRD, ALLOWED)?;
            execute(Path::new(ALLOWED), &payload)
        }
        "symlink" => {
            // Judged by its target, which is not allowed.
            let link = scratch.join("workload");
            std::os::unix::fs::symlink(THIRD, &link)?;
            execute(&link, &payload)
        }
        "chroot" => {
            let inside = scratch.join(&ALLOWED[1..]);
            install(&fs::read(THIRD)?, &inside)?;
            std::os::unix::fs::chroot(scratch)?;
            std::env::set_current_dir("/")?;
            execute(Path::new(ALLOWED), &payload)
        }
        "userns-tmpfs" => {
            let bytes = fs::read(THIRD)?;
            enter_user_namespace()?;
            mount("tmpfs", "/usr/bin", "tmpfs", "")?;
            install(&bytes, Path::new(ALLOWED))?;
            execute(Path::new(ALLOWED), &payload)
        }
        "userns-overlay" => {
            // overlayfs does not stack on the container's own root everywhere, so the layer is on a tmpfs.
            let bytes = fs::read(THIRD)?;
            enter_user_namespace()?;
            mount("tmpfs", "/mnt", "tmpfs", "")?;
            install(&bytes, Path::new("/mnt/lower/workload"))?;
            fs::create_dir("/mnt/second")?;
            mount("overlay", "/usr/bin", "overlay", "lowerdir=/mnt/lower:/mnt/second")?;
            execute(Path::new(ALLOWED), &payload)
        }
        "userns-bind" => {
            let copy = scratch.join("workload");
            install(&fs::read(THIRD)?, &copy)?;
            enter_user_namespace()?;
            bind(&copy, Path::new(ALLOWED))?;
            execute(Path::new(ALLOWED), &payload)
        }
        "memfd" => execute_memfd(&fs::read(THIRD)?, &payload)?,
        "tmpfs" => {
            // The one tmpfs of an ordinary container that programs may run from.
            let path = Path::new("/dev/workload");
            install(&fs::read(ALLOWED)?, path)?;
            execute(path, &payload)
        }
        "deep" => {
            // Deeper than any honest path; relative steps, so that no single string is too long.
            std::env::set_current_dir(scratch)?;
            let bytes = fs::read(ALLOWED)?;
            for _ in 0..80 {
                fs::create_dir("d")?;
                std::env::set_current_dir("d")?;
            }
            install(&bytes, Path::new("workload"))?;
            execute(Path::new("./workload"), &payload)
        }
        "long" => {
            std::env::set_current_dir(scratch)?;
            let bytes = fs::read(ALLOWED)?;
            let name = "n".repeat(250);
            for _ in 0..24 {
                fs::create_dir(&name)?;
                std::env::set_current_dir(&name)?;
            }
            install(&bytes, Path::new("workload"))?;
            execute(Path::new("./workload"), &payload)
        }
        "proc-fd" => {
            use std::os::fd::AsRawFd as _;
            let file = fs::File::open(THIRD)?;
            // SAFETY: the descriptor is open; clearing close-on-exec keeps the link alive.
            unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFD, 0) };
            execute(Path::new(&format!("/proc/self/fd/{}", file.as_raw_fd())), &payload)
        }
        other => {
            eprintln!("no attack is called {other}");
            USAGE
        }
    })
}

fn install(bytes: &[u8], path: &Path) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(path, bytes)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
}

fn checked(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn enter_user_namespace() -> io::Result<()> {
    // SAFETY: plain system calls without pointers.
    let (uid, gid) = unsafe { (libc::getuid(), libc::getgid()) };
    // SAFETY: as above.
    checked(unsafe { libc::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNS) })?;
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/uid_map", format!("0 {uid} 1"))?;
    fs::write("/proc/self/gid_map", format!("0 {gid} 1"))?;
    Ok(())
}

fn mount(source: &str, target: &str, kind: &str, options: &str) -> io::Result<()> {
    let [source, target, kind, options] =
        [source, target, kind, options].map(|text| c_string(Path::new(text)));
    // SAFETY: all strings are terminated and live until the call returns.
    checked(unsafe {
        libc::mount(source.as_ptr(), target.as_ptr(), kind.as_ptr(), 0, options.as_ptr().cast())
    })?;
    Ok(())
}

fn bind(source: &Path, target: &Path) -> io::Result<()> {
    let [source, target] = [source, target].map(c_string);
    // SAFETY: as in `mount`; a bind mount takes neither type nor options.
    checked(unsafe {
        libc::mount(source.as_ptr(), target.as_ptr(), std::ptr::null(), libc::MS_BIND, std::ptr::null())
    })?;
    Ok(())
}

fn execute_memfd(bytes: &[u8], rest: &[&str]) -> io::Result<i32> {
    use std::{io::Write as _, os::fd::FromRawFd as _};
    // SAFETY: the name is a terminated string.
    let descriptor = checked(unsafe { libc::memfd_create(c"workload".as_ptr(), 0) })?;
    // SAFETY: the descriptor was just made and belongs to nobody else.
    let mut file = unsafe { fs::File::from_raw_fd(descriptor) };
    file.write_all(bytes)?;
    let mut owned = vec![c_string(Path::new(ALLOWED))];
    owned.extend(rest.iter().map(|word| c_string(Path::new(word))));
    let mut pointers: Vec<_> = owned.iter().map(|word| word.as_ptr()).collect();
    pointers.push(std::ptr::null());
    let environment: [*const libc::c_char; 1] = [std::ptr::null()];
    // SAFETY: descriptor, strings and arrays live until the call returns.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            descriptor,
            c"".as_ptr(),
            pointers.as_ptr(),
            environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    let error = io::Error::last_os_error();
    eprintln!("execveat of a memfd: {error}");
    Ok(error.raw_os_error().unwrap_or(USAGE))
}

/// Forks and executes `path`; returns its wait status, or an error of the fork.
fn spawn(path: &CString, arguments: &[*const libc::c_char]) -> io::Result<libc::c_int> {
    // SAFETY: the child only executes or exits; nothing of this single-threaded process is shared.
    unsafe {
        let child = libc::fork();
        if child == 0 {
            libc::execv(path.as_ptr(), arguments.as_ptr());
            libc::_exit(127);
        }
        checked(child)?;
        let mut status = 0;
        checked(libc::waitpid(child, &raw mut status, 0))?;
        Ok(status)
    }
}

/// Executes `path` `count` times with a number in its arguments, at most `rate` times a second, and prints how
/// many ran.
fn generate(path: &str, nonce: &str, count: &str, rate: &str) -> i32 {
    let (Ok(count), Ok(rate)) = (count.parse::<u64>(), rate.parse::<f64>()) else { return USAGE };
    let program = c_string(Path::new(path));
    let begun = Instant::now();
    let mut ran = 0_u64;
    for number in 0..count {
        let due = Duration::from_secs_f64(number as f64 / rate);
        if let Some(early) = due.checked_sub(begun.elapsed()) {
            std::thread::sleep(early);
        }
        let numbered = c_string(Path::new(&format!("{nonce}-{number}")));
        let arguments = [program.as_ptr(), c"true".as_ptr(), numbered.as_ptr(), std::ptr::null()];
        match spawn(&program, &arguments) {
            Ok(0) => ran += 1,
            Ok(_) => {}
            Err(error) => {
                eprintln!("fork: {error}");
                return USAGE;
            }
        }
    }
    println!("{ran}");
    0
}

/// Executes `path` `count` times as fast as it can and prints the nanoseconds of the guest's clock it took.
fn exec_loop(path: &str, count: &str) -> i32 {
    let Ok(count) = count.parse::<u64>() else { return USAGE };
    let program = c_string(Path::new(path));
    let arguments = [program.as_ptr(), c"true".as_ptr(), std::ptr::null()];
    let begun = Instant::now();
    for _ in 0..count {
        if !matches!(spawn(&program, &arguments), Ok(0)) {
            eprintln!("a loop's exec failed");
            return 1;
        }
    }
    println!("{}", begun.elapsed().as_nanos());
    0
}
