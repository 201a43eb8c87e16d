//! The VM generation identifier: 16 random bytes in guest memory, new ones at every start and every resume, so that a
//! guest notices that it is a copy, and reseeds what must not be the same twice (Microsoft's specification "Virtual
//! Machine Generation ID"; in Linux from 5.18 on).
//!
//! It has no state to save: where it lies never changes, and what it was must not come back.

use std::io;

use runnel_devices::interrupt::Interrupt;
use runnel_snapshot::block_store::GuestRam;
use rustix::rand::{GetRandomFlags, getrandom};
use vm_memory::{Bytes, GuestMemoryError};

use crate::layout;

/// Why there is no new identifier.
#[derive(Debug, thiserror::Error)]
pub enum VmGenIdError {
    /// The kernel gave no randomness.
    #[error("cannot get random bytes for the VM generation identifier")]
    Random(#[source] io::Error),
    /// Guest memory cannot be written.
    #[error("cannot write the VM generation identifier")]
    Write(#[source] GuestMemoryError),
}

/// The identifier, and the line that tells the guest of a new one.
#[derive(Debug)]
pub struct VmGenId {
    interrupt: Interrupt,
}

impl VmGenId {
    /// An identifier whose changes are told by `interrupt`, the line of the generic event device.
    #[must_use]
    pub fn new(interrupt: Interrupt) -> Self {
        Self { interrupt }
    }

    /// Writes a new identifier.
    ///
    /// # Errors
    /// When it cannot be made or written.
    pub fn write_new(&self, ram: &GuestRam) -> Result<(), VmGenIdError> {
        let id = random().map_err(VmGenIdError::Random)?;
        ram.write_slice(&id, layout::VMGENID.address())
            .map_err(VmGenIdError::Write)
    }

    /// Tells the guest to look. After the interrupt controllers have their state, before the vCPUs run.
    pub fn tell(&self) {
        self.interrupt.signal();
    }
}

/// 16 bytes from the kernel; so few come whole.
fn random() -> io::Result<[u8; 16]> {
    let mut bytes = [0; 16];
    match getrandom(&mut bytes, GetRandomFlags::empty())? {
        16 => Ok(bytes),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::RamLayout;
    use crate::memory;

    #[test]
    fn each_identifier_is_another_and_lies_where_the_guest_is_told() {
        let ram = memory::booted(RamLayout::new(layout::RAM_BYTES_MIN).unwrap()).unwrap();
        let vmgenid = VmGenId::new(Interrupt::new().unwrap());
        let mut seen = vec![[0; 16]];
        for _ in 0..3 {
            vmgenid.write_new(&ram).unwrap();
            let mut id = [0; 16];
            ram.read_slice(&mut id, layout::VMGENID.address()).unwrap();
            assert!(!seen.contains(&id));
            seen.push(id);
        }
        assert!(vmgenid.interrupt.event().read().is_err());
        vmgenid.tell();
        assert_eq!(vmgenid.interrupt.event().read().unwrap(), 1);
    }
}
