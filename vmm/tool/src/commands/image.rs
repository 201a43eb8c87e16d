//! `runnel image`: the local store.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use clap::{Args, Subcommand};
use runnel_snapshot::blobs::Blob;
use runnel_snapshot::causes::with_causes;
use runnel_snapshot::digest::BlobDigest;
use runnel_snapshot::image::folder::{self, ListedImage, Listing};
use runnel_snapshot::image::manifest::{ImageVolume, LayerKind};
use runnel_snapshot::image::reference::ImageReference;
use runnel_snapshot::shell::shell_word;
use serde_json::{Value, json};

use super::{Failure, complete, optimize, squash};
use crate::exit::Exit;
use crate::held::{holders, is_held};
use crate::images::ImageStore;
use crate::output::{OutputArgs, print, print_json, tell};
use crate::size::{self, parse_duration};
use crate::state::StateFolder;
use crate::table::{Table, one_line};

/// Why an image stays.
#[derive(Debug, thiserror::Error)]
enum InUse {
    /// `runnel serve` has it, or its folder.
    #[error(
        "{image} is being served{}, and other hosts may read it, so nothing was removed (--force removes it nevertheless)",
        by(holders)
    )]
    Served {
        /// Its name.
        image: String,
        /// By which processes, as far as that is known.
        holders: Vec<u32>,
    },
    /// A machine came from it.
    #[error(
        "{machine} was resumed from {image}, and may still read it, so nothing was removed (--force removes it nevertheless)"
    )]
    By {
        /// Its name.
        image: String,
        /// Which machine.
        machine: String,
    },
}

/// One of the names is no image's, or not an image's alone.
#[derive(Debug, thiserror::Error)]
#[error("nothing was removed")]
struct NothingRemoved(#[source] Failure);

fn by(processes: &[u32]) -> String {
    match processes {
        [] => String::new(),
        [process] => format!(" by process {process}"),
        [first, rest @ ..] => {
            let rest: String = rest.iter().map(|process| format!(", {process}")).collect();
            format!(" by processes {first}{rest}")
        }
    }
}

/// Look after the images of the local store
#[derive(Debug, Args)]
#[command(after_help = "\
The store is $RUNNEL_IMAGES (an absolute path), else $XDG_DATA_HOME/runnel/images, else /var/lib/runnel/images for root
and ~/.local/share/runnel/images for others. It is a folder of image directories: copying one there adds it. Directories of
anything else are listed as such, and never removed. LAYERS are those of all volumes together; an image that lies over
others has the layers of those that it still needs. AGE, and \"modified\" in JSON, is since when an image is there;
`runnel inspect` says when its machine was saved.

Examples:
    runnel image ls
    runnel image rm web-v1
    runnel image prune --older-than 30d --dry-run
    runnel image squash web-v50 web-base
    runnel image optimize web-v1 web-v1-fast
    runnel image complete web-v2")]
pub(crate) struct ImageArgs {
    #[command(subcommand)]
    command: ImageCommand,
}

#[derive(Debug, Subcommand)]
enum ImageCommand {
    /// List images
    Ls(LsArgs),
    /// Remove images, also broken ones: all that are named, or none if one of them cannot be
    Rm(RmArgs),
    /// Remove what snapshots that were cut short left, and old images that no machine came from
    Prune(PruneArgs),
    /// Write an image anew, each volume in one full layer: the same machine, without the layers that it lies over
    Squash(squash::SquashArgs),
    /// Fetch the layers of a thin image that are on other hosts
    Complete(complete::CompleteArgs),
    /// Put with an image what was recorded of it (`runnel resume --record`): the same machine, which resumes sooner
    Optimize(optimize::OptimizeArgs),
}

#[derive(Debug, Args)]
struct LsArgs {
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Args)]
struct RmArgs {
    /// Names of images
    #[arg(required = true)]
    images: Vec<String>,

    /// Remove images too that running machines came from, which go on with what they have open, or that are served
    #[arg(long)]
    force: bool,
}

#[derive(Debug, Args)]
struct PruneArgs {
    /// Images too that are older than this, unless a running machine came from them or they are served; with its unit: 12h, 30d. What
    /// `image ls` calls no usable image stays until `image rm`
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    older_than: Option<Duration>,

    /// With --older-than: images too that are served
    #[arg(long, requires = "older_than")]
    force: bool,

    /// Say what would go, and do nothing
    #[arg(long)]
    dry_run: bool,

    #[command(flatten)]
    output: OutputArgs,
}

pub(crate) fn run(args: &ImageArgs) -> Result<Exit, Failure> {
    let store = ImageStore::of_this_user()?;
    match &args.command {
        ImageCommand::Ls(args) => list(&store, args),
        ImageCommand::Rm(args) => remove(&store, args),
        ImageCommand::Prune(args) => prune(&store, args),
        ImageCommand::Squash(args) => squash::run(&store, args),
        ImageCommand::Complete(args) => complete::run(&store, args),
        ImageCommand::Optimize(args) => optimize::run(&store, args),
    }
}

/// What is in the store; nothing, if it was never made, which is said of one that somebody named.
fn listing(store: &ImageStore) -> Result<Listing, Failure> {
    if !store.is_there()? {
        if let Some(missing) = store.missing() {
            tell(missing);
        }
        return Ok(Listing::default());
    }
    Ok(folder::list(store.path())?)
}

fn list(store: &ImageStore, args: &LsArgs) -> Result<Exit, Failure> {
    let listing = listing(store)?;
    if args.output.json {
        let images: Vec<Value> = listing.images.iter().map(describe).collect();
        let broken = listing.broken.iter();
        let broken: Vec<Value> = broken
            .map(|(path, error)| json!({ "path": path, "reason": with_causes(error) }))
            .collect();
        let others = listing.others.iter();
        let others: Vec<Value> = others
            .map(|(path, reason)| json!({ "path": path, "reason": reason.to_string() }))
            .collect();
        print_json(&json!({ "store": store.path(), "images": images, "broken": broken, "others": others }))?;
        return Ok(Exit::Done);
    }
    let names = listing.images.iter();
    let names = names.map(|image| (image.manifest.digest, name_of(&image.path)));
    let names: BTreeMap<BlobDigest, String> = names.collect();
    let mut table = Table::new(&[
        "NAME", "TAG", "DIGEST", "SIZE", "STORED", "VOLUMES", "LAYERS", "PARENT", "AGE",
    ]);
    for image in &listing.images {
        table.push(vec![
            one_line(&name_of(&image.path), 60),
            one_line(image.name.as_deref().unwrap_or("-"), 40),
            short(&image.manifest.digest),
            size::bytes(image.volume_bytes()),
            size::bytes(image.stored_bytes()),
            image.manifest.volumes.len().to_string(),
            layers_of(image).count().to_string(),
            match image.manifest.parent {
                None => "-".to_owned(),
                Some(parent) => names
                    .get(&parent)
                    .map_or_else(|| short(&parent), |name| one_line(name, 60)),
            },
            age_of(&image.path).map_or("-".to_owned(), size::duration),
        ]);
    }
    print(&table.to_string())?;
    for (path, error) in &listing.broken {
        let removal = match folder::check_removal(path) {
            Ok(()) => format!(" (`runnel image rm {}` removes it)", shell_word(name_of(path))),
            Err(_) => String::new(),
        };
        let reason = with_causes(error);
        tell(format_args!(
            "{} is no usable image{removal}: {reason}",
            path.display()
        ));
    }
    for (path, reason) in &listing.others {
        tell(format_args!(
            "{} is no image, and is neither served nor removed: {reason}",
            path.display()
        ));
    }
    Ok(Exit::Done)
}

/// So much of a digest as tells images apart.
fn short(digest: &BlobDigest) -> String {
    digest.to_string().chars().take(19).collect()
}

/// The layers of all volumes, each with the volume that it is of.
fn layers_of(image: &ListedImage) -> impl Iterator<Item = (&ImageVolume, Blob, LayerKind)> {
    let volumes = image.manifest.volumes.iter();
    volumes.flat_map(|volume| {
        let layers = volume.layers_with_kinds();
        layers.map(move |(blob, kind)| (volume, blob, kind))
    })
}

fn describe(image: &ListedImage) -> Value {
    let volumes = image.manifest.volumes.iter();
    let layer = |(volume, blob, kind): (&ImageVolume, Blob, LayerKind)| {
        json!({
            "volume": volume.name.to_string(),
            "kind": kind.name(),
            "digest": blob.digest.to_string(),
            "bytes": blob.bytes,
            "urls": image.manifest.urls.get(&blob.digest),
        })
    };
    json!({
        "name": name_of(&image.path),
        "path": image.path,
        "tag": image.name,
        "modified": changed(&image.path).map(size::timestamp),
        "digest": image.manifest.digest.to_string(),
        "volume_bytes": image.volume_bytes(),
        "stored_bytes": image.stored_bytes(),
        "layers_elsewhere": image.elsewhere.len(),
        "volumes": volumes.map(|volume| volume.name.to_string()).collect::<Vec<_>>(),
        "layers": layers_of(image).map(layer).collect::<Vec<_>>(),
        "parent": image.manifest.parent.map(|parent| parent.to_string()),
    })
}

fn remove(store: &ImageStore, args: &RmArgs) -> Result<Exit, Failure> {
    // All are looked at before one goes.
    let paths = args.images.iter().map(|name| removable(store, name));
    let paths = paths
        .collect::<Result<BTreeSet<_>, _>>()
        .map_err(NothingRemoved)?;
    if !args.force {
        for machine in StateFolder::open()?.machines()? {
            let from = machine.record.image.as_deref().and_then(directory_of);
            if let Some(path) = paths.iter().find(|path| Some(path.as_path()) == from.as_deref()) {
                return Err(InUse::By {
                    image: name_of(path),
                    machine: machine.folder.name.to_string(),
                }
                .into());
            }
        }
        if let Some(path) = paths.iter().find(|path| is_held(path)) {
            return Err(InUse::Served {
                image: name_of(path),
                holders: holders(path),
            }
            .into());
        }
    }
    let mut removed = String::new();
    let mut done = Ok(());
    for path in &paths {
        done = folder::remove(path);
        if done.is_err() {
            break;
        }
        removed += &format!("removed {}\n", path.display());
    }
    // At the end: where nobody reads it, the work is done all the same.
    let told = print(&removed);
    done?;
    told?;
    Ok(Exit::Done)
}

/// The directory of the image of that name, if nothing but an image would go with it.
fn removable(store: &ImageStore, name: &str) -> Result<PathBuf, Failure> {
    let path = store.image(name)?;
    folder::check_removal(&path)?;
    Ok(path)
}

fn prune(store: &ImageStore, args: &PruneArgs) -> Result<Exit, Failure> {
    let mut removed: BTreeSet<PathBuf> = BTreeSet::new();
    if store.is_there()? {
        removed.extend(match args.dry_run {
            true => folder::unfinished(store.path())?,
            false => folder::prune(store.path())?,
        });
    }
    if let Some(limit) = args.older_than {
        let machines = StateFolder::open()?.machines()?;
        let in_use = machines
            .iter()
            .filter_map(|machine| directory_of(machine.record.image.as_deref()?));
        let in_use: BTreeSet<PathBuf> = in_use.collect();
        let is_old = |path: &Path| age_of(path).is_some_and(|age| age > limit);
        let images = listing(store)?.images;
        // A layout of several images is one directory.
        let old: BTreeSet<PathBuf> = images.into_iter().map(|image| image.path).collect();
        for path in old
            .into_iter()
            .filter(|path| is_old(path) && !in_use.contains(path))
        {
            if !args.force && is_held(&path) {
                tell(format_args!(
                    "{} is kept, since it is served{} (--force removes it nevertheless)",
                    path.display(),
                    by(&holders(&path))
                ));
                continue;
            }
            // One that is more than an image is no reason to keep the others.
            if let Err(error) = folder::check_removal(&path) {
                tell(with_causes(&error));
                continue;
            }
            if !args.dry_run {
                folder::remove(&path)?;
            }
            removed.insert(path);
        }
    }
    match args.output.json {
        true => print_json(&json!({ "dry_run": args.dry_run, "removed": removed }))?,
        false if removed.is_empty() => tell("there is nothing to remove"),
        false => {
            let verb = if args.dry_run { "would remove" } else { "removed" };
            let lines: String = removed
                .iter()
                .map(|path| format!("{verb} {}\n", path.display()))
                .collect();
            print(&lines)?;
        }
    }
    Ok(Exit::Done)
}

/// The directory of an image that a machine came from, if it is one of this host.
fn directory_of(image: &str) -> Option<PathBuf> {
    match image.parse().ok()? {
        ImageReference::Directory { path, .. } => Some(path),
        ImageReference::Remote { .. } => None,
    }
}

fn name_of(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

/// When the image appeared here, or was last changed: of one that was copied, when it was copied.
fn changed(path: &Path) -> Option<SystemTime> {
    path.join("index.json").metadata().ok()?.modified().ok()
}

/// How long ago that was.
fn age_of(path: &Path) -> Option<Duration> {
    // One from the future is new.
    Some(
        SystemTime::now()
            .duration_since(changed(path)?)
            .unwrap_or_default(),
    )
}
