//! Bytes between files and guest memory, without a copy in between.
//!
//! This is the one place that hands addresses of guest memory to the kernel, so it is also the one place that marks
//! what the kernel wrote there as dirty.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::bitmap::Bitmap;
use vm_memory::volatile_memory::PtrGuardMut;

use super::GuestSlice;

/// The most slices that one system call takes (`IOV_MAX`, limits.h).
const SLICES_PER_CALL_MAX: usize = 1024;

/// How many bytes the slices hold together.
#[must_use]
pub fn total(slices: &[GuestSlice<'_>]) -> u64 {
    slices.iter().map(|slice| slice.len() as u64).sum()
}

/// Fills the slices, one after the other, from `offset` of `file` on, and marks them dirty.
///
/// # Errors
/// When reading fails, or the file ends early.
pub fn read_slices_at(file: &File, offset: u64, into: &[GuestSlice<'_>]) -> io::Result<()> {
    let result = transfer(offset, into, |vectors, count, at| {
        // SAFETY: `transfer` built the vectors from guest memory that its slices keep mapped; the kernel writes only
        // inside them, and guest memory may change at any time anyway.
        unsafe { libc::preadv(file.as_raw_fd(), vectors, count, at) }
    });
    // Whatever happened, some of it may have been written.
    for slice in into {
        slice.bitmap().mark_dirty(0, slice.len());
    }
    result
}

/// Writes the slices, one after the other, at `offset` of `file`.
///
/// # Errors
/// When writing fails.
pub fn write_slices_at(file: &File, offset: u64, from: &[GuestSlice<'_>]) -> io::Result<()> {
    transfer(offset, from, |vectors, count, at| {
        // SAFETY: `transfer` built the vectors from guest memory that its slices keep mapped; the kernel only reads.
        unsafe { libc::pwritev(file.as_raw_fd(), vectors, count, at) }
    })
}

/// Receives one message from `fd` (a tap, a datagram socket) into the slices, one after the other, and marks what was
/// filled as dirty; says how many bytes the message had, as far as there was room.
///
/// # Errors
/// What `readv(2)` says: `WouldBlock` when there is no message.
pub fn receive_message(fd: BorrowedFd<'_>, into: &[GuestSlice<'_>]) -> io::Result<usize> {
    let received = message(into, |vectors, count| {
        // SAFETY: `message` built the vectors from guest memory that its slices keep mapped; the kernel writes only
        // inside them, and guest memory may change at any time anyway.
        unsafe { libc::readv(fd.as_raw_fd(), vectors, count) }
    })?;
    let mut left = received;
    for slice in into {
        let part = left.min(slice.len());
        slice.bitmap().mark_dirty(0, part);
        left -= part;
    }
    Ok(received)
}

/// Sends the slices as one message to `fd`.
///
/// # Errors
/// What `writev(2)` says: `WouldBlock` when there is no room.
pub fn send_message(fd: BorrowedFd<'_>, from: &[GuestSlice<'_>]) -> io::Result<usize> {
    message(from, |vectors, count| {
        // SAFETY: `message` built the vectors from guest memory that its slices keep mapped; the kernel only reads.
        unsafe { libc::writev(fd.as_raw_fd(), vectors, count) }
    })
}

/// One call of `call` with all slices, which must not be more than one call takes.
fn message(
    slices: &[GuestSlice<'_>],
    call: impl Fn(*const libc::iovec, libc::c_int) -> isize,
) -> io::Result<usize> {
    if slices.len() > SLICES_PER_CALL_MAX {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let guards: Vec<_> = slices.iter().map(GuestSlice::ptr_guard_mut).collect();
    let vectors = vectors_of(&guards);
    loop {
        match usize::try_from(call(vectors.as_ptr(), vectors.len() as libc::c_int)) {
            Ok(moved) => return Ok(moved),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

fn vectors_of(guards: &[PtrGuardMut]) -> Vec<libc::iovec> {
    guards
        .iter()
        .map(|guard| libc::iovec {
            iov_base: guard.as_ptr().cast(),
            iov_len: guard.len(),
        })
        .collect()
}

/// Repeats `call` until all bytes have moved. `call` takes vectors, their count and a file offset, as `preadv(2)`.
fn transfer(
    offset: u64,
    slices: &[GuestSlice<'_>],
    call: impl Fn(*const libc::iovec, libc::c_int, libc::off_t) -> isize,
) -> io::Result<()> {
    let guards: Vec<_> = slices.iter().map(GuestSlice::ptr_guard_mut).collect();
    let mut vectors = vectors_of(&guards);
    let mut rest = vectors.as_mut_slice();
    let mut at = offset;
    loop {
        while rest.first().is_some_and(|vector| vector.iov_len == 0) {
            rest = &mut rest[1..];
        }
        if rest.is_empty() {
            return Ok(());
        }
        let count = rest.len().min(SLICES_PER_CALL_MAX);
        let position = libc::off_t::try_from(at).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let moved = call(rest.as_ptr(), count as libc::c_int, position);
        let Ok(moved) = usize::try_from(moved) else {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            return Err(error);
        };
        if moved == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        at += moved as u64;
        advance(rest, moved);
    }
}

/// Takes `moved` bytes off the front of the vectors.
fn advance(vectors: &mut [libc::iovec], mut moved: usize) {
    for vector in vectors {
        let part = moved.min(vector.iov_len);
        vector.iov_base = vector.iov_base.cast::<u8>().wrapping_add(part).cast();
        vector.iov_len -= part;
        moved -= part;
        if moved == 0 {
            return;
        }
    }
}

/// Hands out slices piece by piece.
pub struct Cursor<'s, 'g> {
    slices: &'s [GuestSlice<'g>],
    /// Bytes of the first slice that were handed out already.
    taken: usize,
}

impl<'s, 'g> Cursor<'s, 'g> {
    /// Starts at the first byte of the first slice.
    #[must_use]
    pub fn new(slices: &'s [GuestSlice<'g>]) -> Self {
        Self { slices, taken: 0 }
    }

    /// The next `bytes` bytes, or what is left of the slices.
    pub fn take(&mut self, bytes: u64) -> Vec<GuestSlice<'g>> {
        let mut wanted = usize::try_from(bytes).unwrap_or(usize::MAX);
        let mut pieces = Vec::new();
        while wanted > 0
            && let Some(slice) = self.slices.first()
        {
            let len = wanted.min(slice.len() - self.taken);
            pieces.push(
                slice
                    .subslice(self.taken, len)
                    .expect("the piece lies inside the slice"),
            );
            wanted -= len;
            self.taken += len;
            if self.taken == slice.len() {
                self.slices = &self.slices[1..];
                self.taken = 0;
            }
        }
        pieces
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::bitmap::AtomicBitmap;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

    use super::*;

    const PAGE: u64 = 4096;

    fn ram() -> GuestMemoryMmap<AtomicBitmap> {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 8 * PAGE as usize)]).unwrap()
    }

    #[test]
    fn bytes_read_into_guest_memory_leave_dirty_marks_and_only_there() {
        let file = tempfile::tempfile().unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, b"hello, guest", 100).unwrap();
        let ram = ram();
        let slices = [
            ram.get_slice(GuestAddress(PAGE), 5).unwrap(),
            ram.get_slice(GuestAddress(5 * PAGE), 0).unwrap(),
            ram.get_slice(GuestAddress(3 * PAGE), 7).unwrap(),
        ];
        read_slices_at(&file, 100, &slices).unwrap();

        let mut text = [0; 5];
        ram.read_slice(&mut text, GuestAddress(PAGE)).unwrap();
        assert_eq!(&text, b"hello");
        let mut text = [0; 7];
        ram.read_slice(&mut text, GuestAddress(3 * PAGE)).unwrap();
        assert_eq!(&text, b", guest");
        let region = ram.iter().next().unwrap();
        let dirty: Vec<_> = (0..8)
            .filter(|page| region.bitmap().dirty_at(page * PAGE as usize))
            .collect();
        assert_eq!(dirty, [1, 3]);
    }

    #[test]
    fn a_message_marks_what_it_fills_and_no_more() {
        use std::os::fd::AsFd;
        let (here, there) = std::os::unix::net::UnixDatagram::pair().unwrap();
        there.send(&[7; 6000]).unwrap();
        let ram = ram();
        let slices = [
            ram.get_slice(GuestAddress(PAGE), PAGE as usize).unwrap(),
            ram.get_slice(GuestAddress(4 * PAGE), 3 * PAGE as usize).unwrap(),
        ];
        assert_eq!(receive_message(here.as_fd(), &slices).unwrap(), 6000);
        let region = ram.iter().next().unwrap();
        let dirty: Vec<_> = (0..8)
            .filter(|page| region.bitmap().dirty_at(page * PAGE as usize))
            .collect();
        assert_eq!(dirty, [1, 4]);

        assert_eq!(send_message(here.as_fd(), &slices[..1]).unwrap(), PAGE as usize);
        let mut echoed = [0; 2 * PAGE as usize];
        assert_eq!(there.recv(&mut echoed).unwrap(), PAGE as usize);
        assert_eq!(echoed[..PAGE as usize], [7; PAGE as usize]);
    }

    #[test]
    fn a_file_that_ends_early_is_an_error_and_not_an_endless_loop() {
        let file = tempfile::tempfile().unwrap();
        let ram = ram();
        let slices = [ram.get_slice(GuestAddress(0), 1).unwrap()];
        assert_eq!(
            read_slices_at(&file, 0, &slices).unwrap_err().kind(),
            io::ErrorKind::UnexpectedEof
        );
    }

    #[test]
    fn a_cursor_cuts_slices_without_losing_a_byte() {
        let file = tempfile::tempfile().unwrap();
        let ram = ram();
        ram.write_slice(b"abcdefghij", GuestAddress(0)).unwrap();
        let slices = [
            ram.get_slice(GuestAddress(0), 4).unwrap(),
            ram.get_slice(GuestAddress(4), 6).unwrap(),
        ];
        let mut cursor = Cursor::new(&slices);
        let mut at = 0;
        for bytes in [3, 3, 100] {
            let pieces = cursor.take(bytes);
            write_slices_at(&file, at, &pieces).unwrap();
            at += total(&pieces);
        }
        assert_eq!(at, 10);
        let mut text = [0; 10];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut text, 0).unwrap();
        assert_eq!(&text, b"abcdefghij");
        assert!(cursor.take(1).is_empty());
    }
}
