//! `runnel image complete`: fetches the layers of a thin image that are on other hosts.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use runnel_agent::remote::ThinBlobs;
use runnel_snapshot::blobs::Blob;
use runnel_snapshot::image::Image;
use runnel_snapshot::image::complete::{CompleteError, complete};
use runnel_snapshot::image::layout::Layout;
use serde_json::json;

use super::Failure;
use super::rewrite::LocalImage;
use crate::exit::Exit;
use crate::images::ImageStore;
use crate::output::{OutputArgs, print, print_json, tell};
use crate::progress::ProgressView;
use crate::remote::RemoteFlags;
use crate::signals::Signals;
use crate::size;

/// How often progress is shown and signals are looked for.
const LOOK: Duration = Duration::from_millis(100);

#[derive(Debug, Args)]
#[command(after_help = "\
A machine that was resumed from another host's image can be saved as what it changed since (`runnel snapshot --diff`), without
fetching what it never touched. Such an image is thin: the layers that it lies over stay where they are, and its manifest says
where. It is resumed through an agent, which reads them there; served, squashed and optimized are whole images alone. This
fetches what is missing, holds it against its digests, and puts it with the image, which stays the same: its digest does not
change. Ctrl-C calls it off: layers that have come whole stay.

Examples:
    runnel image complete web-v2
    runnel image complete ./web-v2 --json")]
pub(crate) struct CompleteArgs {
    /// Name or directory of an image
    image: String,

    #[command(flatten)]
    remote: RemoteFlags,

    #[command(flatten)]
    output: OutputArgs,
}

pub(super) fn run(store: &ImageStore, args: &CompleteArgs) -> Result<Exit, Failure> {
    let signals = Signals::take()?;
    let found = LocalImage::find(store, &args.image, "completed")?;
    let (image, missing) = Image::open_thin(&found.path, &found.wanted)?;
    let started = Instant::now();
    let total: u64 = missing
        .iter()
        .map(|layer| layer.bytes)
        .fold(0, u64::saturating_add);
    if !missing.is_empty() {
        let layout = Layout::open(&found.path)?;
        let from = ThinBlobs::open(&image, &missing, &args.remote.settings()?)?;
        let view = ProgressView::new(format!("complete {}", args.image));
        if let Some(signal) = fetch(&layout, &missing, &from, view, &signals)? {
            tell("called off: layers that have come whole stay");
            return Ok(Exit::Signal(signal));
        }
    }
    match args.output.json {
        true => print_json(&json!({
            "image": found.path,
            "digest": image.digest().to_string(),
            "layers_fetched": missing.len(),
            "bytes_fetched": total,
            "elapsed_ms": u64::try_from(started.elapsed().as_millis())?,
        }))?,
        false => print(&match missing.len() {
            0 => format!("{} is whole: nothing was missing\n", found.path.display()),
            layers => format!(
                "{} is whole: {layers} layers, {}, were fetched in {:.1} s\n",
                found.path.display(),
                size::bytes(total),
                started.elapsed().as_secs_f64()
            ),
        })?,
    }
    Ok(Exit::Done)
}

/// Fetches a layer from one place after the other, until one has it right.
fn fetch_layer(
    layout: &Layout,
    layer: &Blob,
    from: &ThinBlobs,
    goes_on: &dyn Fn(u64) -> bool,
) -> Result<(), CompleteError> {
    let mut fetched = Ok(());
    for store in from.stores_of(layer) {
        fetched = complete(layout, layer, store.as_ref(), goes_on);
        if matches!(fetched, Ok(()) | Err(CompleteError::Cancelled)) {
            break;
        }
    }
    fetched
}

/// Fetches one layer after the other; the signal that called it off, if one did.
fn fetch(
    layout: &Layout,
    missing: &[Blob],
    from: &ThinBlobs,
    mut view: ProgressView,
    signals: &Signals,
) -> Result<Option<i32>, Failure> {
    let total = missing
        .iter()
        .map(|layer| layer.bytes)
        .fold(0, u64::saturating_add);
    let (done, is_off) = (AtomicU64::new(0), AtomicBool::new(false));
    let mut called_off = None;
    let fetched = thread::scope(|scope| {
        let goes_on = |bytes| {
            done.fetch_add(bytes, Ordering::Relaxed);
            !is_off.load(Ordering::Relaxed)
        };
        let worker = scope.spawn(move || {
            let mut layers = missing.iter();
            layers.try_for_each(|layer| fetch_layer(layout, layer, from, &goes_on))
        });
        while !worker.is_finished() {
            view.show("", done.load(Ordering::Relaxed), total);
            if let Some(signal) = signals.next() {
                called_off = Some(signal);
                is_off.store(true, Ordering::Relaxed);
            }
            thread::sleep(LOOK);
        }
        worker.join()
    });
    drop(view);
    match fetched.map_err(|_| "fetching the layers panicked: this is a bug in Runnel")? {
        Err(CompleteError::Cancelled) => Ok(called_off),
        fetched => {
            fetched?;
            Ok(None)
        }
    }
}
