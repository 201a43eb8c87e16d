//! What a saved machine is made of, as an image says it: enough to build its board again on a host that has none of
//! its files.

use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;

use runnel_snapshot::machine::Paused;
use runnel_snapshot::section::Section;
use serde::{Deserialize, Serialize};

use crate::config::{
    BadIdentifier, CacheType, Drive, Interface, IoEngine, MacAddress, Machine, MemorySize, MicrovmConfig,
    ResourceId, VcpuCount,
};

/// Why what an image says makes no machine.
#[derive(Debug, thiserror::Error)]
pub enum DescriptionError {
    /// vCPUs.
    #[error("the image has a machine of {0} vCPUs, and 1 to 32 are possible")]
    Vcpus(u8),
    /// RAM.
    #[error("the image has a machine of {0} MiB, and 32 to 65536 are possible")]
    Memory(u64),
    /// A name.
    #[error("the image names a device {name:?}")]
    Name {
        /// The name.
        name: String,
        /// What is wrong with it.
        #[source]
        source: BadIdentifier,
    },
    /// A name that comes twice.
    #[error("the image has two devices named {0:?}")]
    Twice(String),
    /// An address.
    #[error("the image has an interface with the address {0:?}, which is none")]
    Mac(String),
}

/// A machine's configuration and what is known of its drives.
#[derive(Clone, Debug)]
pub(super) struct Description {
    /// What it is made of.
    pub config: MicrovmConfig,
    /// For each drive of the configuration, in its order.
    pub drives: Vec<DriveRecord>,
}

/// What is known of a drive's content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct DriveRecord {
    /// Whether the content is a volume of the image; if not, it must be supplied at load, or is reopened by path.
    pub in_image: bool,
    /// Its length.
    pub bytes: u64,
    /// When the file behind it was last written, in nanoseconds since 1970, if it stayed outside.
    #[serde(default)]
    pub modified_ns: Option<i64>,
}

impl DriveRecord {
    /// The record of a file that stays outside the image.
    ///
    /// # Errors
    /// When the file cannot be asked.
    pub(super) fn of_file(file: &std::fs::File, bytes: u64) -> std::io::Result<Self> {
        let about = file.metadata()?;
        let modified_ns = about
            .mtime()
            .checked_mul(1_000_000_000)
            .and_then(|ns| ns.checked_add(about.mtime_nsec()));
        Ok(Self {
            in_image: false,
            bytes,
            modified_ns,
        })
    }
}

/// [`Description`] as plain data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct DescriptionState {
    vcpus: u8,
    smt: bool,
    memory_mib: u64,
    drives: Vec<DriveState>,
    interfaces: Vec<InterfaceState>,
    entropy: bool,
    /// Images of 0.1.0 know of none.
    #[serde(default)]
    guest_channel: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct DriveState {
    id: String,
    path: PathBuf,
    is_root: bool,
    #[serde(default)]
    partuuid: Option<String>,
    is_read_only: bool,
    cache_type: CacheType,
    #[serde(default)]
    io_engine: IoEngine,
    #[serde(flatten)]
    record: DriveRecord,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct InterfaceState {
    id: String,
    tap: String,
    #[serde(default)]
    mac: Option<String>,
    #[serde(default)]
    mtu: Option<u16>,
}

impl Section for Description {
    const KIND: &'static str = "machine";
    const VERSION: u32 = 1;
    type State = DescriptionState;
    type Deps = ();
    type Error = DescriptionError;

    fn save(&self, _: &Paused<'_>) -> Result<DescriptionState, DescriptionError> {
        let machine = &self.config.machine;
        let drives = self
            .config
            .drives()
            .iter()
            .zip(&self.drives)
            .map(|(drive, record)| DriveState {
                id: drive.id.to_string(),
                path: drive.path.clone(),
                is_root: drive.is_root,
                partuuid: drive.partuuid.clone(),
                is_read_only: drive.is_read_only,
                cache_type: drive.cache_type,
                io_engine: drive.io_engine,
                record: record.clone(),
            });
        let interfaces = self.config.interfaces().iter().map(|interface| InterfaceState {
            id: interface.id.to_string(),
            tap: interface.tap.clone(),
            mac: interface.mac.map(|mac| mac.to_string()),
            mtu: interface.mtu,
        });
        Ok(DescriptionState {
            vcpus: machine.vcpus.get(),
            smt: machine.smt,
            memory_mib: machine.memory.mib(),
            drives: drives.collect(),
            interfaces: interfaces.collect(),
            entropy: self.config.entropy,
            guest_channel: self.config.guest_channel,
        })
    }

    fn restore((): (), state: DescriptionState) -> Result<Self, DescriptionError> {
        let machine = Machine {
            vcpus: VcpuCount::new(state.vcpus).ok_or(DescriptionError::Vcpus(state.vcpus))?,
            memory: MemorySize::from_mib(state.memory_mib)
                .ok_or(DescriptionError::Memory(state.memory_mib))?,
            smt: state.smt,
            track_dirty_pages: false,
        };
        let mut drives = Vec::new();
        let mut records = Vec::new();
        for drive in state.drives {
            drives.push(Drive {
                id: name(&drive.id)?,
                path: drive.path,
                is_root: drive.is_root,
                partuuid: drive.partuuid,
                is_read_only: drive.is_read_only,
                cache_type: drive.cache_type,
                io_engine: drive.io_engine,
            });
            records.push(drive.record);
        }
        let interface = |interface: InterfaceState| {
            let mac = interface
                .mac
                .map(|mac| mac.parse::<MacAddress>().map_err(|_| DescriptionError::Mac(mac)));
            Ok(Interface {
                id: name(&interface.id)?,
                tap: interface.tap,
                mac: mac.transpose()?,
                mtu: interface.mtu,
            })
        };
        let interfaces = state
            .interfaces
            .into_iter()
            .map(interface)
            .collect::<Result<Vec<_>, DescriptionError>>()?;
        refuse_twins(drives.iter().map(|drive| &drive.id))?;
        refuse_twins(interfaces.iter().map(|interface| &interface.id))?;
        let mut config = MicrovmConfig::of_saved(machine, drives, interfaces);
        config.entropy = state.entropy;
        config.guest_channel = state.guest_channel;
        Ok(Self {
            config,
            drives: records,
        })
    }
}

fn name(text: &str) -> Result<ResourceId, DescriptionError> {
    text.parse().map_err(|source| DescriptionError::Name {
        name: text.chars().take(100).collect(),
        source,
    })
}

fn refuse_twins<'i>(names: impl Iterator<Item = &'i ResourceId>) -> Result<(), DescriptionError> {
    let mut seen = std::collections::BTreeSet::new();
    for name in names {
        if !seen.insert(name) {
            return Err(DescriptionError::Twice(name.to_string()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> serde_json::Value {
        serde_json::json!({
            "vcpus": 2, "smt": false, "memory_mib": 64, "entropy": true, "guest_channel": true,
            "drives": [{
                "id": "rootfs", "path": "/gone", "is_root": true, "is_read_only": false, "cache_type": "Writeback",
                "in_image": true, "bytes": 4096,
            }],
            "interfaces": [{"id": "eth0", "tap": "tap0", "mac": "06:00:00:00:00:01"}],
        })
    }

    fn restored(state: serde_json::Value) -> Result<Description, DescriptionError> {
        Description::restore((), serde_json::from_value(state).unwrap())
    }

    #[test]
    fn a_description_comes_back_without_looking_for_the_files_it_names() {
        let description = restored(state()).unwrap();
        assert_eq!(description.config.drives()[0].id.as_str(), "rootfs");
        assert_eq!(description.config.machine.vcpus.get(), 2);
        let saved = description.save(&Paused::until(|| {})).unwrap();
        assert_eq!(saved, serde_json::from_value(state()).unwrap());
    }

    #[test]
    fn an_image_that_knows_of_no_guest_channel_has_none() {
        let mut old = state();
        old.as_object_mut().unwrap().remove("guest_channel");
        assert!(!restored(old).unwrap().config.guest_channel);
        assert!(restored(state()).unwrap().config.guest_channel);
    }

    #[test]
    fn numbers_and_names_that_cannot_be_are_refused() {
        let with = |path: &str, value: serde_json::Value| {
            let mut state = state();
            *state.pointer_mut(path).unwrap() = value;
            restored(state)
        };
        assert!(matches!(
            with("/vcpus", 33.into()),
            Err(DescriptionError::Vcpus(33))
        ));
        assert!(matches!(
            with("/memory_mib", 1.into()),
            Err(DescriptionError::Memory(1))
        ));
        assert!(matches!(
            with("/drives/0/id", "../x".into()),
            Err(DescriptionError::Name { .. })
        ));
        assert!(matches!(
            with("/interfaces/0/mac", "zz".into()),
            Err(DescriptionError::Mac(_))
        ));
        let twin = state()["drives"][0].clone();
        let twice = with("/drives", serde_json::json!([twin, twin]));
        assert!(matches!(twice, Err(DescriptionError::Twice(name)) if name == "rootfs"));
    }
}
