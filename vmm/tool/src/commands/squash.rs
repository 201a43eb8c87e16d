//! `runnel image squash`: writes an image anew, without the layers that it lies over.

use std::time::Instant;

use clap::Args;
use runnel_snapshot::capture::CaptureSettings;
use runnel_snapshot::capture::squash::squash;

use super::Failure;
use super::rewrite::{LocalImage, report, rewrite};
use crate::exit::Exit;
use crate::images::ImageStore;
use crate::output::OutputArgs;
use crate::signals::Signals;

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
        None => report(&image, &target, started.elapsed(), None, args.output),
    }
}
