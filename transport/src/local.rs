//! Unix sockets, where no certificates are: file rights decide who may connect, and the kernel tells which user did.
//!
//! A collector has two in a folder of its own, since who may ask and who may deliver are not the same.

use std::{
    io,
    os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use hyper_util::rt::TokioIo;
use rustix::{
    fd::OwnedFd,
    fs::{FlockOperation, Gid, Mode, OFlags},
    io::Errno,
};
use thiserror::Error;
use tokio::{
    net::{UnixListener, UnixSocket, UnixStream},
    sync::mpsc,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Uri;

use crate::{accept::Connection, peer::Peer};

/// Where a collector has its sockets unless it is configured otherwise.
pub const FOLDER: &str = "/run/palisade/collector";
/// Of the folder: the group gets through, and writes nothing.
const FOLDER_MODE: u32 = 0o750;
/// Of a socket for its owner and root.
const OWNER_MODE: u32 = 0o600;
/// Of a socket for the group as well.
const GROUP_MODE: u32 = 0o660;
/// Connections that the kernel keeps until they are accepted.
const BACKLOG: u32 = 1024;
/// Connections that are accepted and not served yet.
const MOST_WAITING: usize = 64;
/// How long to wait when no connection can be accepted, for want of descriptors for example.
const BREATH: Duration = Duration::from_millis(100);

/// What a socket is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    Deliver,
    Ask,
}

impl Purpose {
    /// The socket's name in its folder.
    #[must_use]
    pub fn file(self) -> &'static str {
        match self {
            Self::Deliver => "deliver.sock",
            Self::Ask => "ask.sock",
        }
    }

    /// The address of the socket in `folder`.
    #[must_use]
    pub fn address(self, folder: &Path) -> String {
        format!("unix://{}", folder.join(self.file()).display())
    }
}

/// What [`listen`] makes.
#[derive(Clone, Debug)]
pub struct Rights {
    /// Made where it is absent. It must be the process's own.
    pub folder: PathBuf,
    /// The group that may ask; absent: that of the process.
    pub group: Option<u32>,
    /// Whether that group gets at the socket for delivery, too. Which of its users may deliver is to be decided by [`Peer`].
    pub group_delivers: bool,
}

/// Why there are no sockets.
#[derive(Debug, Error)]
pub enum LocalError {
    #[error("cannot make the folder {}: {error}", path.display())]
    Folder { path: PathBuf, error: io::Error },
    #[error(
        "the folder {} belongs to user {owner}, and this is user {own}; remove it, or configure another one",
        path.display()
    )]
    Owner { path: PathBuf, owner: u32, own: u32 },
    #[error("another collector has the folder {}; stop it, or configure another folder", path.display())]
    Taken { path: PathBuf },
    #[error(
        "cannot give {} to group {group}: {error}; without root's rights a user can give it only to a group that it is in",
        path.display()
    )]
    Group { path: PathBuf, group: u32, error: io::Error },
    #[error("{} is there and is no socket; remove it, or configure another folder", path.display())]
    Occupied { path: PathBuf },
    #[error("a program listens at {} already; stop it, or configure another folder", path.display())]
    Busy { path: PathBuf },
    #[error("cannot listen at {}: {error}", path.display())]
    Listen { path: PathBuf, error: io::Error },
}

/// Listens at both sockets until what is returned is dropped. A socket of an earlier run is replaced, if nothing listens there.
///
/// # Errors
///
/// See [`LocalError`].
pub async fn listen(rights: &Rights) -> Result<ReceiverStream<io::Result<Connection>>, LocalError> {
    let Rights { folder, group, group_delivers } = rights;
    let group = group.map_or_else(rustix::process::getegid, Gid::from_raw);
    let held = Arc::new(own_folder(folder, group)?);
    let deliver_mode = if *group_delivers { GROUP_MODE } else { OWNER_MODE };
    let mut listeners = Vec::new();
    for (purpose, mode) in [(Purpose::Deliver, deliver_mode), (Purpose::Ask, GROUP_MODE)] {
        let path = folder.join(purpose.file());
        listeners.push((bind(&path, mode, group).await?, purpose, Arc::from(path)));
    }
    let (accepted, connections) = mpsc::channel(MOST_WAITING);
    for (listener, purpose, socket) in listeners {
        tokio::spawn(accept(listener, purpose, socket, accepted.clone(), Arc::clone(&held)));
    }
    Ok(ReceiverStream::new(connections))
}

/// Makes the folder, or takes one over that is the process's own. It is held for as long as what is returned.
fn own_folder(path: &Path, group: Gid) -> Result<OwnedFd, LocalError> {
    let failed = |error: io::Error| LocalError::Folder { path: path.to_owned(), error };
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(failed)?;
    }
    match std::fs::DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(error)),
        _ => {}
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let folder = rustix::fs::open(path, flags, Mode::empty()).map_err(|error| failed(error.into()))?;
    let (owner, own) = (
        rustix::fs::fstat(&folder).map_err(|error| failed(error.into()))?.st_uid,
        rustix::process::geteuid().as_raw(),
    );
    if owner != own {
        return Err(LocalError::Owner { path: path.to_owned(), owner, own });
    }
    // Between looking for a listener and taking its place no second collector may do the same.
    rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive).map_err(|error| match error {
        Errno::WOULDBLOCK => LocalError::Taken { path: path.to_owned() },
        error => failed(error.into()),
    })?;
    rustix::fs::fchown(&folder, None, Some(group)).map_err(|error| LocalError::Group {
        path: path.to_owned(),
        group: group.as_raw(),
        error: error.into(),
    })?;
    rustix::fs::fchmod(&folder, Mode::from_raw_mode(FOLDER_MODE)).map_err(|error| failed(error.into()))?;
    Ok(folder)
}

async fn bind(path: &Path, mode: u32, group: Gid) -> Result<UnixListener, LocalError> {
    let failed = |error: io::Error| LocalError::Listen { path: path.to_owned(), error };
    remove_stale(path).await?;
    let socket = UnixSocket::new_stream().map_err(failed)?;
    socket.bind(path).map_err(failed)?;
    // It listens only once it has its rights: until then nothing can connect.
    rustix::fs::chown(path, None, Some(group)).map_err(|error| LocalError::Group {
        path: path.to_owned(),
        group: group.as_raw(),
        error: error.into(),
    })?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(failed)?;
    socket.listen(BACKLOG).map_err(failed)
}

/// Removes a socket that nothing listens at.
async fn remove_stale(path: &Path) -> Result<(), LocalError> {
    let failed = |error: io::Error| LocalError::Listen { path: path.to_owned(), error };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(LocalError::Occupied { path: path.to_owned() });
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path).await {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(failed)
        }
        // Another answer than that nothing listens: a full queue, for one, is that of a listener.
        Ok(_) | Err(_) => Err(LocalError::Busy { path: path.to_owned() }),
    }
}

/// Accepts connections until nothing takes them any more.
async fn accept(
    listener: UnixListener,
    purpose: Purpose,
    socket: Arc<Path>,
    accepted: mpsc::Sender<io::Result<Connection>>,
    _held: Arc<OwnedFd>,
) {
    loop {
        let found = tokio::select! {
            () = accepted.closed() => return,
            found = listener.accept() => found,
        };
        let known = found.and_then(|(stream, _)| Ok((stream.peer_cred()?.uid(), stream)));
        match known {
            Ok((user, stream)) => {
                let peer = Peer::Local { socket: Arc::clone(&socket), purpose, user };
                if accepted.send(Ok(Connection::local(stream, peer))).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                tracing::warn!(socket = %socket.display(), %error, "a connection cannot be accepted");
                tokio::time::sleep(BREATH).await;
            }
        }
    }
}

/// What tonic asks for a URI, which is not used: the connector knows the socket.
pub const ANY: &str = "http://localhost";

/// Connects tonic to a unix socket.
#[derive(Clone, Debug)]
pub struct Connector(PathBuf);

impl Connector {
    /// To the one at `path`, whenever a connection is wanted.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        Self(path.to_owned())
    }
}

impl tower::Service<Uri> for Connector {
    type Response = TokioIo<UnixStream>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let path = self.0.clone();
        Box::pin(async move { Ok(TokioIo::new(UnixStream::connect(path).await?)) })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use tokio_stream::StreamExt as _;
    use tonic::transport::server::Connected as _;

    use super::*;

    fn rights(folder: &Path) -> Rights {
        Rights { folder: folder.to_owned(), group: None, group_delivers: false }
    }

    fn mode(path: &Path) -> u32 {
        std::fs::symlink_metadata(path).unwrap().mode() & 0o7777
    }

    async fn problem(rights: &Rights) -> String {
        listen(rights).await.map(drop).unwrap_err().to_string()
    }

    /// The tasks that have listened before end once they are scheduled.
    async fn until_listening(rights: &Rights) -> ReceiverStream<io::Result<Connection>> {
        let begun = std::time::Instant::now();
        loop {
            match listen(rights).await {
                Ok(open) => return open,
                Err(error) => assert!(begun.elapsed() < Duration::from_secs(10), "{error}"),
            }
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn rights_are_those_of_owner_and_group_whatever_was_there() {
        let outer = tempfile::tempdir().unwrap();
        let folder = outer.path().join("run/collector");
        let open = listen(&rights(&folder)).await.unwrap();
        let own = rustix::process::getegid().as_raw();
        for (name, expected) in [("", 0o750), ("deliver.sock", 0o600), ("ask.sock", 0o660)] {
            let path = folder.join(name);
            assert_eq!(mode(&path), expected, "{}", path.display());
            assert_eq!(std::fs::metadata(&path).unwrap().gid(), own, "{}", path.display());
        }
        drop(open);
        // Wider rights that a folder has already do not stay.
        let wide = outer.path().join("wide");
        std::fs::create_dir(&wide).unwrap();
        std::fs::set_permissions(&wide, std::fs::Permissions::from_mode(0o2777)).unwrap();
        let _open = listen(&Rights { group_delivers: true, ..rights(&wide) }).await.unwrap();
        for (name, expected) in [("", 0o750), ("deliver.sock", 0o660), ("ask.sock", 0o660)] {
            assert_eq!(mode(&wide.join(name)), expected, "{name}");
        }
    }

    #[tokio::test]
    async fn a_group_gets_folder_and_sockets() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: only root gives files to a group that it is not in");
            return;
        }
        let outer = tempfile::tempdir().unwrap();
        let folder = outer.path().join("collector");
        let _open = listen(&Rights { group: Some(4242), ..rights(&folder) }).await.unwrap();
        for name in ["", "deliver.sock", "ask.sock"] {
            assert_eq!(std::fs::metadata(folder.join(name)).unwrap().gid(), 4242, "{name}");
        }
    }

    #[tokio::test]
    async fn who_connects_is_known_by_socket_and_user() {
        let folder = tempfile::tempdir().unwrap();
        let mut connections = listen(&rights(folder.path())).await.unwrap();
        for purpose in [Purpose::Ask, Purpose::Deliver] {
            let path = folder.path().join(purpose.file());
            let _stream = UnixStream::connect(&path).await.unwrap();
            let peer = connections.next().await.unwrap().unwrap().connect_info();
            let user = rustix::process::geteuid().as_raw();
            assert_eq!(peer, Peer::Local { socket: Arc::from(path.as_path()), purpose, user });
            assert_eq!(peer.to_string(), format!("user/{user}"));
            assert_eq!(peer.address(), format!("unix:{}", path.display()));
        }
    }

    #[tokio::test]
    async fn a_socket_of_an_earlier_run_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ask.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let refused = UnixStream::connect(&path).await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        let open = listen(&rights(folder.path())).await.unwrap();
        UnixStream::connect(&path).await.unwrap();
        // Its own, too.
        drop(open);
        let _again = until_listening(&rights(folder.path())).await;
        UnixStream::connect(&path).await.unwrap();
    }

    #[tokio::test]
    async fn what_is_in_use_or_no_socket_is_not_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deliver.sock");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let error = problem(&rights(folder.path())).await;
        assert!(error.contains("listens at") && error.contains("deliver.sock"), "{error}");
        std::os::unix::net::UnixStream::connect(&path).expect("it is still there");
        drop(listener);
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "kept").unwrap();
        let error = problem(&rights(folder.path())).await;
        assert!(error.contains("is no socket; remove it"), "{error}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "kept");
        // A link to a socket that nothing listens at is no such socket.
        std::fs::remove_file(&path).unwrap();
        let elsewhere = folder.path().join("elsewhere");
        drop(std::os::unix::net::UnixListener::bind(&elsewhere).unwrap());
        std::os::unix::fs::symlink(&elsewhere, &path).unwrap();
        let error = problem(&rights(folder.path())).await;
        assert!(error.contains("is no socket; remove it"), "{error}");
        assert!(elsewhere.exists());
    }

    #[tokio::test]
    async fn a_folder_has_one_collector() {
        let folder = tempfile::tempdir().unwrap();
        let open = listen(&rights(folder.path())).await.unwrap();
        // Also where its sockets were taken away.
        std::fs::remove_file(folder.path().join("ask.sock")).unwrap();
        std::fs::remove_file(folder.path().join("deliver.sock")).unwrap();
        let error = problem(&rights(folder.path())).await;
        assert!(error.contains("another collector has the folder"), "{error}");
        drop(open);
    }

    #[tokio::test]
    async fn a_folder_that_is_not_ones_own_is_refused() {
        let outer = tempfile::tempdir().unwrap();
        let (real, link) = (outer.path().join("real"), outer.path().join("link"));
        std::fs::create_dir(&real).unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        let error = problem(&rights(&link)).await;
        assert!(error.contains("cannot make the folder") && error.contains("link"), "{error}");
        assert_eq!(std::fs::read_dir(&real).unwrap().count(), 0);
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&real, Some(4242), None).unwrap();
            let error = problem(&rights(&real)).await;
            assert!(error.contains("belongs to user 4242, and this is user 0"), "{error}");
        }
    }
}
