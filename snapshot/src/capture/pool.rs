//! The compressors, and the capture of one volume through them.

use std::io;
use std::sync::{Mutex, PoisonError};
use std::thread;

use super::CaptureSettings;
use super::content::{Content, Found};
use super::job::CaptureError;
use super::line::{Line, Place};
use super::progress::Progress;
use super::splitter::{Piece, Splitter};
use super::volume_writer::{CompressedChunk, VolumeWriter};
use crate::digest::ChunkDigest;
use crate::give_way::{CAPTURE, give_way};
use crate::layer::frame::{ChunkCompressor, is_zero};
use crate::units::{ByteRange, ChunkIndex, ChunkSize};
use crate::volume::VolumeName;

/// Pieces in flight beyond one for each compressor. So many may wait for the one at the front when the host puts its
/// compressor aside for a moment; with more, throughput did not rise, and each is up to 256 KiB of memory.
pub(super) const PLACES_AHEAD: usize = 14;

/// A finished piece.
enum Finished {
    Zeros { chunks: u64 },
    Span(Span),
}

/// Chunks that were looked at; used again and again.
#[derive(Default)]
struct Span {
    /// The frames of those that are not zero, back to back.
    frames: Vec<u8>,
    /// One for each chunk, `None` for zeros.
    chunks: Vec<Option<CompressedChunk>>,
}

/// What the threads of one volume's capture share.
struct Capture<'a> {
    name: &'a VolumeName,
    content: &'a dyn Content,
    chunk_size: ChunkSize,
    volume_bytes: u64,
    progress: &'a Progress,
    line: Line<Splitter<'a>, Finished, CaptureError>,
    /// Spans that the writer is done with.
    spare: Mutex<Vec<Span>>,
}

/// Captures a volume; `position` is that of its figures in `progress`.
///
/// # Errors
/// When content cannot be read, the image cannot be written, or it was cancelled.
pub(super) fn capture_volume(
    name: &VolumeName,
    content: &dyn Content,
    settings: &CaptureSettings,
    progress: (&Progress, usize),
    writer: &mut VolumeWriter,
) -> Result<(), CaptureError> {
    let (progress, position) = progress;
    let compressors = settings.compressors.max(1);
    let capture = Capture {
        name,
        content,
        chunk_size: settings.chunk_size,
        volume_bytes: content.bytes(),
        progress,
        line: Line::new(
            Splitter::new(content, settings.chunk_size),
            compressors + PLACES_AHEAD,
        ),
        spare: Mutex::new(Vec::new()),
    };
    while_compressing(
        settings,
        &capture.line,
        || capture.compress(settings.level),
        || capture.write(writer, position),
    )
}

/// Has `write` take from the line what compressors, of which each is a call of `compress`, put into it. Whatever ends
/// `write` ends them.
///
/// # Errors
/// What `write` says, or that no thread can be started.
pub(super) fn while_compressing<P: Send, T: Send>(
    settings: &CaptureSettings,
    line: &Line<P, T, CaptureError>,
    compress: impl Fn() + Sync,
    write: impl FnOnce() -> Result<(), CaptureError>,
) -> Result<(), CaptureError> {
    thread::scope(|scope| {
        // Whatever ends this block, also a panic, ends the compressors: the scope waits for them.
        let _abandon = OnDrop(|| line.abandon());
        for number in 0..settings.compressors.max(1) {
            let thread = thread::Builder::new().name(format!("compress-{number}"));
            let work = || {
                let _abandon_on_panic = OnDrop(|| {
                    if thread::panicking() {
                        line.abandon();
                    }
                });
                if settings.gives_way {
                    give_way(CAPTURE);
                }
                compress();
            };
            thread.spawn_scoped(scope, work).map_err(CaptureError::Thread)?;
        }
        write()
    })
}

/// Calls when dropped.
struct OnDrop<F: FnMut()>(F);

impl<F: FnMut()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

impl Capture<'_> {
    fn write(&self, writer: &mut VolumeWriter, position: usize) -> Result<(), CaptureError> {
        while let Some(finished) = self.line.leave()? {
            let before = writer.content_bytes();
            match finished {
                Finished::Zeros { chunks } => writer.push_zeros(chunks)?,
                Finished::Span(span) => {
                    write_span(writer, &span)?;
                    self.spare
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push(span);
                }
            }
            self.progress.add_done(position, writer.content_bytes() - before);
            self.progress.set_stored(position, writer.stored_bytes());
        }
        if self.progress.is_cancelled() {
            return Err(CaptureError::Cancelled);
        }
        Ok(())
    }

    fn compress(&self, level: i32) {
        let mut compressor = match ChunkCompressor::new(level) {
            Ok(compressor) => compressor,
            Err(error) => return self.line.fail(CaptureError::Compressor { level, source: error }),
        };
        let mut plain = Vec::new();
        while let Some((place, piece)) = self.take() {
            let finished = match piece {
                Piece::Zeros { chunks } => Ok(Finished::Zeros { chunks }),
                Piece::Span { first, chunks } => self.span(first, chunks, &mut plain, &mut compressor),
            };
            match finished {
                Ok(finished) => self.line.put(place, finished),
                Err(error) => return self.line.fail(error),
            }
        }
    }

    fn take(&self) -> Option<(Place, Piece)> {
        self.line.take(|splitter| {
            if self.progress.is_cancelled() {
                return Err(CaptureError::Cancelled);
            }
            splitter
                .next()
                .map_err(|(range, source)| self.unreadable(range, source))
        })
    }

    fn span(
        &self,
        first: ChunkIndex,
        chunks: u64,
        plain: &mut Vec<u8>,
        compressor: &mut ChunkCompressor,
    ) -> Result<Finished, CaptureError> {
        let spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut span = spare.unwrap_or_default();
        span.frames.clear();
        span.chunks.clear();
        for number in first.0..first.0 + chunks {
            let range = self.chunk_size.range_of(ChunkIndex(number), self.volume_bytes);
            plain.resize(range.len as usize, 0); // at most 2 MiB
            let found = self
                .content
                .read(range.start, plain)
                .map_err(|source| self.unreadable(range, source))?;
            if found == Found::Zero || is_zero(plain) {
                span.chunks.push(None);
                continue;
            }
            let digest = ChunkDigest::of(plain);
            let frame_bytes = compressor
                .append_frame(plain, &mut span.frames)
                .map_err(|source| CaptureError::Compress {
                    volume: self.name.clone(),
                    range,
                    source,
                })?;
            span.chunks.push(Some(CompressedChunk { frame_bytes, digest }));
        }
        Ok(Finished::Span(span))
    }

    fn unreadable(&self, range: ByteRange, source: io::Error) -> CaptureError {
        CaptureError::Read {
            volume: self.name.clone(),
            range,
            source,
        }
    }
}

/// Hands the chunks of a span on, run by run.
fn write_span(writer: &mut VolumeWriter, span: &Span) -> Result<(), CaptureError> {
    let mut frames = &span.frames[..];
    let mut data: Vec<CompressedChunk> = Vec::new();
    for run in span
        .chunks
        .chunk_by(|left, right| left.is_some() == right.is_some())
    {
        data.clear();
        data.extend(run.iter().flatten());
        if data.is_empty() {
            writer.push_zeros(run.len() as u64)?;
            continue;
        }
        let bytes: usize = data.iter().map(|chunk| chunk.frame_bytes as usize).sum();
        let (now, rest) = frames.split_at(bytes);
        writer.push_frames(now, &data)?;
        frames = rest;
    }
    Ok(())
}
