//! The two digests of an image: SHA-256 names blobs (as OCI asks), BLAKE3 names a chunk's plain bytes.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::Digest as _;

/// The SHA-256 of a blob, written `sha256:<64 hex digits>` (OCI image specification, descriptor.md).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct BlobDigest([u8; 32]);

/// Text that is no digest of the expected kind.
#[derive(Debug, thiserror::Error)]
#[error("{text:?} is not a digest: expected {expected} and 64 lower-case hex digits")]
pub struct BadDigest {
    text: String,
    expected: &'static str,
}

impl BadDigest {
    fn new(text: &str, expected: &'static str) -> Self {
        // What a peer sent is quoted, but never without a limit.
        Self {
            text: text.chars().take(100).collect(),
            expected,
        }
    }
}

impl BlobDigest {
    /// The digest of `bytes`.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(sha2::Sha256::digest(bytes).into())
    }

    /// Takes what a running hash came to.
    #[must_use]
    pub fn from_hash(hash: sha2::Sha256) -> Self {
        Self(hash.finalize().into())
    }

    /// The 64 hex digits alone: the blob's file name under `blobs/sha256/`.
    #[must_use]
    pub fn hex(&self) -> String {
        hex(&self.0)
    }
}

impl fmt::Display for BlobDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for BlobDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for BlobDigest {
    type Err = BadDigest;

    fn from_str(text: &str) -> Result<Self, BadDigest> {
        text.strip_prefix("sha256:")
            .and_then(parse_hex)
            .map(Self)
            .ok_or_else(|| BadDigest::new(text, "sha256:"))
    }
}

impl TryFrom<String> for BlobDigest {
    type Error = BadDigest;

    fn try_from(text: String) -> Result<Self, BadDigest> {
        text.parse()
    }
}

impl From<BlobDigest> for String {
    fn from(digest: BlobDigest) -> String {
        digest.to_string()
    }
}

/// The full 32-byte BLAKE3 of a chunk's plain bytes. Never shortened: caches deduplicate by it across the images of
/// strangers. Written `blake3:<64 hex digits>`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ChunkDigest(pub [u8; 32]);

impl ChunkDigest {
    /// The digest of a chunk's plain bytes.
    #[must_use]
    pub fn of(plain: &[u8]) -> Self {
        Self(*blake3::hash(plain).as_bytes())
    }
}

impl fmt::Display for ChunkDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "blake3:{}", hex(&self.0))
    }
}

impl fmt::Debug for ChunkDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for ChunkDigest {
    type Err = BadDigest;

    fn from_str(text: &str) -> Result<Self, BadDigest> {
        text.strip_prefix("blake3:")
            .and_then(parse_hex)
            .map(Self)
            .ok_or_else(|| BadDigest::new(text, "blake3:"))
    }
}

impl TryFrom<String> for ChunkDigest {
    type Error = BadDigest;

    fn try_from(text: String) -> Result<Self, BadDigest> {
        text.parse()
    }
}

impl From<ChunkDigest> for String {
    fn from(digest: ChunkDigest) -> String {
        digest.to_string()
    }
}

fn hex(bytes: &[u8; 32]) -> String {
    use fmt::Write as _;
    bytes.iter().fold(String::with_capacity(64), |mut text, byte| {
        let _ = write!(text, "{byte:02x}"); // writing to a String cannot fail
        text
    })
}

fn parse_hex(text: &str) -> Option<[u8; 32]> {
    let digits = text.as_bytes();
    if digits.len() != 64 {
        return None;
    }
    let value = |digit: u8| match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; 32];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = value(pair[0])? << 4 | value(pair[1])?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blob_digest_survives_its_text() {
        let digest = BlobDigest::of(b"runnel");
        assert_eq!(digest.to_string().parse::<BlobDigest>().unwrap(), digest);
        assert_eq!(
            BlobDigest::of(b"").to_string(),
            "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
    }

    #[test]
    fn a_chunk_digest_survives_its_text_and_the_two_kinds_are_not_confused() {
        let digest = ChunkDigest::of(b"runnel");
        assert_eq!(digest.to_string().parse::<ChunkDigest>().unwrap(), digest);
        assert!(digest.to_string().parse::<BlobDigest>().is_err());
        assert!(
            BlobDigest::of(b"runnel")
                .to_string()
                .parse::<ChunkDigest>()
                .is_err()
        );
    }

    #[test]
    fn text_that_is_no_digest_is_refused() {
        let upper = format!("sha256:{}", "A".repeat(64));
        let path = format!("sha256:../{}", "a".repeat(61));
        for text in ["", "sha256:", "sha512:00", &upper, &path] {
            assert!(text.parse::<BlobDigest>().is_err(), "{text}");
        }
    }
}
