//! `runnel image squash`: writes an image anew, without the layers that it lies over.

use std::path::Path;
use std::time::{Duration, Instant};

use clap::Args;
use runnel_snapshot::capture::CaptureSettings;
use runnel_snapshot::capture::squash::squash;
use runnel_snapshot::image::Image;
use runnel_snapshot::image::reference::Wanted;
use serde_json::json;

use super::Failure;
use super::rewrite::{LocalImage, layers, rewrite, stored};
use crate::exit::Exit;
use crate::images::ImageStore;
use crate::output::{OutputArgs, print, print_json};
use crate::signals::Signals;
use crate::size;

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
    let image = LocalImage::find(store, &args.image, "squashed")?;
    let target = store.destination(&args.target)?;
    let started = Instant::now();
    let made = squash(&image.path, &image.wanted, CaptureSettings::default())?;
    let title = format!("squash {}", args.image);
    match rewrite(made, &target, title, &signals)? {
        Some(signal) => Ok(Exit::Signal(signal)),
        None => report(args, &image, &target, started.elapsed()),
    }
}

fn report(args: &SquashArgs, image: &LocalImage, target: &Path, elapsed: Duration) -> Result<Exit, Failure> {
    let made = Image::open_directory(target, &Wanted::Only)?;
    let below = image.open()?;
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
