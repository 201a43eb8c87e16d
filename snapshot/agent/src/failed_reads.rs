//! Reads of a blob in one store after the other, until one has it right: what those say that have not.

use std::fmt::Display;

use runnel_snapshot::blobs::{Blob, BlobError};
use runnel_snapshot::causes::with_causes;

/// The reads that have failed so far.
#[derive(Default)]
pub(crate) struct FailedReads {
    troubles: Vec<String>,
    is_transient: bool,
    /// The first error: what one store has wrong, another that cannot be read may have right.
    error: Option<BlobError>,
}

impl FailedReads {
    /// Takes what a read in `place` has come to; if that is no success, what the trouble is.
    pub(crate) fn take(
        &mut self,
        place: &dyn Display,
        blob: &Blob,
        read: Result<bool, BlobError>,
    ) -> Result<(), String> {
        let trouble = match read {
            Ok(true) => return Ok(()),
            Ok(false) => format!("its bytes of blob {} are damaged", blob.digest),
            Err(error) => {
                self.is_transient |= error.is_transient();
                let trouble = with_causes(&error);
                self.error.get_or_insert(error);
                trouble
            }
        };
        self.troubles.push(format!("{place}: {trouble}"));
        Err(trouble)
    }

    /// What the whole comes to when there is no other store: the error if there was one alone, or all of them; `Ok(false)`
    /// where there are bytes, and wrong ones.
    pub(crate) fn end(self, blob: &Blob) -> Result<bool, BlobError> {
        match self.error {
            None => Ok(false),
            Some(error) if self.troubles.len() == 1 => Err(error),
            Some(_) => Err(BlobError::Unavailable {
                digest: blob.digest,
                reason: self.troubles.join("; "),
                transient: self.is_transient,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use runnel_snapshot::digest::BlobDigest;

    use super::*;

    fn blob() -> Blob {
        Blob {
            digest: BlobDigest::of(b"layer"),
            bytes: 5,
        }
    }

    fn unavailable(reason: &str, transient: bool) -> Result<bool, BlobError> {
        Err(BlobError::Unavailable {
            digest: blob().digest,
            reason: reason.to_owned(),
            transient,
        })
    }

    /// What several reads come to, in places that are numbered.
    fn end_of(reads: impl IntoIterator<Item = Result<bool, BlobError>>) -> Result<bool, BlobError> {
        let mut failed = FailedReads::default();
        for (number, read) in reads.into_iter().enumerate() {
            let taken = failed.take(&number, &blob(), read);
            assert!(taken.is_err());
        }
        failed.end(&blob())
    }

    #[test]
    fn one_failure_is_told_as_it_is_and_several_with_their_places() {
        let alone = end_of([unavailable("away", true)]).unwrap_err();
        assert!(
            alone.is_transient() && !alone.to_string().contains("0: "),
            "{alone}"
        );
        let several = end_of([unavailable("gone", false), Ok(false), unavailable("away", true)]).unwrap_err();
        let told = several.to_string();
        assert!(several.is_transient(), "one of them may come back");
        for what in ["0: ", "gone", "1: its bytes", "2: ", "away"] {
            assert!(told.contains(what), "{what}: {told}");
        }
        let for_good = end_of([unavailable("gone", false), Ok(false)]).unwrap_err();
        assert!(!for_good.is_transient());
    }

    #[test]
    fn bytes_that_are_wrong_everywhere_are_no_error_and_a_success_is_no_failure() {
        assert!(!end_of([Ok(false), Ok(false)]).unwrap());
        assert!(!end_of([]).unwrap());
        let mut failed = FailedReads::default();
        assert!(failed.take(&"here", &blob(), Ok(true)).is_ok());
    }
}
