//! Runnel driven by `fctools`, a public client of Firecracker, unmodified: see `tests/`.
