//! `runnel image optimize`: puts a recorded working set with an image.

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use runnel_snapshot::capture::CaptureSettings;
use runnel_snapshot::capture::optimize::optimize;
use runnel_snapshot::image::Image;
use runnel_snapshot::image::reference::Wanted;
use runnel_snapshot::working_set::read_file;

use super::Failure;
use super::rewrite::{LocalImage, report, rewrite};
use crate::exit::Exit;
use crate::images::ImageStore;
use crate::output::OutputArgs;
use crate::signals::Signals;

#[derive(Debug, Args)]
#[command(after_help = "\
A working set is the order in which a machine first touched the chunks of its image, as `runnel resume --record` wrote it
down. TARGET is the same machine, byte for byte, and has that order with it: whoever resumes it has these chunks fetched in
that order, before anything that nobody waits for. They lie together in a layer of their own over the image's others, the
first touched first, so that a few long requests bring them all from afar; it takes as much more room as they do. The other
layers are the same blobs, on disk and in a registry. `runnel image squash` takes the layer away again. IMAGE stays as it is,
and is the parent of TARGET, which must not exist. A working set is also one of other images of the same machine, as long as
it has no chunk that they lack. Ctrl-C calls it off, and leaves nothing.

Examples:
    runnel resume web-v1 --record --record-for 30s
    runnel image optimize web-v1 web-v1-fast
    runnel image optimize ./web-v2 ./web-v2-fast --working-set web-v1.working-set --json")]
pub(crate) struct OptimizeArgs {
    /// Name or directory of an image
    image: String,

    /// The image to make
    target: String,

    /// What was recorded; IMAGE.working-set beside the image's directory unless given, or else the image's own
    #[arg(long, value_name = "FILE")]
    working_set: Option<PathBuf>,

    #[command(flatten)]
    output: OutputArgs,
}

/// Where the working set of an image of this host is recorded, unless somebody says otherwise.
pub(super) fn beside(image: &Path) -> PathBuf {
    // Without a slash at its end.
    let mut path = image.components().collect::<PathBuf>().into_os_string();
    path.push(".working-set");
    path.into()
}

pub(super) fn run(store: &ImageStore, args: &OptimizeArgs) -> Result<Exit, Failure> {
    let signals = Signals::take()?;
    let image = LocalImage::find(store, &args.image, "optimized")?;
    let target = store.destination(&args.target)?;
    let started = Instant::now();
    let recorded = match &args.working_set {
        Some(path) => Some(path.clone()),
        None => Some(beside(&image.path)).filter(|path| path.exists()),
    };
    let recorded = recorded.map(|path| read_file(&path)).transpose()?;
    let made = optimize(&image.path, &image.wanted, recorded, CaptureSettings::default())?;
    let title = format!("optimize {}", args.image);
    match rewrite(made, &target, title, &signals)? {
        Some(signal) => Ok(Exit::Signal(signal)),
        None => {
            let made = Image::open_directory(&target, &Wanted::Only)?;
            let chunks = made.working_set()?.map_or(0, |set| set.len());
            report(&image, &target, started.elapsed(), Some(chunks), args.output)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_recorded_of_an_image_lies_beside_it() {
        for image in ["/images/web.v1", "/images/web.v1/"] {
            assert_eq!(beside(Path::new(image)), Path::new("/images/web.v1.working-set"));
        }
    }
}
