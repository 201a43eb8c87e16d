//! Putting a kernel into guest RAM so that a vCPU can enter it: kernel, initial RAM disk, command line, zero page, the
//! tables of long mode, and what it finds where it looks for a BIOS. Linux's 64-bit boot protocol (Documentation/arch/x86/boot.rst).
//!
//! **Never**: touches a vCPU; what it comes to is an [`Entry`].

mod kernel;
pub mod long_mode;
mod reset_vector;
mod zero_page;

use std::fs::File;
use std::io::{self, Seek, SeekFrom};

use runnel_snapshot::block_store::GuestRam;
use runnel_snapshot::units::{ByteRange, PAGE_SIZE};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::layout::{self, RamLayout};
use kernel::Kernel;

/// What to boot.
#[derive(Debug)]
pub struct Source<'a> {
    /// An ELF `vmlinux` or a `bzImage`.
    pub kernel: &'a mut File,
    /// The initial RAM disk, if there is one.
    pub initrd: Option<&'a mut File>,
    /// The kernel's command line.
    pub command_line: &'a str,
}

/// Where the boot processor enters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The first instruction, entered in long mode with the zero page in RSI.
    pub address: GuestAddress,
}

/// Why a machine cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The file is not a kernel.
    #[error("the kernel is neither an ELF vmlinux nor a bzImage: it begins with {found:02x?}")]
    NotAKernel {
        /// Its first bytes.
        found: [u8; 4],
    },
    /// It is one, but cannot be loaded.
    #[error("the kernel cannot be loaded into {ram_bytes} bytes of RAM")]
    Load {
        /// How much RAM there is.
        ram_bytes: u64,
        /// What the loader said.
        source: linux_loader::loader::Error,
    },
    /// It knows no 64-bit entry.
    #[error("the bzImage has no 64-bit entry point: a 64-bit kernel of version 3.8 or later is needed")]
    No64BitEntry,
    /// It needs more RAM than there is.
    #[error(
        "the kernel needs RAM up to {needed:#x}, and RAM below 4 GiB ends at {end:#x}: give the machine more memory"
    )]
    TooLittleRam {
        /// Up to where it needs it.
        needed: u64,
        /// Where it ends.
        end: u64,
    },
    /// The initial RAM disk does not fit.
    #[error(
        "the initrd of {bytes} bytes does not fit between the kernel's end at {from:#x} and {to:#x}: give the machine more memory"
    )]
    InitrdTooLarge {
        /// Its length.
        bytes: u64,
        /// The first address that is free.
        from: u64,
        /// The end of what the kernel can reach.
        to: u64,
    },
    /// The command line does not fit.
    #[error("the kernel command line of {bytes} bytes is longer than {max}")]
    CommandLineTooLong {
        /// Its length.
        bytes: usize,
        /// What fits.
        max: u64,
    },
    /// A file cannot be read.
    #[error("cannot read the {what}")]
    Read {
        /// Which file.
        what: &'static str,
        /// The kernel's reason.
        source: io::Error,
    },
    /// Guest RAM cannot be written.
    #[error("cannot write the {what} to guest RAM")]
    Write {
        /// What did not go there.
        what: &'static str,
        /// Why not.
        source: GuestMemoryError,
    },
}

/// Puts everything into RAM.
///
/// # Errors
/// When something is not what it should be, or does not fit.
pub fn load(ram: &GuestRam, layout: RamLayout, source: Source<'_>) -> Result<Entry, BootError> {
    let kernel = kernel::load(ram, layout, source.kernel)?;
    let initrd = source
        .initrd
        .map(|file| load_initrd(ram, layout, &kernel, file))
        .transpose()?;
    write_command_line(ram, source.command_line)?;
    zero_page::write(ram, layout, &kernel, initrd).map_err(|source| BootError::Write {
        what: "zero page",
        source,
    })?;
    long_mode::write_tables(ram).map_err(|source| BootError::Write {
        what: "page tables",
        source,
    })?;
    reset_vector::write(ram).map_err(|source| BootError::Write {
        what: "reset vector",
        source,
    })?;
    Ok(Entry {
        address: kernel.entry,
    })
}

/// The initial RAM disk goes as high as the kernel can reach, out of the way of whatever the kernel does below.
fn load_initrd(
    ram: &GuestRam,
    layout: RamLayout,
    kernel: &Kernel,
    file: &mut File,
) -> Result<ByteRange, BootError> {
    let failed = |source| BootError::Read {
        what: "initrd",
        source,
    };
    let bytes = file.seek(SeekFrom::End(0)).map_err(failed)?;
    file.rewind().map_err(failed)?;
    let to = layout.low_end().min(kernel.initrd_end_max);
    let start = to
        .checked_sub(bytes)
        .map(|start| start / PAGE_SIZE * PAGE_SIZE)
        .filter(|start| *start >= kernel.end);
    let start = start.ok_or(BootError::InitrdTooLarge {
        bytes,
        from: kernel.end,
        to,
    })?;
    // It fits into RAM, so its length fits a usize.
    let len = usize::try_from(bytes).unwrap_or(usize::MAX);
    ram.read_exact_volatile_from(GuestAddress(start), file, len)
        .map_err(|source| BootError::Write {
            what: "initrd",
            source,
        })?;
    Ok(ByteRange { start, len: bytes })
}

fn write_command_line(ram: &GuestRam, text: &str) -> Result<(), BootError> {
    let max = layout::COMMAND_LINE.bytes - 1;
    if text.len() as u64 > max {
        return Err(BootError::CommandLineTooLong {
            bytes: text.len(),
            max,
        });
    }
    let write = |bytes: &[u8], at: u64| {
        ram.write_slice(bytes, GuestAddress(at))
            .map_err(|source| BootError::Write {
                what: "command line",
                source,
            })
    };
    write(text.as_bytes(), layout::COMMAND_LINE.start)?;
    write(&[0], layout::COMMAND_LINE.start + text.len() as u64)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;
    use crate::memory;

    fn file(content: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        file
    }

    fn boot(kernel: &[u8]) -> Result<Entry, BootError> {
        let layout = RamLayout::new(layout::RAM_BYTES_MIN).unwrap();
        let ram = memory::booted(layout).unwrap();
        load(
            &ram,
            layout,
            Source {
                kernel: &mut file(kernel),
                initrd: None,
                command_line: "",
            },
        )
    }

    /// A minimal ELF64 with one segment of four bytes to be loaded at `address`, of `bytes` in memory.
    fn elf(address: u64, bytes: u64) -> Vec<u8> {
        let mut elf = Vec::from(*b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0");
        for word in [address, 64, 0] {
            elf.extend(word.to_le_bytes());
        }
        elf.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 64, 0, 0, 0, 0, 0]);
        elf.extend([1, 0, 0, 0, 5, 0, 0, 0]);
        for word in [120, address, address, 4, bytes, 0x1000] {
            elf.extend(u64::to_le_bytes(word));
        }
        elf.extend(*b"code");
        elf
    }

    #[test]
    fn a_file_that_is_no_kernel_is_refused_with_its_first_bytes() {
        let refusal = boot(b"#!/bin/sh\n").unwrap_err();
        assert!(
            matches!(
                refusal,
                BootError::NotAKernel {
                    found: [b'#', b'!', b'/', b'b']
                }
            ),
            "{refusal}"
        );
        assert!(matches!(boot(b"").unwrap_err(), BootError::Read { .. }));
    }

    #[test]
    fn an_elf_kernel_is_entered_where_it_says() {
        assert_eq!(boot(&elf(0x10_0000, 4)).unwrap().address, GuestAddress(0x10_0000));
    }

    #[test]
    fn an_elf_kernel_beyond_ram_or_below_it_is_refused() {
        assert!(matches!(
            boot(&elf(1 << 30, 4)).unwrap_err(),
            BootError::Load { .. }
        ));
        assert!(matches!(
            boot(&elf(0x10_0000, 1 << 30)).unwrap_err(),
            BootError::TooLittleRam { .. }
        ));
        // It would overwrite the zero page.
        assert!(matches!(
            boot(&elf(0x7000, 4)).unwrap_err(),
            BootError::Load { .. }
        ));
    }

    #[test]
    fn an_initrd_goes_to_the_end_of_ram_and_one_too_large_is_refused() {
        let layout = RamLayout::new(layout::RAM_BYTES_MIN).unwrap();
        let ram = memory::booted(layout).unwrap();
        let mut kernel = file(&elf(0x10_0000, 4));
        let mut initrd = file(b"initrd");
        load(
            &ram,
            layout,
            Source {
                kernel: &mut kernel,
                initrd: Some(&mut initrd),
                command_line: "quiet",
            },
        )
        .unwrap();
        let mut found = [0; 6];
        ram.read_slice(&mut found, GuestAddress(layout.bytes() - PAGE_SIZE))
            .unwrap();
        assert_eq!(&found, b"initrd");
        ram.read_slice(&mut found, layout::COMMAND_LINE.address())
            .unwrap();
        assert_eq!(&found, b"quiet\0");

        initrd.set_len(layout.bytes()).unwrap();
        let source = Source {
            kernel: &mut kernel,
            initrd: Some(&mut initrd),
            command_line: "",
        };
        assert!(matches!(
            load(&ram, layout, source).unwrap_err(),
            BootError::InitrdTooLarge { .. }
        ));
    }

    #[test]
    fn a_command_line_fits_with_its_zero_or_is_refused() {
        let layout = RamLayout::new(layout::RAM_BYTES_MIN).unwrap();
        let ram = memory::booted(layout).unwrap();
        write_command_line(&ram, &"x".repeat(2047)).unwrap();
        let refusal = write_command_line(&ram, &"x".repeat(2048)).unwrap_err();
        assert!(matches!(
            refusal,
            BootError::CommandLineTooLong {
                bytes: 2048,
                max: 2047
            }
        ));
    }
}
