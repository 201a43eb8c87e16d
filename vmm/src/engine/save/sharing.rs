//! Memory that was frozen for a snapshot, and is delivered to the machines of the image from there.

use std::path::Path;
use std::sync::Arc;

use runnel_snapshot::capture::{Captured, Progress};
use runnel_snapshot::protocol::{Adopt, PROTOCOL_VERSION, hand_over};
use runnel_snapshot::volume::VolumeName;

use super::meanwhile::Meanwhile;
use super::{How, SaveError, Saving};
use crate::engine::KvmGuest;
use crate::engine::memory::RamBacking;
use crate::memory::seal;

/// Whether frozen memory can be shared now. If not, the machine goes on with it, and the image is read as any other.
pub(super) fn seal_memory(guest: &KvmGuest) -> bool {
    let sealed = seal(guest.machine.ram());
    if let Err(error) = &sealed {
        let error = error as &dyn std::error::Error;
        tracing::warn!(error, "guest memory is not shared");
    }
    sealed.is_ok()
}

impl Saving {
    /// Gives frozen memory to the agent that is to deliver it to machines of the image. Without, they read the image as any
    /// other.
    pub(super) fn hand_over(
        &self,
        guest: &mut KvmGuest,
        image: &Path,
        captured: &Captured,
        meanwhile: &mut Meanwhile<'_>,
    ) -> Result<(), SaveError> {
        let (How::Frozen, Some(agent), RamBacking::Frozen { file, .. }) =
            (&self.how, &self.agent, &guest.backing)
        else {
            return Ok(());
        };
        meanwhile.operation.enter("sharing memory");
        let file = Arc::clone(file);
        let adopt = Adopt {
            protocol: PROTOCOL_VERSION,
            image: std::path::absolute(image)
                .unwrap_or_else(|_| image.to_owned())
                .to_string_lossy()
                .into_owned(),
            digest: captured.manifest.digest,
            volume: VolumeName::Memory,
            machine: guest.name.clone(),
        };
        let is_cancelled = meanwhile.operation.cancel_flag();
        // All of memory is read already, and the machine runs.
        let read = Progress::new([]);
        let taken = meanwhile.work(guest, &self.how, &read, || {
            hand_over(agent, adopt, &file, &|| is_cancelled())
        })?;
        match taken {
            Ok(()) => tracing::info!("The agent delivers the image's memory from this machine's."),
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, "the image's memory is not shared with this machine");
            }
        }
        Ok(())
    }
}
