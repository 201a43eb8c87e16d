//! Guest memory as a snapshot reads it.

use std::fs::File;
use std::io;
use std::sync::Arc;

use runnel_snapshot::block_store::GuestRam;
use runnel_snapshot::capture::Content;
use runnel_snapshot::capture::content::{FileContent, OverFile};
use runnel_snapshot::copy_before_write::OwnPages;
use runnel_snapshot::overlay::{IsCancelled, OverImage};
use runnel_snapshot::units::PAGE_SIZE;
use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion};

use super::KvmGuest;
use crate::layout::RamLayout;
use crate::memory::FreezeError;
use crate::pager::{HostAddress, HostMapping, own_pages};

/// What is behind guest memory.
///
/// Nothing gives pages of it back to the host where there is no pager: to the machine that does first, a page of
/// [`Frozen`](Self::Frozen) or [`Foreign`](Self::Foreign) memory would show what the file holds, where it is to show zeros.
/// The pager keeps such pages apart.
pub(super) enum RamBacking {
    /// A file of the machine's own, mapped shared: it was booted.
    Own,
    /// That file, which nobody can write any more, mapped privately.
    Frozen {
        /// Opened for reading alone.
        file: Arc<File>,
        /// Whether there is an image of what it holds, or of something later: what differs from that is the machine's own
        /// then.
        is_saved: bool,
    },
    /// A file that others have too, mapped privately: an image's page file, whose pager answers for it, or a raw one.
    Foreign,
}

/// Freezes the memory of a machine that was booted, and stands; what it holds now, whatever the machine writes.
pub(super) fn freeze(guest: &mut KvmGuest) -> Result<Arc<dyn Content>, FreezeError> {
    // It watches the mapping that goes.
    guest.writes = None;
    let file = Arc::new(crate::memory::freeze(guest.machine.ram())?);
    guest.backing = RamBacking::Frozen {
        file: Arc::clone(&file),
        is_saved: false,
    };
    let bytes = guest.machine.layout().bytes();
    let content = file.try_clone().and_then(|file| FileContent::new(file, bytes));
    Ok(Arc::new(content.map_err(FreezeError::Reopen)?))
}

/// The memory of a machine that stands still.
pub(super) fn memory_content(guest: &KvmGuest, is_cancelled: IsCancelled) -> io::Result<Arc<dyn Content>> {
    let layout = guest.machine.layout();
    let ram = guest.machine.ram();
    if let Some(pager) = &guest.pager {
        let logic = pager.logic();
        let own = own_pages(&mappings(ram, layout)?, layout.bytes() / PAGE_SIZE)?;
        let pages = Box::new(MappedPages::new(ram.clone(), layout));
        let volume = logic.volume();
        return Ok(Arc::new(OverImage::new(
            logic.fetcher(),
            volume,
            own,
            pages,
            logic.discarded(),
            is_cancelled,
        )));
    }
    let pages = MappedPages::new(ram.clone(), layout);
    Ok(match &guest.backing {
        RamBacking::Own => Arc::new(FileContent::new(memory_file(ram)?, layout.bytes())?),
        RamBacking::Frozen { .. } => {
            let own = own_pages(&mappings(ram, layout)?, layout.bytes() / PAGE_SIZE)?;
            let file = FileContent::new(memory_file(ram)?, layout.bytes())?;
            Arc::new(OverFile::new(file, own, Box::new(pages)))
        }
        // What the guest wrote is in the mapping alone.
        RamBacking::Foreign => Arc::new(MappedContent(pages)),
    })
}

/// How guest RAM is mapped in this process.
pub(super) fn mappings(ram: &GuestRam, layout: RamLayout) -> io::Result<Vec<HostMapping>> {
    let mapping = |span: crate::layout::RamSpan| {
        let start = vm_memory::GuestAddress(span.start);
        let host = ram.get_host_address(start).map_err(io::Error::other)?;
        Ok(HostMapping {
            start: HostAddress(host as u64),
            bytes: span.volume.len,
            first_page: runnel_snapshot::units::PageIndex::holding(span.volume.start),
        })
    };
    layout.spans().map(mapping).collect()
}

/// The memory file of a machine that was booted, which holds the volume in its own order; as it was, if it is frozen.
pub(super) fn memory_file(ram: &GuestRam) -> io::Result<File> {
    let file = ram
        .iter()
        .find_map(|region| Some(region.file_offset()?.file().try_clone()));
    file.ok_or_else(|| io::Error::other("guest memory has no file"))?
}

/// Pages read through this process's mapping.
pub(super) struct MappedPages {
    ram: Arc<GuestRam>,
    layout: RamLayout,
}

impl OwnPages for MappedPages {
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while done < into.len() {
            let at = offset + done as u64;
            let (address, left) = self.locate(at)?;
            let part = (into.len() - done).min(usize::try_from(left).unwrap_or(usize::MAX));
            self.ram
                .read_slice(&mut into[done..done + part], address)
                .map_err(io::Error::other)?;
            done += part;
        }
        Ok(())
    }
}

impl MappedPages {
    pub(super) fn new(ram: Arc<GuestRam>, layout: RamLayout) -> Self {
        Self { ram, layout }
    }

    /// Where the byte at `offset` of the volume is, and how many bytes follow it in one piece.
    fn locate(&self, offset: u64) -> io::Result<(vm_memory::GuestAddress, u64)> {
        let span = self
            .layout
            .spans()
            .find(|span| (span.volume.start..span.volume.start + span.volume.len).contains(&offset));
        let span = span.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?;
        let inside = offset - span.volume.start;
        Ok((
            vm_memory::GuestAddress(span.start + inside),
            span.volume.len - inside,
        ))
    }
}

/// All of memory, read through the mapping.
struct MappedContent(MappedPages);

impl Content for MappedContent {
    fn bytes(&self) -> u64 {
        self.0.layout.bytes()
    }

    fn next_data(&self, from: u64) -> io::Result<Option<runnel_snapshot::units::ByteRange>> {
        let len = self.bytes().saturating_sub(from);
        Ok((len > 0).then_some(runnel_snapshot::units::ByteRange { start: from, len }))
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<runnel_snapshot::capture::content::Found> {
        self.0.read(offset, into)?;
        Ok(runnel_snapshot::capture::content::Found::Data)
    }
}
