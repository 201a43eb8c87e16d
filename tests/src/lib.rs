//! What Runnel's behaviour tests, benches and demo stand on.

pub mod agent;
pub mod bare;
pub mod forge;
pub mod golden;
pub mod lab;
pub mod link;
pub mod monitor;
mod program;
pub mod served;
mod signal;
pub mod user;

use std::path::Path;

pub use program::program;
pub use signal::signal;

/// The bare guest: an ELF64 kernel of our own (`tests/bare-guest/`) that even an interpreted KVM runs.
#[must_use]
pub fn bare_guest() -> &'static Path {
    Path::new(env!("BARE_GUEST"))
}
