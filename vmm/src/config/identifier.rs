//! Identifiers: of the instance, and of drives and network interfaces.

use std::fmt;
use std::str::FromStr;

use runnel_snapshot::volume::VolumeName;

/// Text that cannot be an identifier.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadIdentifier {
    /// Empty, or too long.
    #[error("Invalid len ({found});  the length must be between 1 and {max}")]
    Length {
        /// Its length in bytes.
        found: usize,
        /// The longest one.
        max: usize,
    },
    /// A character that is not allowed.
    #[error("Invalid char ({found}) at position {position}")]
    Character {
        /// The character.
        found: char,
        /// The how-many-eth, from 0.
        position: usize,
    },
}

/// The longest identifier in bytes; a drive's becomes part of a volume's name.
const BYTES_MAX: usize = VolumeName::DRIVE_ID_BYTES_MAX;

fn check(text: &str, allowed: impl Fn(char) -> bool) -> Result<(), BadIdentifier> {
    if !(1..=BYTES_MAX).contains(&text.len()) {
        return Err(BadIdentifier::Length {
            found: text.len(),
            max: BYTES_MAX,
        });
    }
    match text.chars().enumerate().find(|(_, c)| !allowed(*c)) {
        Some((position, found)) => Err(BadIdentifier::Character { found, position }),
        None => Ok(()),
    }
}

/// The name of this machine among others, `--id`: 1 to 64 ASCII letters, digits and hyphens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstanceId(String);

impl InstanceId {
    /// What a machine is called that was given no name; Firecracker's word.
    pub const DEFAULT: &'static str = "anonymous-instance";

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for InstanceId {
    fn default() -> Self {
        Self(Self::DEFAULT.to_owned())
    }
}

impl FromStr for InstanceId {
    type Err = BadIdentifier;

    fn from_str(text: &str) -> Result<Self, BadIdentifier> {
        check(text, |c| c.is_ascii_alphanumeric() || c == '-')?;
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The name of a drive or a network interface: 1 to 64 ASCII letters, digits, `_` and `-`.
///
/// The API's paths are stricter, as Firecracker's are (no hyphen); a configuration file may use one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ResourceId(String);

impl ResourceId {
    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ResourceId {
    type Err = BadIdentifier;

    fn from_str(text: &str) -> Result<Self, BadIdentifier> {
        check(text, |c| c.is_ascii_alphanumeric() || c == '_' || c == '-')?;
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for ResourceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instance_may_be_named_with_letters_digits_and_hyphens_alone() {
        assert_eq!("12-3aa".parse::<InstanceId>().unwrap().as_str(), "12-3aa");
        assert_eq!(
            "".parse::<InstanceId>(),
            Err(BadIdentifier::Length { found: 0, max: 64 })
        );
        assert_eq!(
            "12_3".parse::<InstanceId>(),
            Err(BadIdentifier::Character {
                found: '_',
                position: 2
            })
        );
        assert!("x".repeat(64).parse::<InstanceId>().is_ok());
        assert!("x".repeat(65).parse::<InstanceId>().is_err());
    }

    #[test]
    fn every_drive_that_can_be_named_is_a_volume_that_can_be_named() {
        for text in ["rootfs", "data_2", "a-b", &"x".repeat(64)] {
            let id: ResourceId = text.parse().unwrap();
            assert_eq!(
                format!("drive:{id}").parse::<VolumeName>().unwrap(),
                VolumeName::Drive(text.to_owned())
            );
        }
        for text in ["", "../etc", "a b", "ä", &"x".repeat(65)] {
            assert!(text.parse::<ResourceId>().is_err(), "{text}");
            assert!(format!("drive:{text}").parse::<VolumeName>().is_err(), "{text}");
        }
    }
}
