//! Blobs of a remote store, by range.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use runnel_snapshot::blobs::{Blob, BlobError, BlobStore};
use runnel_snapshot::causes::with_causes;
use runnel_snapshot::digest::BlobDigest;
use runnel_snapshot::image::reference::is_name;
use runnel_snapshot::units::ByteRange;

use super::client::{Asked, Client, Found};
use super::error::RemoteError;
use super::url::{Origin, Url};
use crate::traffic::Traffic;

/// The most that is skipped of a blob whose server ignores ranges. Beyond, reading all before each chunk would take
/// longer than copying the image.
const SKIP_BYTES_MAX: u64 = 64 << 20;

/// The most parts that a read is cut into.
const PARTS_MAX: u64 = 6;

/// The longest read that is cut: a chunk's frame. Longer ones are background fill, for which nobody waits.
const CUT_BYTES_MAX: u64 = 160 << 10;

/// The most blobs whose redirects are remembered: an image has some per volume.
const REDIRECTS_KEPT: usize = 1024;

/// Where a store keeps blobs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// A registry: `/v2/<name>/blobs/<digest>`.
    Registry,
    /// An image layout on a plain server: `/<name>/blobs/sha256/<hex>`.
    Plain,
}

impl Layout {
    pub(super) fn blob_target(self, name: &str, digest: &BlobDigest) -> String {
        self.before_digits(name) + &digest.hex()
    }

    /// What comes before a blob's hexadecimal digits in its target.
    fn before_digits(self, name: &str) -> String {
        match self {
            Self::Registry => format!("/v2/{name}/blobs/sha256:"),
            Self::Plain => format!("/{name}/blobs/sha256/"),
        }
    }

    /// The name in a blob's target, if it is one of that blob.
    pub(super) fn name_in<'t>(self, target: &'t str, digest: &BlobDigest) -> Option<&'t str> {
        let (front, blobs) = match self {
            Self::Registry => ("/v2/", format!("/blobs/{digest}")),
            Self::Plain => ("/", format!("/blobs/sha256/{}", digest.hex())),
        };
        let name = target.strip_prefix(front)?.strip_suffix(&*blobs)?;
        is_name(name).then_some(name)
    }
}

/// The blobs of one image of a server.
pub struct RemoteBlobs {
    client: Arc<Client>,
    layout: Layout,
    name: String,
    /// Where blobs were found that the store does not serve itself. The store is asked again when one is not there
    /// any more: such places are signed for a while.
    elsewhere: Mutex<HashMap<BlobDigest, Url>>,
}

impl RemoteBlobs {
    pub(super) fn new(client: Arc<Client>, layout: Layout, name: &str) -> Self {
        Self {
            client,
            layout,
            name: name.to_owned(),
            elsewhere: Mutex::default(),
        }
    }

    /// Its server.
    pub(super) fn base(&self) -> &Origin {
        self.client.base()
    }

    /// What comes before a blob's hexadecimal digits in its URL.
    #[must_use]
    pub fn before_digits(&self) -> String {
        format!("{}{}", self.client.base(), self.layout.before_digits(&self.name))
    }

    /// What went over the wire for this image.
    #[must_use]
    pub fn traffic(&self) -> &Arc<Traffic> {
        self.client.traffic()
    }

    /// Reads a range in parts, each over a connection of its own: a server's first window on one would not hold it.
    fn read_parts(
        &self,
        blob: &Blob,
        range: ByteRange,
        into: &mut [u8],
        parts: u64,
    ) -> Result<(), BlobError> {
        let part_bytes = range.len.div_ceil(parts).max(1) as usize;
        thread::scope(|scope| {
            let mut pieces = into.chunks_mut(part_bytes).enumerate().map(|(number, piece)| {
                let part = ByteRange {
                    start: range.start + (number * part_bytes) as u64,
                    len: piece.len() as u64,
                };
                (part, piece)
            });
            let first = pieces.next();
            let others: Vec<_> = pieces
                .map(|(part, piece)| scope.spawn(move || self.read(blob, part, piece)))
                .collect();
            let mut read = first.map_or(Ok(()), |(part, piece)| self.read(blob, part, piece));
            for other in others {
                // A thread that panicked said so already.
                let other = other.join().unwrap_or_else(|_| {
                    Err(BlobError::Unavailable {
                        digest: blob.digest,
                        reason: "reading a part of it failed".to_owned(),
                        transient: true,
                    })
                });
                read = read.and(other);
            }
            read
        })
    }

    fn read(&self, blob: &Blob, range: ByteRange, into: &mut [u8]) -> Result<(), BlobError> {
        let unavailable = |error: RemoteError| match error {
            RemoteError::Missing { .. } => BlobError::Missing {
                digest: blob.digest,
                store: format!("{}/{}", self.client.base(), self.name),
            },
            error => BlobError::Unavailable {
                digest: blob.digest,
                reason: with_causes(&error),
                transient: error.is_transient(),
            },
        };
        let mut found = self.find(&blob.digest, range).map_err(unavailable)?;
        let url = found.url.clone();
        self.begin(&mut found, blob, range)?.map_err(unavailable)?;
        if let Err(error) = found.answer.read_exact(into) {
            return Err(unavailable(self.client.broken(&url, error)));
        }
        self.client.finish(found);
        Ok(())
    }

    /// Asks where the blob was found last, else the store.
    fn find(&self, digest: &BlobDigest, range: ByteRange) -> Result<Found, RemoteError> {
        let asked = Asked {
            range: Some((range.start, range.len)),
            ..Asked::default()
        };
        let known = self.elsewhere().get(digest).cloned();
        if let Some(url) = known {
            match self.client.get(&url, asked) {
                Err(error) if error.is_transient() => return Err(error),
                Err(_) => self.elsewhere().remove(digest),
                found => return found,
            };
        }
        let url = Url {
            origin: self.client.base().clone(),
            target: self.layout.blob_target(&self.name, digest),
        };
        let found = self.client.get(&url, asked)?;
        if found.url != url {
            let mut elsewhere = self.elsewhere();
            if elsewhere.len() < REDIRECTS_KEPT {
                elsewhere.insert(*digest, found.url.clone());
            }
        }
        Ok(found)
    }

    /// Holds an answer against what was asked for, and skips what comes before it.
    fn begin(
        &self,
        found: &mut Found,
        blob: &Blob,
        range: ByteRange,
    ) -> Result<Result<(), RemoteError>, BlobError> {
        let wrong_length = |length| BlobError::WrongLength {
            digest: blob.digest,
            store: self.client.base().to_string(),
            expected: blob.bytes,
            found: length,
        };
        let (head, length) = (&found.answer.head, found.answer.length());
        let answer = |reason: String| RemoteError::Answer {
            url: found.url.to_string(),
            reason,
        };
        if head.status == 206 {
            let Some((first, last, whole)) = head.content_range() else {
                return Ok(Err(answer("a part that does not say which".to_owned())));
            };
            if let Some(whole) = whole.filter(|whole| *whole != blob.bytes) {
                return Err(wrong_length(whole));
            }
            if first != range.start
                || last.checked_sub(first).and_then(|len| len.checked_add(1)) != Some(range.len)
            {
                let reason = format!("it gives bytes {first} to {last} where {range} were asked for");
                return Ok(Err(answer(reason)));
            }
            if length.is_some_and(|length| length != range.len) {
                return Ok(Err(answer(format!("its length does not fit its {range}"))));
            }
            return Ok(Ok(()));
        }
        // The whole blob: this server, or something before it, knows no ranges.
        if let Some(length) = length.filter(|length| *length != blob.bytes) {
            return Err(wrong_length(length));
        }
        if range.start > SKIP_BYTES_MAX {
            return Ok(Err(RemoteError::NoRanges {
                origin: found.url.origin.clone(),
                bytes: range.start,
            }));
        }
        let skipped = found.answer.skip(range.start);
        Ok(skipped.map_err(|error| self.client.broken(&found.url, error)))
    }

    fn elsewhere(&self) -> std::sync::MutexGuard<'_, HashMap<BlobDigest, Url>> {
        self.elsewhere.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BlobStore for RemoteBlobs {
    fn read_range(&self, blob: &Blob, offset: u64, into: &mut [u8]) -> Result<(), BlobError> {
        let range = ByteRange {
            start: offset,
            len: into.len() as u64,
        };
        if !range.fits_in(blob.bytes) {
            return Err(BlobError::OutOfBounds {
                digest: blob.digest,
                range,
            });
        }
        // There is no way to ask for no bytes.
        if into.is_empty() {
            return Ok(());
        }
        let parts = match range.len {
            ..=CUT_BYTES_MAX => self.client.parts_for(range.len, PARTS_MAX),
            _ => 1,
        };
        match parts {
            0 | 1 => self.read(blob, range, into),
            parts => self.read_parts(blob, range, into, parts),
        }
    }
}
