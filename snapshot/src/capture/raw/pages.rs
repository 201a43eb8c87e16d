//! A raw file of some pages alone, as Firecracker's diff snapshots are: every other page is a hole, or what the file has
//! that was at the target before, if that is as long (then it becomes the whole memory, brought up to date).

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;

use rustix::fs::SeekFrom as Find;
use rustix::io::Errno;

use super::{RawError, RawFile};
use crate::capture::CaptureSettings;
use crate::capture::content::{Content, Found};
use crate::capture::progress::Progress;
use crate::give_way::{CAPTURE, give_way};
use crate::pager::PageSet;
use crate::units::{ByteRange, PAGE_SIZE, PageIndex};

/// Pages that are read and written together, 256 KiB.
const PAGES_AT_ONCE: u64 = 64;

/// Writes `pages` of `content` for `target`, those that are zeros too, down to the disk. What is at `target` stays until
/// [`publish`](super::publish); other pages are taken over from it, if it is a file of the same length. The volume's
/// figures are the first of `progress`.
///
/// # Errors
/// When reading or writing fails, or it was cancelled.
pub fn write_raw_pages(
    content: &dyn Content,
    pages: &PageSet,
    target: &Path,
    settings: &CaptureSettings,
    progress: &Progress,
) -> Result<RawFile, RawError> {
    let bytes = content.bytes();
    let file = RawFile::create(target, bytes)?;
    if settings.gives_way {
        give_way(CAPTURE);
    }
    // First the pages of a machine that may wait for it.
    let mut buffer = Vec::new();
    let mut done = 0;
    for (first, count) in pages.runs() {
        for start in (first.0..first.0 + count).step_by(PAGES_AT_ONCE as usize) {
            if progress.is_cancelled() {
                return Err(RawError::Cancelled);
            }
            let end = (start + PAGES_AT_ONCE).min(first.0 + count);
            let range = ByteRange {
                start: PageIndex(start).offset(),
                len: PageIndex(end).offset().min(bytes) - PageIndex(start).offset(),
            };
            buffer.resize(range.len as usize, 0);
            let read = content.read(range.start, &mut buffer);
            if read.map_err(|source| RawError::Read { range, source })? == Found::Zero {
                buffer.fill(0);
            }
            file.write(&buffer, range.start)?;
            progress.add_done(0, range.start + range.len - done);
            done = range.start + range.len;
        }
    }
    progress.add_done(0, bytes - done);
    take_over(target, &file, pages, bytes, progress)?;
    file.synchronise()?;
    Ok(file)
}

/// Copies what is at `target` to the other pages, if there is a file of so many bytes.
fn take_over(
    target: &Path,
    file: &RawFile,
    pages: &PageSet,
    bytes: u64,
    progress: &Progress,
) -> Result<(), RawError> {
    let failed = |source| RawError::Write {
        what: "taking over pages of",
        path: target.to_owned(),
        source,
    };
    let is_one = fs::symlink_metadata(target).is_ok_and(|about| about.is_file() && about.len() == bytes);
    if !is_one {
        return Ok(());
    }
    let old = File::open(target).map_err(failed)?;
    let mut page = PageIndex(0);
    while page.0 < pages.pages() {
        let (is_new, run) = pages.run_at(page, pages.pages() - page.0);
        let end = PageIndex(page.0 + run).offset().min(bytes);
        if !is_new {
            copy_data(&old, file, page.offset(), end, progress).map_err(|error| match error {
                CopyError::Cancelled => RawError::Cancelled,
                CopyError::Io(source) => failed(source),
            })?;
        }
        page.0 += run;
    }
    Ok(())
}

enum CopyError {
    Cancelled,
    Io(io::Error),
}

impl From<io::Error> for CopyError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Copies the data, not the holes, between two offsets.
fn copy_data(old: &File, new: &RawFile, from: u64, to: u64, progress: &Progress) -> Result<(), CopyError> {
    let (mut old, mut new) = (old, new.partial.file());
    let mut at = from;
    while at < to {
        let start = match rustix::fs::seek(old, Find::Data(at)) {
            Ok(start) if start < to => start,
            Ok(_) | Err(Errno::NXIO) => return Ok(()),
            Err(Errno::INVAL) => at, // a file system that knows of no holes
            Err(error) => return Err(io::Error::from(error).into()),
        };
        let end = match rustix::fs::seek(old, Find::Hole(start)) {
            Ok(end) => end.min(to),
            Err(_) => to,
        };
        old.seek(SeekFrom::Start(start))?;
        new.seek(SeekFrom::Start(start))?;
        let mut left = end - start;
        while left > 0 {
            if progress.is_cancelled() {
                return Err(CopyError::Cancelled);
            }
            let piece = left.min(PAGES_AT_ONCE * PAGE_SIZE * 64);
            // The standard library has the kernel copy, where it can without moving the bytes.
            let copied = io::copy(&mut old.take(piece), &mut new)?;
            if copied == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            left -= copied;
        }
        new.flush()?;
        at = end;
    }
    Ok(())
}
