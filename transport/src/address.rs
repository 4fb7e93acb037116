//! Where a collector is: at a unix socket of this machine, or at a TCP address under TLS.

use std::path::PathBuf;

use thiserror::Error;
use tonic::transport::Uri;

/// Longest path of a socket, in bytes: the kernel's `sun_path` without the zero at its end.
const LONGEST_PATH: usize = 107;

/// An address that can be connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// `unix://` and a whole path.
    Socket(PathBuf),
    /// `https://HOST:PORT`.
    Tls(Uri),
}

/// Why a text is no such address.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum AddressError {
    #[error(
        "{0:?} is not a collector's address; write unix:///PATH for a collector on this machine, or https://HOST:PORT"
    )]
    Unknown(String),
    #[error(
        "{0} is TCP without TLS, which is not spoken; for a collector on this machine write its unix socket, \
         unix:///run/palisade/collector/deliver.sock for an agent and …/ask.sock to ask, for another write https:// and \
         name certificates (`palisade pki` makes them)"
    )]
    Plain(String),
    #[error("{0}: behind unix:// comes a whole path, as in unix:///run/palisade/collector/ask.sock")]
    Path(String),
    #[error("{0}: the path of a socket has at most {LONGEST_PATH} bytes")]
    Long(String),
}

impl Address {
    /// Reads `unix:///PATH` or `https://HOST:PORT`.
    ///
    /// # Errors
    ///
    /// See [`AddressError`]; `http://` is one, also on loopback, where every user and every pod in the host's network could connect.
    pub fn parse(text: &str) -> Result<Self, AddressError> {
        let named = || text.to_owned();
        if let Some(rest) = text.strip_prefix("unix:") {
            let path = rest.strip_prefix("//").filter(|path| path.starts_with('/') && !path.contains('\0'));
            let path = path.filter(|path| !path.ends_with('/')).ok_or_else(|| AddressError::Path(named()))?;
            if path.len() > LONGEST_PATH {
                return Err(AddressError::Long(named()));
            }
            return Ok(Self::Socket(path.into()));
        }
        let uri: Uri = text.parse().map_err(|_| AddressError::Unknown(named()))?;
        match uri.scheme_str() {
            Some("http") => Err(AddressError::Plain(named())),
            Some("https") if uri.host().is_some() && uri.port().is_some() => Ok(Self::Tls(uri)),
            _ => Err(AddressError::Unknown(named())),
        }
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Socket(path) => write!(f, "unix://{}", path.display()),
            Self::Tls(uri) => write!(f, "{uri}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_and_tls_are_addresses() {
        let socket = "unix:///run/palisade/collector/ask.sock";
        let path = "/run/palisade/collector/ask.sock";
        assert_eq!(Address::parse(socket), Ok(Address::Socket(path.into())));
        assert_eq!(Address::parse(socket).unwrap().to_string(), socket);
        for text in ["https://collector.example:7443", "https://[2001:db8::1]:7443"] {
            assert!(matches!(Address::parse(text), Ok(Address::Tls(_))), "{text}");
        }
    }

    #[test]
    fn what_is_wrong_with_an_address_is_said_with_the_remedy() {
        let long = format!("unix:///{}", "x".repeat(LONGEST_PATH));
        for (text, remedies) in [
            ("http://127.0.0.1:7443", ["unix:///run/palisade/collector/", "palisade pki"]),
            ("http://[::1]:7443", ["unix:///run/palisade/collector/", "palisade pki"]),
            ("http://localhost:7443", ["unix:///run/palisade/collector/", "palisade pki"]),
            ("HTTP://collector.example:7443", ["unix:///run/palisade/collector/", "palisade pki"]),
            ("127.0.0.1:7443", ["unix:///PATH", "https://HOST:PORT"]),
            ("collector.example", ["unix:///PATH", "https://HOST:PORT"]),
            ("/run/palisade/collector/ask.sock", ["unix:///PATH", "https://HOST:PORT"]),
            ("https://collector.example", ["unix:///PATH", "https://HOST:PORT"]),
            ("ftp://127.0.0.1:1", ["unix:///PATH", "https://HOST:PORT"]),
            ("", ["unix:///PATH", "https://HOST:PORT"]),
            ("unix://run/ask.sock", ["a whole path", "unix:///"]),
            ("unix:/run/ask.sock", ["a whole path", "unix:///"]),
            ("unix:///run/", ["a whole path", "unix:///"]),
            ("unix:///", ["a whole path", "unix:///"]),
            ("unix:///run/\0", ["a whole path", "unix:///"]),
            (&long, ["at most 107 bytes", "unix:///"]),
        ] {
            let error = Address::parse(text).unwrap_err().to_string();
            assert!(remedies.iter().all(|remedy| error.contains(remedy)), "{text:?}: {error}");
        }
        assert!(Address::parse(&long[..long.len() - 1]).is_ok(), "the longest one");
    }
}
