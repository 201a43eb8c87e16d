//! Rate limiters, as far as this version has them: one that limits nothing is accepted, another is refused.

use serde::{Deserialize, Serialize};

/// A token bucket, as the API takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenBucketBody {
    /// How many tokens it holds: bytes or operations.
    pub size: u64,
    /// Tokens beyond `size`, once, at the start.
    pub one_time_burst: Option<u64>,
    /// Milliseconds until an empty bucket is full.
    pub refill_time: u64,
}

impl TokenBucketBody {
    /// Whether it holds anything back: Firecracker takes a size or a time of 0 as «no limit».
    fn limits(&self) -> bool {
        self.size != 0 && self.refill_time != 0
    }
}

/// A rate limiter, as the API takes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimiterBody {
    /// Limits bytes.
    pub bandwidth: Option<TokenBucketBody>,
    /// Limits operations.
    pub ops: Option<TokenBucketBody>,
}

/// A rate limiter that would have to hold something back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} is not supported by this version of Runnel: leave it out")]
pub struct LimiterUnsupported(&'static str);

/// Refuses a rate limiter that limits anything; `field` is its name in the body.
pub(super) fn refuse_limiter(
    field: &'static str,
    limiter: Option<&RateLimiterBody>,
) -> Result<(), LimiterUnsupported> {
    match limiter {
        Some(RateLimiterBody { bandwidth, ops }) => {
            refuse_bucket(field, bandwidth.as_ref())?;
            refuse_bucket(field, ops.as_ref())
        }
        None => Ok(()),
    }
}

/// Refuses a token bucket that limits anything; `field` is its name in the body.
pub(super) fn refuse_bucket(
    field: &'static str,
    bucket: Option<&TokenBucketBody>,
) -> Result<(), LimiterUnsupported> {
    if bucket.is_some_and(TokenBucketBody::limits) {
        Err(LimiterUnsupported(field))
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limiter(json: &str) -> RateLimiterBody {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn a_limiter_that_limits_nothing_is_accepted_and_another_is_refused_by_name() {
        assert_eq!(refuse_limiter("rate_limiter", None), Ok(()));
        for nothing in [
            "{}",
            r#"{"ops": {"size": 0, "refill_time": 100}}"#,
            r#"{"bandwidth": {"size": 9, "refill_time": 0}}"#,
        ] {
            assert_eq!(
                refuse_limiter("rate_limiter", Some(&limiter(nothing))),
                Ok(()),
                "{nothing}"
            );
        }
        for limit in ["ops", "bandwidth"] {
            let json = format!(r#"{{"{limit}": {{"size": 10, "refill_time": 100, "one_time_burst": 5}}}}"#);
            let refusal = refuse_limiter("rx_rate_limiter", Some(&limiter(&json))).unwrap_err();
            assert!(
                refusal
                    .to_string()
                    .starts_with("rx_rate_limiter is not supported"),
                "{refusal}"
            );
        }
    }
}
