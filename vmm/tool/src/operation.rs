//! A snapshot made or loaded: the request that lasts, beside it the progress that is shown, and Ctrl-C which calls it
//! off through the API.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use serde_json::Value;

use crate::api::{Api, ApiError};
use crate::progress::ProgressView;
use crate::signals::Signals;

/// How often progress is asked for.
const LOOK: Duration = Duration::from_millis(100);

/// How an operation ended that did not fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It is done.
    Done,
    /// It is done, since a signal came too late to call it off.
    Overtaken(i32),
    /// A signal called it off; all is as it was before.
    Cancelled(i32),
    /// A second signal came before the monitor had called it off. How it ends is not known.
    Abandoned(i32),
}

/// Puts `body` to `path` (`/snapshot/create` or `/snapshot/load`) and waits until it is done.
///
/// # Errors
/// When the monitor refuses or fails. A request that fails because it was called off is no error.
pub(crate) fn run(
    api: &Api,
    path: &'static str,
    body: Value,
    view: &mut ProgressView,
    signals: &Signals,
) -> Result<Outcome, ApiError> {
    let (sender, answer) = mpsc::channel();
    let request = {
        let api = api.clone();
        // Fails only if this thread is gone, and then nobody waits for it.
        move || drop(sender.send(api.put(path, &body)))
    };
    let worker = thread::spawn(request);
    let mut cancelled = None;
    let answered = loop {
        match answer.recv_timeout(LOOK) {
            Ok(answered) => break answered,
            Err(RecvTimeoutError::Timeout) => show(api, path, view),
            Err(RecvTimeoutError::Disconnected) => unreachable!("the thread sends before it ends"),
        }
        if let Some(signal) = signals.next() {
            if cancelled.replace(signal).is_some() {
                return Ok(Outcome::Abandoned(signal));
            }
            // Refused if it has just ended; the answer tells.
            let _ = api.delete(path);
        }
    };
    // It has sent its answer and does nothing more.
    let _ = worker.join();
    match (answered, cancelled) {
        (Ok(()), None) => Ok(Outcome::Done),
        (Ok(()), Some(signal)) => Ok(Outcome::Overtaken(signal)),
        (Err(ApiError::Refused { .. }), Some(signal)) => Ok(Outcome::Cancelled(signal)),
        (Err(error), _) => Err(error),
    }
}

/// Shows how far it is. What cannot be asked is not shown: the request itself tells what is wrong.
fn show(api: &Api, path: &str, view: &mut ProgressView) {
    let Ok(progress) = api.progress() else { return };
    let Some(operation) = progress.operation else {
        return;
    };
    // The last one's, if this one has not begun.
    if operation.is_under_way() && path.ends_with(&operation.kind) {
        view.show(&operation.phase, operation.bytes_done, operation.bytes_total);
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::{UnixListener, UnixStream};

    use serde_json::json;

    use super::*;

    const REFUSED: &str =
        "HTTP/1.1 400 Bad Request\r\n\r\n{\"fault_message\":\"the snapshot was cancelled\"}";
    const DONE: &str = "HTTP/1.1 204 No Content\r\n\r\n";

    fn method_of(stream: &mut UnixStream) -> String {
        let mut request = vec![0; 4096];
        let len = stream.read(&mut request).unwrap();
        let text = String::from_utf8(request[..len].to_vec()).unwrap();
        text.split(' ').next().unwrap().to_owned()
    }

    /// A monitor that saves until it is told not to; then `answer` is what the request for it gets.
    fn monitor(listener: &UnixListener, answer: &'static str) {
        let (mut saving, mut is_called_off) = (None, false);
        // On a busy host the two may come in any order.
        while saving.is_none() || !is_called_off {
            let (mut stream, _) = listener.accept().unwrap();
            let answer = match method_of(&mut stream).as_str() {
                "PUT" => {
                    saving = Some(stream);
                    continue;
                }
                "GET" => "HTTP/1.1 200 OK\r\n\r\n{\"operation\":null,\"volumes\":[]}",
                "DELETE" => {
                    is_called_off = true;
                    DONE
                }
                other => panic!("{other}"),
            };
            stream.write_all(answer.as_bytes()).unwrap();
        }
        saving.unwrap().write_all(answer.as_bytes()).unwrap();
    }

    /// Interrupts an operation that ends with `answer` once it is called off.
    fn interrupted(answer: &'static str) -> Outcome {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("api.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let monitor = thread::spawn(move || monitor(&listener, answer));
        let signals = Signals::take().unwrap();
        // SAFETY: the signal is for this thread, and blocked in it.
        assert_eq!(unsafe { libc::raise(libc::SIGINT) }, 0);
        let mut view = ProgressView::new("snapshot web".into());
        let outcome = run(
            &Api::new(&socket),
            "/snapshot/create",
            json!({}),
            &mut view,
            &signals,
        );
        monitor.join().unwrap();
        outcome.unwrap()
    }

    #[test]
    fn a_signal_calls_the_operation_off_through_the_api() {
        assert_eq!(interrupted(REFUSED), Outcome::Cancelled(libc::SIGINT));
    }

    #[test]
    fn an_operation_that_was_done_all_the_same_is_done() {
        assert_eq!(interrupted(DONE), Outcome::Overtaken(libc::SIGINT));
    }
}
