//! The tables in guest memory that a 64-bit kernel is entered with: a GDT, and page tables that map the first 4 GiB
//! one to one. They lie where [`layout`](crate::layout) says.

use runnel_snapshot::block_store::GuestRam;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::layout;

/// The code segment that Linux expects, `__BOOT_CS`.
pub const CODE_SELECTOR: u16 = 0x10;
/// The data segment that Linux expects, `__BOOT_DS`.
pub const DATA_SELECTOR: u16 = 0x18;
/// A task state segment: Intel's processors enter no guest without one.
pub const TSS_SELECTOR: u16 = 0x20;
/// The length of the table.
pub const GDT_BYTES: u16 = 6 * 8;

/// Segment descriptors (Intel SDM vol. 3A §3.4.5): base 0, limit 4 GiB, as long mode ignores them anyway. The task
/// state segment's descriptor takes two places.
const GDT: [u64; GDT_BYTES as usize / 8] = [
    0,
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x0000_8b00_0000_0067,
    0,
];

const PRESENT_WRITABLE: u64 = 0b11;
const LARGE_PAGE: u64 = 1 << 7;
const TABLE_BYTES: u64 = 4096;
const ENTRIES: u64 = 512;
const DIRECTORIES: u64 = 4;
const LARGE_PAGE_BYTES: u64 = 2 << 20;

/// Writes the tables.
///
/// # Errors
/// When RAM is not there.
pub fn write_tables(ram: &GuestRam) -> Result<(), GuestMemoryError> {
    const { assert!((2 + DIRECTORIES) * TABLE_BYTES == layout::BOOT_PAGE_TABLES.bytes) };
    const { assert!(GDT_BYTES as u64 <= layout::BOOT_GDT.bytes) };
    for (at, descriptor) in (layout::BOOT_GDT.start..).step_by(8).zip(GDT) {
        ram.write_obj(descriptor, GuestAddress(at))?;
    }
    let root = layout::BOOT_PAGE_TABLES.start;
    let pointers = root + TABLE_BYTES;
    let directories = pointers + TABLE_BYTES;
    ram.write_obj(pointers | PRESENT_WRITABLE, GuestAddress(root))?;
    for number in 0..DIRECTORIES {
        let directory = directories + number * TABLE_BYTES;
        ram.write_obj(directory | PRESENT_WRITABLE, GuestAddress(pointers + number * 8))?;
    }
    let page = |number| (number * LARGE_PAGE_BYTES) | PRESENT_WRITABLE | LARGE_PAGE;
    let entries: Vec<u8> = (0..DIRECTORIES * ENTRIES)
        .flat_map(|number| page(number).to_le_bytes())
        .collect();
    ram.write_slice(&entries, GuestAddress(directories))
}
