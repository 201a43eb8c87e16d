//! `--config-file` and `GET /vm/config`: a whole machine in one JSON document.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::boot_source::BootSourceBody;
use super::drive::DriveBody;
use super::entropy::EntropyBody;
use super::guest_channel::GuestChannelBody;
use super::machine::MachineBody;
use super::microvm::{ConfigError, MicrovmConfig};
use super::network::InterfaceBody;
use super::serial::SerialBody;

/// What the log is to be, as the file and `PUT /logger` say it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoggerBody {
    /// The file or named pipe.
    pub log_path: Option<PathBuf>,
    /// The least important level that is written.
    pub level: Option<String>,
    /// Whether lines carry their level.
    pub show_level: Option<bool>,
    /// Whether lines carry file and line of their origin.
    pub show_log_origin: Option<bool>,
    /// The only module whose lines are written.
    pub module: Option<String>,
}

/// The document.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct WholeFile {
    /// As `PUT /drives/{drive_id}`.
    pub drives: Vec<DriveBody>,
    /// As `PUT /boot-source`; null of a machine that was loaded.
    pub boot_source: Option<BootSourceBody>,
    /// As `PUT /logger`.
    pub logger: Option<LoggerBody>,
    /// As `PUT /machine-config`.
    pub machine_config: Option<MachineBody>,
    /// As `PUT /network-interfaces/{iface_id}`.
    #[serde(default)]
    pub network_interfaces: Vec<InterfaceBody>,
    /// As `PUT /entropy`.
    pub entropy: Option<EntropyBody>,
    /// As `PUT /serial`; Runnel's own, and not shown where it is the default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<SerialBody>,
    /// As `PUT /guest-channel`; Runnel's own, and not shown where there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest_channel: Option<GuestChannelBody>,
    /// Everything else. What Firecracker knows and this version does not is refused if it asks for something;
    /// what neither knows is ignored, as Firecracker ignores it, and named in the log.
    #[serde(flatten)]
    pub others: BTreeMap<String, Value>,
}

/// Parts of the document that Firecracker knows and this version of Runnel does not.
const LATER: [&str; 7] = [
    "balloon",
    "cpu-config",
    "memory-hotplug",
    "metrics",
    "mmds-config",
    "pmem",
    "vsock",
];

/// Why a document describes no machine.
#[derive(Debug, thiserror::Error)]
pub enum WholeFileError {
    /// Not JSON, or not this document.
    #[error("Invalid JSON: {0}")]
    Json(#[from] serde_json::Error),
    /// A part that this version has not.
    #[error("{0:?} is not supported by this version of Runnel: remove it from the configuration")]
    Later(String),
    /// A part without which nothing boots.
    #[error("Invalid JSON: missing field `boot-source`")]
    NoBootSource,
    /// A part that makes no sense.
    #[error(transparent)]
    Part(#[from] ConfigError),
}

impl WholeFile {
    /// Reads the document.
    ///
    /// # Errors
    /// When it is none.
    pub fn parse(text: &str) -> Result<Self, WholeFileError> {
        Ok(serde_json::from_str(text)?)
    }

    /// The names of parts that nobody knows.
    pub fn unknown_parts(&self) -> impl Iterator<Item = &str> {
        self.others
            .keys()
            .map(String::as_str)
            .filter(|name| !LATER.contains(name))
    }

    /// What `config` looks like as a document: each part that Firecracker shows is there, null where there is none.
    #[must_use]
    pub fn describing(config: &MicrovmConfig) -> Self {
        let absent = |name: &&str| match *name {
            "pmem" => Value::Array(Vec::new()),
            _ => Value::Null,
        };
        Self {
            drives: config.drives().iter().map(DriveBody::from).collect(),
            boot_source: Some(
                config
                    .boot_source
                    .as_ref()
                    .map(BootSourceBody::from)
                    .unwrap_or_default(),
            ),
            logger: None,
            machine_config: Some(MachineBody::from(&config.machine)),
            network_interfaces: config.interfaces().iter().map(InterfaceBody::from).collect(),
            entropy: config.entropy.then(EntropyBody::default),
            serial: None,
            guest_channel: config.guest_channel.then(GuestChannelBody::default),
            others: LATER
                .iter()
                .map(|name| ((*name).to_owned(), absent(name)))
                .collect(),
        }
    }

    /// Checks every part. What the document says of the log is the caller's.
    ///
    /// # Errors
    /// At the first part that is refused.
    pub fn into_config(self) -> Result<MicrovmConfig, WholeFileError> {
        let asks = |value: &Value| !(value.is_null() || value.as_array().is_some_and(Vec::is_empty));
        if let Some((name, _)) = self
            .others
            .iter()
            .find(|(name, value)| LATER.contains(&name.as_str()) && asks(value))
        {
            return Err(WholeFileError::Later(name.clone()));
        }
        let mut config = MicrovmConfig::default();
        if let Some(machine) = self.machine_config {
            config.set_machine(machine)?;
        }
        config.set_boot_source(self.boot_source.ok_or(WholeFileError::NoBootSource)?)?;
        for drive in self.drives {
            config.put_drive(drive)?;
        }
        for interface in self.network_interfaces {
            config.put_interface(interface)?;
        }
        if let Some(entropy) = self.entropy {
            config.set_entropy(&entropy)?;
        }
        config.guest_channel = self.guest_channel.is_some();
        if let Some(serial) = self.serial {
            config.set_serial(serial)?;
        }
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: &str = r#"{
        "boot-source": {"kernel_image_path": "/proc/self/exe", "boot_args": "console=ttyS0", "initrd_path": null},
        "drives": [{"drive_id": "rootfs", "path_on_host": "/proc/self/exe", "is_root_device": true,
                    "is_read_only": true, "partuuid": null, "cache_type": "Writeback", "io_engine": "Sync",
                    "rate_limiter": null, "socket": null}],
        "machine-config": {"vcpu_count": 2, "mem_size_mib": 1024, "smt": false, "track_dirty_pages": false,
                           "huge_pages": "None"},
        "network-interfaces": [{"iface_id": "net1", "guest_mac": "06:00:ac:10:00:02", "host_dev_name": "tap0"}],
        "entropy": {"rate_limiter": null},
        "guest-channel": {},
        "balloon": null, "vsock": null, "metrics": null, "pmem": []
    }"#;

    #[test]
    fn a_whole_machine_is_read_and_described_alike() {
        let config = WholeFile::parse(WHOLE).unwrap().into_config().unwrap();
        assert_eq!(config.machine.vcpus.get(), 2);
        assert_eq!(config.drives()[0].id.as_str(), "rootfs");
        assert!(config.entropy && config.guest_channel);
        let described = serde_json::to_string(&WholeFile::describing(&config)).unwrap();
        assert_eq!(
            WholeFile::parse(&described).unwrap().into_config().unwrap(),
            config
        );
    }

    #[test]
    fn the_description_has_every_part_that_firecracker_shows() {
        let described = serde_json::to_value(WholeFile::describing(&MicrovmConfig::default())).unwrap();
        let parts: Vec<&str> = described
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect();
        for part in [
            "balloon",
            "boot-source",
            "cpu-config",
            "drives",
            "entropy",
            "logger",
            "machine-config",
            "memory-hotplug",
            "metrics",
            "mmds-config",
            "network-interfaces",
            "pmem",
            "vsock",
        ] {
            assert!(parts.contains(&part), "{part} is not among {parts:?}");
        }
    }

    #[test]
    fn what_a_later_version_brings_is_refused_and_what_nobody_knows_is_named() {
        let vsock = WHOLE.replace(
            r#""vsock": null"#,
            r#""vsock": {"guest_cid": 3, "uds_path": "v"}"#,
        );
        let refusal = WholeFile::parse(&vsock).unwrap().into_config().unwrap_err();
        assert!(matches!(refusal, WholeFileError::Later(name) if name == "vsock"));

        let comment = WHOLE.replace(r#""vsock": null"#, r#""_comment": "mine""#);
        let file = WholeFile::parse(&comment).unwrap();
        assert_eq!(file.unknown_parts().collect::<Vec<_>>(), ["_comment"]);
        file.into_config().unwrap();
    }

    #[test]
    fn a_document_without_a_kernel_or_with_strange_fields_is_refused() {
        let no_kernel = WholeFile::parse(r#"{"drives": []}"#).unwrap().into_config();
        assert!(matches!(no_kernel, Err(WholeFileError::NoBootSource)));
        let no_drives = WHOLE.replace("\"drives\"", "\"disks\"");
        assert!(matches!(
            WholeFile::parse(&no_drives),
            Err(WholeFileError::Json(_))
        ));
        let strange = WHOLE.replace("\"smt\"", "\"hyperthreads\"");
        assert!(matches!(WholeFile::parse(&strange), Err(WholeFileError::Json(_))));
    }
}
