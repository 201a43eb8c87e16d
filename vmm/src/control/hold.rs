//! Lets a test meet an operation in a phase that is shorter than a signal's way: with `RUNNEL_HOLD_PHASE` in its
//! environment, a monitor that was built with debug assertions waits at the beginning of the phase that is named there.
//!
//! It waits until the operation is cancelled, and no longer than [`HOLD_MAX`]; then the phase goes on with the code that
//! it always has. **Never** in a release: there the environment is not even read.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// The phase's name.
const VARIABLE: &str = "RUNNEL_HOLD_PHASE";

/// The longest hold: whoever forgets it gets on.
const HOLD_MAX: Duration = Duration::from_secs(60);

/// How often it is looked whether the operation is cancelled.
const LOOK: Duration = Duration::from_millis(1);

/// Waits if `phase` is to be held.
pub(super) fn hold(phase: &str, is_cancelled: &AtomicBool) {
    if !cfg!(debug_assertions) || std::env::var_os(VARIABLE).is_none_or(|held| held != phase) {
        return;
    }
    let begun = Instant::now();
    while !is_cancelled.load(Ordering::Acquire) && begun.elapsed() < HOLD_MAX {
        thread::sleep(LOOK);
    }
}
