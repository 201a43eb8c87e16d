//! `runnel inspect`: what an image consists of.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::Args;
use runnel_agent::remote::RemoteImage;
use runnel_snapshot::blobs::Blob;
use runnel_snapshot::image::manifest::{ImageVolume, LayerKind};
use runnel_snapshot::image::reference::ImageReference;
use runnel_snapshot::image::{Image, folder};
use runnel_snapshot::index::{Entry, IndexError, SegmentIndex};
use runnel_snapshot::shell::shell_word;
use runnel_snapshot::state::MachineState;
use runnel_snapshot::units::ChunkIndex;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Failure;
use crate::exit::Exit;
use crate::images::ImageStore;
use crate::output::{OutputArgs, print, print_json};
use crate::remote::RemoteFlags;
use crate::size;
use crate::table::{Table, one_line};

/// Ancestors that are followed: a chain longer than any that makes sense, or a circle.
const LINEAGE_MAX: usize = 64;

/// Show what an image consists of
#[derive(Debug, Args)]
#[command(after_help = "\
Drives of the machine that the image does not hold, and that `runnel resume` must be given, are named. Of an image of
another host only manifest, machine state and indexes are read.

Examples:
    runnel inspect web-v1
    runnel inspect http://10.0.0.1:5000/web-v1 --json | jq .volumes")]
pub(crate) struct InspectArgs {
    /// Name, directory or URL of an image
    image: String,

    #[command(flatten)]
    remote: RemoteFlags,

    #[command(flatten)]
    output: OutputArgs,
}

/// An image, as `--json` shows it.
#[derive(Debug, Serialize)]
struct Inspection {
    image: String,
    digest: String,
    saved_by: String,
    saved_at_unix_ms: u64,
    volume_bytes: u64,
    stored_bytes: u64,
    volumes: Vec<VolumeInspection>,
    /// Drives of the machine that are not in the image.
    drives_to_supply: Vec<DriveToSupply>,
    state_bytes: u64,
    sections: BTreeMap<String, SectionInspection>,
    first_chunks: usize,
    working_set_bytes: Option<u64>,
    compatibility: BTreeMap<String, Value>,
    /// The parent first. `image` where it is in the local store.
    lineage: Vec<Ancestor>,
}

#[derive(Debug, Serialize)]
struct VolumeInspection {
    name: String,
    bytes: u64,
    stored_bytes: u64,
    zero_bytes: u64,
    chunk_bytes: u64,
    chunks: u64,
    data_chunks: u64,
    /// Those of them that are of several parts: pages of other layers lie over them.
    chunks_of_parts: u64,
    index_bytes: u64,
    layers: Vec<Layer>,
}

/// As the machine's description says it, which is the monitor's: what is not understood is not shown.
#[derive(Debug, Serialize, Deserialize)]
struct DriveToSupply {
    id: String,
    bytes: u64,
    is_read_only: bool,
}

#[derive(Debug, Serialize)]
struct Layer {
    digest: String,
    kind: &'static str,
    bytes: u64,
    /// Where else it can be had, as the manifest says.
    urls: Vec<String>,
}

#[derive(Debug, Serialize)]
struct SectionInspection {
    version: u32,
    count: usize,
}

#[derive(Debug, Serialize)]
struct Ancestor {
    digest: String,
    image: Option<PathBuf>,
}

pub(crate) fn run(args: &InspectArgs) -> Result<Exit, Failure> {
    let store = ImageStore::of_this_user()?;
    let reference = store.resolve(&args.image)?;
    let image = open(&reference, &args.remote)?;
    let inspection = inspect(&reference, &image, &store)?;
    match args.output.json {
        true => print_json(&inspection)?,
        false => print(&inspection.describe())?,
    }
    Ok(Exit::Done)
}

fn open(reference: &ImageReference, remote: &RemoteFlags) -> Result<Image, Failure> {
    Ok(match reference {
        ImageReference::Directory { path, wanted } => Image::open_thin(path, wanted)?.0,
        ImageReference::Remote { base, name, wanted } => {
            RemoteImage::open(base, name, wanted, remote.settings()?)?.image
        }
    })
}

fn inspect(reference: &ImageReference, image: &Image, store: &ImageStore) -> Result<Inspection, Failure> {
    let manifest = &image.manifest;
    let state = image.state()?;
    let volumes = manifest
        .volumes
        .iter()
        .map(|volume| inspect_volume(image, volume));
    let volumes = volumes.collect::<Result<Vec<_>, _>>()?;
    let mut sections = BTreeMap::new();
    for section in &state.sections {
        let entry = sections.entry(one_line(&section.kind, 60));
        let found: &mut SectionInspection = entry.or_insert(SectionInspection {
            version: section.version,
            count: 0,
        });
        found.count += 1;
    }
    let sum = |bytes: fn(&VolumeInspection) -> u64| volumes.iter().map(bytes).fold(0, u64::saturating_add);
    Ok(Inspection {
        image: reference.to_string(),
        digest: manifest.digest.to_string(),
        saved_by: one_line(&state.runnel, 40),
        saved_at_unix_ms: state.saved_at_unix_ms,
        volume_bytes: sum(|volume| volume.bytes),
        stored_bytes: manifest
            .blobs()
            .iter()
            .fold(0, |sum, blob| sum.saturating_add(blob.bytes)),
        volumes,
        drives_to_supply: drives_to_supply(&state),
        state_bytes: manifest.state.bytes,
        sections,
        first_chunks: state.first_chunks.len(),
        working_set_bytes: manifest.working_set.map(|blob| blob.bytes),
        compatibility: state.compatibility,
        lineage: lineage(image, store),
    })
}

/// The drives that were left out of the image, or that were files outside it.
fn drives_to_supply(state: &MachineState) -> Vec<DriveToSupply> {
    let machine = state.sections.iter().find(|section| section.kind == "machine");
    let drives = machine.and_then(|section| section.state["drives"].as_array());
    let left_out = |drive: &&Value| drive["in_image"] == false;
    let drives = drives.into_iter().flatten().filter(left_out);
    drives
        .filter_map(|drive| DriveToSupply::deserialize(drive).ok())
        .collect()
}

/// Reads the whole index, which costs some 40 bytes a chunk.
fn inspect_volume(image: &Image, volume: &ImageVolume) -> Result<VolumeInspection, IndexError> {
    let (root, index) = (&volume.root, image.index(volume));
    let (mut zero_bytes, mut data_chunks, mut chunks_of_parts) = (0, 0, 0);
    for number in (0..root.segments()).map(SegmentIndex) {
        let segment = index.segment(number)?;
        let (first, count) = root.chunks_of(number);
        for position in 0..count {
            match segment.entry(position) {
                Some(Entry::Data(_)) => data_chunks += 1,
                Some(Entry::Parts(_)) => {
                    data_chunks += 1;
                    chunks_of_parts += 1;
                }
                Some(Entry::Zero) | None => {
                    let chunk = ChunkIndex(first.0 + u64::from(position));
                    zero_bytes += root.chunk_size().range_of(chunk, root.volume_bytes()).len;
                }
            }
        }
    }
    let layer = |(blob, kind): (Blob, LayerKind)| Layer {
        digest: blob.digest.to_string(),
        kind: kind.name(),
        bytes: blob.bytes,
        urls: image.manifest.urls.get(&blob.digest).cloned().unwrap_or_default(),
    };
    Ok(VolumeInspection {
        name: volume.name.to_string(),
        bytes: root.volume_bytes(),
        stored_bytes: volume.stored_bytes(),
        zero_bytes,
        chunk_bytes: root.chunk_size().bytes(),
        chunks: root.chunks(),
        data_chunks,
        chunks_of_parts,
        index_bytes: volume.index.bytes,
        layers: volume.layers_with_kinds().map(layer).collect(),
    })
}

/// Follows parents as far as the local store has them.
fn lineage(image: &Image, store: &ImageStore) -> Vec<Ancestor> {
    let mut lineage = Vec::new();
    let mut parent = image.manifest.parent;
    while let Some(digest) = parent.filter(|_| lineage.len() < LINEAGE_MAX) {
        // A store that cannot be read has nobody to tell of here.
        let listing = folder::list(store.path()).unwrap_or_default();
        let found = listing
            .images
            .into_iter()
            .find(|image| image.manifest.digest == digest);
        parent = found.as_ref().and_then(|image| image.manifest.parent);
        lineage.push(Ancestor {
            digest: digest.to_string(),
            image: found.map(|image| image.path),
        });
    }
    lineage
}

impl Inspection {
    fn describe(&self) -> String {
        let mut text = format!(
            "image    {}\ndigest   {}\nsaved    {} by Runnel {}\nsize     {} stored, {} of memory and disks ({})\n",
            self.image,
            self.digest,
            size::instant(self.saved_at_unix_ms),
            self.saved_by,
            size::bytes(self.stored_bytes),
            size::bytes(self.volume_bytes),
            size::share(self.stored_bytes, self.volume_bytes),
        );
        for (number, ancestor) in self.lineage.iter().enumerate() {
            let place = ancestor
                .image
                .as_ref()
                .map_or("not here".to_owned(), |path| path.display().to_string());
            let label = if number == 0 { "parent  " } else { "its own " };
            text.push_str(&format!("{label} {} ({place})\n", ancestor.digest));
        }
        text.push('\n');
        text.push_str(&self.volume_table().to_string());
        for drive in &self.drives_to_supply {
            text.push_str(&format!(
                "\nneeded   drive {id} of {} bytes{}, which is not in the image: `runnel resume --drive {word}=PATH`",
                drive.bytes,
                if drive.is_read_only { ", read-only" } else { "" },
                id = one_line(&drive.id, 64),
                word = shell_word(&drive.id),
            ));
        }
        text.push_str(&format!("\nstate    {}", size::bytes(self.state_bytes)));
        for (kind, section) in &self.sections {
            let count = if section.count == 1 {
                String::new()
            } else {
                format!(" ×{}", section.count)
            };
            text.push_str(&format!(", {kind} v{}{count}", section.version));
        }
        text.push_str(&format!(
            "\nfirst    {} chunks are asked for before the machine runs\n",
            self.first_chunks
        ));
        for volume in &self.volumes {
            for layer in &volume.layers {
                let place = layer
                    .urls
                    .first()
                    .map_or(String::new(), |url| format!("  {}", one_line(url, 200)));
                text.push_str(&format!(
                    "layer    {}  {}  {}  {}{place}\n",
                    layer.digest,
                    layer.kind,
                    size::bytes(layer.bytes),
                    volume.name
                ));
            }
        }
        text
    }

    fn volume_table(&self) -> Table {
        let mut table = Table::new(&[
            "VOLUME", "SIZE", "STORED", "RATIO", "ZERO", "CHUNK", "CHUNKS", "INDEX", "LAYERS",
        ]);
        for volume in &self.volumes {
            table.push(vec![
                volume.name.clone(),
                size::bytes(volume.bytes),
                size::bytes(volume.stored_bytes),
                size::share(volume.stored_bytes, volume.bytes),
                size::share(volume.zero_bytes, volume.bytes),
                size::bytes(volume.chunk_bytes),
                volume.data_chunks.to_string(),
                size::bytes(volume.index_bytes),
                volume.layers.len().to_string(),
            ]);
        }
        table
    }
}
