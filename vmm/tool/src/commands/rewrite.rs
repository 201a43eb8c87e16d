//! What the commands share that make an image of another one of this host.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use runnel_snapshot::capture::{CaptureError, Job, Progress, progress::Stage};
use runnel_snapshot::image::reference::{ImageReference, Wanted};
use runnel_snapshot::image::{Image, ImageError};
use runnel_snapshot::state::MachineState;
use serde_json::json;

use super::Failure;
use crate::exit::Exit;
use crate::images::ImageStore;
use crate::output::{OutputArgs, print, print_json, tell};
use crate::progress::ProgressView;
use crate::signals::Signals;
use crate::size;

/// How often progress is shown and signals are looked for.
const LOOK: Duration = Duration::from_millis(100);

/// The image is elsewhere.
#[derive(Debug, thiserror::Error)]
#[error(
    "{image} is of another host, and is {done} there, or here once its directory was copied (`skopeo copy`): give a directory or a name"
)]
struct Remote {
    image: String,
    done: &'static str,
}

/// An image of this host.
#[derive(Debug)]
pub(super) struct LocalImage {
    pub(super) path: PathBuf,
    pub(super) wanted: Wanted,
}

impl LocalImage {
    /// The one that `name` names; `done` is what is to be done with it.
    pub(super) fn find(store: &ImageStore, name: &str, done: &'static str) -> Result<Self, Failure> {
        match store.resolve(name)? {
            ImageReference::Directory { path, wanted } => Ok(Self { path, wanted }),
            reference @ ImageReference::Remote { .. } => Err(Remote {
                image: reference.to_string(),
                done,
            }
            .into()),
        }
    }

    pub(super) fn open(&self) -> Result<Image, ImageError> {
        Image::open_directory(&self.path, &self.wanted)
    }
}

/// How many layers the volumes of an image have together.
fn layers(image: &Image) -> usize {
    let volumes = image.manifest.volumes.iter();
    volumes.map(|volume| volume.layers.len()).sum()
}

/// What the blobs of an image take together.
fn stored(image: &Image) -> u64 {
    let blobs = image.manifest.blobs();
    blobs.iter().fold(0, |sum, blob| sum.saturating_add(blob.bytes))
}

/// Says what became of `below`: the image at `target`, in so much time, with so many chunks laid together if that is what
/// it is for.
pub(super) fn report(
    below: &LocalImage,
    target: &Path,
    elapsed: Duration,
    chunks: Option<usize>,
    output: OutputArgs,
) -> Result<Exit, Failure> {
    let made = Image::open_directory(target, &Wanted::Only)?;
    let below = below.open()?;
    if output.json {
        let mut told = json!({
            "image": target,
            "digest": made.digest().to_string(),
            "parent": below.digest().to_string(),
            "layers": layers(&made),
            "layers_before": layers(&below),
            "stored_bytes": stored(&made),
            "stored_bytes_before": stored(&below),
            "elapsed_ms": u64::try_from(elapsed.as_millis())?,
        });
        if let Some(chunks) = chunks {
            told["chunks"] = json!(chunks);
        }
        print_json(&told)?;
        return Ok(Exit::Done);
    }
    let first = chunks.map_or(String::new(), |chunks| format!("{chunks} chunks first, "));
    print(&format!(
        "{}\n{}: {first}{} layers in {}, from {} in {}, after {:.1} s\n",
        made.digest(),
        target.display(),
        layers(&made),
        size::bytes(stored(&made)),
        layers(&below),
        size::bytes(stored(&below)),
        elapsed.as_secs_f64(),
    ))?;
    Ok(Exit::Done)
}

/// Runs a job and shows how far it is; the signal that called it off, if one did. Then nothing is left of the target.
pub(super) fn rewrite(
    (job, state): (Job, MachineState),
    target: &Path,
    title: String,
    signals: &Signals,
) -> Result<Option<i32>, Failure> {
    let progress = job.progress();
    let mut view = ProgressView::new(title);
    let mut called_off = None;
    let made = thread::scope(|scope| {
        let (sender, end) = mpsc::channel::<()>();
        let mut look = || {
            if let Some(signal) = signals.next() {
                called_off = Some(signal);
                progress.cancel();
            }
            show(&progress, &mut view);
        };
        // One that came early calls it off before it begins.
        look();
        let worker = scope.spawn(move || {
            // Dropped when it ends, however that comes.
            let _sender = sender;
            job.run(target, state)
        });
        while matches!(end.recv_timeout(LOOK), Err(RecvTimeoutError::Timeout)) {
            look();
        }
        worker.join()
    });
    drop(view);
    match (
        made.map_err(|_| "writing the image panicked: this is a bug in Runnel")?,
        called_off,
    ) {
        (Err(CaptureError::Cancelled), Some(signal)) => {
            tell(format_args!(
                "called off: nothing is left of {}.",
                target.display()
            ));
            Ok(Some(signal))
        }
        (made, _) => {
            made?;
            Ok(None)
        }
    }
}

fn show(progress: &Progress, view: &mut ProgressView) {
    let volumes = progress.volumes();
    let done = volumes.iter().map(|volume| volume.bytes_done).sum();
    let total = volumes.iter().map(|volume| volume.bytes_total).sum();
    let phase = match progress.stage() {
        Stage::Copying => "copying",
        Stage::Publishing | Stage::Published => "publishing",
    };
    view.show(phase, done, total);
}
