//! `boot-source`: which kernel, with what.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::host_file::{self, Access, HostFileError};

/// `PUT /boot-source`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootSourceBody {
    /// The kernel: an ELF `vmlinux` or a `bzImage`.
    pub kernel_image_path: PathBuf,
    /// The initial RAM disk.
    pub initrd_path: Option<PathBuf>,
    /// The kernel's command line.
    pub boot_args: Option<String>,
}

/// Why a machine cannot be booted that way.
#[derive(Debug, thiserror::Error)]
pub enum BootSourceError {
    /// The kernel cannot be read.
    #[error("The kernel file cannot be opened: {0}")]
    Kernel(#[source] HostFileError),
    /// The initial RAM disk cannot be read.
    #[error("The initrd file cannot be opened due to invalid path or invalid permissions. {0}")]
    Initrd(#[source] HostFileError),
    /// The command line does not fit.
    #[error("The kernel command line is invalid: its {found} bytes are more than the {max} that fit.")]
    TooLong {
        /// How many bytes it has.
        found: usize,
        /// How many fit.
        max: usize,
    },
    /// The command line holds something that no kernel would read.
    #[error("The kernel command line is invalid: only printable ASCII characters are allowed, not {0:?}.")]
    Character(char),
}

/// Where to boot from, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootSource {
    /// The kernel: an ELF `vmlinux` or a `bzImage`.
    pub kernel: PathBuf,
    /// The initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line, if one was given; [`Self::command_line`] has the default.
    pub boot_args: Option<String>,
}

impl BootSource {
    /// The longest command line in bytes, without the terminating zero: `COMMAND_LINE_SIZE` of x86 Linux.
    pub const COMMAND_LINE_BYTES_MAX: usize = 2047;

    /// The command line of a machine that was given none: Firecracker's, without `nomodule` (Debian's kernels have
    /// virtio in modules) and with the serial port left on (ACPI declares it).
    pub const COMMAND_LINE_DEFAULT: &'static str =
        "reboot=k panic=1 i8042.noaux i8042.nomux i8042.dumbkbd swiotlb=noforce";

    /// What the kernel is told, before anything that the devices add.
    #[must_use]
    pub fn command_line(&self) -> &str {
        self.boot_args.as_deref().unwrap_or(Self::COMMAND_LINE_DEFAULT)
    }
}

impl TryFrom<BootSourceBody> for BootSource {
    type Error = BootSourceError;

    fn try_from(body: BootSourceBody) -> Result<Self, BootSourceError> {
        host_file::check(&body.kernel_image_path, Access::Read).map_err(BootSourceError::Kernel)?;
        if let Some(initrd) = &body.initrd_path {
            host_file::check(initrd, Access::Read).map_err(BootSourceError::Initrd)?;
        }
        if let Some(text) = &body.boot_args {
            check_command_line(text)?;
        }
        Ok(Self {
            kernel: body.kernel_image_path,
            initrd: body.initrd_path,
            boot_args: body.boot_args,
        })
    }
}

fn check_command_line(text: &str) -> Result<(), BootSourceError> {
    if text.len() > BootSource::COMMAND_LINE_BYTES_MAX {
        return Err(BootSourceError::TooLong {
            found: text.len(),
            max: BootSource::COMMAND_LINE_BYTES_MAX,
        });
    }
    match text.chars().find(|c| !matches!(c, ' '..='~')) {
        Some(strange) => Err(BootSourceError::Character(strange)),
        None => Ok(()),
    }
}

impl From<&BootSource> for BootSourceBody {
    fn from(source: &BootSource) -> Self {
        Self {
            kernel_image_path: source.kernel.clone(),
            initrd_path: source.initrd.clone(),
            boot_args: source.boot_args.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(kernel: &str) -> BootSourceBody {
        BootSourceBody {
            kernel_image_path: kernel.into(),
            ..BootSourceBody::default()
        }
    }

    #[test]
    fn a_kernel_that_is_missing_or_a_directory_is_refused() {
        assert!(matches!(
            BootSource::try_from(body("/nonexistent")),
            Err(BootSourceError::Kernel(_))
        ));
        assert!(matches!(
            BootSource::try_from(body("/")),
            Err(BootSourceError::Kernel(_))
        ));
        let initrd = BootSourceBody {
            initrd_path: Some("/nonexistent".into()),
            ..body("/proc/self/exe")
        };
        assert!(matches!(
            BootSource::try_from(initrd),
            Err(BootSourceError::Initrd(_))
        ));
    }

    #[test]
    fn a_command_line_of_one_byte_too_many_or_with_control_characters_is_refused() {
        let with = |args: String| {
            BootSource::try_from(BootSourceBody {
                boot_args: Some(args),
                ..body("/proc/self/exe")
            })
        };
        assert!(with("x".repeat(2047)).is_ok());
        assert!(matches!(
            with("x".repeat(2048)),
            Err(BootSourceError::TooLong { found: 2048, .. })
        ));
        assert!(matches!(
            with("quiet\n".to_owned()),
            Err(BootSourceError::Character('\n'))
        ));
        assert_eq!(with(String::new()).unwrap().command_line(), "");
        let default = BootSource::try_from(body("/proc/self/exe")).unwrap();
        assert_eq!(default.command_line(), BootSource::COMMAND_LINE_DEFAULT);
    }
}
