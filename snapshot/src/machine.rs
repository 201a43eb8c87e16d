//! The token that shows that a machine stands still.

use std::fmt;

/// A machine that stands still: vCPUs stopped, devices drained. Saving state requires it; dropping it lets the
/// machine run on, unless it was paused before.
pub struct Paused<'m> {
    on_drop: Option<Box<dyn FnOnce() + Send + 'm>>,
}

impl<'m> Paused<'m> {
    /// Vouches that the machine stands still until `resume` is called; called once, when the token is dropped.
    pub fn until(resume: impl FnOnce() + Send + 'm) -> Self {
        Self {
            on_drop: Some(Box::new(resume)),
        }
    }
}

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        if let Some(resume) = self.on_drop.take() {
            resume();
        }
    }
}

impl fmt::Debug for Paused<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Paused")
    }
}
