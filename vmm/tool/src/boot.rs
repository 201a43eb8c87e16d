//! What is to be booted, as requests to the monitor's API: from flags, or from Firecracker's configuration file.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde_json::{Map, Value, json};

/// The longest configuration file.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Why a machine cannot be described.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BootError {
    /// The file cannot be read.
    #[error("the configuration {path} cannot be read")]
    Read {
        /// Which file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// It is no JSON object.
    #[error("the configuration {path} is no JSON object")]
    Json {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
    /// It lacks something.
    #[error("the configuration {path} has no {part}")]
    Lacks {
        /// Which file.
        path: PathBuf,
        /// What is missing.
        part: &'static str,
    },
    /// A part that this version does not know.
    #[error(
        "the configuration {path} has a part {part:?}, which is not supported by this version of Runnel: remove it"
    )]
    Unknown {
        /// Which file.
        path: PathBuf,
        /// Which part.
        part: String,
    },
    /// Two drives or interfaces of one name, of which the monitor would take the last.
    #[error("{part} names {id} twice: give each an id of its own")]
    Twice {
        /// `--drive`, `--net`, or the part of the configuration.
        part: &'static str,
        /// The name.
        id: String,
    },
    /// One tap for two interfaces.
    #[error("--net names the tap {0} twice: give each interface a tap of its own")]
    TapTwice(String),
    /// A drive or interface without a usable name.
    #[error("{part} of the configuration needs a {field} of 1 to 64 letters, digits and '_'")]
    Id {
        /// `drives` or `network-interfaces`.
        part: &'static str,
        /// The name's field.
        field: &'static str,
    },
}

/// One request, to be `PUT`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Put {
    /// Where to.
    pub(crate) path: String,
    /// What.
    pub(crate) body: Value,
}

/// A machine to boot.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Boot {
    /// What to ask of a fresh monitor, in order.
    pub(crate) requests: Vec<Put>,
    /// Its kernel, for `ps`.
    pub(crate) kernel: String,
    /// How many vCPUs, for `ps`.
    pub(crate) vcpus: u64,
    /// Guest memory, for `ps`.
    pub(crate) memory_mib: u64,
}

impl Boot {
    fn put(&mut self, path: impl Into<String>, body: Value) {
        self.requests.push(Put {
            path: path.into(),
            body,
        });
    }

    /// Adds something that has a name below `path`; `part` is where the name was given.
    fn put_named(&mut self, part: &'static str, path: &str, id: &str, body: Value) -> Result<(), BootError> {
        let path = format!("{path}/{id}");
        if self.requests.iter().any(|put| put.path == path) {
            let id = id.to_owned();
            return Err(BootError::Twice { part, id });
        }
        self.put(path, body);
        Ok(())
    }

    /// A machine of these parts.
    pub(crate) fn new(boot_source: Value, vcpus: u64, memory_mib: u64) -> Self {
        let mut boot = Self {
            kernel: boot_source["kernel_image_path"]
                .as_str()
                .unwrap_or_default()
                .to_owned(),
            vcpus,
            memory_mib,
            ..Self::default()
        };
        boot.put(
            "/machine-config",
            json!({ "vcpu_count": vcpus, "mem_size_mib": memory_mib }),
        );
        boot.put("/boot-source", boot_source);
        boot
    }

    /// Adds a drive.
    ///
    /// # Errors
    /// When there is one of that name.
    pub(crate) fn add_drive(&mut self, number: usize, drive: &DriveFlag) -> Result<(), BootError> {
        let id = drive.id.clone().unwrap_or_else(|| format!("drive{number}"));
        let mut body = json!({
            "drive_id": id,
            "path_on_host": drive.path,
            "is_root_device": drive.is_root,
            "is_read_only": drive.is_read_only,
        });
        if let Some(partuuid) = &drive.partuuid {
            body["partuuid"] = json!(partuuid);
        }
        self.put_named("--drive", "/drives", &id, body)
    }

    /// Adds a network interface.
    ///
    /// # Errors
    /// When there is one of that name, or with that tap.
    pub(crate) fn add_interface(&mut self, number: usize, interface: &NetFlag) -> Result<(), BootError> {
        let tap = interface.tap.as_str();
        if self.requests.iter().any(|put| put.body["host_dev_name"] == tap) {
            return Err(BootError::TapTwice(tap.to_owned()));
        }
        let id = interface.id.clone().unwrap_or_else(|| format!("eth{number}"));
        let mut body = json!({ "iface_id": id, "host_dev_name": interface.tap });
        if let Some(mac) = &interface.mac {
            body["guest_mac"] = json!(mac);
        }
        if let Some(mtu) = interface.mtu {
            body["mtu"] = json!(mtu);
        }
        self.put_named("--net", "/network-interfaces", &id, body)
    }

    /// The taps of its interfaces.
    pub(crate) fn taps(&self) -> impl Iterator<Item = &str> {
        let bodies = self.requests.iter().map(|put| &put.body);
        bodies.filter_map(|body| body["host_dev_name"].as_str())
    }

    /// Adds an entropy device.
    pub(crate) fn add_entropy(&mut self) {
        self.put("/entropy", json!({}));
    }

    /// Reads Firecracker's configuration file. Where console and log go is the tool's to say.
    ///
    /// # Errors
    /// When it cannot be read, or has parts that nobody knows. What is in the parts is the monitor's to judge.
    pub(crate) fn from_file(path: &Path) -> Result<Self, BootError> {
        let read = |source| BootError::Read {
            path: path.to_owned(),
            source,
        };
        let mut text = String::new();
        let file = File::open(path).map_err(read)?;
        file.take(FILE_BYTES_MAX)
            .read_to_string(&mut text)
            .map_err(read)?;
        let parts: Map<String, Value> = serde_json::from_str(&text).map_err(|source| BootError::Json {
            path: path.to_owned(),
            source,
        })?;
        Self::from_parts(parts, path)
    }

    fn from_parts(mut parts: Map<String, Value>, path: &Path) -> Result<Self, BootError> {
        let mut take = |part: &str| parts.remove(part).filter(|value| !value.is_null());
        let boot_source = take("boot-source").ok_or_else(|| BootError::Lacks {
            path: path.to_owned(),
            part: "boot-source",
        })?;
        let machine = take("machine-config");
        let number = |field: &str, default: u64| {
            let value = machine.as_ref().and_then(|machine| machine.get(field)?.as_u64());
            value.unwrap_or(default)
        };
        let mut boot = Self {
            kernel: boot_source["kernel_image_path"]
                .as_str()
                .unwrap_or_default()
                .to_owned(),
            // What the monitor takes, as Firecracker does, where nothing is said.
            vcpus: number("vcpu_count", 1),
            memory_mib: number("mem_size_mib", 128),
            ..Self::default()
        };
        if let Some(machine) = machine {
            boot.put("/machine-config", machine);
        }
        boot.put("/boot-source", boot_source);
        for (part, path, field) in [
            ("drives", "/drives", "drive_id"),
            ("network-interfaces", "/network-interfaces", "iface_id"),
        ] {
            for body in elements(take(part)) {
                let id = body[field]
                    .as_str()
                    .filter(|id| is_id(id))
                    .ok_or(BootError::Id { part, field })?;
                boot.put_named(part, path, id, body.clone())?;
            }
        }
        if let Some(entropy) = take("entropy") {
            boot.put("/entropy", entropy);
        }
        for part in ["serial", "logger"] {
            if take(part).is_some() {
                tracing::warn!("{part} of the configuration is not used: `runnel` decides where it goes");
            }
        }
        let asks = |value: &Value| !(value.is_null() || value.as_array().is_some_and(Vec::is_empty));
        match parts.iter().find(|(_, value)| asks(value)) {
            Some((part, _)) => Err(BootError::Unknown {
                path: path.to_owned(),
                part: part.clone(),
            }),
            None => Ok(boot),
        }
    }
}

/// The elements of a list; whatever else stands there is one element, which the monitor will refuse.
fn elements(part: Option<Value>) -> Vec<Value> {
    match part {
        None => Vec::new(),
        Some(Value::Array(elements)) => elements,
        Some(other) => vec![other],
    }
}

/// Whether the API takes it in a path.
fn is_id(text: &str) -> bool {
    (1..=64).contains(&text.len()) && text.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'_')
}

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
    id: Option<String>,
    path: PathBuf,
    is_read_only: bool,
    is_root: bool,
    partuuid: Option<String>,
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
    id: Option<String>,
    tap: String,
    mac: Option<String>,
    mtu: Option<u16>,
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

    fn from_file(parts: Value) -> Result<Boot, BootError> {
        let Value::Object(parts) = parts else {
            panic!("an object")
        };
        Boot::from_parts(parts, Path::new("config.json"))
    }

    #[test]
    fn drives_and_interfaces_are_read_from_flags() {
        let drive: DriveFlag = "id=root,path=/srv/a.img,ro,root".parse().unwrap();
        let net: NetFlag = "tap=tap0,mac=06:00:00:00:00:01,mtu=1400".parse().unwrap();
        let mut boot = Boot::new(json!({ "kernel_image_path": "/k" }), 2, 512);
        boot.add_drive(0, &drive).unwrap();
        boot.add_drive(1, &"path=b".parse().unwrap()).unwrap();
        boot.add_interface(0, &net).unwrap();
        boot.add_entropy();
        let paths: Vec<_> = boot.requests.iter().map(|put| put.path.as_str()).collect();
        let expected = [
            "/machine-config",
            "/boot-source",
            "/drives/root",
            "/drives/drive1",
            "/network-interfaces/eth0",
            "/entropy",
        ];
        assert_eq!(paths, expected);
        assert_eq!(
            boot.requests[2].body,
            json!({ "drive_id": "root", "path_on_host": "/srv/a.img", "is_root_device": true, "is_read_only": true })
        );
        assert_eq!(
            boot.requests[4].body,
            json!({ "iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": "06:00:00:00:00:01", "mtu": 1400 })
        );
    }

    #[test]
    fn what_is_given_twice_is_refused_by_name_and_not_dropped() {
        let mut boot = Boot::new(json!({ "kernel_image_path": "/k" }), 1, 64);
        boot.add_drive(0, &"id=drive1,path=a".parse().unwrap()).unwrap();
        let refused = boot.add_drive(1, &"path=b".parse().unwrap()).unwrap_err();
        assert!(
            refused.to_string().contains("--drive names drive1 twice"),
            "{refused}"
        );
        boot.add_interface(0, &"tap=tap0".parse().unwrap()).unwrap();
        let refused = boot.add_interface(1, &"tap=tap0".parse().unwrap()).unwrap_err();
        assert!(refused.to_string().contains("tap0"), "{refused}");
        let refused = boot
            .add_interface(1, &"id=eth0,tap=tap1".parse().unwrap())
            .unwrap_err();
        assert!(
            refused.to_string().contains("--net names eth0 twice"),
            "{refused}"
        );

        let drive = json!({ "drive_id": "a", "path_on_host": "/a", "is_root_device": false });
        let file = json!({ "boot-source": { "kernel_image_path": "/k" }, "drives": [drive, drive] });
        let refused = from_file(file).unwrap_err();
        assert!(refused.to_string().contains("drives names a twice"), "{refused}");
    }

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

    #[test]
    fn firecrackers_file_becomes_requests_in_an_order_that_the_monitor_takes() {
        let boot = from_file(json!({
            "boot-source": { "kernel_image_path": "/k", "boot_args": "quiet" },
            "drives": [{ "drive_id": "rootfs", "path_on_host": "/r", "is_root_device": true }],
            "machine-config": { "vcpu_count": 4, "mem_size_mib": 1024 },
            "network-interfaces": [{ "iface_id": "eth0", "host_dev_name": "tap0" }],
            "entropy": {},
            "balloon": null,
            "pmem": [],
        }))
        .unwrap();
        let paths: Vec<_> = boot.requests.iter().map(|put| put.path.as_str()).collect();
        assert_eq!(
            paths,
            [
                "/machine-config",
                "/boot-source",
                "/drives/rootfs",
                "/network-interfaces/eth0",
                "/entropy"
            ]
        );
        assert_eq!(
            (boot.kernel.as_str(), boot.vcpus, boot.memory_mib),
            ("/k", 4, 1024)
        );
    }

    #[test]
    fn a_file_that_asks_for_what_nobody_knows_is_refused_by_name() {
        let source = json!({ "kernel_image_path": "/k" });
        let error = from_file(json!({ "boot-source": source, "vsock": { "guest_cid": 3 } })).unwrap_err();
        assert!(matches!(error, BootError::Unknown { part, .. } if part == "vsock"));
        let error = from_file(json!({ "drives": [] })).unwrap_err();
        assert!(matches!(
            error,
            BootError::Lacks {
                part: "boot-source",
                ..
            }
        ));
        let strange = json!({ "boot-source": source, "drives": [{ "drive_id": "../x" }] });
        assert!(matches!(
            from_file(strange),
            Err(BootError::Id {
                field: "drive_id",
                ..
            })
        ));
    }
}
