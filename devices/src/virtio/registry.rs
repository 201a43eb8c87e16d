//! The one list of virtio devices: builds each kind, and rebuilds it from its section.
//!
//! A new device is a module, a variant of [`Parts`] and a line in each function here; nothing else names device kinds.

use std::sync::Arc;

use runnel_snapshot::block_store::GuestRam;
use runnel_snapshot::section::{SavedSection, Section, SectionError};

use super::VirtioDevice;
use super::block::{Block, BlockError, BlockParts};
use super::net::{Net, NetParts};
use super::rng::Rng;
use super::transport::{MmioDevice, MmioTransport, RestoreError, TransportDeps, TransportError};
use crate::event_loop::EventLoop;
use crate::interrupt::Interrupt;

/// A kind of device with what it is built on.
#[derive(Debug)]
pub enum Parts {
    /// A drive.
    Block(BlockParts),
    /// An interface.
    Net(NetParts),
    /// An entropy device.
    Rng,
}

/// What a device of any kind needs.
#[derive(Debug)]
pub struct Place {
    /// Guest RAM.
    pub ram: Arc<GuestRam>,
    /// The device's line.
    pub interrupt: Interrupt,
    /// Where the device runs. Each drive has a loop of its own, as its store may wait; all others share one.
    pub event_loop: Arc<EventLoop>,
}

/// Why there is no device.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The drive.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// The transport.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The section is of another kind.
    #[error("the image has a section {found:?} where {expected:?} belongs")]
    Kind {
        /// In the image.
        found: String,
        /// What the parts are for.
        expected: &'static str,
    },
    /// The section itself.
    #[error(transparent)]
    Section(#[from] SectionError),
    /// Its content.
    #[error("{kind} {id:?} cannot be restored")]
    Restore {
        /// The kind of device.
        kind: &'static str,
        /// Which one.
        id: String,
        /// Why.
        #[source]
        source: RestoreError,
    },
}

impl Parts {
    /// The kind of section that a device of these parts is saved as.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Block(_) => Block::KIND,
            Self::Net(_) => Net::KIND,
            Self::Rng => Rng::KIND,
        }
    }
}

/// Builds a device that no driver has touched.
///
/// # Errors
/// When the parts do not make a device, or the host has no room for it.
pub fn build(parts: Parts, place: Place) -> Result<Arc<dyn MmioDevice>, RegistryError> {
    match parts {
        Parts::Block(parts) => transport(Block::new(parts)?, place),
        Parts::Net(parts) => transport(Net::new(parts), place),
        Parts::Rng => transport(Rng::new(), place),
    }
}

/// Rebuilds a device from its section. It does nothing until [`MmioDevice::resume`].
///
/// # Errors
/// When the section is of another kind, malformed, or does not fit the parts.
pub fn restore(
    saved: SavedSection,
    parts: Parts,
    place: Place,
) -> Result<Arc<dyn MmioDevice>, RegistryError> {
    match parts {
        Parts::Block(parts) => restored::<Block>(saved, parts, place),
        Parts::Net(parts) => restored::<Net>(saved, parts, place),
        Parts::Rng => restored::<Rng>(saved, (), place),
    }
}

fn transport<D: VirtioDevice>(device: D, place: Place) -> Result<Arc<dyn MmioDevice>, RegistryError> {
    Ok(Arc::new(MmioTransport::new(
        device,
        place.ram,
        place.interrupt,
        &place.event_loop,
    )?))
}

fn restored<D: VirtioDevice>(
    saved: SavedSection,
    parts: D::Parts,
    place: Place,
) -> Result<Arc<dyn MmioDevice>, RegistryError> {
    if saved.kind != D::KIND {
        return Err(RegistryError::Kind {
            found: saved.kind,
            expected: D::KIND,
        });
    }
    let id = saved.id.clone();
    let state = saved.state_of::<MmioTransport<D>>()?;
    let Place {
        ram,
        interrupt,
        event_loop,
    } = place;
    let deps = TransportDeps {
        parts,
        ram,
        interrupt,
        event_loop,
    };
    let transport =
        <MmioTransport<D> as Section>::restore(deps, state).map_err(|source| RegistryError::Restore {
            kind: D::KIND,
            id,
            source,
        })?;
    Ok(Arc::new(transport))
}
