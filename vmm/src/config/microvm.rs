//! All that a machine is to be made of, gathered request by request or from one file.

use std::path::Path;

use super::boot_source::{BootSource, BootSourceBody, BootSourceError};
use super::drive::{Drive, DriveBody, DriveError};
use super::entropy::{EntropyBody, EntropyError};
use super::identifier::ResourceId;
use super::network::{Interface, InterfaceBody, InterfaceError};
use super::serial::{Serial, SerialBody, SerialError};
use super::{Machine, MachineBody, MachineError, MachineUpdate};

/// Why something cannot be part of the machine. The prefixes are Firecracker's.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// `machine-config`.
    #[error("Machine config error: {0}")]
    Machine(#[from] MachineError),
    /// `boot-source`.
    #[error("Boot source error: {0}")]
    BootSource(#[from] BootSourceError),
    /// `drives`.
    #[error("Drive config error: {0}")]
    Drive(#[from] DriveError),
    /// `network-interfaces`.
    #[error("Network config error: {0}")]
    Interface(#[from] InterfaceError),
    /// `entropy`.
    #[error("Entropy config error: {0}")]
    Entropy(#[from] EntropyError),
    /// `serial`.
    #[error("Serial config error: {0}")]
    Serial(#[from] SerialError),
}

/// What a machine is to be made of, checked piece by piece and as a whole.
///
/// A piece that is refused leaves everything as it was.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MicrovmConfig {
    /// vCPUs and memory.
    pub machine: Machine,
    /// Kernel, initial RAM disk, command line; a machine cannot be booted without.
    pub boot_source: Option<BootSource>,
    /// Drives in the order in which the guest sees them; the root, if there is one, first.
    drives: Vec<Drive>,
    /// Network interfaces in the order in which the guest sees them.
    interfaces: Vec<Interface>,
    /// Whether there is an entropy device.
    pub entropy: bool,
    /// Whether there is a guest channel.
    pub guest_channel: bool,
    /// Where the serial console ends.
    pub serial: Serial,
    /// Whether the guest can report the end of its boot (`--boot-timer`).
    pub boot_timer: bool,
}

impl MicrovmConfig {
    /// The parts of a machine that was saved that have names, and whose files need not be on this host; the names are
    /// distinct.
    #[must_use]
    pub fn of_saved(machine: Machine, drives: Vec<Drive>, interfaces: Vec<Interface>) -> Self {
        Self {
            machine,
            drives,
            interfaces,
            ..Self::default()
        }
    }

    /// Gives the interface `id` another tap; `false` if there is none of that name.
    pub fn override_tap(&mut self, id: &ResourceId, tap: &str) -> bool {
        let interface = self.interfaces.iter_mut().find(|interface| interface.id == *id);
        interface
            .map(|interface| tap.clone_into(&mut interface.tap))
            .is_some()
    }

    /// Gives the drive `id` another file; `false` if there is none of that name.
    pub fn override_drive(&mut self, id: &ResourceId, path: &Path) -> bool {
        let drive = self.drives.iter_mut().find(|drive| drive.id == *id);
        drive.map(|drive| path.clone_into(&mut drive.path)).is_some()
    }

    /// The drives in the order in which the guest sees them; the root, if there is one, first.
    #[must_use]
    pub fn drives(&self) -> &[Drive] {
        &self.drives
    }

    /// The network interfaces in the order in which the guest sees them.
    #[must_use]
    pub fn interfaces(&self) -> &[Interface] {
        &self.interfaces
    }

    /// The kernel's command line: what was given, and where the root is if a drive is marked as such.
    #[must_use]
    pub fn command_line(&self) -> Option<String> {
        let boot = self.boot_source.as_ref()?;
        let root = self.drives.first().and_then(Drive::root_argument);
        Some(match root {
            Some(root) if boot.command_line().is_empty() => root,
            Some(root) => format!("{} {root}", boot.command_line()),
            None => boot.command_line().to_owned(),
        })
    }

    /// Replaces vCPUs and memory.
    ///
    /// # Errors
    /// When no such machine can be made.
    pub fn set_machine(&mut self, body: MachineBody) -> Result<(), ConfigError> {
        self.machine = body.try_into()?;
        Ok(())
    }

    /// Changes some of vCPUs and memory.
    ///
    /// # Errors
    /// When no such machine can be made.
    pub fn update_machine(&mut self, update: &MachineUpdate) -> Result<(), ConfigError> {
        self.set_machine(update.onto(&self.machine))
    }

    /// Replaces the kernel.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn set_boot_source(&mut self, body: BootSourceBody) -> Result<(), ConfigError> {
        self.boot_source = Some(body.try_into()?);
        Ok(())
    }

    /// Adds a drive, or replaces the one of the same name.
    ///
    /// # Errors
    /// When it cannot be used, or would be a second root.
    pub fn put_drive(&mut self, body: DriveBody) -> Result<(), ConfigError> {
        let drive = Drive::try_from(body)?;
        if drive.is_root
            && self
                .drives
                .iter()
                .any(|other| other.is_root && other.id != drive.id)
        {
            return Err(DriveError::SecondRoot.into());
        }
        match self.drives.iter().position(|other| other.id == drive.id) {
            Some(index) => self.drives[index] = drive,
            None => self.drives.push(drive),
        }
        // The root is /dev/vda; the others keep the order in which they came.
        self.drives.sort_by_key(|drive| !drive.is_root);
        Ok(())
    }

    /// Adds a network interface, or replaces the one of the same name.
    ///
    /// # Errors
    /// When it makes no sense, or another has its address.
    pub fn put_interface(&mut self, body: InterfaceBody) -> Result<(), ConfigError> {
        let interface = Interface::try_from(body)?;
        if let Some(mac) = interface.mac
            && self
                .interfaces
                .iter()
                .any(|other| other.mac == Some(mac) && other.id != interface.id)
        {
            return Err(InterfaceError::MacInUse(mac).into());
        }
        match self.interfaces.iter().position(|other| other.id == interface.id) {
            Some(index) => self.interfaces[index] = interface,
            None => self.interfaces.push(interface),
        }
        Ok(())
    }

    /// Gives the guest an entropy device.
    ///
    /// # Errors
    /// When a rate limit is asked for.
    pub fn set_entropy(&mut self, body: &EntropyBody) -> Result<(), ConfigError> {
        body.check()?;
        self.entropy = true;
        Ok(())
    }

    /// Says where the serial console ends.
    ///
    /// # Errors
    /// When it would end in two places, or a rate limit is asked for.
    pub fn set_serial(&mut self, body: SerialBody) -> Result<(), ConfigError> {
        self.serial = body.try_into()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drive(id: &str, root: bool) -> DriveBody {
        let json = format!(
            r#"{{"drive_id": "{id}", "is_root_device": {root}, "is_read_only": true, "path_on_host": "/proc/self/exe"}}"#
        );
        serde_json::from_str(&json).unwrap()
    }

    fn interface(id: &str, mac: &str) -> InterfaceBody {
        let json = format!(r#"{{"iface_id": "{id}", "host_dev_name": "tap0", "guest_mac": "{mac}"}}"#);
        serde_json::from_str(&json).unwrap()
    }

    fn drive_ids(config: &MicrovmConfig) -> Vec<&str> {
        config.drives().iter().map(|drive| drive.id.as_str()).collect()
    }

    #[test]
    fn the_root_comes_first_and_the_others_keep_their_order() {
        let mut config = MicrovmConfig::default();
        for (id, root) in [("a", false), ("b", false), ("root", true), ("c", false)] {
            config.put_drive(drive(id, root)).unwrap();
        }
        assert_eq!(drive_ids(&config), ["root", "a", "b", "c"]);
        config.put_drive(drive("a", false)).unwrap();
        assert_eq!(drive_ids(&config), ["root", "a", "b", "c"]);
    }

    #[test]
    fn a_second_root_is_refused_and_changes_nothing() {
        let mut config = MicrovmConfig::default();
        config.put_drive(drive("root", true)).unwrap();
        config.put_drive(drive("a", false)).unwrap();
        let before = config.clone();
        for second in ["a", "b"] {
            let refusal = config.put_drive(drive(second, true)).unwrap_err();
            assert!(matches!(refusal, ConfigError::Drive(DriveError::SecondRoot)));
            assert_eq!(config, before);
        }
        config.put_drive(drive("root", true)).unwrap();
    }

    #[test]
    fn two_interfaces_cannot_have_one_address() {
        let mut config = MicrovmConfig::default();
        config
            .put_interface(interface("eth0", "06:00:00:00:00:01"))
            .unwrap();
        config
            .put_interface(interface("eth0", "06:00:00:00:00:01"))
            .unwrap();
        assert_eq!(config.interfaces().len(), 1);
        let refusal = config
            .put_interface(interface("eth1", "06:00:00:00:00:01"))
            .unwrap_err();
        assert!(refusal.to_string().contains("already in use"), "{refusal}");
        config
            .put_interface(interface("eth1", "06:00:00:00:00:02"))
            .unwrap();
        assert_eq!(config.interfaces().len(), 2);
    }

    #[test]
    fn the_command_line_tells_where_the_root_is() {
        let mut config = MicrovmConfig::default();
        assert_eq!(config.command_line(), None);
        let boot = r#"{"kernel_image_path": "/proc/self/exe", "boot_args": "console=ttyS0"}"#;
        config
            .set_boot_source(serde_json::from_str(boot).unwrap())
            .unwrap();
        assert_eq!(config.command_line().unwrap(), "console=ttyS0");
        config.put_drive(drive("root", true)).unwrap();
        assert_eq!(config.command_line().unwrap(), "console=ttyS0 root=/dev/vda ro");
    }
}
