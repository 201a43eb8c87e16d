//! `guest-channel`: whether an agent in the guest can take part in snapshots; Runnel's own.

use serde::{Deserialize, Serialize};

/// `PUT /guest-channel`: there is nothing to choose yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestChannelBody {}
