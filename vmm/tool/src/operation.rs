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
    /// A signal called it off.
    Cancelled(i32),
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
            cancelled = Some(signal);
            // Refused if it has just ended; the answer tells.
            let _ = api.delete(path);
        }
    };
    // It has sent its answer and does nothing more.
    let _ = worker.join();
    match (answered, cancelled) {
        (Ok(()), _) => Ok(Outcome::Done),
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
    if operation.state == "running" && path.ends_with(&operation.kind) {
        view.show(&operation.phase, operation.bytes_done, operation.bytes_total);
    }
}
