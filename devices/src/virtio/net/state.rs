//! What an image holds of an interface beside its transport. Its tap is the host's, and is opened anew.

use serde::{Deserialize, Serialize};

/// An interface as its guest knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetState {
    /// The hardware address that the guest was given.
    pub mac: Option<[u8; 6]>,
    /// The MTU that the guest was told of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
}
