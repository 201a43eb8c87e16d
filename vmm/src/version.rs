//! Which versions this is: Runnel's own, and the one of Firecracker whose API it speaks.

/// Firecracker's clients look for this one: they refuse a monitor whose version they do not know.
pub const FIRECRACKER_VERSION: &str = "1.17.0";

/// Runnel's own.
pub const RUNNEL_VERSION: &str = env!("CARGO_PKG_VERSION");

/// What `--version` prints: first what Firecracker would, then who speaks.
pub const LONG_VERSION: &str = concat!("v1.17.0\n\nRunnel v", env!("CARGO_PKG_VERSION"));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_places_name_the_same_version_of_firecracker() {
        assert!(LONG_VERSION.starts_with(&format!("v{FIRECRACKER_VERSION}\n")));
    }
}
