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
    use std::io::Write as _;

    use super::*;

    #[test]
    fn names_that_are_none_are_refused() {
        for name in ["", "a name", "a/b", "tap%d", "sixteen-bytes-xx", "tap\0"] {
            assert!(matches!(Tap::open(name), Err(TapError::Name { .. })), "{name:?}");
        }
    }

    /// A tap, or `None` where this host or user has none; then the test is skipped, or fails in the full lab.
    fn tap_or_skip(name: &str) -> Option<Tap> {
        match Tap::open(name) {
            Ok(tap) => Some(tap),
            Err(error @ (TapError::Device(_) | TapError::Forbidden { .. })) => {
                let required = std::env::var("RUNNEL_LAB").is_ok_and(|level| level == "full");
                assert!(!required, "RUNNEL_LAB=full, and {error}");
                let _ = writeln!(io::stderr(), "skipped: {error}"); // past the test harness
                None
            }
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn a_tap_is_one_machines_and_takes_what_is_offered_to_guests() {
        let name = format!("rnl{}", std::process::id());
        let Some(tap) = tap_or_skip(&name) else {
            return;
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

    /// Gives the interface an address and puts it up.
    fn bring_up(tap: &Tap, address: [u8; 4]) {
        // Only a handle for ioctls: nothing is sent through it.
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        let mut request = interface_request(tap.name()).unwrap();
        let internet = libc::sockaddr_in {
            sin_family: libc::AF_INET as _,
            sin_port: 0,
            sin_addr: libc::in_addr {
                s_addr: u32::from_ne_bytes(address),
            },
            sin_zero: [0; 8],
        };
        // SAFETY: both are plain data of 16 bytes, and `sockaddr_in` is one of the forms of `sockaddr`.
        request.ifr_ifru.ifru_addr =
            unsafe { std::mem::transmute::<libc::sockaddr_in, libc::sockaddr>(internet) };
        // SAFETY: SIOCSIFADDR reads one `ifreq`, which lives for the length of the call.
        check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFADDR as _, &raw const request) })
            .unwrap();
        request.ifr_ifru = libc::__c_anonymous_ifr_ifru {
            ifru_flags: libc::IFF_UP as c_short,
        };
        // SAFETY: as above, for SIOCSIFFLAGS.
        check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &raw const request) })
            .unwrap();
    }

    const HOST: [u8; 4] = [10, 77, 0, 1];
    const GUEST: [u8; 4] = [10, 77, 0, 2];
    const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

    /// «Who has the host's address?», behind an empty header.
    fn arp_request() -> Vec<u8> {
        let mut packet = vec![0; HEADER_BYTES];
        packet.extend([0xff; 6]);
        packet.extend(GUEST_MAC);
        packet.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        packet.extend(GUEST_MAC);
        packet.extend(GUEST);
        packet.extend([0; 6]);
        packet.extend(HOST);
        packet
    }

    #[test]
    fn packets_pass_between_guest_memory_and_the_hosts_network() {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

        // The namespace is this thread's, and goes with it.
        // SAFETY: nothing in this thread relies on the network namespace that it began in.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            let required = std::env::var("RUNNEL_LAB").is_ok_and(|level| level == "full");
            assert!(!required, "RUNNEL_LAB=full, and no network namespace");
            let _ = writeln!(io::stderr(), "skipped: no network namespace for this user"); // past the test harness
            return;
        }
        let Some(tap) = tap_or_skip("tap0") else {
            return;
        };
        bring_up(&tap, HOST);
        let ram: GuestMemoryMmap<vm_memory::bitmap::AtomicBitmap> =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
        let request = arp_request();
        ram.write_slice(&request, GuestAddress(0)).unwrap();
        let (header, frame) = (GuestAddress(0), GuestAddress(HEADER_BYTES as u64));
        let out = [
            ram.get_slice(header, HEADER_BYTES).unwrap(),
            ram.get_slice(frame, request.len() - HEADER_BYTES).unwrap(),
        ];
        tap.send(&out).unwrap();

        let into = [ram.get_slice(GuestAddress(0x1000), 0x1000).unwrap()];
        loop {
            let mut events = [PollFd::new(&tap.file, PollFlags::IN)];
            let limit = Timespec {
                tv_sec: 20,
                tv_nsec: 0,
            };
            assert_eq!(poll(&mut events, Some(&limit)).unwrap(), 1, "no answer");
            let bytes = tap.receive(&into).unwrap();
            let mut packet = vec![0; bytes];
            ram.read_slice(&mut packet, GuestAddress(0x1000)).unwrap();
            let frame = &packet[HEADER_BYTES..];
            // The host says other things, too: it looks for neighbours and routers.
            if frame[12..14] == [8, 6] && frame[20..22] == [0, 2] {
                assert_eq!((&frame[..6], &frame[28..32]), (&GUEST_MAC[..], &HOST[..]));
                return;
            }
        }
    }
}
