//! What an image holds of an entropy device beside its transport: nothing, on purpose.

use serde::{Deserialize, Serialize};

/// Empty: randomness that was saved would come out twice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RngState {}
