//! Loading a kernel: an ELF `vmlinux` (or any ELF64 that keeps to the same protocol), or a `bzImage`.

use std::fs::File;
use std::os::unix::fs::FileExt;

use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use runnel_snapshot::block_store::GuestRam;
use vm_memory::GuestAddress;

use super::BootError;
use crate::layout::{self, RamLayout};

/// A kernel in guest RAM.
#[derive(Debug)]
pub(super) struct Kernel {
    /// Where it is entered in long mode.
    pub(super) entry: GuestAddress,
    /// The first address after what it needs while it starts.
    pub(super) end: u64,
    /// One past the highest address at which it finds an initial RAM disk.
    pub(super) initrd_end_max: u64,
    /// What a `bzImage` says of itself.
    pub(super) setup_header: Option<setup_header>,
}

const ELF_MAGIC: [u8; 4] = *b"\x7fELF";
/// Where a `bzImage` has its own magic.
const SETUP_MAGIC_OFFSET: u64 = 0x202;
const SETUP_MAGIC: [u8; 4] = *b"HdrS";
/// The 64-bit entry of a `bzImage`, from where it was loaded.
const ENTRY_64_OFFSET: u64 = 0x200;
/// `XLF_KERNEL_64` in `xloadflags`: there is such an entry.
const XLF_KERNEL_64: u16 = 1;

pub(super) fn load(ram: &GuestRam, layout: RamLayout, file: &mut File) -> Result<Kernel, BootError> {
    let read = |offset| {
        let mut magic = [0; 4];
        file.read_exact_at(&mut magic, offset).map(|()| magic)
    };
    let found = read(0).map_err(|source| BootError::Read {
        what: "kernel",
        source,
    })?;
    let kernel = if found == ELF_MAGIC {
        load_elf(ram, layout, file)?
    } else if read(SETUP_MAGIC_OFFSET).is_ok_and(|magic| magic == SETUP_MAGIC) {
        load_bzimage(ram, layout, file)?
    } else {
        return Err(BootError::NotAKernel { found });
    };
    if kernel.end > layout.low_end() {
        return Err(BootError::TooLittleRam {
            needed: kernel.end,
            end: layout.low_end(),
        });
    }
    Ok(kernel)
}

fn load_elf(ram: &GuestRam, layout: RamLayout, file: &mut File) -> Result<Kernel, BootError> {
    let failed = |source| BootError::Load {
        ram_bytes: layout.bytes(),
        source,
    };
    let high_ram = GuestAddress(layout::HIGH_RAM_START);
    let loaded = Elf::load(ram, None, file, Some(high_ram)).map_err(failed)?;
    Ok(Kernel {
        entry: loaded.kernel_load,
        end: loaded.kernel_end,
        initrd_end_max: u64::MAX,
        setup_header: None,
    })
}

fn load_bzimage(ram: &GuestRam, layout: RamLayout, file: &mut File) -> Result<Kernel, BootError> {
    let failed = |source| BootError::Load {
        ram_bytes: layout.bytes(),
        source,
    };
    let high_ram = GuestAddress(layout::HIGH_RAM_START);
    let loaded = BzImage::load(ram, Some(high_ram), file, Some(high_ram)).map_err(failed)?;
    let header = loaded.setup_header.ok_or(BootError::No64BitEntry)?;
    if header.version < 0x20c || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(BootError::No64BitEntry);
    }
    // It unpacks itself at its preferred address, or where it was loaded if that is higher.
    let unpacks_at = loaded.kernel_load.0.max(header.pref_address);
    let unpacked_end = unpacks_at.saturating_add(u64::from(header.init_size));
    Ok(Kernel {
        entry: GuestAddress(loaded.kernel_load.0 + ENTRY_64_OFFSET),
        end: loaded.kernel_end.max(unpacked_end),
        initrd_end_max: u64::from(header.initrd_addr_max) + 1,
        setup_header: Some(header),
    })
}
