//! A tap of this host, for the interface of a guest. Never on a machine of anybody's: in a nested host, or where tests
//! run as root.

use std::process::Command;

/// A tap, until it is dropped.
#[derive(Debug)]
pub struct Tap {
    name: &'static str,
}

impl Tap {
    /// A tap that is up and has `address`, as `ip address` takes it.
    ///
    /// # Panics
    /// When there is none to be had.
    #[must_use]
    pub fn new(name: &'static str, address: &str) -> Self {
        let tap = Self { name };
        ip(&["tuntap", "add", "dev", name, "mode", "tap"]);
        ip(&["address", "add", address, "dev", name]);
        ip(&["link", "set", name, "up"]);
        tap
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.name
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        // Not `ip()`: a panic while another unwinds would abort the suite.
        let _ = Command::new("ip").args(["link", "delete", self.name]).status();
    }
}

fn ip(arguments: &[&str]) {
    let status = Command::new("ip").args(arguments).status();
    assert!(status.is_ok_and(|status| status.success()), "ip {arguments:?}");
}
