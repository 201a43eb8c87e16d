//! Stores of blobs: what an image's manifest, state, layers and indexes are read from, each named by its SHA-256.
//!
//! A store hands out bytes and believes nothing: whoever reads checks them, whole blobs here by
//! [`read_verified`], segments by [`crate::index`], chunks by [`crate::decode`].

use std::fmt;
use std::io;

use crate::digest::BlobDigest;
use crate::units::ByteRange;

/// A blob: its name and its length, as a descriptor of a manifest gives them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Blob {
    /// The SHA-256 of its bytes.
    pub digest: BlobDigest,
    /// How many bytes it has.
    pub bytes: u64,
}

impl fmt::Display for Blob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({} bytes)", self.digest, self.bytes)
    }
}

/// Why bytes of a blob could not be had.
#[derive(Debug, thiserror::Error)]
pub enum BlobError {
    /// The store does not have it.
    #[error(
        "blob {digest} is not in {store}: the image is incomplete there, or was removed in use: copy it there again, or \
         resume it from another place"
    )]
    Missing {
        /// Which blob.
        digest: BlobDigest,
        /// Where it was looked for.
        store: String,
    },
    /// What the store has is no regular file, or has another length than its descriptor says.
    #[error(
        "blob {digest} in {store} has {found} bytes instead of {expected}: it is truncated or not the blob"
    )]
    WrongLength {
        /// Which blob.
        digest: BlobDigest,
        /// Where it is.
        store: String,
        /// The descriptor's length.
        expected: u64,
        /// The true length.
        found: u64,
    },
    /// The range reaches beyond the blob.
    #[error("{range} reach beyond blob {digest}")]
    OutOfBounds {
        /// Which blob.
        digest: BlobDigest,
        /// What was asked for.
        range: ByteRange,
    },
    /// The bytes are not those of the digest.
    #[error("blob {digest} does not match its digest: its bytes come to {found}")]
    Corrupt {
        /// The digest that was asked for.
        digest: BlobDigest,
        /// What the bytes hash to.
        found: BlobDigest,
    },
    /// A blob that must be small is not.
    #[error("blob {digest} has {bytes} bytes, and at most {bytes_max} are accepted for what it should be")]
    TooLarge {
        /// Which blob.
        digest: BlobDigest,
        /// Its length.
        bytes: u64,
        /// The cap.
        bytes_max: u64,
    },
    /// Reading failed.
    #[error("reading {range} of blob {digest} from {store} failed")]
    Read {
        /// Which blob.
        digest: BlobDigest,
        /// Where it is.
        store: String,
        /// What was asked for.
        range: ByteRange,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// A store that is not a directory of this host could not deliver.
    #[error("blob {digest} cannot be had: {reason}")]
    Unavailable {
        /// Which blob.
        digest: BlobDigest,
        /// What happened, for people.
        reason: String,
        /// Whether asking again can help.
        transient: bool,
    },
}

impl BlobError {
    /// Whether asking the same store again can help.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unavailable { transient, .. } => *transient,
            Self::Read { source, .. } => {
                matches!(
                    source.kind(),
                    io::ErrorKind::Interrupted
                        | io::ErrorKind::TimedOut
                        | io::ErrorKind::StaleNetworkFileHandle
                )
            }
            _ => false,
        }
    }
}

/// Where blobs are read from: a directory of this host, a registry, an object store.
pub trait BlobStore: Send + Sync {
    /// Fills `into` with the bytes of `blob` from `offset` on; all of them or an error.
    ///
    /// # Errors
    /// When the store has no such blob, it ends before, or it cannot be read.
    fn read_range(&self, blob: &Blob, offset: u64, into: &mut [u8]) -> Result<(), BlobError>;

    /// Reads as [`read_range`](Self::read_range) does, and tells whether `are_right` says so of the bytes. A store
    /// that has the blob in several places goes on to the next where those of one are not; whoever can tell right
    /// bytes from wrong ones reads this way.
    ///
    /// # Errors
    /// When right bytes were not found and some place could not be read: it may have had them.
    fn read_right(
        &self,
        blob: &Blob,
        offset: u64,
        into: &mut [u8],
        are_right: &mut dyn FnMut(&[u8]) -> bool,
    ) -> Result<bool, BlobError> {
        self.read_range(blob, offset, into)?;
        Ok(are_right(into))
    }
}

/// Reads the whole of `blob` and holds it against its digest.
///
/// # Errors
/// When it is larger than `bytes_max`, cannot be read, or does not match its digest.
pub fn read_verified(store: &dyn BlobStore, blob: &Blob, bytes_max: u64) -> Result<Vec<u8>, BlobError> {
    let too_large = || BlobError::TooLarge {
        digest: blob.digest,
        bytes: blob.bytes,
        bytes_max,
    };
    if blob.bytes > bytes_max {
        return Err(too_large());
    }
    let mut bytes = vec![0; usize::try_from(blob.bytes).map_err(|_| too_large())?];
    let mut found = blob.digest;
    let are_right = store.read_right(blob, 0, &mut bytes, &mut |bytes| {
        found = BlobDigest::of(bytes);
        found == blob.digest
    })?;
    if are_right {
        return Ok(bytes);
    }
    Err(BlobError::Corrupt {
        digest: blob.digest,
        found,
    })
}
