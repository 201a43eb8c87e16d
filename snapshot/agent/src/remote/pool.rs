//! Kept connections to one server. Each request borrows one; connections can be opened before anybody needs them.
//!
//! Opening one costs a round trip, with TLS two. So when an image is opened a few are opened at once, and the first
//! chunks are spread over them: no handshake in their way, and the first congestion window of each to share.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::connection::{Connection, Dial};
use super::error::RemoteError;
use crate::traffic::Traffic;

/// Connections to one server.
pub(super) struct Pool {
    dial: Dial,
    /// How many are kept when nobody uses them.
    kept_max: usize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// The most recently used last: its congestion window is the widest.
    idle: Vec<Connection>,
    /// The shortest time that opening one took: about a round trip.
    round_trip: Option<Duration>,
    /// Being opened in advance.
    opening: usize,
    /// Waiting for one of those.
    waiting: usize,
}

impl Pool {
    pub(super) fn new(dial: Dial, kept_max: usize) -> Self {
        Self {
            dial,
            kept_max,
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// Has `count` connections opened by threads of their own; returns at once. Failures show when a request fails.
    pub(super) fn warm_up(self: &Arc<Self>, count: usize, traffic: &Arc<Traffic>) {
        let mut state = self.lock();
        let there = state.idle.len() + state.opening;
        for _ in there..count.min(self.kept_max) {
            let (pool, traffic) = (Arc::clone(self), Arc::clone(traffic));
            let thread = thread::Builder::new().name("connect".to_owned());
            let spawned = thread.spawn(move || {
                let opened = pool.open(&traffic);
                let mut state = pool.lock();
                state.opening -= 1;
                match opened {
                    Ok(connection) => state.idle.push(connection),
                    Err(error) => {
                        let error = &error as &dyn std::error::Error;
                        tracing::debug!(error, "a connection could not be opened in advance");
                    }
                }
                pool.changed.notify_all();
            });
            if spawned.is_err() {
                return; // requests open their own
            }
            state.opening += 1;
        }
    }

    /// A connection that is there, or that is about to be. What goes over it from now on is counted in `traffic`.
    pub(super) fn borrow(&self, traffic: &Arc<Traffic>) -> Result<Connection, RemoteError> {
        let mut state = self.lock();
        loop {
            if let Some(mut connection) = state.idle.pop() {
                connection.count_in(traffic);
                return Ok(connection);
            }
            // One that is being opened for somebody else does not count.
            if state.opening <= state.waiting {
                break;
            }
            state.waiting += 1;
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.waiting -= 1;
        }
        drop(state);
        self.open(traffic)
    }

    /// Into how many parts a read should be cut so that each comes within one round trip: as few as do, or as many as
    /// there are connections, up to `parts_max`. One, where a round trip costs less than `near`.
    pub(super) fn parts_for(&self, bytes: u64, near: Duration, parts_max: u64) -> u64 {
        let state = self.lock();
        if state.round_trip.is_none_or(|round_trip| round_trip < near) {
            return 1;
        }
        let mut narrowest = u64::MAX;
        let mut parts = 0;
        // They will be borrowed in this order.
        for connection in state.idle.iter().rev().take(parts_max as usize) {
            parts += 1;
            narrowest = narrowest.min(connection.window_bytes());
            if bytes.div_ceil(parts) <= narrowest {
                break;
            }
        }
        parts.max(1)
    }

    /// A new connection, whatever is there.
    pub(super) fn open(&self, traffic: &Arc<Traffic>) -> Result<Connection, RemoteError> {
        let start = Instant::now();
        let connection = self.dial.connect(traffic)?;
        let took = start.elapsed();
        let mut state = self.lock();
        state.round_trip = Some(state.round_trip.map_or(took, |shortest| shortest.min(took)));
        Ok(connection)
    }

    /// Gives a connection back between two requests.
    pub(super) fn put_back(&self, connection: Connection) {
        let mut state = self.lock();
        if state.idle.len() < self.kept_max {
            state.idle.push(connection);
            self.changed.notify_one();
        }
    }

    /// Forgets all connections that nobody uses: the server went away, and each would be found dead in turn.
    pub(super) fn forget(&self) {
        let idle = std::mem::take(&mut self.lock().idle);
        drop(idle); // outside the lock: closing may take a moment
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
