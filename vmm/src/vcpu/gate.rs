//! The gate at which vCPUs stand: what is wanted of them, and which of them do it.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// What is wanted of all vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    Stand,
    Run,
    Quit,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doing {
    Standing,
    Running,
    Gone,
}

#[derive(Debug)]
pub(super) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    wanted: Wanted,
    doing: Vec<Doing>,
}

/// How often whoever waits for vCPUs asks whether to give up: soon enough for a person, seldom enough to cost nothing.
const ASK_EVERY: Duration = Duration::from_millis(20);

/// How long the end of the machine waits for vCPUs. One that has not come by then waits for a page for ever.
const QUIT_TRIES_MAX: u32 = 100;

impl Gate {
    pub(super) fn new(vcpus: usize) -> Self {
        let state = State {
            wanted: Wanted::Stand,
            doing: vec![Doing::Standing; vcpus],
        };
        Self {
            state: Mutex::new(state),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says what is wanted, and calls `and` before any vCPU can notice: a vCPU clears its flag under the same lock,
    /// so that a flag raised here is never taken for an old one.
    pub(super) fn want(&self, wanted: Wanted, and: impl FnOnce()) {
        let mut state = self.lock();
        // Whoever quits never runs again.
        if state.wanted != Wanted::Quit {
            state.wanted = wanted;
        }
        and();
        drop(state);
        self.changed.notify_all();
    }

    /// Called by vCPU `number`: stands until running is wanted, calls `and` and returns true; false if it is to end.
    pub(super) fn pass(&self, number: u8, and: impl FnOnce()) -> bool {
        let mut state = self.lock();
        state.doing[usize::from(number)] = Doing::Standing;
        self.changed.notify_all();
        let mut state = self
            .changed
            .wait_while(state, |state| state.wanted == Wanted::Stand)
            .unwrap_or_else(PoisonError::into_inner);
        let runs = state.wanted == Wanted::Run;
        state.doing[usize::from(number)] = if runs { Doing::Running } else { Doing::Gone };
        if runs {
            and();
        }
        drop(state);
        self.changed.notify_all();
        runs
    }

    /// Called by vCPU `number`, which will not come back to the gate.
    pub(super) fn leave(&self, number: u8) {
        self.lock().doing[usize::from(number)] = Doing::Gone;
        self.changed.notify_all();
    }

    /// Waits until no vCPU runs; asks `give_up` now and then, and returns who still runs if it says true.
    pub(super) fn wait_until_all_stand(&self, give_up: &dyn Fn() -> bool) -> Result<(), Vec<u8>> {
        loop {
            let running = self.wait_a_little(Doing::Running);
            if running.is_empty() {
                return Ok(());
            }
            if give_up() {
                return Err(running);
            }
        }
    }

    /// Waits until all threads are done, but not for ever; returns who is not.
    pub(super) fn wait_a_moment_until_all_are_gone(&self) -> Vec<u8> {
        let mut left = Vec::new();
        for _ in 0..QUIT_TRIES_MAX {
            left = self.wait_a_little(Doing::Running);
            if left.is_empty() {
                break;
            }
        }
        left
    }

    /// Waits, for [`ASK_EVERY`] at most, until no vCPU does `what`; returns who still does.
    fn wait_a_little(&self, what: Doing) -> Vec<u8> {
        let (state, _) = self
            .changed
            .wait_timeout_while(self.lock(), ASK_EVERY, |state| state.doing.contains(&what))
            .unwrap_or_else(PoisonError::into_inner);
        (0u8..)
            .zip(&state.doing)
            .filter(|(_, doing)| **doing == what)
            .map(|(number, _)| number)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn a_vcpu_that_does_not_come_is_named_when_the_caller_gives_up() {
        let gate = Arc::new(Gate::new(2));
        gate.want(Wanted::Run, || {});
        assert!(gate.pass(0, || {}));
        assert!(gate.pass(1, || {}));
        let comes = {
            let gate = Arc::clone(&gate);
            gate.want(Wanted::Stand, || {});
            std::thread::spawn(move || gate.pass(0, || {}))
        };
        // Vcpu 1 never comes.
        let asked = AtomicBool::new(false);
        let missing = gate
            .wait_until_all_stand(&|| asked.swap(true, Ordering::Relaxed))
            .unwrap_err();
        assert_eq!(missing, [1]);

        gate.want(Wanted::Quit, || {});
        assert!(!comes.join().unwrap());
        assert!(!gate.pass(1, || {}));
        assert!(gate.wait_a_moment_until_all_are_gone().is_empty());
    }

    #[test]
    fn nobody_runs_again_after_the_end() {
        let gate = Gate::new(1);
        gate.want(Wanted::Quit, || {});
        gate.want(Wanted::Run, || {});
        assert!(!gate.pass(0, || unreachable!()));
    }
}
