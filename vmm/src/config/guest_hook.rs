//! `guest_hook` of `snapshot/create`: whether the guest is asked to prepare for the snapshot; Runnel's own.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// How long a guest may take, unless told otherwise: to flush a database that is not waited for by everybody.
const DEADLINE_MS: u64 = 5000;

/// The longest that a guest may take.
pub const HOOK_DEADLINE_MS_MAX: u64 = 600_000;

/// What becomes of the snapshot if the guest does not say that it is ready.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Otherwise {
    /// It fails, and the machine runs on.
    #[default]
    Fail,
    /// It is made all the same, and the log says so.
    Proceed,
}

/// `guest_hook`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestHookBody {
    /// How long the guest may take; 0 if it is not to be asked.
    pub deadline_ms: Option<u64>,
    /// What becomes of the snapshot if it does not say in time that it is ready.
    #[serde(default)]
    pub otherwise: Otherwise,
}

/// How the guest is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestHook {
    /// How long it may take.
    pub deadline: Duration,
    /// What becomes of the snapshot if it does not say in time that it is ready.
    pub otherwise: Otherwise,
}

impl GuestHook {
    /// Of a snapshot that says nothing of it, of a machine whose agent has announced itself: a guest that does not
    /// answer delays such a snapshot, and cannot prevent it.
    pub const UNASKED_FOR: Self = Self {
        deadline: Duration::from_millis(DEADLINE_MS),
        otherwise: Otherwise::Proceed,
    };

    /// Whether the guest is asked at all.
    #[must_use]
    pub fn asks(&self) -> bool {
        !self.deadline.is_zero()
    }
}

/// A deadline that is too far away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`guest_hook`: {0} ms are too long: give up to {HOOK_DEADLINE_MS_MAX}, or 0 to ask nobody")]
pub struct BadDeadline(u64);

impl TryFrom<GuestHookBody> for GuestHook {
    type Error = BadDeadline;

    fn try_from(body: GuestHookBody) -> Result<Self, BadDeadline> {
        match body.deadline_ms.unwrap_or(DEADLINE_MS) {
            too_long if too_long > HOOK_DEADLINE_MS_MAX => Err(BadDeadline(too_long)),
            deadline => Ok(Self {
                deadline: Duration::from_millis(deadline),
                otherwise: body.otherwise,
            }),
        }
    }
}
