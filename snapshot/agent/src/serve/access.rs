//! Who may pull: anyone on this host's loopback; from elsewhere whoever has the token, over TLS.

use std::fs::File;
use std::io::{self, Read};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use runnel_snapshot::digest::BlobDigest;

/// The longest token file.
const TOKEN_BYTES_MAX: u64 = 4 << 10;

/// The shortest token: sixteen characters of 64 kinds are 96 bits.
const TOKEN_BYTES_MIN: usize = 16;

/// Why a server does not start.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// Others could listen, or come in.
    #[error(
        "images hold guests' memory, and {address} can be reached from other hosts: give {missing}, or --insecure if the network is yours alone"
    )]
    Exposed {
        /// Where it was to listen.
        address: SocketAddr,
        /// The flags that are missing.
        missing: &'static str,
    },
    /// The token cannot be read.
    #[error("the token in {path} cannot be read")]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The token is none.
    #[error(
        "the token in {path} is not usable: it must be {TOKEN_BYTES_MIN} to {TOKEN_BYTES_MAX} printable characters without spaces, as from `openssl rand -hex 32`"
    )]
    BadToken {
        /// Which file.
        path: PathBuf,
    },
}

/// A secret that lets clients pull. Kept as its hash, so that comparing takes the same time whatever is offered.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(BlobDigest);

impl Token {
    /// Reads the token in a file; spaces and line ends around it do not count.
    ///
    /// # Errors
    /// When the file cannot be read, or holds nothing that is hard to guess.
    pub fn read(path: &Path) -> Result<Self, AccessError> {
        let unreadable = |source| AccessError::Unreadable {
            path: path.to_owned(),
            source,
        };
        let file = File::open(path).map_err(unreadable)?;
        if file.metadata().map_err(unreadable)?.permissions().mode() & 0o077 != 0 {
            tracing::warn!(path = %path.display(), "other users can read the token: chmod 600 it");
        }
        let mut text = String::new();
        file.take(TOKEN_BYTES_MAX + 1)
            .read_to_string(&mut text)
            .map_err(unreadable)?;
        Self::new(text.trim()).ok_or_else(|| AccessError::BadToken {
            path: path.to_owned(),
        })
    }

    /// Takes a token, unless it is too short, too long or not printable.
    #[must_use]
    pub fn new(text: &str) -> Option<Self> {
        let possible = text.len() >= TOKEN_BYTES_MIN
            && text.len() as u64 <= TOKEN_BYTES_MAX
            && text.bytes().all(|c| c.is_ascii_graphic());
        possible.then(|| Self(BlobDigest::of(text.as_bytes())))
    }

    /// Whether an `Authorization` header carries the token: as a bearer's, or as the password of any user, which is
    /// what tools for registries can be told.
    pub(super) fn admits(&self, authorization: Option<&[u8]>) -> bool {
        let offered = authorization
            .and_then(|value| std::str::from_utf8(value).ok())
            .and_then(|text| text.split_once(' '));
        match offered {
            Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => {
                self.is(token.trim().as_bytes())
            }
            Some((scheme, pair)) if scheme.eq_ignore_ascii_case("basic") => {
                let pair = BASE64.decode(pair.trim()).unwrap_or_default();
                let colon = pair.iter().position(|c| *c == b':');
                colon.is_some_and(|colon| self.is(&pair[colon + 1..]))
            }
            _ => false,
        }
    }

    fn is(&self, offered: &[u8]) -> bool {
        BlobDigest::of(offered) == self.0
    }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token")
    }
}

/// Refuses to listen where others could read along or come in, unless `insecure` says that this is meant.
pub(super) fn check(address: SocketAddr, token: bool, tls: bool, insecure: bool) -> Result<(), AccessError> {
    if address.ip().to_canonical().is_loopback() || insecure {
        return Ok(());
    }
    let missing = match (token, tls) {
        (true, true) => return Ok(()),
        (false, true) => "--token-file",
        (true, false) => "--tls-cert and --tls-key",
        (false, false) => "--token-file, --tls-cert and --tls-key",
    };
    Err(AccessError::Exposed { address, missing })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_is_served_without_token_and_tls() {
        for (address, token, tls, insecure, allowed) in [
            ("127.0.0.1:1", false, false, false, true),
            ("127.9.9.9:1", false, false, false, true),
            ("[::1]:1", false, false, false, true),
            ("[::ffff:127.0.0.1]:1", false, false, false, true),
            ("0.0.0.0:1", false, false, false, false),
            ("[::]:1", false, false, false, false),
            ("192.0.2.1:1", true, false, false, false),
            ("192.0.2.1:1", false, true, false, false),
            ("192.0.2.1:1", true, true, false, true),
            ("192.0.2.1:1", false, false, true, true),
        ] {
            let checked = check(address.parse().unwrap(), token, tls, insecure);
            assert_eq!(checked.is_ok(), allowed, "{address} {token} {tls} {insecure}");
        }
    }

    #[test]
    fn a_token_is_taken_as_bearers_and_as_anyones_password_and_nothing_else_is() {
        let token = Token::new("0123456789abcdef").unwrap();
        let basic = |pair: &str| format!("Basic {}", BASE64.encode(pair));
        for (header, admitted) in [
            ("Bearer 0123456789abcdef".to_owned(), true),
            ("bearer 0123456789abcdef".into(), true),
            (basic("any:0123456789abcdef"), true),
            (basic("0123456789abcdef"), false),
            (basic("any:other"), false),
            ("Basic !".into(), false),
            ("Bearer 0123456789abcdeF".into(), false),
            ("Bearer".into(), false),
            ("0123456789abcdef".into(), false),
        ] {
            assert_eq!(token.admits(Some(header.as_bytes())), admitted, "{header}");
        }
        assert!(!token.admits(None));
        assert!(!token.admits(Some(&[0xff])));
    }

    #[test]
    fn tokens_that_can_be_guessed_are_refused() {
        assert!(Token::new("short").is_none());
        assert!(Token::new("with spaces in between").is_none());
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        std::fs::write(&path, "0123456789abcdef\n").unwrap();
        assert_eq!(
            Token::read(&path).unwrap(),
            Token::new("0123456789abcdef").unwrap()
        );
        std::fs::write(&path, "\n").unwrap();
        assert!(matches!(Token::read(&path), Err(AccessError::BadToken { .. })));
    }
}
