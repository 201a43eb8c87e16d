//! A tap of the host: opened by name, or made where there is none.
//!
//! Packets carry a virtio-net header of 12 bytes in both directions, so checksums and segmentation pass through to
//! whoever does them best. A tap that was made here goes when the machine goes; one that existed stays.

use std::ffi::c_short;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use runnel_snapshot::block_store::GuestSlice;
use runnel_snapshot::block_store::guest_io::{receive_message, send_message};

use super::{Backend, GuestOffloads, HEADER_BYTES};

/// Bytes of an interface's name, without the zero at its end.
const NAME_BYTES_MAX: usize = libc::IFNAMSIZ - 1;

/// Why there is no tap.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// Not an interface's name.
    #[error(
        "{name:?} is no name of an interface: it needs 1 to {NAME_BYTES_MAX} bytes, without '/', '%' and spaces"
    )]
    Name {
        /// What was given.
        name: String,
    },
    /// The kernel has no taps, or does not let this user have them.
    #[error("cannot open /dev/net/tun: load the module tun, and let this user read and write it")]
    Device(#[source] io::Error),
    /// Somebody else has it.
    #[error("tap {name} is in use by another machine")]
    Busy {
        /// Which tap.
        name: String,
    },
    /// Not allowed.
    #[error(
        "not allowed to use tap {name}: make it beforehand for this user (ip tuntap add {name} mode tap user USER vnet_hdr), or run with CAP_NET_ADMIN"
    )]
    Forbidden {
        /// Which tap.
        name: String,
    },
    /// The interface is of another kind, or the kernel too old.
    #[error("tap {name} cannot be set up ({step})")]
    SetUp {
        /// Which tap.
        name: String,
        /// What failed.
        step: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A tap. See the module documentation.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
}

impl Tap {
    /// Opens the tap called `name`, or makes it.
    ///
    /// # Errors
    /// When the name is none, the tap is in use, or the host does not allow it.
    pub fn open(name: &str) -> Result<Self, TapError> {
        let request = interface_request(name)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .map_err(TapError::Device)?;
        let tap = Self {
            file,
            name: name.to_owned(),
        };
        // SAFETY: TUNSETIFF reads and writes one `ifreq`, which `request` is for the length of the call.
        let attached = unsafe { libc::ioctl(tap.file.as_raw_fd(), libc::TUNSETIFF as _, &raw const request) };
        check(attached).map_err(|source| match source.raw_os_error() {
            Some(libc::EBUSY) => TapError::Busy {
                name: name.to_owned(),
            },
            Some(libc::EPERM | libc::EACCES) => TapError::Forbidden {
                name: name.to_owned(),
            },
            _ => tap.failed("attach: it may be a tun, or made for several queues", source),
        })?;
        let header_bytes = HEADER_BYTES as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads one int, which lives for the length of the call.
        let sized = unsafe {
            libc::ioctl(
                tap.file.as_raw_fd(),
                libc::TUNSETVNETHDRSZ as _,
                &raw const header_bytes,
            )
        };
        check(sized).map_err(|source| tap.failed("header size", source))?;
        Ok(tap)
    }

    /// Its name on the host.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    fn failed(&self, step: &'static str, source: io::Error) -> TapError {
        TapError::SetUp {
            name: self.name.clone(),
            step,
            source,
        }
    }
}

impl Backend for Tap {
    fn descriptor(&self) -> RawFd {
        super::raw(&self.file)
    }

    fn set_offloads(&self, offloads: GuestOffloads) -> io::Result<()> {
        let flags = [
            (offloads.checksum, libc::TUN_F_CSUM),
            (offloads.tso4, libc::TUN_F_TSO4),
            (offloads.tso6, libc::TUN_F_TSO6),
            (offloads.ufo, libc::TUN_F_UFO),
        ];
        let wanted = flags
            .iter()
            .filter(|(on, _)| *on)
            .fold(0, |all, (_, flag)| all | flag);
        // SAFETY: TUNSETOFFLOAD takes its flags by value.
        check(unsafe {
            libc::ioctl(
                self.file.as_raw_fd(),
                libc::TUNSETOFFLOAD as _,
                libc::c_ulong::from(wanted),
            )
        })
    }

    fn receive(&self, into: &[GuestSlice<'_>]) -> io::Result<usize> {
        receive_message(self.file.as_fd(), into)
    }

    fn send(&self, from: &[GuestSlice<'_>]) -> io::Result<()> {
        send_message(self.file.as_fd(), from).map(drop)
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// What TUNSETIFF is asked for.
fn interface_request(name: &str) -> Result<libc::ifreq, TapError> {
    let acceptable = |byte: u8| byte.is_ascii_graphic() && byte != b'/' && byte != b'%';
    // The kernel would take a '%' for «number it», and the machine would not find its tap again.
    if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.bytes().all(acceptable) {
        return Err(TapError::Name {
            name: name.chars().take(100).collect(),
        });
    }
    let mut ifr_name = [0; libc::IFNAMSIZ];
    for (letter, byte) in ifr_name.iter_mut().zip(name.bytes()) {
        *letter = byte as libc::c_char;
    }
    let flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as c_short;
    Ok(libc::ifreq {
        ifr_name,
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_none_are_refused() {
        for name in ["", "a name", "a/b", "tap%d", "sixteen-bytes-xx", "tap\0"] {
            assert!(matches!(Tap::open(name), Err(TapError::Name { .. })), "{name:?}");
        }
    }

    #[test]
    fn a_tap_is_one_machines_and_takes_what_is_offered_to_guests() {
        let name = format!("rnl{}", std::process::id());
        let tap = match Tap::open(&name) {
            Ok(tap) => tap,
            Err(error @ (TapError::Device(_) | TapError::Forbidden { .. })) => {
                let required = std::env::var("RUNNEL_LAB").is_ok_and(|level| level == "full");
                assert!(!required, "RUNNEL_LAB=full, and {error}");
                eprintln!("skipped: {error}");
                return;
            }
            Err(error) => panic!("{error}"),
        };
        assert!(matches!(Tap::open(&name), Err(TapError::Busy { .. })));
        let all = GuestOffloads {
            checksum: true,
            tso4: true,
            tso6: true,
            ufo: true,
        };
        tap.set_offloads(all).unwrap();
        tap.set_offloads(GuestOffloads::default()).unwrap();
        drop(tap);
        drop(Tap::open(&name).unwrap());
    }
}
