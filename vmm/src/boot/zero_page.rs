//! The zero page: Linux's `boot_params` (Documentation/arch/x86/zero-page.rst).

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use runnel_snapshot::block_store::GuestRam;
use runnel_snapshot::units::ByteRange;
use vm_memory::{Bytes, GuestMemoryError};

use super::kernel::Kernel;
use crate::layout::{self, HIGH_RAM_START, LOW_RAM_END, RamLayout};

/// A boot loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

pub(super) fn write(
    ram: &GuestRam,
    layout: RamLayout,
    kernel: &Kernel,
    initrd: Option<ByteRange>,
) -> Result<(), GuestMemoryError> {
    let mut params = boot_params {
        hdr: kernel.setup_header.unwrap_or_else(elf_header),
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = low(layout::COMMAND_LINE.start);
    params.hdr.cmdline_size = low(layout::COMMAND_LINE.bytes - 1);
    if let Some(initrd) = initrd {
        params.hdr.ramdisk_image = low(initrd.start);
        params.hdr.ramdisk_size = low(initrd.len);
    }
    params.acpi_rsdp_addr = layout::RSDP.start;

    let map = memory_map(layout);
    for (entry, (start, bytes, kind)) in params.e820_table.iter_mut().zip(&map) {
        *entry = boot_e820_entry {
            addr: *start,
            size: *bytes,
            r#type: *kind,
        };
    }
    params.e820_entries = map.len() as u8; // Four at most.
    ram.write_obj(params, layout::ZERO_PAGE.address())
}

/// What a boot loader fills in for a kernel without a setup header of its own.
fn elf_header() -> setup_header {
    setup_header {
        boot_flag: 0xaa55,
        header: u32::from_le_bytes(*b"HdrS"),
        version: 0x20f,
        kernel_alignment: 0x0100_0000,
        ..Default::default()
    }
}

fn memory_map(layout: RamLayout) -> Vec<(u64, u64, u32)> {
    let mut map = vec![
        (0, LOW_RAM_END, E820_RAM),
        (LOW_RAM_END, HIGH_RAM_START - LOW_RAM_END, E820_RESERVED),
        (HIGH_RAM_START, layout.low_end() - HIGH_RAM_START, E820_RAM),
    ];
    map.extend(
        layout
            .spans()
            .skip(1)
            .map(|high| (high.start, high.volume.len, E820_RAM)),
    );
    map
}

/// Addresses and lengths here lie below 4 GiB.
fn low(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_map_is_ram_without_the_hole_and_without_firmwares_area() {
        let layout = RamLayout::new(5 << 30).unwrap();
        let ram: u64 = memory_map(layout)
            .iter()
            .filter(|entry| entry.2 == E820_RAM)
            .map(|entry| entry.1)
            .sum();
        assert_eq!(ram, layout.bytes() - (HIGH_RAM_START - LOW_RAM_END));
        assert_eq!(memory_map(layout).last(), Some(&(4 << 30, 2 << 30, E820_RAM)));
    }
}
