//! `runnel image squash`: writes an image anew, without the layers that it lies over.

use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use runnel_snapshot::capture::squash::squash;
use runnel_snapshot::capture::{CaptureError, CaptureSettings, Progress, progress::Stage};
use runnel_snapshot::image::Image;
use runnel_snapshot::image::reference::{ImageReference, Wanted};
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
    "{0} is of another host, and is squashed there, or here once its directory was copied (`skopeo copy`): give a directory or a name"
)]
struct Remote(String);

#[derive(Debug, Args)]
#[command(after_help = "\
An image that lies over others has their layers beside its own, and each page from where it was written last. What is
squashed is the same machine, byte for byte, in one full layer for memory and for each disk: it shares nothing with the
others any more, takes fewer requests to resume from afar, and `zstd -dc` of each layer is the volume. Volumes that are one
full layer already are taken over as they are. IMAGE stays as it is, and is the parent of TARGET, which must not exist: a
name, and it goes into the local store, or a path with a slash in it. Every chunk is verified as it is read. Ctrl-C calls it
off, and leaves nothing.

Examples:
    runnel image squash web-v50 web-base
    runnel image squash ./web-v50 /srv/images/web-base --json")]
pub(crate) struct SquashArgs {
    /// Name or directory of an image
    image: String,

    /// The image to make
    target: String,

    #[command(flatten)]
    output: OutputArgs,
}

pub(super) fn run(store: &ImageStore, args: &SquashArgs) -> Result<Exit, Failure> {
    let signals = Signals::take()?;
    let reference = store.resolve(&args.image)?;
    let ImageReference::Directory { path, wanted } = &reference else {
        return Err(Remote(reference.to_string()).into());
    };
    let target = store.destination(&args.target)?;
    let started = Instant::now();
    let (job, state) = squash(path, wanted, CaptureSettings::default())?;
    let progress = job.progress();
    let mut view = ProgressView::new(format!("squash {}", args.image));
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
        let target = &target;
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
        made.map_err(|_| "squashing panicked: this is a bug in Runnel")?,
        called_off,
    ) {
        (Err(CaptureError::Cancelled), Some(signal)) => {
            tell(format_args!(
                "called off: nothing is left of {}.",
                target.display()
            ));
            return Ok(Exit::Signal(signal));
        }
        (made, _) => _ = made?,
    }
    report(args, path, &target, wanted, started.elapsed())
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

fn report(
    args: &SquashArgs,
    path: &Path,
    target: &Path,
    wanted: &Wanted,
    elapsed: Duration,
) -> Result<Exit, Failure> {
    let made = Image::open_directory(target, &Wanted::Only)?;
    let below = Image::open_directory(path, wanted)?;
    let layers = |image: &Image| -> usize {
        let volumes = image.manifest.volumes.iter();
        volumes.map(|volume| volume.layers.len()).sum()
    };
    let stored = |image: &Image| -> u64 {
        let blobs = image.manifest.blobs();
        blobs.iter().fold(0, |sum, blob| sum.saturating_add(blob.bytes))
    };
    if args.output.json {
        print_json(&json!({
            "image": target,
            "digest": made.digest().to_string(),
            "parent": below.digest().to_string(),
            "layers": layers(&made),
            "layers_before": layers(&below),
            "stored_bytes": stored(&made),
            "stored_bytes_before": stored(&below),
            "elapsed_ms": u64::try_from(elapsed.as_millis())?,
        }))?;
        return Ok(Exit::Done);
    }
    print(&format!(
        "{}\n{}: {} layers in {}, from {} in {}, after {:.1} s\n",
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
