//! Firecracker's configuration file, as the requests that it stands for.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde_json::{Map, Value};

use super::{Boot, BootError, is_id};

/// The longest configuration file.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// The parts that are understood.
const PARTS: [&str; 8] = [
    "boot-source",
    "drives",
    "entropy",
    "guest-channel",
    "logger",
    "machine-config",
    "network-interfaces",
    "serial",
];

impl Boot {
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
        if let Some((part, meant)) = parts.keys().find_map(|part| Some((part, meant_by(part)?))) {
            return Err(BootError::Misspelt {
                path: path.to_owned(),
                part: part.clone(),
                meant,
            });
        }
        let mut take = |part: &str| parts.remove(part).filter(|value| !value.is_null());
        let boot_source = take("boot-source").ok_or_else(|| BootError::Lacks {
            path: path.to_owned(),
            part: "boot-source",
        })?;
        let file = path.to_owned();
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
            file: Some(path.to_owned()),
            ..Self::default()
        };
        if let Some(machine) = machine {
            boot.put("/machine-config", machine);
        }
        boot.put("/boot-source", boot_source);
        // Without a list of drives it is no such file, as Firecracker and the monitor read it; the list may be empty.
        let drives = take("drives").ok_or_else(|| BootError::Lacks {
            path: file.clone(),
            part: "drives",
        })?;
        let interfaces = take("network-interfaces");
        for (part, path, field, bodies) in [
            ("drives", "/drives", "drive_id", Some(drives)),
            (
                "network-interfaces",
                "/network-interfaces",
                "iface_id",
                interfaces,
            ),
        ] {
            for body in elements(bodies) {
                let id = body[field]
                    .as_str()
                    .filter(|id| is_id(id))
                    .ok_or_else(|| BootError::Id {
                        path: file.clone(),
                        part,
                        field,
                    })?;
                boot.put_named(part, path, id, body.clone())?;
            }
        }
        if let Some(entropy) = take("entropy") {
            boot.put("/entropy", entropy);
        }
        if let Some(channel) = take("guest-channel") {
            boot.put("/guest-channel", channel);
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

/// The part that a name nearly is: with underscores, capitals or without its plural.
fn meant_by(name: &str) -> Option<&'static str> {
    let plain = |name: &str| {
        let letters = name.chars().filter(char::is_ascii_alphanumeric);
        let plain: String = letters.map(|letter| letter.to_ascii_lowercase()).collect();
        plain.trim_end_matches('s').to_owned()
    };
    let near = PARTS.iter().find(|part| plain(part) == plain(name));
    near.copied().filter(|part| *part != name)
}

/// The elements of a list; whatever else stands there is one element, which the monitor will refuse.
fn elements(part: Option<Value>) -> Vec<Value> {
    match part {
        None => Vec::new(),
        Some(Value::Array(elements)) => elements,
        Some(other) => vec![other],
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn from_file(parts: Value) -> Result<Boot, BootError> {
        let Value::Object(parts) = parts else {
            panic!("an object")
        };
        Boot::from_parts(parts, Path::new("config.json"))
    }

    #[test]
    fn firecrackers_file_becomes_requests_in_an_order_that_the_monitor_takes() {
        let boot = from_file(json!({
            "boot-source": { "kernel_image_path": "/k", "boot_args": "quiet" },
            "drives": [{ "drive_id": "rootfs", "path_on_host": "/r", "is_root_device": true }],
            "machine-config": { "vcpu_count": 4, "mem_size_mib": 1024 },
            "network-interfaces": [{ "iface_id": "eth0", "host_dev_name": "tap0" }],
            "entropy": {},
            "guest-channel": {},
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
                "/entropy",
                "/guest-channel"
            ]
        );
        assert_eq!(
            (boot.kernel.as_str(), boot.vcpus, boot.memory_mib),
            ("/k", 4, 1024)
        );
    }

    #[test]
    fn a_part_that_is_nearly_one_is_told_what_it_is_called() {
        let source = json!({ "kernel_image_path": "/k" });
        for (part, meant) in [
            ("boot_source", "boot-source"),
            ("machine_config", "machine-config"),
            ("machineConfig", "machine-config"),
            ("drive", "drives"),
        ] {
            let told = from_file(json!({ part: source })).unwrap_err().to_string();
            assert!(told.ends_with(&format!("did you mean {meant}?")), "{told}");
            assert!(told.contains("config.json") && told.contains(part), "{told}");
        }
        for part in PARTS.iter().chain(&["vsock", "metrics"]) {
            assert_eq!(meant_by(part), None, "{part}");
        }
    }

    #[test]
    fn what_the_monitor_refuses_is_told_of_a_part_of_the_file() {
        let boot = from_file(json!({ "boot-source": { "kernel_image_path": "/k" }, "drives": [] })).unwrap();
        assert_eq!(
            boot.told_of("/drives/root", "no such file"),
            "drives root of the configuration config.json: no such file"
        );
        let boot = Boot::new(json!({ "kernel_image_path": "/k" }), 1, 64);
        assert_eq!(boot.told_of("/drives/root", "no such file"), "no such file");
    }

    #[test]
    fn a_file_that_asks_for_what_nobody_knows_is_refused_by_name() {
        let source = json!({ "kernel_image_path": "/k" });
        let error = from_file(json!({ "boot-source": source, "drives": [], "vsock": { "guest_cid": 3 } }))
            .unwrap_err();
        assert!(matches!(error, BootError::Unknown { part, .. } if part == "vsock"));
        let error = from_file(json!({ "drives": [] })).unwrap_err();
        assert!(matches!(
            error,
            BootError::Lacks {
                part: "boot-source",
                ..
            }
        ));
        for file in [
            json!({ "boot-source": source }),
            json!({ "boot-source": source, "drives": null }),
        ] {
            let told = from_file(file).unwrap_err().to_string();
            assert!(told.ends_with("config.json has no drives"), "{told}");
        }
        let strange = json!({ "boot-source": source, "drives": [{ "drive_id": "../x" }] });
        assert!(matches!(
            from_file(strange),
            Err(BootError::Id {
                field: "drive_id",
                ..
            })
        ));
    }

    #[test]
    fn a_drive_that_is_there_twice_is_refused_by_name() {
        let drive = json!({ "drive_id": "a", "path_on_host": "/a", "is_root_device": false });
        let file = json!({ "boot-source": { "kernel_image_path": "/k" }, "drives": [drive, drive] });
        let refused = from_file(file).unwrap_err();
        let expected = "drives of the configuration config.json names a twice";
        assert!(refused.to_string().starts_with(expected), "{refused}");
    }
}
