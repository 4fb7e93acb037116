//! Both sides against each other, over loopback.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};
use tokio_stream::StreamExt as _;
use tonic::transport::{Uri, server::Connected as _};

use crate::{accept, dial, files::Files, name::Name, pki};

const DOMAIN: &str = "test";
const DAYS: u32 = 2;

/// An authority with a collector, a node and a reader.
struct Site {
    folder: tempfile::TempDir,
}

impl Site {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        pki::make_authority(folder.path(), DOMAIN, DAYS).unwrap();
        let site = Self { folder };
        site.issue("collector", &Name::Collector, &["127.0.0.1"]);
        site.issue("node", &Name::Node("worker-1".to_owned()), &[]);
        site.issue("reader", &Name::Reader("ana".to_owned()), &[]);
        site
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn issue(&self, file: &str, name: &Name, addresses: &[&str]) {
        let addresses: Vec<String> = addresses.iter().map(|&address| address.to_owned()).collect();
        pki::issue(self.path(), file, name, DOMAIN, &addresses, DAYS).unwrap();
    }

    fn files(&self, file: &str) -> Files {
        let at = |name: String| -> PathBuf { self.path().join(name) };
        Files {
            ca: at(pki::CA.to_owned()),
            certificate: at(format!("{file}.pem")),
            key: at(format!("{file}-key.pem")),
            revoked: Some(at(pki::REVOKED.to_owned())),
        }
    }
}

/// A collector that answers every connection with who it takes the peer for, and keeps its refusals.
async fn serve(files: Files) -> (Uri, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let refused = Arc::new(Mutex::new(Vec::new()));
    let told = Arc::clone(&refused);
    let tell = move |refusal: accept::Refusal| told.lock().unwrap().push(refusal.why);
    let mut connections = accept::incoming(listener, files, tell).unwrap();
    tokio::spawn(async move {
        while let Some(connection) = connections.next().await {
            let mut connection = connection.unwrap();
            let name = connection.connect_info().to_string();
            tokio::spawn(async move {
                let _peer_gone = connection.write_all(name.as_bytes()).await;
                let _peer_gone = connection.shutdown().await;
            });
        }
    });
    (format!("https://{address}").parse().unwrap(), refused)
}

/// Who the collector takes these files for, or why it does not answer.
async fn ask(uri: &Uri, files: &Files) -> Result<String, String> {
    let config = files.client().map_err(|error| error.to_string())?;
    let mut stream = dial::secure(uri.clone(), config).await.map_err(|error| error.to_string())?.into_inner();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.map_err(|error| error.to_string())?;
    Ok(answer)
}

/// Waits until a refusal says so.
async fn refused(refusals: &Mutex<Vec<String>>, says: &str) {
    let mut found = Vec::new();
    for _ in 0..100 {
        found.clone_from(&refusals.lock().unwrap());
        if found.iter().any(|why| why.contains(says)) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("nobody was refused for {says:?}: {found:?}");
}

#[tokio::test]
async fn who_somebody_is_his_certificate_says() {
    let site = Site::new();
    let (uri, _) = serve(site.files("collector")).await;
    assert_eq!(ask(&uri, &site.files("node")).await.unwrap(), "node/worker-1");
    assert_eq!(ask(&uri, &site.files("reader")).await.unwrap(), "reader/ana");
}

#[tokio::test]
async fn foreign_revoked_and_nameless_peers_are_refused() {
    let (site, other) = (Site::new(), Site::new());
    let (uri, refusals) = serve(site.files("collector")).await;
    // Another authority: neither side trusts the other.
    assert!(ask(&uri, &other.files("node")).await.is_err());
    let mixed = Files { ca: site.files("node").ca, ..other.files("node") };
    assert!(ask(&uri, &mixed).await.is_err());
    refused(&refusals, "invalid peer certificate").await;
    // One that is revoked while the collector runs.
    let node = site.files("node");
    assert!(ask(&uri, &node).await.is_ok());
    pki::revoke(site.path(), &[&node.certificate]).unwrap();
    assert!(ask(&uri, &node).await.is_err());
    refused(&refusals, "Revoked").await;
    assert!(ask(&uri, &site.files("reader")).await.is_ok(), "others are not");
    // What is no TLS at all, and somebody who says nothing.
    let mut plain = TcpStream::connect(uri.authority().unwrap().as_str()).await.unwrap();
    plain.write_all(b"PRI * HTTP/2.0\r\n\r\n").await.unwrap();
    refused(&refusals, "corrupt message").await;
}

#[tokio::test]
async fn who_is_revoked_loses_the_connection_that_is_open() {
    let site = Site::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let uri: Uri = format!("https://{}", listener.local_addr().unwrap()).parse().unwrap();
    let mut connections = accept::incoming(listener, site.files("collector"), |_| {}).unwrap();
    let config = site.files("node").client().unwrap();
    let mut node = dial::secure(uri.clone(), config).await.unwrap().into_inner();
    let mut open = connections.next().await.unwrap().unwrap();
    node.write_all(b"record").await.unwrap();
    open.read_exact(&mut [0; 6]).await.unwrap();
    pki::revoke(site.path(), &[&site.files("node").certificate]).unwrap();
    // Nothing more is read, neither now nor from somebody else's connection, which is taken in between.
    let reading = tokio::spawn(async move { open.read_u8().await });
    let reader = site.files("reader").client().unwrap();
    let _reader = dial::secure(uri, reader).await.unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(20), reading).await.unwrap().unwrap();
    assert!(ended.unwrap_err().to_string().contains("have changed"));
}

#[tokio::test]
async fn who_says_nothing_keeps_nobody_of_another_address_out() {
    let site = Site::new();
    let (uri, refusals) = serve(site.files("collector")).await;
    let mut silent = Vec::new();
    for _ in 0..100 {
        silent.push(TcpStream::connect(uri.authority().unwrap().as_str()).await.unwrap());
    }
    refused(&refusals, "others of its address").await;
    let from = tokio::net::TcpSocket::new_v4().unwrap();
    from.bind("127.0.0.2:0".parse().unwrap()).unwrap();
    let mut stream =
        from.connect(uri.authority().unwrap().as_str().parse().unwrap()).await.expect("another address");
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\n").await.unwrap();
    // Answered, with a refusal, while the others still wait.
    refused(&refusals, "corrupt message").await;
}

#[tokio::test]
async fn whoever_answers_must_be_a_collector_of_that_address() {
    let site = Site::new();
    site.issue("impostor", &Name::Node("worker-2".to_owned()), &["127.0.0.1"]);
    site.issue("elsewhere", &Name::Collector, &["192.0.2.1"]);
    for (file, says) in [("impostor", ""), ("elsewhere", "not valid for name")] {
        let (uri, _) = serve(site.files(file)).await;
        let error = ask(&uri, &site.files("node")).await.unwrap_err();
        assert!(error.contains(says), "{file}: {error}");
    }
}

#[tokio::test]
async fn replaced_files_count_from_the_next_connection_on() {
    let site = Site::new();
    let files = site.files("collector");
    let (uri, _) = serve(files.clone()).await;
    let before = files.fingerprint().unwrap();
    site.issue("collector", &Name::Collector, &["127.0.0.1"]);
    assert_ne!(files.fingerprint().unwrap(), before);
    assert!(ask(&uri, &site.files("node")).await.is_ok());
    // Half a rotation: a key that does not fit. The last good pair stays.
    std::fs::write(&files.key, std::fs::read(&site.files("node").key).unwrap()).unwrap();
    assert!(files.server().unwrap_err().to_string().contains("collector-key.pem"));
    assert!(ask(&uri, &site.files("node")).await.is_ok());
    site.issue("node", &Name::Node("renamed".to_owned()), &[]);
    assert_eq!(ask(&uri, &site.files("node")).await.unwrap(), "node/renamed");
}

#[test]
fn what_is_wrong_with_files_is_said_with_their_names() {
    let site = Site::new();
    let good = site.files("node");
    let empty = site.path().join("empty.pem");
    std::fs::write(&empty, "").unwrap();
    let expired = site.path().join("old");
    for (files, says) in [
        (Files { ca: empty.clone(), ..good.clone() }, "empty.pem holds no certificate"),
        (Files { certificate: empty.clone(), ..good.clone() }, "empty.pem holds no certificate"),
        (Files { key: empty, ..good.clone() }, "empty.pem"),
        (Files { key: expired, ..good.clone() }, "cannot read"),
        (Files { key: site.files("reader").key, ..good.clone() }, "node.pem and"),
    ] {
        let error = files.client().unwrap_err().to_string();
        assert!(error.contains(says), "{says}: {error}");
    }
    pki::issue(site.path(), "old", &Name::Node("a".to_owned()), DOMAIN, &[], 0).unwrap();
    // Valid until now, in whole seconds.
    let expires = Instant::now();
    let error = loop {
        match site.files("old").client() {
            Err(error) => break error.to_string(),
            Ok(_) => assert!(expires.elapsed() < Duration::from_secs(10), "it never expires"),
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    assert!(error.contains("has expired"), "{error}");
    assert_eq!(good.name().unwrap(), Name::Node("worker-1".to_owned()));
    assert!(
        pki::make_authority(site.path(), DOMAIN, DAYS).unwrap_err().to_string().contains("is there already")
    );
}

#[test]
fn a_collector_is_certified_for_addresses_alone() {
    let site = Site::new();
    for address in ["a b", "", "https://collector.example", "collector.example:7443", "*.example", "-a", "ä"]
    {
        let made = pki::issue(site.path(), "c", &Name::Collector, DOMAIN, &[address.to_owned()], DAYS);
        assert!(made.unwrap_err().to_string().contains("is no address"), "{address:?}");
    }
    site.issue("c", &Name::Collector, &["collector.example", "192.0.2.1", "2001:db8::1", "localhost"]);
}

#[test]
fn what_cannot_be_written_leaves_nothing_behind() {
    let site = Site::new();
    // A folder in the place of the key: it can be written beside it, but not put there.
    std::fs::create_dir(site.path().join("full-key.pem")).unwrap();
    let made = pki::issue(site.path(), "full", &Name::Collector, DOMAIN, &["localhost".to_owned()], DAYS);
    let error = made.unwrap_err().to_string();
    assert!(error.contains("full-key.pem: "), "{error}");
    let left = std::fs::read_dir(site.path()).unwrap().map(|entry| entry.unwrap().file_name());
    assert!(left.into_iter().all(|name| !name.to_string_lossy().contains("partial")));
}

#[test]
fn an_address_goes_with_what_secures_it() {
    let files = Site::new().files("node");
    let target = |address: &str, files: Option<&Files>| {
        dial::Target::new(address, files.cloned()).map(drop).map_err(|error| error.to_string())
    };
    let socket = "unix:///run/palisade/collector/deliver.sock";
    assert!(target(socket, None).is_ok());
    assert!(target("https://collector.example:7443", Some(&files)).is_ok());
    for (address, files, says) in [
        ("http://127.0.0.1:7443", None, "is TCP without TLS"),
        ("http://collector.example:7443", Some(&files), "is TCP without TLS"),
        ("https://collector.example:7443", None, "name the certificates"),
        (socket, Some(&files), "write https://, or leave them out"),
        ("collector.example:7443", None, "is not a collector's address"),
    ] {
        let error = target(address, files).unwrap_err();
        assert!(error.contains(says), "{address}: {error}");
    }
}

#[tokio::test]
async fn a_socket_that_is_not_there_or_not_heard_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ask.sock");
    let target = dial::Target::new(&format!("unix://{}", path.display()), None).unwrap();
    let problem = async || {
        let mut error: &dyn std::error::Error = &target.connect(|endpoint| endpoint).await.unwrap_err();
        let mut said = error.to_string();
        while let Some(cause) = error.source() {
            said = format!("{said}: {cause}");
            error = cause;
        }
        said
    };
    let said = problem().await;
    assert!(said.contains("No such file"), "{said}");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let said = problem().await;
    assert!(said.contains("refused"), "{said}");
}
