//! The ACPI tables: how an unmodified Linux finds processors, virtio-mmio devices, the serial port, its way to switch
//! off, and VMGenID, without a word on its command line (ACPI 6.5).
//!
//! ```text
//! RSDP ──► XSDT ──► FADT ──► DSDT
//!              └──► MADT
//! ```
//!
//! Hardware-reduced ACPI: no fixed hardware, no SCI. Events come through a generic event device.

mod dsdt;

use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use runnel_snapshot::block_store::GuestRam;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::layout::{self, VirtioSlot};
use crate::power;

/// Who made the tables, in a table's header.
const OEM_ID: [u8; 6] = *b"RUNNEL";
const OEM_TABLE_ID: [u8; 8] = *b"RUNNELVM";
const OEM_REVISION: u32 = 1;

/// Tables begin at multiples of this.
const ALIGNMENT: u64 = 16;

/// No VGA, and no CMOS clock: Linux then does not look for them.
const BOOT_ARCH_NO_VGA_NO_CMOS_CLOCK: u16 = 1 << 2 | 1 << 5;

/// Why the tables cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// They are longer than their place.
    #[error("the ACPI tables need {needed} bytes, and their place has {max}")]
    TooLong {
        /// What they need.
        needed: u64,
        /// What there is.
        max: u64,
    },
    /// Guest memory cannot be written.
    #[error("cannot write the ACPI tables to guest RAM")]
    Write(#[from] GuestMemoryError),
}

/// What the tables tell of.
#[derive(Clone, Debug)]
pub struct Description {
    /// How many vCPUs; their APIC identifiers count from 0.
    pub vcpus: u8,
    /// Where the virtio devices are.
    pub virtio: Vec<VirtioSlot>,
    /// Whether there is a guest channel.
    pub guest_channel: bool,
}

/// Writes the tables to where [`layout`] has place for them.
///
/// # Errors
/// When they do not fit.
pub fn write(ram: &GuestRam, description: &Description) -> Result<(), AcpiError> {
    let mut writer = Writer {
        ram,
        next: layout::ACPI_TABLES.start,
    };
    let dsdt = writer.place(dsdt::build(description).as_slice())?;
    let fadt = writer.place_aml(&fadt(dsdt))?;
    let madt = writer.place_aml(&madt(description.vcpus))?;
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = writer.place_aml(&xsdt)?;
    ram.write_slice(&bytes_of(&Rsdp::new(OEM_ID, xsdt)), layout::RSDP.address())?;
    Ok(())
}

/// Lays tables one after the other.
struct Writer<'a> {
    ram: &'a GuestRam,
    next: u64,
}

impl Writer<'_> {
    fn place(&mut self, table: &[u8]) -> Result<u64, AcpiError> {
        let at = self.next;
        let end = at + table.len() as u64;
        if end > layout::ACPI_TABLES.end() {
            let needed = end - layout::ACPI_TABLES.start;
            return Err(AcpiError::TooLong {
                needed,
                max: layout::ACPI_TABLES.bytes,
            });
        }
        self.ram.write_slice(table, GuestAddress(at))?;
        self.next = end.next_multiple_of(ALIGNMENT);
        Ok(at)
    }

    fn place_aml(&mut self, table: &dyn Aml) -> Result<u64, AcpiError> {
        self.place(&bytes_of(table))
    }
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(dsdt: u64) -> impl Aml {
    let register = |offset: u64| {
        let port = u64::from(layout::POWER_PORTS.start) + offset;
        GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port)
    };
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::Wbinvd)
        // Without fixed buttons: a guest that looks for them finds none.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup);
    fadt.iapc_boot_arch = BOOT_ARCH_NO_VGA_NO_CMOS_CLOCK.into();
    fadt.sleep_control_reg = register(power::SLEEP_CONTROL.0);
    fadt.sleep_status_reg = register(power::SLEEP_STATUS.0);
    fadt.reset_reg = register(power::RESET.0);
    fadt.reset_value = power::RESET_VALUE;
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(OEM_TABLE_ID).into();
    fadt.finalize()
}

fn madt(vcpus: u8) -> MADT {
    let local_apics = LocalInterruptController::Address(layout::LOCAL_APIC.start as u32);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, local_apics);
    madt.add_structure(IoApic::new(0, layout::IO_APIC.start as u32, 0));
    for number in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(number, number, EnabledStatus::Enabled));
    }
    madt
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{RamLayout, VIRTIO_DEVICES_MAX, virtio_slot};
    use crate::memory;

    fn written(vcpus: u8, devices: usize) -> GuestRam {
        written_with(vcpus, devices, false)
    }

    fn written_with(vcpus: u8, devices: usize, guest_channel: bool) -> GuestRam {
        let ram = memory::booted(RamLayout::new(layout::RAM_BYTES_MIN).unwrap()).unwrap();
        let virtio = (0..devices).map(|number| virtio_slot(number).unwrap()).collect();
        let description = Description {
            vcpus,
            virtio,
            guest_channel,
        };
        write(&ram, &description).unwrap();
        ram
    }

    fn table(ram: &GuestRam, at: u64) -> Vec<u8> {
        let length: u32 = ram.read_obj(GuestAddress(at + 4)).unwrap();
        let mut bytes = vec![0; length as usize];
        ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn adds_up(bytes: &[u8]) -> bool {
        bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)) == 0
    }

    fn quad(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn every_table_is_found_from_the_root_and_adds_up() {
        let ram = written(32, VIRTIO_DEVICES_MAX);
        let mut rsdp = [0; 36];
        ram.read_slice(&mut rsdp, layout::RSDP.address()).unwrap();
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        assert!(adds_up(&rsdp) && adds_up(&rsdp[..20]));
        let xsdt = table(&ram, quad(&rsdp, 24));
        let (fadt, madt) = (table(&ram, quad(&xsdt, 36)), table(&ram, quad(&xsdt, 44)));
        let dsdt = table(&ram, quad(&fadt, 140));
        for (bytes, signature) in [
            (&xsdt, b"XSDT"),
            (&fadt, b"FACP"),
            (&madt, b"APIC"),
            (&dsdt, b"DSDT"),
        ] {
            assert_eq!(&bytes[..4], signature);
            assert!(adds_up(bytes), "{}", String::from_utf8_lossy(signature));
        }
        // A header of 44 bytes, an I/O APIC of 12, local APICs of 8.
        assert_eq!(madt.len(), 44 + 12 + 32 * 8);
    }

    fn count(ram: &GuestRam, name: &[u8]) -> usize {
        let mut place = vec![0; layout::ACPI_TABLES.bytes as usize];
        ram.read_slice(&mut place, layout::ACPI_TABLES.address()).unwrap();
        place.windows(name.len()).filter(|window| *window == name).count()
    }

    #[test]
    fn each_virtio_device_is_named_in_the_dsdt() {
        assert_eq!(count(&written(1, 3), b"LNRO0005"), 3);
    }

    #[test]
    fn the_guest_channels_port_is_there_only_where_there_is_a_channel() {
        assert_eq!(count(&written_with(1, 0, false), b"COM2"), 0);
        let ram = written_with(1, VIRTIO_DEVICES_MAX, true);
        // Its name, and its name for people.
        assert_eq!(count(&ram, b"COM2"), 2);
        assert_eq!(count(&ram, b"COM1"), 2);
    }
}
