//! Reading chunks that may be taken out of their page file at any moment. What makes it right is told in
//! [`Marks`](crate::source::Marks)'s module.

use std::io;

use super::Fetcher;
use crate::source::{Arrived, ChunkId};

impl Fetcher {
    /// Waits for a chunk with `wait`, and then has `read` read bytes of it from the page file, if it is not zeros: again
    /// and again, should it be taken out meanwhile. `read` fills the same place each time.
    ///
    /// # Errors
    /// What `wait` and `read` say.
    pub fn read_held(
        &self,
        id: ChunkId,
        wait: impl Fn() -> io::Result<Arrived>,
        mut read: impl FnMut() -> io::Result<()>,
    ) -> io::Result<Arrived> {
        let volume = self.volumes.get(usize::from(id.volume.0));
        let marks = volume.and_then(|volume| volume.marks.as_ref());
        loop {
            let arrived = wait()?;
            let (Arrived::Data, Some(marks)) = (arrived, marks) else {
                if arrived == Arrived::Data {
                    read()?;
                }
                return Ok(arrived);
            };
            if let Some(mark) = marks.look(id.chunk) {
                read()?;
                if marks.is_still(id.chunk, mark) {
                    return Ok(arrived);
                }
            }
            // Whoever waits next demands it, as what it is: the guest's wait, or a snapshot's.
            self.forget(id);
        }
    }
}
