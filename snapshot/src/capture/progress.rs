//! How far a capture is, for another thread to watch; and the word that calls it off.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use crate::volume::VolumeName;

/// What a capture is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Pages are being read, compressed and written.
    Copying,
    /// Everything is written and on its way to stable storage. It cannot be cancelled any more.
    Publishing,
    /// The image is there.
    Published,
}

/// How far one volume is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeProgress {
    /// Which volume.
    pub name: VolumeName,
    /// Its length.
    pub bytes_total: u64,
    /// How much of it was captured, zeros included.
    pub bytes_done: u64,
    /// How many bytes of the image that took.
    pub bytes_stored: u64,
}

struct Counts {
    name: VolumeName,
    total: u64,
    done: AtomicU64,
    stored: AtomicU64,
}

/// Called on the capture's thread when a stage begins.
type StageHook = Box<dyn Fn(Stage) + Send + Sync>;

/// The progress of one capture. Figures of different volumes may be of slightly different moments.
pub struct Progress {
    volumes: Vec<Counts>,
    stage: AtomicU8,
    cancelled: AtomicBool,
    on_stage: OnceLock<StageHook>,
}

impl Progress {
    /// The progress of a capture of these volumes, before it began.
    pub fn new(volumes: impl IntoIterator<Item = (VolumeName, u64)>) -> Self {
        let counts = |(name, total)| Counts {
            name,
            total,
            done: AtomicU64::new(0),
            stored: AtomicU64::new(0),
        };
        Self {
            volumes: volumes.into_iter().map(counts).collect(),
            stage: AtomicU8::new(Stage::Copying as u8),
            cancelled: AtomicBool::new(false),
            on_stage: OnceLock::new(),
        }
    }

    /// Calls the capture off: it ends soon with an error, and leaves nothing. Without effect once it is publishing.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Whether it was called off.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    /// What is being done.
    #[must_use]
    pub fn stage(&self) -> Stage {
        match self.stage.load(Ordering::Relaxed) {
            stage if stage == Stage::Copying as u8 => Stage::Copying,
            stage if stage == Stage::Publishing as u8 => Stage::Publishing,
            _ => Stage::Published,
        }
    }

    /// Has `hook` called, on the capture's thread, when a stage begins. It must not block. Only the first call counts.
    pub fn on_stage(&self, hook: impl Fn(Stage) + Send + Sync + 'static) {
        // A second time changes nothing.
        let _ = self.on_stage.set(Box::new(hook));
    }

    /// How far each volume is.
    #[must_use]
    pub fn volumes(&self) -> Vec<VolumeProgress> {
        let read = |counts: &Counts| VolumeProgress {
            name: counts.name.clone(),
            bytes_total: counts.total,
            bytes_done: counts.done.load(Ordering::Relaxed),
            bytes_stored: counts.stored.load(Ordering::Relaxed),
        };
        self.volumes.iter().map(read).collect()
    }

    pub(super) fn set_stage(&self, stage: Stage) {
        self.stage.store(stage as u8, Ordering::Relaxed);
        if let Some(hook) = self.on_stage.get() {
            hook(stage);
        }
    }

    /// Adds to the figures of a volume by its position.
    pub(super) fn add_done(&self, volume: usize, bytes: u64) {
        if let Some(counts) = self.volumes.get(volume) {
            counts.done.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    pub(super) fn set_stored(&self, volume: usize, bytes: u64) {
        if let Some(counts) = self.volumes.get(volume) {
            counts.stored.store(bytes, Ordering::Relaxed);
        }
    }
}
