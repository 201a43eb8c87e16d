//! Threads that others come before.

/// Nobody waits for it: at a tenth of the weight of other threads, which still is enough to hold a lock for a moment and
/// let go of it.
pub(crate) const FILL: i32 = 10;

/// Somebody waits for it, though not the guest: at a third of the weight of other threads.
pub(crate) const CAPTURE: i32 = 5;

/// Has this thread run where the machine's own threads, and those that it waits for, leave processors idle.
pub(crate) fn give_way(nice: i32) {
    if let Err(error) = rustix::process::setpriority_process(None, nice) {
        tracing::debug!(%error, "background work runs at the priority of everything else");
    }
}
