//! Buses: which device answers at which address.
//!
//! A [`Bus`] is filled while the machine is built and never changes afterwards, so every vCPU dispatches on it
//! without a lock. There is one for ports and one for MMIO; their addresses are different types. A guest that reads
//! where nothing answers gets all ones, as on a bus with pull-ups, its writes vanish, and both are counted: probing
//! is what guests do, so it is no error.
//!
//! **Lock order.** The bus holds no lock. A device takes its own lock inside [`BusDevice::read`] and
//! [`BusDevice::write`], and never calls the bus from there.
//!
//! **Never** knows the memory map: whoever builds the machine chooses the addresses.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The address of an I/O port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortAddress(pub u16);

/// A guest-physical address at which no RAM lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MmioAddress(pub u64);

/// Where in its own address range a device is accessed, in bytes from the range's first address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Offset(pub u64);

/// The addresses of one bus.
pub trait BusAddress: Copy + fmt::Debug + fmt::Display + Send + Sync {
    /// The address as a number.
    fn raw(self) -> u64;
    /// The highest address that the bus can carry.
    const LAST: u64;
}

impl BusAddress for PortAddress {
    fn raw(self) -> u64 {
        u64::from(self.0)
    }
    const LAST: u64 = u16::MAX as u64;
}

impl BusAddress for MmioAddress {
    fn raw(self) -> u64 {
        self.0
    }
    const LAST: u64 = u64::MAX;
}

impl fmt::Display for PortAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "port {:#x}", self.0)
    }
}

impl fmt::Display for MmioAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "address {:#x}", self.0)
    }
}

/// A device that a vCPU reads and writes. Several vCPUs may call at once: the device does its own locking.
///
/// The bus promises that `offset` and `offset + data.len()` lie within the device's range; it promises nothing about
/// sizes and alignment, which the guest chooses.
pub trait BusDevice: Send + Sync {
    /// The guest reads `data.len()` bytes at `offset`. `data` holds all ones when the call begins.
    fn read(&self, offset: Offset, data: &mut [u8]);

    /// The guest writes `data` at `offset`.
    fn write(&self, offset: Offset, data: &[u8]);
}

/// Why a device cannot be put on a bus.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BusError {
    /// A device with no addresses could never be reached.
    #[error("{device} asks for no addresses at {address}")]
    Empty {
        /// Who asked.
        device: String,
        /// Where, for people.
        address: String,
    },
    /// The range runs past the end of the bus.
    #[error("{device} asks for {len:#x} addresses from {address} on, past the end of the bus")]
    PastEnd {
        /// Who asked.
        device: String,
        /// Where, for people.
        address: String,
        /// How many addresses.
        len: u64,
    },
    /// Somebody else answers there.
    #[error("{device} asks for {len:#x} addresses from {address} on, where {owner} answers")]
    Overlap {
        /// Who asked.
        device: String,
        /// Where, for people.
        address: String,
        /// How many addresses.
        len: u64,
        /// Who was there first.
        owner: String,
    },
}

struct Slot {
    name: String,
    first: u64,
    last: u64,
    device: Arc<dyn BusDevice>,
}

/// Accesses that no device claimed.
#[derive(Debug, Default)]
pub struct Unclaimed {
    /// Reads, answered with all ones.
    pub reads: AtomicU64,
    /// Writes, ignored.
    pub writes: AtomicU64,
}

/// The devices of one address space, ordered by address. See the module documentation.
pub struct Bus<A> {
    /// Sorted by `first`; ranges do not overlap.
    slots: Vec<Slot>,
    unclaimed: Unclaimed,
    addresses: std::marker::PhantomData<A>,
}

impl<A: BusAddress> Bus<A> {
    /// A bus with nothing on it.
    #[must_use]
    pub fn new() -> Self {
        Self {
            slots: Vec::new(),
            unclaimed: Unclaimed::default(),
            addresses: std::marker::PhantomData,
        }
    }

    /// Puts `device` on the bus, at `len` addresses from `at` on. `name` appears in errors.
    ///
    /// # Errors
    /// When the range is empty, runs past the end of the bus or overlaps another one.
    pub fn insert(
        &mut self,
        name: &str,
        at: A,
        len: u64,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), BusError> {
        let (device_name, address) = (name.to_owned(), at.to_string());
        let Some(beyond_first) = len.checked_sub(1) else {
            return Err(BusError::Empty {
                device: device_name,
                address,
            });
        };
        let first = at.raw();
        let last = match first.checked_add(beyond_first) {
            Some(last) if last <= A::LAST => last,
            _ => {
                return Err(BusError::PastEnd {
                    device: device_name,
                    address,
                    len,
                });
            }
        };
        let position = self.slots.partition_point(|slot| slot.last < first);
        if let Some(owner) = self.slots.get(position).filter(|slot| slot.first <= last) {
            return Err(BusError::Overlap {
                device: device_name,
                address,
                len,
                owner: owner.name.clone(),
            });
        }
        self.slots.insert(
            position,
            Slot {
                name: device_name,
                first,
                last,
                device,
            },
        );
        Ok(())
    }

    /// Answers a guest's read. Where no device claims all of it, `data` becomes all ones.
    pub fn read(&self, at: A, data: &mut [u8]) {
        data.fill(0xff);
        match self.claim(at, data.len()) {
            Some((device, offset)) => device.read(offset, data),
            None => {
                self.unclaimed.reads.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Carries out a guest's write. Where no device claims all of it, nothing happens.
    pub fn write(&self, at: A, data: &[u8]) {
        match self.claim(at, data.len()) {
            Some((device, offset)) => device.write(offset, data),
            None => {
                self.unclaimed.writes.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// How often the guest spoke to nobody.
    #[must_use]
    pub fn unclaimed(&self) -> &Unclaimed {
        &self.unclaimed
    }

    fn claim(&self, at: A, len: usize) -> Option<(&dyn BusDevice, Offset)> {
        let first = at.raw();
        let last = first.checked_add(u64::try_from(len).ok()?.checked_sub(1)?)?;
        let slot = self
            .slots
            .get(self.slots.partition_point(|slot| slot.last < first))?;
        (slot.first <= first && last <= slot.last).then(|| (&*slot.device, Offset(first - slot.first)))
    }
}

impl<A: BusAddress> Default for Bus<A> {
    fn default() -> Self {
        Self::new()
    }
}

impl<A> fmt::Debug for Bus<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(
                self.slots
                    .iter()
                    .map(|slot| format!("{:#x}..={:#x} {}", slot.first, slot.last, slot.name)),
            )
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Answers every byte with the low byte of its offset, and remembers what was written.
    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u64, Vec<u8>)>>);

    impl BusDevice for Recorder {
        fn read(&self, offset: Offset, data: &mut [u8]) {
            for (byte, at) in data.iter_mut().zip(offset.0..) {
                *byte = at as u8;
            }
        }
        fn write(&self, offset: Offset, data: &[u8]) {
            self.0.lock().unwrap().push((offset.0, data.to_vec()));
        }
    }

    fn bus_with(ranges: &[(u64, u64)]) -> Result<Bus<MmioAddress>, BusError> {
        let mut bus = Bus::new();
        for (at, len) in ranges {
            bus.insert(
                &format!("device at {at:#x}"),
                MmioAddress(*at),
                *len,
                Arc::new(Recorder::default()),
            )?;
        }
        Ok(bus)
    }

    #[test]
    fn an_access_reaches_the_device_that_owns_all_of_it() {
        let device = Arc::new(Recorder::default());
        let mut bus = bus_with(&[(0x3000, 0x10)]).unwrap();
        bus.insert("recorder", MmioAddress(0x1000), 0x100, device.clone())
            .unwrap();

        let mut data = [0; 2];
        bus.read(MmioAddress(0x1042), &mut data);
        bus.write(MmioAddress(0x10ff), &[7]);

        assert_eq!(data, [0x42, 0x43]);
        assert_eq!(*device.0.lock().unwrap(), [(0xff, vec![7])]);
        assert_eq!(bus.unclaimed().reads.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn reads_of_nobody_are_all_ones_and_counted() {
        let bus = bus_with(&[(0x1000, 0x10)]).unwrap();
        for at in [0, 0xfff, 0x1010, u64::MAX] {
            let mut data = [0; 4];
            bus.read(MmioAddress(at), &mut data);
            assert_eq!(data, [0xff; 4], "{at:#x}");
            bus.write(MmioAddress(at), &data);
        }
        assert_eq!(bus.unclaimed().reads.load(Ordering::Relaxed), 4);
        assert_eq!(bus.unclaimed().writes.load(Ordering::Relaxed), 4);
    }

    #[test]
    fn an_access_that_runs_past_its_device_is_claimed_by_nobody() {
        let bus = bus_with(&[(0x1000, 0x10), (0x1010, 0x10)]).unwrap();
        let mut data = [0; 4];
        bus.read(MmioAddress(0x100e), &mut data);
        assert_eq!(data, [0xff; 4]);
    }

    #[test]
    fn overlapping_devices_are_refused_by_name() {
        for (at, len) in [
            (0x1000, 0x10),
            (0xff8, 9),
            (0x100f, 1),
            (0x0, u64::MAX),
            (0x1004, 4),
        ] {
            let error = bus_with(&[(0x1000, 0x10), (at, len)]).unwrap_err();
            assert!(
                matches!(&error, BusError::Overlap { owner, .. } if owner == "device at 0x1000"),
                "{error}"
            );
        }
        assert!(bus_with(&[(0x1000, 0x10), (0xff8, 8), (0x1010, 1)]).is_ok());
    }

    #[test]
    fn ranges_that_are_empty_or_run_off_the_bus_are_refused() {
        assert!(matches!(bus_with(&[(0x1000, 0)]), Err(BusError::Empty { .. })));
        assert!(matches!(
            bus_with(&[(u64::MAX, 2)]),
            Err(BusError::PastEnd { .. })
        ));
        assert!(bus_with(&[(u64::MAX, 1)]).is_ok());
        let mut ports = Bus::new();
        let refused = ports.insert("uart", PortAddress(0xfffc), 8, Arc::new(Recorder::default()));
        assert!(matches!(refused, Err(BusError::PastEnd { .. })));
    }
}
