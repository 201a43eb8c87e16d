//! What an image holds of a drive beside its transport. The bytes are a volume of their own.

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};

use super::{Block, BlockError, BlockParts, CacheType};

/// A drive as its guest knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockState {
    /// Its length in sectors of 512 bytes.
    pub sectors: u64,
    /// Whether it refuses writes.
    pub read_only: bool,
    /// What flushes mean; features that the guest has accepted depend on it.
    pub cache_type: CacheType,
    /// What the driver chose in the configuration space.
    pub writeback: bool,
}

/// A drive over `parts` that goes on where the saved one stopped. The saved cache type counts, not the parts': the
/// guest has negotiated by it.
pub(super) fn restore(mut parts: BlockParts, state: &BlockState) -> Result<Block, BlockError> {
    parts.cache_type = state.cache_type;
    let block = Block::new(parts)?;
    let drive_id = || block.parts.drive_id.clone();
    if block.sectors != state.sectors {
        return Err(BlockError::Size {
            drive_id: drive_id(),
            found: block.sectors,
            expected: state.sectors,
        });
    }
    let found = block.parts.store.is_read_only();
    if found != state.read_only {
        return Err(BlockError::Access {
            drive_id: drive_id(),
            found,
            expected: state.read_only,
        });
    }
    block.writeback.store(state.writeback, Ordering::Relaxed);
    Ok(block)
}
