//! What machines are called.

use std::str::FromStr;

/// The name of a machine: 1 to 64 letters, digits and hyphens, as the monitor takes it; no hyphen first.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct MachineName(pub(super) String);

/// Text that names no machine.
#[derive(Debug, thiserror::Error)]
#[error("a machine's name is 1 to 64 letters, digits and hyphens, the first no hyphen")]
pub(crate) struct BadMachineName;

impl FromStr for MachineName {
    type Err = BadMachineName;

    fn from_str(text: &str) -> Result<Self, BadMachineName> {
        let allowed = |c: u8| c.is_ascii_alphanumeric() || c == b'-';
        let fits = (1..=64).contains(&text.len()) && text.bytes().all(allowed) && !text.starts_with('-');
        if fits {
            Ok(Self(text.to_owned()))
        } else {
            Err(BadMachineName)
        }
    }
}

impl MachineName {
    /// It, as text.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for MachineName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}
