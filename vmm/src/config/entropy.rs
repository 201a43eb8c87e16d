//! `entropy`: whether the guest gets a virtio entropy device.

use serde::{Deserialize, Serialize};

use super::limiter::{LimiterUnsupported, RateLimiterBody, refuse_limiter};

/// `PUT /entropy`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EntropyBody {
    /// Limits what the guest takes.
    pub rate_limiter: Option<RateLimiterBody>,
}

/// Why the device cannot be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("Could not create Entropy device: {0}")]
pub struct EntropyError(#[from] LimiterUnsupported);

impl EntropyBody {
    /// Refuses what the device cannot do; nothing of it is left to know afterwards.
    ///
    /// # Errors
    /// When a rate limit is asked for.
    pub fn check(&self) -> Result<(), EntropyError> {
        Ok(refuse_limiter("rate_limiter", self.rate_limiter.as_ref())?)
    }
}
