//! Fetches what a thin image lacks: from then on it is whole, wherever its layers came from.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use sha2::Digest as _;

use super::layout::Layout;
use super::partial::{Partial, sweep};
use crate::blobs::{Blob, BlobError, BlobStore};
use crate::digest::BlobDigest;

/// How much is read at a time.
const PIECE_BYTES: u64 = 4 << 20;

/// Why a layer is not with its image now. The image is as it was.
#[derive(Debug, thiserror::Error)]
pub enum CompleteError {
    /// It was called off.
    #[error("fetching the image's layers was cancelled")]
    Cancelled,
    /// It cannot be read.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// The system refused.
    #[error("{what} {path} failed")]
    Io {
        /// What was attempted.
        what: &'static str,
        /// On which path.
        path: PathBuf,
        /// The system's reason: no space, no permission.
        #[source]
        source: io::Error,
    },
}

fn io_error<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> CompleteError + 'a {
    move |source| CompleteError::Io {
        what,
        path: path.to_owned(),
        source,
    }
}

/// Fetches a blob of the image in `layout` from `store`, and puts it there once all of it has come and matches its digest.
/// `goes_on` hears of each piece how many bytes it has, and says whether to go on.
///
/// # Errors
/// When it cannot be read or written, is not what its digest says, or was called off. Nothing is left of it then.
pub fn complete(
    layout: &Layout,
    blob: &Blob,
    store: &dyn BlobStore,
    goes_on: &dyn Fn(u64) -> bool,
) -> Result<(), CompleteError> {
    let target = layout.blob_path(&blob.digest);
    // Beside the image, where nothing is in its way that is left of one who was killed.
    let image = fs::canonicalize(layout.path()).map_err(io_error("finding", layout.path()))?;
    let (Some(folder), Some(name)) = (image.parent(), image.file_name().and_then(|name| name.to_str()))
    else {
        return Err(io_error("writing beside", &image)(
            io::ErrorKind::InvalidInput.into(),
        ));
    };
    sweep(folder, Some(name)).map_err(io_error("reading", folder))?;
    let partial = Partial::create_file(folder, name).map_err(io_error("creating a file in", folder))?;
    let mut file = partial.file();
    let (mut done, mut hash) = (0, sha2::Sha256::default());
    let mut piece = vec![0; PIECE_BYTES.min(blob.bytes) as usize];
    while done < blob.bytes {
        let len = PIECE_BYTES.min(blob.bytes - done);
        let piece = &mut piece[..len as usize];
        store.read_range(blob, done, piece)?;
        file.write_all(piece)
            .map_err(io_error("writing", partial.path()))?;
        hash.update(&*piece);
        done += len;
        if !goes_on(len) {
            return Err(CompleteError::Cancelled);
        }
    }
    let found = BlobDigest::from_hash(hash);
    if found != blob.digest {
        let digest = blob.digest;
        return Err(BlobError::Corrupt { digest, found }.into());
    }
    file.sync_all()
        .map_err(io_error("synchronising", partial.path()))?;
    fs::rename(partial.path(), &target).map_err(io_error("publishing", &target))?;
    let blobs = target.parent().unwrap_or(&target);
    let synced = File::open(blobs).and_then(|blobs| blobs.sync_all());
    synced.map_err(io_error("synchronising", blobs))
}
