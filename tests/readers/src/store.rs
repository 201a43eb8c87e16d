//! A store of one blob, in memory.

use runnel_snapshot::blobs::{Blob, BlobError, BlobStore};
use runnel_snapshot::digest::BlobDigest;
use runnel_snapshot::units::ByteRange;

pub(crate) struct OneBlob(pub(crate) Vec<u8>);

impl OneBlob {
    pub(crate) fn blob(&self) -> Blob {
        Blob {
            digest: BlobDigest::of(&self.0),
            bytes: self.0.len() as u64,
        }
    }
}

impl BlobStore for OneBlob {
    fn read_range(&self, blob: &Blob, offset: u64, into: &mut [u8]) -> Result<(), BlobError> {
        let range = ByteRange {
            start: offset,
            len: into.len() as u64,
        };
        // A store refuses what reaches beyond a blob; a reader that asks for it has believed somebody.
        assert!(range.fits_in(self.0.len() as u64), "{range} of {blob}");
        let start = usize::try_from(offset).expect("it lies in memory");
        into.copy_from_slice(&self.0[start..start + into.len()]);
        Ok(())
    }
}
