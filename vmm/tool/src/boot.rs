//! What is to be booted, as requests to the monitor's API: from [flags](flags), or from Firecracker's configuration
//! [file](file).

mod file;
mod flags;

use std::io;
use std::path::PathBuf;

use serde_json::{Value, json};

pub(crate) use flags::{DriveFlag, NetFlag, Override};

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
    /// A part that is nearly one.
    #[error("the configuration {path} has a part {part:?}, which nobody knows: did you mean {meant}?")]
    Misspelt {
        /// Which file.
        path: PathBuf,
        /// Which part.
        part: String,
        /// What it nearly is.
        meant: &'static str,
    },
    /// Two drives or interfaces of one name, of which the monitor would take the last.
    #[error("{part} names {id} twice: give each an id of its own")]
    Twice {
        /// `--drive`, `--net`, or the part of the configuration and which that is.
        part: String,
        /// The name.
        id: String,
    },
    /// One tap for two interfaces.
    #[error("--net names the tap {0} twice: give each interface a tap of its own")]
    TapTwice(String),
    /// A drive or interface without a usable name.
    #[error("{part} of the configuration {path} needs a {field} of 1 to 64 letters, digits and '_'")]
    Id {
        /// Which file.
        path: PathBuf,
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
    /// The configuration file that they come from, if they do.
    pub(crate) file: Option<PathBuf>,
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
    fn put_named(&mut self, part: &str, path: &str, id: &str, body: Value) -> Result<(), BootError> {
        let path = format!("{path}/{id}");
        if self.requests.iter().any(|put| put.path == path) {
            return Err(BootError::Twice {
                part: self.in_file(part),
                id: id.to_owned(),
            });
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

    /// Has KVM log which pages the guest writes.
    pub(crate) fn track_dirty_pages(&mut self) {
        let mut requests = self.requests.iter_mut();
        if let Some(machine) = requests.find(|put| put.path == "/machine-config") {
            machine.body["track_dirty_pages"] = json!(true);
        }
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

    /// What a reason is of, with which the monitor refuses a request: of what part of the file, if it is of one.
    pub(crate) fn told_of(&self, path: &str, reason: &str) -> String {
        match &self.file {
            Some(_) => {
                let part = path.trim_start_matches('/').replace('/', " ");
                format!("{}: {reason}", self.in_file(&part))
            }
            None => reason.to_owned(),
        }
    }

    /// What a part is called, with the file that it is in, if it is in one.
    fn in_file(&self, part: &str) -> String {
        match &self.file {
            Some(file) => format!("{part} of the configuration {}", file.display()),
            None => part.to_owned(),
        }
    }

    /// The taps of its interfaces.
    pub(crate) fn taps(&self) -> impl Iterator<Item = &str> {
        let bodies = self.requests.iter().map(|put| &put.body);
        bodies.filter_map(|body| body["host_dev_name"].as_str())
    }

    /// The files of its drives.
    pub(crate) fn drive_files(&self) -> impl Iterator<Item = &str> {
        let bodies = self.requests.iter().map(|put| &put.body);
        bodies.filter_map(|body| body["path_on_host"].as_str())
    }

    /// Adds a channel to an agent in the guest.
    pub(crate) fn add_guest_channel(&mut self) {
        self.put("/guest-channel", json!({}));
    }

    /// Adds an entropy device.
    pub(crate) fn add_entropy(&mut self) {
        self.put("/entropy", json!({}));
    }
}

/// Whether the API takes it in a path.
fn is_id(text: &str) -> bool {
    (1..=64).contains(&text.len()) && text.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'_')
}

#[cfg(test)]
mod tests {
    use super::*;

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
    }
}
