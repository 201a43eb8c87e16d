//! What is read of a request, for whoever feeds it strange ones.

use super::call;
use super::route::{self, Verb};

/// Reads a request. Whether something is asked for that this API has.
///
/// # Panics
/// When a name that it takes is none.
#[must_use]
pub fn reads_request(verb: Verb, path: &str, body: &[u8]) -> bool {
    let Ok((endpoint, name)) = route::resolve(verb, path, !body.is_empty()) else {
        return false;
    };
    if let Some(name) = name {
        assert!(
            !name.is_empty() && name.chars().all(|c| c == '_' || c.is_ascii_alphanumeric()),
            "{path}: {name:?}"
        );
    }
    call::parse(endpoint, name, body).is_ok()
}
