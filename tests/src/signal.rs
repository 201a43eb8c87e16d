//! Signals to processes under test.

use std::process::Command;

/// Sends the process `pid` a signal by name: `TERM`, `KILL`.
///
/// # Panics
/// When there is no such process.
pub fn signal(pid: impl ToString, name: &str) {
    let sent = Command::new("kill")
        .arg(format!("-{name}"))
        .arg(pid.to_string())
        .status();
    assert!(sent.expect("kill runs").success());
}
