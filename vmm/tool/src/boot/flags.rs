//! Flags that say several things at once: drives, interfaces, and what takes their place.

use std::path::PathBuf;
use std::str::FromStr;

use super::is_id;

/// A flag that is a list of `key=value`.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BadFlag {
    /// A key that means nothing here.
    #[error("{found:?} means nothing here: give {expected}")]
    Key {
        /// What was given.
        found: String,
        /// What can be.
        expected: &'static str,
    },
    /// Something that is needed.
    #[error("{missing} is missing: give {expected}")]
    Missing {
        /// What.
        missing: &'static str,
        /// What can be given.
        expected: &'static str,
    },
    /// A value that cannot be.
    #[error("{0}")]
    Value(&'static str),
}

const BAD_ID: BadFlag = BadFlag::Value("an id is 1 to 64 letters, digits and '_'");

fn checked_id(id: &str) -> Result<String, BadFlag> {
    if is_id(id) { Ok(id.to_owned()) } else { Err(BAD_ID) }
}

/// `--drive`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct DriveFlag {
    pub(super) id: Option<String>,
    pub(super) path: PathBuf,
    pub(super) is_read_only: bool,
    pub(super) is_root: bool,
    pub(super) partuuid: Option<String>,
}

impl FromStr for DriveFlag {
    type Err = BadFlag;

    fn from_str(text: &str) -> Result<Self, BadFlag> {
        const EXPECTED: &str = "[id=ID,]path=PATH[,ro][,root][,partuuid=UUID]";
        let mut drive = Self::default();
        for part in text.split(',') {
            match part.split_once('=') {
                Some(("id", id)) => drive.id = Some(checked_id(id)?),
                Some(("path", path)) => drive.path = path.into(),
                Some(("partuuid", partuuid)) => drive.partuuid = Some(partuuid.to_owned()),
                None if part == "ro" => drive.is_read_only = true,
                None if part == "root" => drive.is_root = true,
                _ => {
                    return Err(BadFlag::Key {
                        found: part.to_owned(),
                        expected: EXPECTED,
                    });
                }
            }
        }
        if drive.path.as_os_str().is_empty() {
            return Err(BadFlag::Missing {
                missing: "path",
                expected: EXPECTED,
            });
        }
        Ok(drive)
    }
}

/// `--net`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct NetFlag {
    pub(super) id: Option<String>,
    pub(super) tap: String,
    pub(super) mac: Option<String>,
    pub(super) mtu: Option<u16>,
}

impl FromStr for NetFlag {
    type Err = BadFlag;

    fn from_str(text: &str) -> Result<Self, BadFlag> {
        const EXPECTED: &str = "[id=ID,]tap=TAP[,mac=MAC][,mtu=MTU]";
        let mut interface = Self::default();
        for part in text.split(',') {
            match part.split_once('=') {
                Some(("id", id)) => interface.id = Some(checked_id(id)?),
                Some(("tap", tap)) => interface.tap = tap.to_owned(),
                Some(("mac", mac)) if is_mac(mac) => interface.mac = Some(mac.to_owned()),
                Some(("mac", _)) => {
                    return Err(BadFlag::Value(
                        "a mac is six pairs of hex digits, as in 06:00:00:00:00:01",
                    ));
                }
                Some(("mtu", mtu)) => {
                    let bad = |_| BadFlag::Value("an mtu is a number from 68 to 65535");
                    interface.mtu = Some(mtu.parse().map_err(bad)?);
                }
                _ => {
                    return Err(BadFlag::Key {
                        found: part.to_owned(),
                        expected: EXPECTED,
                    });
                }
            }
        }
        if interface.tap.is_empty() {
            return Err(BadFlag::Missing {
                missing: "tap",
                expected: EXPECTED,
            });
        }
        Ok(interface)
    }
}

/// Whether the monitor takes it as an address.
fn is_mac(text: &str) -> bool {
    let is_pair = |pair: &str| pair.len() == 2 && pair.bytes().all(|digit| digit.is_ascii_hexdigit());
    text.split(':').count() == 6 && text.split(':').all(is_pair)
}

/// `ID=VALUE`: what takes the place of what the image names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Override {
    /// Of which drive or interface.
    pub(crate) id: String,
    /// A path, or a tap.
    pub(crate) value: String,
}

impl Override {
    /// Of an interface.
    ///
    /// # Errors
    /// When a side is missing.
    pub(crate) fn of_tap(text: &str) -> Result<Self, BadFlag> {
        Self::parse(text, "give ID=TAP, as in eth0=tap1")
    }

    /// Of a drive.
    ///
    /// # Errors
    /// When a side is missing.
    pub(crate) fn of_drive(text: &str) -> Result<Self, BadFlag> {
        Self::parse(text, "give ID=PATH, as in rootfs=/srv/disk.img")
    }

    fn parse(text: &str, expected: &'static str) -> Result<Self, BadFlag> {
        let found = text
            .split_once('=')
            .filter(|(id, value)| !id.is_empty() && !value.is_empty());
        let (id, value) = found.ok_or(BadFlag::Value(expected))?;
        Ok(Self {
            id: id.to_owned(),
            value: value.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_that_make_no_sense_are_refused_with_what_can_be_given() {
        for text in [
            "",
            "id=x",
            "path=",
            "path=a,rw",
            "path=a,id=a-b",
            "path=a,id=",
            "ro=1,path=a",
        ] {
            assert!(text.parse::<DriveFlag>().is_err(), "{text}");
        }
        for text in [
            "",
            "mac=1",
            "tap=",
            "tap=a,mtu=x",
            "tap=a,queues=2",
            "tap=a,mac=zz",
            "tap=a,mac=06:00:00:00:00:1",
        ] {
            assert!(text.parse::<NetFlag>().is_err(), "{text}");
        }
        for text in ["", "eth0", "=tap", "eth0="] {
            assert!(Override::of_tap(text).is_err(), "{text}");
        }
        let error = Override::of_drive("rootfs").unwrap_err().to_string();
        assert!(error.contains("ID=PATH"), "{error}");
        let error = "path=a,rw".parse::<DriveFlag>().unwrap_err().to_string();
        assert!(error.contains("\"rw\"") && error.contains("path=PATH"), "{error}");
    }
}
