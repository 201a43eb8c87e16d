//! Output through a descriptor that others share: the monitor's standard output.
//!
//! Such a descriptor cannot be told not to block: that would hold for whoever else has it. So a thread of its own
//! writes to it, and what waits for the thread waits in a queue. A pipe that nobody empties and a terminal that was
//! stopped (Ctrl+S) hold up that thread for as long as they like, and a vCPU for [`READER_WAIT`].

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::pipe::PIPE_BUF;

use super::{QUEUE_BYTES_MAX, READER_WAIT};

/// What the guest printed and nobody has taken. Shared by the sink, the thread and the console.
struct Outbox {
    /// Held for moves of bytes alone. No other lock is taken under it.
    queue: Mutex<Queue>,
    /// Told when the thread has something to do.
    work: Condvar,
    /// Told when the thread has written something, or has ended.
    progress: Condvar,
}

#[derive(Default)]
struct Queue {
    bytes: VecDeque<u8>,
    /// Bytes that the thread has taken out, and is writing.
    in_hand: usize,
    /// Nobody has read for [`READER_WAIT`]: until somebody does, a full queue loses what comes at once.
    is_given_up: bool,
    /// The console is gone: what is here is all that there will be.
    is_closed: bool,
    /// The other end is gone for good.
    has_failed: bool,
}

impl Queue {
    /// All that waits.
    fn len(&self) -> usize {
        self.bytes.len() + self.in_hand
    }

    fn is_full(&self) -> bool {
        self.len() >= QUEUE_BYTES_MAX
    }

    fn is_done(&self) -> bool {
        self.has_failed || self.len() == 0
    }
}

impl Outbox {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the thread, but no longer than [`READER_WAIT`] without any progress.
    fn wait_while<'q>(
        &self,
        queue: MutexGuard<'q, Queue>,
        condition: impl FnMut(&mut Queue) -> bool,
    ) -> MutexGuard<'q, Queue> {
        self.progress
            .wait_timeout_while(queue, READER_WAIT, condition)
            .unwrap_or_else(PoisonError::into_inner)
            .0
    }
}

/// The thread that writes. Dropping it waits for what the guest printed last, while somebody reads.
pub(super) struct OutputThread {
    outbox: Arc<Outbox>,
    thread: Option<JoinHandle<()>>,
}

impl OutputThread {
    /// Starts it, and gives what the guest's output is to be written to.
    pub(super) fn start(file: File) -> io::Result<(Self, OutputSink)> {
        let outbox = Arc::new(Outbox {
            queue: Mutex::default(),
            work: Condvar::new(),
            progress: Condvar::new(),
        });
        let shared = Arc::clone(&outbox);
        let thread = std::thread::Builder::new()
            .name("console output".to_owned())
            .spawn(move || write_all(&shared, file))?;
        let sink = OutputSink(Arc::clone(&outbox));
        let thread = Some(thread);
        Ok((Self { outbox, thread }, sink))
    }
}

impl fmt::Debug for OutputThread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OutputThread")
    }
}

impl Drop for OutputThread {
    fn drop(&mut self) {
        let mut queue = self.outbox.queue();
        queue.is_closed = true;
        self.outbox.work.notify_one();
        while !queue.is_done() {
            let left = queue.len();
            queue = self
                .outbox
                .wait_while(queue, |queue| !queue.is_done() && queue.len() == left);
            if queue.len() == left {
                // Nobody reads. The thread ends with the process, or when somebody does.
                return;
            }
        }
        drop(queue);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn write_all(outbox: &Outbox, mut file: File) {
    let mut hand = VecDeque::new();
    loop {
        let mut queue = outbox.queue();
        while queue.bytes.is_empty() && !queue.is_closed {
            queue = outbox.work.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        if queue.bytes.is_empty() {
            return;
        }
        std::mem::swap(&mut queue.bytes, &mut hand);
        queue.in_hand = hand.len();
        drop(queue);
        while !hand.is_empty() {
            let front = hand.as_slices().0;
            // A pipe takes all of a write or waits: of a long one nobody would know how far it is.
            let written = write_some(&mut file, &front[..front.len().min(PIPE_BUF)]);
            hand.drain(..written);
            let mut queue = outbox.queue();
            queue.in_hand = hand.len();
            if written == 0 {
                queue.has_failed = true;
            } else {
                queue.is_given_up = false;
            }
            drop(queue);
            outbox.progress.notify_all();
            if written == 0 {
                return;
            }
        }
    }
}

/// Waits until it has written something; 0 says that nobody will ever take anything.
fn write_some(file: &mut File, bytes: &[u8]) -> usize {
    loop {
        match file.write(bytes) {
            Ok(written) => return written,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // Somebody who has the descriptor too has told it not to block.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let is_ready = poll(&mut [PollFd::new(&*file, PollFlags::OUT)], None);
                if is_ready.is_err_and(|error| error != Errno::INTR) {
                    return 0;
                }
            }
            Err(error) => {
                tracing::warn!(%error, "nobody takes the serial console's output any more");
                return 0;
            }
        }
    }
}

/// The guest's output. It fails, and the byte is lost, where nobody reads any more.
pub(super) struct OutputSink(Arc<Outbox>);

impl Write for OutputSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let must_wait = |queue: &mut Queue| queue.is_full() && !queue.is_given_up && !queue.has_failed;
        let mut queue = self.0.wait_while(self.0.queue(), must_wait);
        if queue.has_failed {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        if queue.is_full() {
            queue.is_given_up = true;
            return Err(io::ErrorKind::WouldBlock.into());
        }
        queue.bytes.extend(bytes);
        drop(queue);
        self.0.work.notify_one();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::os::fd::OwnedFd;

    use super::*;

    fn pipe() -> (io::PipeReader, File) {
        let (reader, writer) = io::pipe().unwrap();
        (reader, File::from(OwnedFd::from(writer)))
    }

    /// Prints until nobody takes it any more, and says how much was taken.
    fn fill(sink: &mut OutputSink) -> usize {
        (0..)
            .take_while(|number| sink.write(&[*number as u8]).is_ok())
            .count()
    }

    #[test]
    fn what_was_printed_last_is_written_before_the_console_is_gone() {
        let (mut reader, writer) = pipe();
        let (thread, mut sink) = OutputThread::start(writer).unwrap();
        for byte in b"the end" {
            sink.write_all(&[*byte]).unwrap();
        }
        drop((sink, thread));
        let mut heard = String::new();
        reader.read_to_string(&mut heard).unwrap();
        assert_eq!(heard, "the end");
    }

    #[test]
    fn a_pipe_that_nobody_empties_loses_output_and_holds_nobody_up_for_ever() {
        let (reader, writer) = pipe();
        let (thread, mut sink) = OutputThread::start(writer).unwrap();
        assert!(fill(&mut sink) >= QUEUE_BYTES_MAX);
        assert!(sink.0.queue().is_given_up, "the next byte would wait again");
        drop((sink, thread));
        drop(reader);
    }

    #[test]
    fn a_slow_reader_that_goes_on_reading_gets_everything() {
        let (mut reader, writer) = pipe();
        let (thread, mut sink) = OutputThread::start(writer).unwrap();
        let said = QUEUE_BYTES_MAX + (128 << 10);
        let heard = std::thread::spawn(move || {
            let mut heard = 0;
            let mut bytes = [0; 16 << 10];
            loop {
                // All of it takes longer than a reader is waited for that does not read at all.
                std::thread::sleep(READER_WAIT / 10);
                match reader.read(&mut bytes).unwrap() {
                    0 => return heard,
                    more => heard += more,
                }
            }
        });
        for _ in 0..said {
            sink.write_all(b"x").unwrap();
        }
        drop((sink, thread));
        assert_eq!(heard.join().unwrap(), said);
    }

    #[test]
    fn who_reads_again_gets_everything_that_was_taken_and_what_comes_then() {
        let (mut reader, writer) = pipe();
        let (thread, mut sink) = OutputThread::start(writer).unwrap();
        let taken = fill(&mut sink);
        let mut heard = vec![0; taken];
        reader.read_exact(&mut heard).unwrap();
        assert!(heard.iter().copied().eq((0..taken).map(|number| number as u8)));
        sink.write_all(b"again").unwrap();
        drop((sink, thread));
        let mut rest = Vec::new();
        reader.read_to_end(&mut rest).unwrap();
        assert_eq!(rest, b"again");
    }

    #[test]
    fn a_reader_that_is_gone_ends_the_thread() {
        let (reader, writer) = pipe();
        drop(reader);
        let (thread, mut sink) = OutputThread::start(writer).unwrap();
        // The first byte finds out.
        let _ = sink.write(b"x");
        while sink.write(b"y").is_ok() {}
        drop(thread);
        assert_eq!(sink.write(b"z").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}
