//! Cuts a volume into pieces of work, in order: runs of zeros that cost nothing, and spans of chunks to look at.

use std::io;

use super::content::Content;
use crate::units::{ByteRange, ChunkIndex, ChunkSize};

/// The bytes of a span, or one chunk if that is larger: enough that handing it over costs nothing beside compressing
/// it, and small enough that a dozen of them in flight are a few MiB.
const SPAN_BYTES: u64 = 256 << 10;

/// A piece of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Piece {
    /// So many chunks are zero; nobody needs to look.
    Zeros { chunks: u64 },
    /// These chunks may be anything.
    Span { first: ChunkIndex, chunks: u64 },
}

/// Walks over a volume.
pub(super) struct Splitter<'a> {
    content: &'a dyn Content,
    volume_bytes: u64,
    chunk_size: ChunkSize,
    /// The next chunk to hand out.
    next: u64,
    /// The chunk behind the current run of data.
    data_end: u64,
}

impl<'a> Splitter<'a> {
    pub(super) fn new(content: &'a dyn Content, chunk_size: ChunkSize) -> Self {
        Self {
            content,
            volume_bytes: content.bytes(),
            chunk_size,
            next: 0,
            data_end: 0,
        }
    }

    /// The next piece, or `None` at the end.
    ///
    /// # Errors
    /// What the content said, and the bytes that it was asked about.
    pub(super) fn next(&mut self) -> Result<Option<Piece>, (ByteRange, io::Error)> {
        let chunks = self.chunk_size.chunks_in(self.volume_bytes);
        if self.next >= chunks {
            return Ok(None);
        }
        if self.next >= self.data_end {
            let from = self.next * self.chunk_size.bytes();
            let failed = |error| {
                (
                    ByteRange {
                        start: from,
                        len: self.volume_bytes - from,
                    },
                    error,
                )
            };
            let start = match self.content.next_data(from).map_err(failed)? {
                None => chunks,
                Some(data) => {
                    let start = data.start / self.chunk_size.bytes();
                    let end = data
                        .end()
                        .map_or(chunks, |end| self.chunk_size.chunks_in(end))
                        .min(chunks);
                    if start < self.next || end <= start {
                        let reason =
                            format!("the content claims data at {data}, looked for from byte {from} on");
                        return Err(failed(io::Error::other(reason)));
                    }
                    self.data_end = end;
                    start
                }
            };
            if start > self.next {
                let zeros = start - self.next;
                self.next = start;
                return Ok(Some(Piece::Zeros { chunks: zeros }));
            }
        }
        let span = (SPAN_BYTES / self.chunk_size.bytes())
            .max(1)
            .min(self.data_end - self.next);
        let first = ChunkIndex(self.next);
        self.next += span;
        Ok(Some(Piece::Span { first, chunks: span }))
    }
}

#[cfg(test)]
mod tests {
    use super::super::content::Found;
    use super::*;

    /// Says where data is, and nothing else.
    struct Claims(u64, Vec<ByteRange>);

    impl Content for Claims {
        fn bytes(&self) -> u64 {
            self.0
        }

        fn next_data(&self, from: u64) -> io::Result<Option<ByteRange>> {
            Ok(self
                .1
                .iter()
                .copied()
                .find(|data| data.start + data.len > from)
                .map(|data| {
                    let start = data.start.max(from);
                    ByteRange {
                        start,
                        len: data.start + data.len - start,
                    }
                }))
        }

        fn read(&self, _: u64, _: &mut [u8]) -> io::Result<Found> {
            Ok(Found::Zero)
        }
    }

    fn pieces(content: &dyn Content) -> Vec<Piece> {
        let mut splitter = Splitter::new(content, ChunkSize::DEFAULT);
        std::iter::from_fn(|| splitter.next().unwrap()).collect()
    }

    #[test]
    fn pieces_cover_the_volume_in_order_and_holes_are_one_piece() {
        const CHUNK: u64 = 64 << 10;
        let data = vec![
            ByteRange {
                start: 3 * CHUNK + 5,
                len: 6 * CHUNK,
            },
            ByteRange {
                start: 10 * CHUNK - 1,
                len: 1,
            },
        ];
        let span = |first, chunks| Piece::Span {
            first: ChunkIndex(first),
            chunks,
        };
        assert_eq!(
            pieces(&Claims(1 << 40, data)),
            [
                Piece::Zeros { chunks: 3 },
                span(3, 4),
                span(7, 3),
                Piece::Zeros {
                    chunks: (1 << 24) - 10
                }
            ]
        );
        assert_eq!(pieces(&Claims(1, Vec::new())), [Piece::Zeros { chunks: 1 }]);
        assert_eq!(pieces(&vec![1; 5 * CHUNK as usize + 1]), [span(0, 4), span(4, 2)]);
    }

    #[test]
    fn content_that_claims_nonsense_is_an_error_and_no_endless_loop() {
        struct Backwards;
        impl Content for Backwards {
            fn bytes(&self) -> u64 {
                1 << 30
            }
            fn next_data(&self, _: u64) -> io::Result<Option<ByteRange>> {
                Ok(Some(ByteRange { start: 0, len: 1 }))
            }
            fn read(&self, _: u64, _: &mut [u8]) -> io::Result<Found> {
                Ok(Found::Zero)
            }
        }
        let mut splitter = Splitter::new(&Backwards, ChunkSize::DEFAULT);
        assert!(splitter.next().is_ok());
        assert!(splitter.next().is_err());
    }
}
