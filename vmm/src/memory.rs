//! Guest RAM: what backs it, and how it is mapped.
//!
//! A machine that was booted has a memfd of its own, mapped shared. A machine resumed from an image maps that image's
//! page file privately, so that all machines resumed from it share every page that they have not written. Either way
//! the file holds the volume `memory` in the volume's order, and writes of device threads mark a dirty bitmap.
//!
//! ```text
//!   booted ──► shared mapping of a memfd ──freeze──► private mapping of the same memfd, which nobody can write any more
//! ```

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::AsRawFd as _;
use std::sync::Arc;

use runnel_snapshot::block_store::GuestRam;
use runnel_snapshot::units::PAGE_SIZE;
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend as _, GuestMemoryRegion, GuestRegionCollectionError,
    GuestRegionMmap,
};

use crate::layout::RamLayout;

/// Why there is no guest RAM.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host is too small.
    #[error("{wanted} bytes of guest RAM are more than this host's {host}: ask for less")]
    BeyondHost {
        /// What was asked for.
        wanted: u64,
        /// RAM and swap of the host.
        host: u64,
    },
    /// The file behind RAM cannot be made.
    #[error("cannot make a memory file of {bytes} bytes for guest RAM")]
    File {
        /// Its length.
        bytes: u64,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The page file is shorter than RAM.
    #[error("the page file of {found} bytes cannot hold {wanted} bytes of guest RAM")]
    ShortFile {
        /// Its length.
        found: u64,
        /// RAM in bytes.
        wanted: u64,
    },
    /// The file cannot be mapped.
    #[error("cannot map {bytes} bytes of guest RAM at guest address {start:#x}")]
    Map {
        /// Where the guest sees it.
        start: u64,
        /// How many bytes.
        bytes: u64,
        /// Why not.
        source: MmapRegionError,
    },
    /// The mappings do not make up an address space.
    #[error("guest RAM does not fit together")]
    Regions(#[source] GuestRegionCollectionError),
}

/// What is taken out of the page tables with one call: others who change them wait no longer than for this.
const UNMAPPED_BYTES: usize = 2 << 20;

/// How often it is tried to seal a file some of whose pages are in use: each time the kernel waits for some 150 ms.
const SEAL_TRIES: u32 = 8;

/// Why RAM is not frozen, or its file not sealed.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// It is no machine's that was booted.
    #[error("guest RAM has no file")]
    NoFile,
    /// Its file.
    #[error("the file of guest RAM cannot be opened for reading")]
    Reopen(#[source] io::Error),
    /// The mapping.
    #[error("guest RAM cannot be mapped privately")]
    Map(#[source] io::Error),
    /// Somebody could still write.
    #[error("the file of guest RAM cannot be sealed against writing")]
    Seal(#[source] io::Error),
}

/// RAM of a machine that boots: zeros, in a shared memfd of its own.
///
/// # Errors
/// When the host cannot have so much, or the kernel refuses.
pub fn booted(layout: RamLayout) -> Result<GuestRam, MemoryError> {
    refuse_beyond_host(layout.bytes())?;
    let file = memory_file(layout.bytes()).map_err(|source| MemoryError::File {
        bytes: layout.bytes(),
        source: source.into(),
    })?;
    map(layout, &Arc::new(file), libc::MAP_SHARED)
}

/// RAM of a machine resumed from an image: a private mapping of the image's page file, which may be open for reading
/// alone.
///
/// # Errors
/// When the file is too short, or the kernel refuses.
pub fn resumed(layout: RamLayout, page_file: &Arc<File>) -> Result<GuestRam, MemoryError> {
    let wanted = layout.bytes();
    let found = page_file
        .metadata()
        .map_err(|source| MemoryError::File {
            bytes: wanted,
            source,
        })?
        .len();
    if found < wanted {
        return Err(MemoryError::ShortFile { found, wanted });
    }
    // Without NORESERVE each clone would be charged for all of its RAM, written or not.
    map(layout, page_file, libc::MAP_PRIVATE | libc::MAP_NORESERVE)
}

fn memory_file(bytes: u64) -> rustix::io::Result<File> {
    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
    let file = File::from(memfd_create(
        "guest-ram",
        MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
    )?);
    ftruncate(&file, bytes)?;
    // Whoever holds the descriptor can no longer cut RAM short under a running guest.
    // Not that no seal can be added: `seal` adds one.
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW)?;
    Ok(file)
}

/// Takes the RAM of a machine that was [`booted`], and was never frozen, out of this process's page tables while the
/// machine runs, so that there is less of it to take out at [`freeze`]: that takes tens of milliseconds for each GiB. What
/// is touched meanwhile is mapped again, from the file, which has all of it.
///
/// # Errors
/// When the host refuses; then there is more to do later.
pub fn unmap_ahead(ram: &GuestRam) -> io::Result<()> {
    for region in ram.iter() {
        let mapping = region.get_mmap();
        for start in (0..mapping.size()).step_by(UNMAPPED_BYTES) {
            let bytes = UNMAPPED_BYTES.min(mapping.size() - start);
            // SAFETY: the piece lies within the region's mapping, as the bound says.
            let piece = unsafe { mapping.as_ptr().add(start) };
            // SAFETY: that piece, of a mapping that is shared: its pages are the file's, and no byte changes.
            unsafe { rustix::mm::madvise(piece.cast(), bytes, Advice::LinuxDontNeed) }?;
        }
    }
    Ok(())
}

/// Freezes the RAM of a machine that was [`booted`], and stands: its file has what RAM holds now, and what the machine
/// writes from now on is its own, in a mapping that is private, at the addresses that RAM had. Returns the file, opened for
/// reading alone, for whoever is to share it; once it is [sealed](seal).
///
/// KVM's memory slots name these addresses, and follow. A userfaultfd that watched the old mapping watches nothing any
/// more. The first read of a page that the file does not have yet makes it one of zeros there, and the first write too,
/// beside the machine's own: that is how the kernel fills private mappings of tmpfs.
///
/// # Errors
/// When the host refuses; RAM is as it was then.
pub fn freeze(ram: &GuestRam) -> Result<File, FreezeError> {
    let file = File::open(format!("/proc/self/fd/{}", file_of(ram)?.as_raw_fd()));
    let file = file.map_err(FreezeError::Reopen)?;
    if let Err(error) = remap(ram, MapFlags::PRIVATE | MapFlags::NORESERVE) {
        // Nothing was written meanwhile.
        if let Err(undo) = remap(ram, MapFlags::SHARED) {
            tracing::error!(error = %undo, "guest RAM cannot be mapped as it was: the monitor ends");
            // Where nothing is mapped, the guest would read and write what is not its memory.
            std::process::abort();
        }
        return Err(FreezeError::Map(error));
    }
    Ok(file)
}

/// Seals the file of RAM that is [frozen](freeze): nobody can write it any more. The machine may run: all of the file is
/// looked at, some milliseconds for each GiB.
///
/// # Errors
/// When somebody else could write: by a mapping that is shared and writable, or I/O into its pages.
pub fn seal(ram: &GuestRam) -> Result<(), FreezeError> {
    use rustix::fs::{SealFlags, fcntl_add_seals};
    let file = file_of(ram)?;
    let mut tries = 1;
    loop {
        match fcntl_add_seals(file, SealFlags::WRITE) {
            // The kernel takes a page for pinned while a vCPU just faults on it, and has waited for that to pass.
            Err(Errno::BUSY) if tries < SEAL_TRIES => tries += 1,
            sealed => return sealed.map_err(|error| FreezeError::Seal(error.into())),
        }
    }
}

fn file_of(ram: &GuestRam) -> Result<&File, FreezeError> {
    let file = ram.iter().find_map(GuestMemoryRegion::file_offset);
    Ok(file.ok_or(FreezeError::NoFile)?.file())
}

/// Maps all of RAM anew, from its own file, at the addresses that it has.
fn remap(ram: &GuestRam, flags: MapFlags) -> io::Result<()> {
    for region in ram.iter() {
        let mapping = region.get_mmap();
        let file = region.file_offset().ok_or(io::ErrorKind::NotFound)?;
        // SAFETY: `MAP_FIXED` replaces the mapping that the region owns, and no other: address and length are the
        // region's, which unmaps them when it is dropped. The new one has the same bytes, as nobody writes: the machine
        // stands. References to RAM are raw addresses, which stay valid.
        let mapped = unsafe {
            rustix::mm::mmap(
                mapping.as_ptr().cast(),
                mapping.size(),
                ProtFlags::READ | ProtFlags::WRITE,
                flags | MapFlags::FIXED,
                file.file(),
                file.start(),
            )
        };
        mapped?;
    }
    Ok(())
}

fn map(layout: RamLayout, file: &Arc<File>, flags: libc::c_int) -> Result<GuestRam, MemoryError> {
    let regions = layout.spans().map(|span| {
        let bytes = span.volume.len;
        // At most RAM_BYTES_MAX, which fits a usize on every machine we run on.
        let len = usize::try_from(bytes).unwrap_or(usize::MAX);
        let page = const { NonZeroUsize::new(PAGE_SIZE as usize).unwrap() };
        MmapRegionBuilder::new_with_bitmap(len, AtomicBitmap::new(len, page))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(flags)
            .with_file_offset(FileOffset::from_arc(Arc::clone(file), span.volume.start))
            .build()
            .map(|region| GuestRegionMmap::new(region, GuestAddress(span.start)))
            .map_err(|source| MemoryError::Map {
                start: span.start,
                bytes,
                source,
            })?
            .ok_or(MemoryError::Regions(
                GuestRegionCollectionError::MemoryRegionOverlap,
            ))
    });
    GuestRam::from_regions(regions.collect::<Result<_, _>>()?).map_err(MemoryError::Regions)
}

fn refuse_beyond_host(wanted: u64) -> Result<(), MemoryError> {
    let info = rustix::system::sysinfo();
    let unit = u64::from(info.mem_unit);
    let host = info.totalram.saturating_add(info.totalswap).saturating_mul(unit);
    if wanted > host {
        Err(MemoryError::BeyondHost { wanted, host })
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion};

    use super::*;
    use crate::layout::{HOLE, RAM_BYTES_MIN};

    #[test]
    fn a_device_write_reaches_the_file_and_marks_its_page() {
        let ram = booted(RamLayout::new(RAM_BYTES_MIN).unwrap()).unwrap();
        ram.write_slice(b"runnel", GuestAddress(0x12_3456)).unwrap();

        let region = ram.iter().next().unwrap();
        let mut found = [0; 6];
        region
            .file_offset()
            .unwrap()
            .file()
            .read_exact_at(&mut found, 0x12_3456)
            .unwrap();
        assert_eq!(&found, b"runnel");
        let dirty: Vec<usize> = (0..region.get_mmap().bitmap().len())
            .filter(|page| region.get_mmap().bitmap().is_bit_set(*page))
            .collect();
        assert_eq!(dirty, [0x123]);
    }

    #[test]
    fn ram_above_the_hole_follows_ram_below_it_in_the_file() {
        // Nothing is touched but one page, so the size costs nothing; hosts smaller than it are not told.
        let layout = RamLayout::new(HOLE.start + (64 << 20)).unwrap();
        let file = Arc::new(memory_file(layout.bytes()).unwrap());
        let ram = map(layout, &file, libc::MAP_SHARED).unwrap();
        ram.write_slice(b"high", GuestAddress(HOLE.end())).unwrap();
        let mut found = [0; 4];
        file.read_exact_at(&mut found, HOLE.start).unwrap();
        assert_eq!(&found, b"high");
    }

    #[test]
    fn a_resumed_machine_reads_the_page_file_and_never_writes_it() {
        let layout = RamLayout::new(RAM_BYTES_MIN).unwrap();
        let file = Arc::new(memory_file(layout.bytes()).unwrap());
        file.write_all_at(b"image", 0x5000).unwrap();
        let ram = resumed(layout, &file).unwrap();
        let mut found = [0; 5];
        ram.read_slice(&mut found, GuestAddress(0x5000)).unwrap();
        assert_eq!(&found, b"image");

        ram.write_slice(b"guest", GuestAddress(0x5000)).unwrap();
        file.read_exact_at(&mut found, 0x5000).unwrap();
        assert_eq!(&found, b"image");
    }

    /// With RAM on both sides of the hole.
    fn ram_of_two_regions() -> (RamLayout, GuestRam) {
        let layout = RamLayout::new(HOLE.start + (64 << 20)).unwrap();
        let file = Arc::new(memory_file(layout.bytes()).unwrap());
        (layout, map(layout, &file, libc::MAP_SHARED).unwrap())
    }

    #[test]
    fn what_is_written_after_a_freeze_is_not_in_the_file_which_nobody_can_write_once_it_is_sealed() {
        let (_, ram) = ram_of_two_regions();
        let places = [GuestAddress(0x5000), GuestAddress(HOLE.end() + 0x3000)];
        let addresses = places.map(|place| ram.get_host_address(place).unwrap());
        for place in places {
            ram.write_slice(b"before", place).unwrap();
        }
        unmap_ahead(&ram).unwrap();
        let file = freeze(&ram).unwrap();
        seal(&ram).unwrap();
        assert_eq!(
            places.map(|place| ram.get_host_address(place).unwrap()),
            addresses
        );
        let seen = |place| {
            let mut seen = [0; 6];
            ram.read_slice(&mut seen, place).unwrap();
            seen
        };
        for (place, offset) in places.into_iter().zip([0x5000, HOLE.start + 0x3000]) {
            assert_eq!(&seen(place), b"before");
            ram.write_slice(b"behind", place).unwrap();
            let mut found = [0; 6];
            file.read_exact_at(&mut found, offset).unwrap();
            assert_eq!((&found, &seen(place)), (b"before", b"behind"));
        }
        // A page that was nowhere before.
        ram.write_slice(b"behind", GuestAddress(0x9000)).unwrap();
        let mut found = [1; 6];
        file.read_exact_at(&mut found, 0x9000).unwrap();
        assert_eq!(found, [0; 6]);

        let own = ram.iter().next().unwrap().file_offset().unwrap().file();
        for file in [&file, own] {
            assert!(file.write_at(b"x", 0x5000).is_err());
        }
        use rustix::fs::SealFlags;
        let seals = rustix::fs::fcntl_get_seals(&file).unwrap();
        assert!(seals.contains(SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW));
    }

    #[test]
    fn a_file_that_somebody_else_can_write_is_not_sealed_and_the_machine_goes_on() {
        let (layout, ram) = ram_of_two_regions();
        let file = ram.iter().next().unwrap().file_offset().unwrap().arc().clone();
        let other = map(layout, &file, libc::MAP_SHARED).unwrap();
        let frozen = freeze(&ram).unwrap();
        assert!(matches!(seal(&ram), Err(FreezeError::Seal(_))));
        for (place, offset) in [
            (GuestAddress(0x5000), 0x5000),
            (GuestAddress(HOLE.end()), HOLE.start),
        ] {
            ram.write_slice(b"behind", place).unwrap();
            let (mut seen, mut found) = ([0; 6], [1; 6]);
            ram.read_slice(&mut seen, place).unwrap();
            frozen.read_exact_at(&mut found, offset).unwrap();
            assert_eq!((&seen, found), (b"behind", [0; 6]));
        }
        drop(other);
        seal(&ram).unwrap();
    }

    #[test]
    fn a_page_file_shorter_than_ram_is_refused() {
        let file = Arc::new(memory_file(RAM_BYTES_MIN - 4096).unwrap());
        let refusal = resumed(RamLayout::new(RAM_BYTES_MIN).unwrap(), &file).unwrap_err();
        assert!(matches!(refusal, MemoryError::ShortFile { .. }), "{refusal}");
    }

    #[test]
    fn ram_beyond_the_host_is_refused_with_both_numbers() {
        let refusal = refuse_beyond_host(u64::MAX).unwrap_err();
        assert!(
            refusal.to_string().starts_with("18446744073709551615 bytes"),
            "{refusal}"
        );
    }
}
