//! What the control thread asks of a machine; `Microvm` gives it, and so does a machine of tests that needs no KVM.

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use runnel_snapshot::units::ChunkIndex;
use runnel_snapshot::volume::VolumeName;
use serde::Serialize;

use super::operation::Operation;
use crate::config::{CreateSnapshot, LoadSnapshot, MicrovmConfig};
use crate::exit::EndSignal;

/// Why a machine could not do something. Its trace of sources becomes the `fault_message`, outermost first, so no
/// message repeats its source.
pub type GuestError = Box<dyn Error + Send + Sync>;

/// Who makes machines.
pub trait Engine {
    /// Builds the machine that `config` describes, ready to boot; its vCPUs stand still.
    ///
    /// # Errors
    /// When it cannot be built. Nothing is left of it.
    fn boot(&mut self, config: &MicrovmConfig) -> Result<Box<dyn Guest>, GuestError>;

    /// Builds a machine from a snapshot; its vCPUs stand still. `config` says what a snapshot does not: where the
    /// serial console ends.
    ///
    /// # Errors
    /// When the snapshot or this host does not allow it, or the operation was cancelled. Nothing is left of it.
    fn load(
        &mut self,
        load: &LoadSnapshot,
        config: &MicrovmConfig,
        operation: &Operation,
    ) -> Result<Box<dyn Guest>, GuestError>;
}

/// Does with a machine, while it is saved, what else is asked of it; told whether it must stand for the snapshot just now,
/// and neither be paused nor let run.
pub type Beside<'a> = dyn FnMut(&mut dyn Guest, bool) + 'a;

/// A machine that was booted or loaded.
pub trait Guest {
    /// Stops the vCPUs, and then the devices. Whoever of them waits for a chunk is waited for; `give_up` is asked now
    /// and then meanwhile.
    ///
    /// # Errors
    /// When the machine is stalled, `give_up` says so, or KVM fails; it runs on then.
    fn pause(&mut self, give_up: &dyn Fn() -> bool) -> Result<(), GuestError>;

    /// Lets the devices and then the vCPUs go on.
    ///
    /// # Errors
    /// When KVM fails; the machine stands still then.
    fn resume(&mut self) -> Result<(), GuestError>;

    /// Presses Ctrl+Alt+Del on the guest's keyboard.
    ///
    /// # Errors
    /// When the keyboard cannot take it.
    fn press_ctrl_alt_del(&mut self) -> Result<(), GuestError>;

    /// Saves the machine. Whether it fails or not, the machine goes on as it was, or as `beside` left it. Looks at
    /// [`Operation::is_cancelled`] and calls `beside` often enough for whoever waits.
    ///
    /// # Errors
    /// When it cannot be saved, or the operation was cancelled; nothing is left of the snapshot.
    fn save(
        &mut self,
        create: &CreateSnapshot,
        operation: &Operation,
        beside: &mut Beside<'_>,
    ) -> Result<(), GuestError>;

    /// Looks after a machine whose volumes are on their way: stops what still runs of one that is stalled, and lets it
    /// go on afterwards. To be called again after what it returns; never if `None`.
    fn look_after(&mut self) -> Option<Duration>;

    /// What the machine is made of.
    fn config(&self) -> &MicrovmConfig;

    /// Where it is said how the machine ended.
    fn end(&self) -> &EndSignal;

    /// What is known of memory and drives that are still on their way, if some are.
    fn paging(&self) -> Option<Arc<dyn Paging>>;

    /// Where it can be seen whether an agent in the guest has announced itself, if there is a channel for one.
    fn agent(&self) -> Option<Arc<AtomicBool>>;
}

/// What can be asked, at any time and without waiting, of a machine whose volumes are still on their way.
pub trait Paging: Send + Sync {
    /// Why the machine is stalled, if it is.
    fn stalled(&self) -> Option<Stalled>;
    /// How much of each volume has arrived.
    fn residency(&self) -> Vec<Residency>;
    /// How long its chunks were waited for.
    fn waits(&self) -> Waits;
}

/// The machine waits for a chunk that cannot be had.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Stalled {
    /// Of which volume.
    pub volume: VolumeName,
    /// Which chunk.
    pub chunk: ChunkIndex,
    /// Why it cannot be had.
    pub reason: String,
    /// How long it has been waited for, in milliseconds.
    pub waiting_ms: u64,
    /// Whether it will not come until somebody repairs the image.
    pub needs_repair: bool,
}

/// How long a machine waited for chunks that it needed at once. A snapshot that reads on in them counts as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Waits {
    /// How many waits have ended.
    pub count: u64,
    /// Half of them took no longer, in microseconds; rounded up to a power of two.
    pub p50_us: u64,
    /// 99 of 100 took no longer, likewise.
    pub p99_us: u64,
    /// The longest.
    pub longest_us: u64,
}

/// How much of a volume has arrived.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Residency {
    /// Of which volume.
    pub volume: VolumeName,
    /// So much of it.
    pub bytes_resident: u64,
    /// Of so much.
    pub bytes_total: u64,
}
