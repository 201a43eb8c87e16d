//! A snapshot being made or loaded: how far it is, and whether it is still wanted.
//!
//! The control thread works and reports; the API's thread looks on, and may say that it is to end.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::fault::Fault;
use super::hold::hold;

/// What is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum OperationKind {
    /// A snapshot is made.
    Create,
    /// A snapshot is loaded.
    Load,
}

/// How it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum OperationState {
    /// It goes on.
    Running,
    /// It succeeded.
    Done,
    /// It failed.
    Failed,
    /// It was cancelled.
    Cancelled,
}

/// How far an operation is: what `GET /snapshot/progress` answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Progress {
    /// What it is.
    pub kind: OperationKind,
    /// How it stands.
    pub state: OperationState,
    /// What it does just now, or did last.
    pub phase: &'static str,
    /// Bytes of volumes that are done.
    pub bytes_done: u64,
    /// Bytes of volumes in all; 0 while that is not known.
    pub bytes_total: u64,
    /// How long it has taken so far, or took.
    pub elapsed_ms: u64,
    /// Whether a machine that runs stands for it just now.
    pub is_holding: bool,
    /// How long such a machine has stood for it so far, or stood; absent if it did not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pause_ms: Option<u64>,
    /// Why it failed, if it did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fault_message: Option<String>,
}

/// What is to happen once, when the operation is cancelled.
type CancelHook = Box<dyn FnOnce() + Send>;
/// Says how far the operation is: bytes done, bytes in all.
type Gauge = Box<dyn Fn() -> (u64, u64) + Send>;

/// An operation under way, or the last one.
pub struct Operation {
    kind: OperationKind,
    started: Instant,
    is_cancelled: Arc<AtomicBool>,
    bytes_done: AtomicU64,
    bytes_total: AtomicU64,
    /// Shared with threads that outlive a borrow; held for an assignment.
    phase: Arc<Mutex<&'static str>>,
    /// Held for a few assignments at a time.
    detail: Mutex<Detail>,
}

struct Detail {
    /// The end, once it is there: how, how long it took, and why if it failed.
    end: Option<(OperationState, Duration, Option<String>)>,
    on_cancel: Option<CancelHook>,
    gauge: Option<Gauge>,
    pause: Option<Pause>,
}

/// How long a machine that runs stands for a snapshot.
#[derive(Clone, Copy)]
enum Pause {
    Since(Instant),
    Over(Duration),
}

impl Operation {
    pub(super) fn new(kind: OperationKind) -> Arc<Self> {
        Arc::new(Self {
            kind,
            started: Instant::now(),
            is_cancelled: Arc::default(),
            bytes_done: AtomicU64::new(0),
            bytes_total: AtomicU64::new(0),
            phase: Arc::new(Mutex::new("starting")),
            detail: Mutex::new(Detail {
                end: None,
                on_cancel: None,
                gauge: None,
                pause: None,
            }),
        })
    }

    fn detail(&self) -> MutexGuard<'_, Detail> {
        // Nobody panics while holding it, and if somebody did, the text would still be whole.
        self.detail.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says what the operation does from now on.
    pub fn enter(&self, phase: &'static str) {
        self.phases()(phase);
    }

    /// [`enter`](Self::enter), for threads that outlive this borrow.
    pub fn phases(&self) -> impl Fn(&'static str) + Send + Sync + use<> {
        let (kind, shared) = (self.kind, Arc::clone(&self.phase));
        let is_cancelled = Arc::clone(&self.is_cancelled);
        move |phase| {
            *shared.lock().unwrap_or_else(PoisonError::into_inner) = phase;
            tracing::debug!("{kind:?} of a snapshot: {phase}");
            hold(phase, &is_cancelled);
        }
    }

    /// Says that a machine that runs stands for the operation from now on.
    pub fn begin_pause(&self) {
        self.detail().pause = Some(Pause::Since(Instant::now()));
    }

    /// Says that it runs on; how long it stood, if it did.
    pub fn end_pause(&self) -> Option<Duration> {
        let mut detail = self.detail();
        let stood = match detail.pause? {
            Pause::Since(begun) => begun.elapsed(),
            Pause::Over(stood) => stood,
        };
        detail.pause = Some(Pause::Over(stood));
        Some(stood)
    }

    /// Says how many bytes there are in all.
    pub fn expect_bytes(&self, total: u64) {
        self.bytes_total.store(total, Ordering::Relaxed);
    }

    /// Says that so many more bytes are done.
    pub fn advance(&self, bytes: u64) {
        self.bytes_done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// For work that counts for itself: `gauge` says how many bytes are done, of how many. It must not block.
    pub fn measure_with(&self, gauge: impl Fn() -> (u64, u64) + Send + 'static) {
        self.detail().gauge = Some(Box::new(gauge));
    }

    /// Whether the operation is no longer wanted: leave everything as it was, and fail.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.is_cancelled.load(Ordering::Acquire)
    }

    /// [`is_cancelled`](Self::is_cancelled), for threads that outlive this borrow.
    #[must_use]
    pub fn cancel_flag(&self) -> Arc<dyn Fn() -> bool + Send + Sync> {
        let flag = Arc::clone(&self.is_cancelled);
        Arc::new(move || flag.load(Ordering::Acquire))
    }

    /// For work that is not asked but told: `hook` is called once when the operation is cancelled, at once if it has
    /// been. It must not block. The last hook counts.
    pub fn on_cancel(&self, hook: impl FnOnce() + Send + 'static) {
        {
            let mut detail = self.detail();
            if !self.is_cancelled() {
                detail.on_cancel = Some(Box::new(hook));
                return;
            }
        }
        hook();
    }

    /// Says that the operation is no longer wanted. Whether it still goes on.
    pub(super) fn cancel(&self) -> bool {
        let hook = {
            let mut detail = self.detail();
            if detail.end.is_some() {
                return false;
            }
            // Under the lock, so that a hook that comes along is called, and not by both.
            self.is_cancelled.store(true, Ordering::Release);
            detail.on_cancel.take()
        };
        if let Some(hook) = hook {
            hook();
        }
        true
    }

    pub(super) fn kind(&self) -> OperationKind {
        self.kind
    }

    pub(super) fn succeed(&self) {
        self.end(OperationState::Done, None);
    }

    /// Ends the operation with `fault`, and hands it back.
    pub(super) fn fail(&self, fault: Fault) -> Fault {
        let state = if self.is_cancelled() {
            OperationState::Cancelled
        } else {
            OperationState::Failed
        };
        self.end(state, Some(fault.to_string()));
        fault
    }

    fn end(&self, state: OperationState, why: Option<String>) {
        let mut detail = self.detail();
        detail.end = Some((state, self.started.elapsed(), why));
        detail.on_cancel = None;
        // What it measures may be large, and is over.
        if let Some(gauge) = detail.gauge.take() {
            let (done, total) = gauge();
            self.bytes_done.store(done, Ordering::Relaxed);
            self.bytes_total.store(total, Ordering::Relaxed);
        }
    }

    /// How far it is.
    #[must_use]
    pub fn progress(&self) -> Progress {
        let detail = self.detail();
        let (state, elapsed, fault_message) = detail
            .end
            .clone()
            .unwrap_or_else(|| (OperationState::Running, self.started.elapsed(), None));
        let (bytes_done, bytes_total) = match &detail.gauge {
            Some(gauge) => gauge(),
            None => (
                self.bytes_done.load(Ordering::Relaxed),
                self.bytes_total.load(Ordering::Relaxed),
            ),
        };
        let pause = detail.pause.map(|pause| match pause {
            Pause::Since(begun) => (true, begun.elapsed()),
            Pause::Over(stood) => (false, stood),
        });
        Progress {
            kind: self.kind,
            state,
            phase: *self.phase.lock().unwrap_or_else(PoisonError::into_inner),
            bytes_done,
            bytes_total,
            elapsed_ms: milliseconds(elapsed),
            is_holding: pause.is_some_and(|(is_holding, _)| is_holding),
            pause_ms: pause.map(|(_, stood)| milliseconds(stood)),
            fault_message,
        }
    }
}

fn milliseconds(of: Duration) -> u64 {
    u64::try_from(of.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_is_shown_while_it_lasts_and_its_length_afterwards() {
        let operation = Operation::new(OperationKind::Create);
        let shown = operation.progress();
        assert_eq!((shown.is_holding, shown.pause_ms), (false, None));
        assert_eq!(operation.end_pause(), None);
        operation.begin_pause();
        let shown = operation.progress();
        assert!(shown.is_holding && shown.pause_ms.is_some());
        let stood = operation.end_pause().unwrap();
        assert_eq!(operation.end_pause(), Some(stood), "it ends once");
        let shown = operation.progress();
        assert_eq!(
            (shown.is_holding, shown.pause_ms),
            (false, Some(milliseconds(stood)))
        );
    }

    #[test]
    fn a_cancel_hook_is_called_once_whether_it_comes_early_or_late() {
        let calls = Arc::new(AtomicU64::new(0));
        let count = || {
            let calls = Arc::clone(&calls);
            move || {
                calls.fetch_add(1, Ordering::Relaxed);
            }
        };
        let early = Operation::new(OperationKind::Create);
        early.on_cancel(count());
        assert!(early.cancel());
        assert!(early.cancel());
        assert_eq!(calls.load(Ordering::Relaxed), 1);
        assert!(early.is_cancelled());

        let late = Operation::new(OperationKind::Create);
        assert!(late.cancel());
        late.on_cancel(count());
        assert_eq!(calls.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn an_operation_that_ended_cannot_be_cancelled() {
        let operation = Operation::new(OperationKind::Load);
        operation.succeed();
        assert!(!operation.cancel());
        assert_eq!(operation.progress().state, OperationState::Done);
    }

    #[test]
    fn progress_keeps_the_last_word_of_a_gauge() {
        let operation = Operation::new(OperationKind::Create);
        operation.enter("copying");
        operation.expect_bytes(10);
        operation.advance(4);
        assert_eq!(
            (operation.progress().bytes_done, operation.progress().bytes_total),
            (4, 10)
        );
        operation.measure_with(|| (7, 12));
        assert_eq!(
            (operation.progress().bytes_done, operation.progress().bytes_total),
            (7, 12)
        );
        operation.cancel();
        let _ = operation.fail(Fault::Create("cancelled".to_owned()));
        let progress = operation.progress();
        assert_eq!((progress.bytes_done, progress.bytes_total), (7, 12));
        assert_eq!(
            (progress.state, progress.phase),
            (OperationState::Cancelled, "copying")
        );
    }
}
