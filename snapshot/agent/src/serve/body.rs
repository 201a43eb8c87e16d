//! The body of an answer: bytes at hand, or a range of a file read piece by piece as the peer takes it.
//!
//! A piece that the page cache holds is read at once, on the server's own thread; one that would have to wait for a
//! disk is read by a thread that may. So a connection holds one piece, and no disk holds up another connection.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::unix::fs::FileExt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use hyper::body::{Body, Bytes, Frame, SizeHint};
use runnel_snapshot::units::ByteRange;
use rustix::io::{Errno, ReadWriteFlags};
use tokio::task::JoinHandle;

/// Bytes read at a time: two chunks' frames or so, and all that a connection holds of a layer.
const PIECE_BYTES: u64 = 128 << 10;

/// What is sent after an answer's head.
pub(super) enum AnswerBody {
    /// These bytes; none once they were sent.
    Whole(Option<Bytes>),
    /// A range of a file.
    File(FileRange),
}

/// The part of a file that is still to be sent.
pub(super) struct FileRange {
    file: Arc<File>,
    left: ByteRange,
    reading: Option<JoinHandle<io::Result<Vec<u8>>>>,
}

impl AnswerBody {
    pub(super) fn of(bytes: Vec<u8>) -> Self {
        Self::Whole(Some(bytes.into()))
    }

    pub(super) fn file(file: File, range: ByteRange) -> Self {
        Self::File(FileRange {
            file: Arc::new(file),
            left: range,
            reading: None,
        })
    }
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        match self.get_mut() {
            Self::Whole(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::File(range) => {
                let piece = ready!(range.poll_piece(context));
                Poll::Ready(piece.map(|piece| piece.map(|bytes| Frame::data(bytes.into()))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Whole(bytes) => bytes.is_none(),
            Self::File(range) => range.left.len == 0,
        }
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(match self {
            Self::Whole(bytes) => bytes.as_ref().map_or(0, |bytes| bytes.len() as u64),
            Self::File(range) => range.left.len,
        })
    }
}

impl FileRange {
    fn poll_piece(&mut self, context: &mut Context<'_>) -> Poll<Option<io::Result<Vec<u8>>>> {
        let read = match &mut self.reading {
            Some(reading) => {
                let done = ready!(Pin::new(reading).poll(context));
                self.reading = None;
                done.unwrap_or_else(|error| Err(io::Error::other(error)))
            }
            None if self.left.len == 0 => return Poll::Ready(None),
            None => {
                let (start, len) = (self.left.start, self.left.len.min(PIECE_BYTES) as usize);
                match read_cached(&self.file, start, len) {
                    Some(read) => read,
                    None => {
                        let file = Arc::clone(&self.file);
                        self.reading = Some(tokio::task::spawn_blocking(move || read(&file, start, len)));
                        return self.poll_piece(context);
                    }
                }
            }
        };
        if let Ok(piece) = &read {
            self.left.start += piece.len() as u64;
            self.left.len -= piece.len() as u64;
        } else {
            // The peer is told by a connection that ends early; there is nothing to go on with.
            self.left.len = 0;
        }
        Poll::Ready(Some(read))
    }
}

/// Reads what the page cache has of a piece; `None` if that is nothing, or cannot be told.
fn read_cached(file: &File, start: u64, len: usize) -> Option<io::Result<Vec<u8>>> {
    let mut piece = vec![0; len];
    let into = &mut [IoSliceMut::new(&mut piece)];
    match rustix::io::preadv2(file, into, start, ReadWriteFlags::NOWAIT) {
        Ok(0) => Some(Err(cut_off())),
        Ok(count) => {
            piece.truncate(count);
            Some(Ok(piece))
        }
        Err(Errno::AGAIN | Errno::OPNOTSUPP | Errno::INTR) => None,
        Err(error) => Some(Err(error.into())),
    }
}

fn read(file: &File, start: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut piece = vec![0; len];
    file.read_exact_at(&mut piece, start)?;
    Ok(piece)
}

fn cut_off() -> io::Error {
    io::Error::new(
        io::ErrorKind::UnexpectedEof,
        "the file became shorter while it was sent",
    )
}
