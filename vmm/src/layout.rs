//! The one map of guest physical addresses, port addresses and interrupt lines.
//!
//! ```text
//! 0x0000_0000  real-mode vectors; boot structures (GDT, zero page, page tables, command line)
//! 0x0009_fc00  end of low RAM (where firmware's EBDA would be); reserved up to 1 MiB
//! 0x000e_0000  RSDP, then the other ACPI tables, then the page of VMGenID
//! 0x000f_fff0  the reset vector: what a guest that jumps to the BIOS finds
//! 0x0010_0000  kernel, initrd, the guest's memory
//! 0xc000_0000  the hole: virtio-mmio devices ...
//! 0xfec0_0000  ... I/O APIC, local APICs, KVM's own pages
//! 0x1_0000_0000  the rest of RAM
//! ```
//!
//! Nothing here is ever computed from what a guest says. Overlaps do not compile: see the end of the file.

use std::ops::Range;

use runnel_snapshot::units::{ByteRange, PAGE_SIZE};
use vm_memory::GuestAddress;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// The global descriptor table that the boot processor starts with.
pub const BOOT_GDT: Span = Span::new(0x500, 0x40);
/// The zero page: Linux's `boot_params` (Documentation/arch/x86/zero-page.rst).
pub const ZERO_PAGE: Span = Span::new(0x7000, 4 * KIB);
/// The boot processor's first stack; it grows down from the end.
pub const BOOT_STACK: Span = Span::new(0x8000, 4 * KIB);
/// Page tables that map the first 4 GiB one to one in pages of 2 MiB: PML4, PDPT and four page directories.
pub const BOOT_PAGE_TABLES: Span = Span::new(0x9000, 6 * 4 * KIB);
/// The kernel's command line with its terminating zero: `COMMAND_LINE_SIZE` of x86 Linux.
pub const COMMAND_LINE: Span = Span::new(0x2_0000, 2 * KIB);
/// Where low RAM ends for the guest: firmware's data area would begin here.
pub const LOW_RAM_END: u64 = 0x9_fc00;

/// The ACPI root pointer; Linux is told in the zero page, others look for it from here on.
pub const RSDP: Span = Span::new(0xe_0000, 64);
/// The other ACPI tables. The largest is the DSDT: about 1 KiB and 70 bytes a virtio device; the MADT takes 8 bytes
/// a vCPU. 64 KiB leave room for PCI and for hundreds of devices.
pub const ACPI_TABLES: Span = Span::new(0xe_1000, 64 * KIB);
/// The page whose first 16 bytes are the VM generation identifier. A page of its own, so that writing a new one at
/// every resume touches (and makes private) nothing else.
pub const VMGENID: Span = Span::new(0xf_e000, PAGE_SIZE);
/// The last 16 bytes before 1 MiB, ffff:0000 and f000:fff0 in real mode: where a PC's BIOS begins.
pub const RESET_VECTOR: Span = Span::new(0xf_fff0, 16);

/// Where kernels are loaded, and RAM begins again after the first MiB.
pub const HIGH_RAM_START: u64 = MIB;

/// Guest physical addresses below 4 GiB that are never RAM.
pub const HOLE: Span = Span::new(3 * GIB, GIB);
/// The boot timer of `--boot-timer`, where Firecracker's guests look for it.
pub const BOOT_TIMER: Span = Span::new(HOLE.start, PAGE_SIZE);
/// One page for each virtio-mmio device.
pub const VIRTIO_MMIO: Span = Span::new(BOOT_TIMER.end(), VIRTIO_DEVICES_MAX as u64 * PAGE_SIZE);
/// The I/O APIC's registers, in KVM.
pub const IO_APIC: Span = Span::new(0xfec0_0000, PAGE_SIZE);
/// The local APICs' registers, in KVM.
pub const LOCAL_APIC: Span = Span::new(0xfee0_0000, PAGE_SIZE);
/// Page tables that KVM needs for real mode on some Intel processors.
pub const KVM_IDENTITY_MAP: Span = Span::new(0xfeff_c000, PAGE_SIZE);
/// Three pages that KVM needs for real mode on some Intel processors.
pub const KVM_TSS: Span = Span::new(0xfeff_d000, 3 * PAGE_SIZE);

/// The first serial port, COM1.
pub const COM1_PORTS: Range<u16> = 0x3f8..0x400;
/// COM1's interrupt line.
pub const COM1_GSI: u32 = 4;
/// The second serial port, COM2: the guest channel.
pub const COM2_PORTS: Range<u16> = 0x2f8..0x300;
/// COM2's interrupt line.
pub const COM2_GSI: u32 = 3;
/// The keyboard controller: a guest's `reboot=k` writes its reset command here.
pub const I8042_PORTS: Range<u16> = 0x60..0x65;
/// The keyboard's interrupt line.
pub const KEYBOARD_GSI: u32 = 1;
/// ACPI's sleep control, sleep status and reset registers, one byte each (ACPI 6.5 §4.8.3.7).
pub const POWER_PORTS: Range<u16> = 0x600..0x603;
/// The interrupt line of the ACPI generic event device, which tells the guest of a new VMGenID.
pub const GED_GSI: u32 = 5;
/// The interrupt lines of virtio devices: what the I/O APIC's 24 inputs leave over. Line 8 and 9 are left out, where
/// PCs have the clock and ACPI.
pub const VIRTIO_GSIS: [u32; VIRTIO_DEVICES_MAX] =
    [6, 7, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23];
/// How many virtio devices a machine can have.
pub const VIRTIO_DEVICES_MAX: usize = 16;

/// The least RAM: below it no Linux kernel of the kind we boot unpacks itself.
pub const RAM_BYTES_MIN: u64 = 32 * MIB;
/// The most RAM: bitmaps, indexes and tests are made for it.
pub const RAM_BYTES_MAX: u64 = 64 * GIB;

/// A run of guest physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The first address.
    pub start: u64,
    /// How many bytes.
    pub bytes: u64,
}

impl Span {
    const fn new(start: u64, bytes: u64) -> Self {
        Self { start, bytes }
    }

    /// One past the last address.
    #[must_use]
    pub const fn end(self) -> u64 {
        self.start + self.bytes
    }

    /// The first address, as rust-vmm's crates want it.
    #[must_use]
    pub const fn address(self) -> GuestAddress {
        GuestAddress(self.start)
    }

    const fn holds(self, inner: Self) -> bool {
        self.start <= inner.start && inner.end() <= self.end()
    }

    const fn is_before(self, next: Self) -> bool {
        self.end() <= next.start
    }
}

/// The page of registers and the interrupt line of one virtio-mmio device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioSlot {
    /// Its registers.
    pub registers: Span,
    /// Its interrupt line.
    pub gsi: u32,
}

/// The place of the how-many-eth virtio device, or `None` where there is no place left.
#[must_use]
pub fn virtio_slot(number: usize) -> Option<VirtioSlot> {
    let gsi = *VIRTIO_GSIS.get(number)?;
    let registers = Span::new(VIRTIO_MMIO.start + number as u64 * PAGE_SIZE, PAGE_SIZE);
    Some(VirtioSlot { registers, gsi })
}

/// How much RAM, and so where: from 0 on, the hole left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamLayout {
    bytes: u64,
}

/// One run of RAM: where the guest sees it, and where it is in the volume `memory`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamSpan {
    /// The first guest physical address.
    pub start: u64,
    /// Where it lies in the volume.
    pub volume: ByteRange,
}

/// RAM of a size that cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{bytes} bytes of RAM are not possible: it must be a multiple of 4096 from 32 MiB to 64 GiB")]
pub struct BadRamSize {
    bytes: u64,
}

impl RamLayout {
    /// Checks `bytes`, which may come from an image.
    ///
    /// # Errors
    /// Unless it is a multiple of [`PAGE_SIZE`] from [`RAM_BYTES_MIN`] to [`RAM_BYTES_MAX`].
    pub fn new(bytes: u64) -> Result<Self, BadRamSize> {
        if (RAM_BYTES_MIN..=RAM_BYTES_MAX).contains(&bytes) && bytes.is_multiple_of(PAGE_SIZE) {
            Ok(Self { bytes })
        } else {
            Err(BadRamSize { bytes })
        }
    }

    /// RAM in bytes; the length of the volume `memory`.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.bytes
    }

    /// Where RAM below the hole ends.
    #[must_use]
    pub fn low_end(self) -> u64 {
        self.bytes.min(HOLE.start)
    }

    /// The runs of RAM, in guest-physical order, which is the volume's order.
    pub fn spans(self) -> impl Iterator<Item = RamSpan> {
        let low = RamSpan {
            start: 0,
            volume: ByteRange {
                start: 0,
                len: self.low_end(),
            },
        };
        let high = RamSpan {
            start: HOLE.end(),
            volume: ByteRange {
                start: low.volume.len,
                len: self.bytes - low.volume.len,
            },
        };
        [low, high].into_iter().filter(|span| span.volume.len > 0)
    }

    /// Where the byte at `address` is in the volume, if it is RAM.
    #[must_use]
    pub fn volume_offset(self, address: GuestAddress) -> Option<u64> {
        let offset = match address.0 {
            low if low < HOLE.start => low,
            high => high.checked_sub(HOLE.end())? + HOLE.start,
        };
        (offset < self.bytes).then_some(offset)
    }

    /// The guest physical address of the byte at `offset` of the volume, if it has so many.
    #[must_use]
    pub fn address(self, offset: u64) -> Option<GuestAddress> {
        let address = if offset < HOLE.start {
            offset
        } else {
            offset + HOLE.bytes
        };
        (offset < self.bytes).then_some(GuestAddress(address))
    }
}

/// Overlaps do not compile.
const _: () = {
    assert!(BOOT_GDT.is_before(ZERO_PAGE));
    assert!(ZERO_PAGE.is_before(BOOT_STACK));
    assert!(BOOT_STACK.is_before(BOOT_PAGE_TABLES));
    assert!(BOOT_PAGE_TABLES.is_before(COMMAND_LINE));
    assert!(COMMAND_LINE.end() <= LOW_RAM_END);
    assert!(LOW_RAM_END <= RSDP.start);
    assert!(RSDP.is_before(ACPI_TABLES));
    assert!(ACPI_TABLES.is_before(VMGENID));
    // What is in VMGenID's page is not fetched at a resume: the code must lie in another.
    assert!(VMGENID.end() <= RESET_VECTOR.start / PAGE_SIZE * PAGE_SIZE);
    assert!(RESET_VECTOR.end() == HIGH_RAM_START);
    assert!(HIGH_RAM_START < RAM_BYTES_MIN);
    assert!(HOLE.end() == 4 * GIB);
    assert!(VIRTIO_MMIO.is_before(IO_APIC));
    assert!(IO_APIC.is_before(LOCAL_APIC));
    assert!(LOCAL_APIC.is_before(KVM_IDENTITY_MAP));
    assert!(KVM_IDENTITY_MAP.is_before(KVM_TSS));
    assert!(HOLE.holds(VIRTIO_MMIO) && HOLE.holds(IO_APIC) && HOLE.holds(LOCAL_APIC));
    assert!(HOLE.holds(KVM_IDENTITY_MAP) && HOLE.holds(KVM_TSS));
    assert!(I8042_PORTS.end <= COM2_PORTS.start && COM2_PORTS.end <= COM1_PORTS.start);
    assert!(COM1_PORTS.end <= POWER_PORTS.start);
    assert!(RAM_BYTES_MAX.is_multiple_of(PAGE_SIZE) && LOW_RAM_END < RSDP.start);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_sizes_outside_the_limits_are_refused() {
        for bytes in [
            0,
            RAM_BYTES_MIN - PAGE_SIZE,
            RAM_BYTES_MIN + 1,
            RAM_BYTES_MAX + PAGE_SIZE,
            u64::MAX,
        ] {
            assert!(RamLayout::new(bytes).is_err(), "{bytes}");
        }
        assert!(RamLayout::new(RAM_BYTES_MIN).is_ok());
        assert!(RamLayout::new(RAM_BYTES_MAX).is_ok());
    }

    #[test]
    fn the_hole_is_neither_ram_nor_in_the_volume() {
        let layout = RamLayout::new(5 * GIB).unwrap();
        let spans: Vec<_> = layout.spans().collect();
        assert_eq!(
            spans[0],
            RamSpan {
                start: 0,
                volume: ByteRange {
                    start: 0,
                    len: 3 * GIB
                }
            }
        );
        assert_eq!(
            spans[1],
            RamSpan {
                start: 4 * GIB,
                volume: ByteRange {
                    start: 3 * GIB,
                    len: 2 * GIB
                }
            }
        );
        assert_eq!(layout.volume_offset(GuestAddress(HOLE.start)), None);
        assert_eq!(layout.volume_offset(GuestAddress(HOLE.end() - 1)), None);
        assert_eq!(layout.volume_offset(GuestAddress(6 * GIB)), None);
        for offset in [0, 3 * GIB - 1, 3 * GIB, 5 * GIB - 1] {
            let address = layout.address(offset).unwrap();
            assert_eq!(layout.volume_offset(address), Some(offset));
        }
        assert_eq!(layout.address(5 * GIB), None);
    }

    #[test]
    fn ram_that_fits_below_the_hole_is_one_span() {
        let layout = RamLayout::new(3 * GIB).unwrap();
        assert_eq!(layout.spans().count(), 1);
        assert_eq!(layout.volume_offset(GuestAddress(4 * GIB)), None);
    }

    #[test]
    fn every_virtio_device_has_registers_and_a_line_of_its_own() {
        let slots: Vec<_> = (0..VIRTIO_DEVICES_MAX)
            .map(|number| virtio_slot(number).unwrap())
            .collect();
        for (number, slot) in slots.iter().enumerate() {
            assert!(VIRTIO_MMIO.holds(slot.registers));
            assert!(![KEYBOARD_GSI, COM2_GSI, COM1_GSI, GED_GSI].contains(&slot.gsi));
            for other in &slots[..number] {
                assert!(other.registers.is_before(slot.registers) && other.gsi != slot.gsi);
            }
        }
        assert_eq!(virtio_slot(VIRTIO_DEVICES_MAX), None);
    }
}
