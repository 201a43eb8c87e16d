//! The DSDT: the devices, and how deeply the machine can sleep.

use std::ops::Range;

use acpi_tables::aml::{
    Arg, Device, EISAName, Equal, IO, If, Interrupt, Memory32Fixed, Method, Name, Notify, Package, Path,
    ResourceTemplate, Scope,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

use super::{Description, OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::layout::{self, VirtioSlot};
use crate::power::SLEEP_TYPE_S5;

/// The header before the definitions.
const HEADER_BYTES: u32 = 36;

/// Revision 2: integers of 64 bits.
const REVISION: u8 = 2;

/// «The generation identifier has changed», in VMGenID's specification.
const NOTIFY_CHANGED: u8 = 0x80;

pub(super) fn build(description: &Description) -> Sdt {
    let mut definitions = Vec::new();
    let mut devices = Vec::new();
    for (slot, number) in description.virtio.iter().zip(0u32..) {
        add_virtio(&mut devices, *slot, number);
    }
    add_serial(&mut devices, 0, "COM1", &layout::COM1_PORTS, layout::COM1_GSI);
    if description.guest_channel {
        add_serial(&mut devices, 1, "COM2", &layout::COM2_PORTS, layout::COM2_GSI);
    }
    add_keyboard(&mut devices);
    add_vmgenid(&mut devices);
    add_event_device(&mut devices);
    definitions.vec(&Scope::raw(Path::new("\\_SB_"), devices));
    Name::new(
        Path::new("\\_S5_"),
        &Package::new(vec![&SLEEP_TYPE_S5, &0u8, &0u8, &0u8]),
    )
    .to_aml_bytes(&mut definitions);

    let mut table = Sdt::new(
        *b"DSDT",
        HEADER_BYTES,
        REVISION,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    table.append_slice(&definitions);
    table
}

/// An edge-triggered line that no other device has.
fn line(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

/// A virtio-mmio device, by the identifier that Linux's driver knows (drivers/virtio/virtio_mmio.c).
fn add_virtio(devices: &mut Vec<u8>, slot: VirtioSlot, number: u32) {
    let name = format!("VR{number:02X}");
    // The hole ends at 4 GiB, so its addresses have 32 bits.
    let registers = Memory32Fixed::new(true, slot.registers.start as u32, slot.registers.bytes as u32);
    Device::new(
        Path::new(&name),
        vec![
            &Name::new(Path::new("_HID"), &"LNRO0005"),
            &Name::new(Path::new("_UID"), &number),
            // Its memory accesses are coherent with the processors' caches.
            &Name::new(Path::new("_CCA"), &1u8),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![&registers, &line(slot.gsi)]),
            ),
        ],
    )
    .to_aml_bytes(devices);
}

fn add_serial(devices: &mut Vec<u8>, number: u8, name: &'static str, ports: &Range<u16>, gsi: u32) {
    let ports = IO::new(ports.start, ports.start, 1, ports.len() as u8);
    Device::new(
        Path::new(name),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
            &Name::new(Path::new("_UID"), &number),
            &Name::new(Path::new("_DDN"), &name),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![&ports, &line(gsi)]),
            ),
        ],
    )
    .to_aml_bytes(devices);
}

fn add_keyboard(devices: &mut Vec<u8>) {
    let ports = &layout::I8042_PORTS;
    let port = |number| IO::new(number, number, 1, 1);
    let (data, command) = (port(ports.start), port(ports.end - 1));
    let line = line(layout::KEYBOARD_GSI);
    let resources = ResourceTemplate::new(vec![&data, &command, &line]);
    Device::new(
        Path::new("PS2_"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0303")),
            &Name::new(Path::new("_UID"), &0u8),
            &Name::new(Path::new("_CRS"), &resources),
        ],
    )
    .to_aml_bytes(devices);
}

fn add_vmgenid(devices: &mut Vec<u8>) {
    let start = layout::VMGENID.start;
    let address = Package::new(vec![&start, &0u8]);
    // The specification's own identifier is longer than ACPI allows; Linux knows it in capitals, and newer ones know
    // the short one, too (drivers/virt/vmgenid.c).
    let compatible = Package::new(vec![&"VM_Gen_Counter", &"VM_GEN_COUNTER", &"VMGENCTR"]);
    Device::new(
        Path::new("VGEN"),
        vec![
            &Name::new(Path::new("_HID"), &"RNNL0001"),
            &Name::new(Path::new("_CID"), &compatible),
            &Name::new(Path::new("_DDN"), &"VM_Gen_Counter"),
            &Name::new(Path::new("ADDR"), &address),
        ],
    )
    .to_aml_bytes(devices);
}

/// The generic event device (ACPI 6.5 §5.6.9): its line means that VMGenID has changed.
fn add_event_device(devices: &mut Vec<u8>) {
    let vmgenid = Path::new("\\_SB_.VGEN");
    let notify = Notify::new(&vmgenid, &NOTIFY_CHANGED);
    let gsi = layout::GED_GSI;
    let event = Arg(0);
    let is_ours = Equal::new(&event, &gsi);
    Device::new(
        Path::new("GED0"),
        vec![
            &Name::new(Path::new("_HID"), &"ACPI0013"),
            &Name::new(Path::new("_UID"), &0u8),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&line(gsi)])),
            &Method::new(
                Path::new("_EVT"),
                1,
                true,
                vec![&If::new(&is_ours, vec![&notify])],
            ),
        ],
    )
    .to_aml_bytes(devices);
}
