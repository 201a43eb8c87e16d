//! Volumes: the large parts of a machine. A volume is a byte range with a name.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Which volume of a machine: written `memory` or `drive:<drive_id>`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum VolumeName {
    /// Guest RAM in guest-physical order, the hole below 4 GiB left out.
    Memory,
    /// The content of the drive with this identifier.
    Drive(String),
}

/// Text that names no volume.
#[derive(Debug, thiserror::Error)]
#[error(
    "{0:?} names no volume: expected \"memory\" or \"drive:<drive_id>\", the identifier of 1 to 64 letters, digits, '-' or '_'"
)]
pub struct BadVolumeName(String);

impl VolumeName {
    /// The longest identifier of a drive, in bytes; Firecracker's limit.
    pub const DRIVE_ID_BYTES_MAX: usize = 64;
}

impl fmt::Display for VolumeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory => f.write_str("memory"),
            Self::Drive(id) => write!(f, "drive:{id}"),
        }
    }
}

impl FromStr for VolumeName {
    type Err = BadVolumeName;

    fn from_str(text: &str) -> Result<Self, BadVolumeName> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
        match text.strip_prefix("drive:") {
            None if text == "memory" => Ok(Self::Memory),
            Some(id) if (1..=Self::DRIVE_ID_BYTES_MAX).contains(&id.len()) && id.chars().all(allowed) => {
                Ok(Self::Drive(id.to_owned()))
            }
            _ => Err(BadVolumeName(text.chars().take(100).collect())),
        }
    }
}

impl TryFrom<String> for VolumeName {
    type Error = BadVolumeName;

    fn try_from(text: String) -> Result<Self, BadVolumeName> {
        text.parse()
    }
}

impl From<VolumeName> for String {
    fn from(name: VolumeName) -> String {
        name.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volume_names_survive_their_text_and_strange_ones_are_refused() {
        for text in ["memory", "drive:rootfs", "drive:data_2"] {
            assert_eq!(text.parse::<VolumeName>().unwrap().to_string(), text);
        }
        let long = format!("drive:{}", "x".repeat(65));
        for text in ["", "drive:", "drive:../etc", "disk:a", "Memory", &long] {
            assert!(text.parse::<VolumeName>().is_err(), "{text}");
        }
    }
}
