//! A whole image: a valid one, changed in some of its parts, with the digests that lead there made right again.
//!
//! What is asserted is what `verify` promises: an image without findings opens, each of its volumes comes out of index,
//! store and decoder, and stock `zstd` makes the same bytes of each layer.

use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use runnel_snapshot::capture::volume_writer::{CompressedChunk, VolumeWriter};
use runnel_snapshot::decode::ChunkDecoder;
use runnel_snapshot::digest::{BlobDigest, ChunkDigest};
use runnel_snapshot::image::layout::Layout;
use runnel_snapshot::image::manifest::{INDEX, INDEX_ROOT, LAYER, ManifestDraft};
use runnel_snapshot::image::publication::Publication;
use runnel_snapshot::image::reference::Wanted;
use runnel_snapshot::image::{Image, ImageError};
use runnel_snapshot::index::{Entry, INDEX_BLOB_HEADER};
use runnel_snapshot::layer::frame::ChunkCompressor;
use runnel_snapshot::section::SavedSection;
use runnel_snapshot::state::{FirstChunk, MachineState};
use runnel_snapshot::units::{ChunkIndex, ChunkSize};
use runnel_snapshot::verify::{VerifyProgress, verify};
use runnel_snapshot::volume::VolumeName;
use serde_json::Value;
use tempfile::TempDir;

use crate::input::Input;

/// The smallest that there is.
const CHUNK: usize = ChunkSize::MIN as usize;
/// Edits of one input.
const EDITS_MAX: usize = 16;
/// The longest layer that is decoded, in content: no edit of these frames needs more.
const CONTENT_BYTES_MAX: u64 = 64 << 20;

/// The parts of an image, each as its reader finds it once it is past the digests.
#[derive(Clone)]
struct Parts {
    /// The state's JSON, before it is compressed.
    state: Vec<u8>,
    layer: Vec<u8>,
    index: Vec<u8>,
    root: Vec<u8>,
    /// The manifest, of which only what is not mended stays as it is.
    manifest: Vec<u8>,
    index_json: Vec<u8>,
    marker: Vec<u8>,
}

/// The files of an image, by where they are in its folder.
type Files = HashMap<PathBuf, Vec<u8>>;

/// An image in memory's file system, of which each input changes little.
struct Workshop {
    folder: TempDir,
    seed: Parts,
    files: Files,
    compressor: zstd::bulk::Compressor<'static>,
}

thread_local! {
    static WORKSHOP: RefCell<Workshop> = RefCell::new(Workshop::new());
}

fn path_of(digest: BlobDigest) -> PathBuf {
    Path::new("blobs/sha256").join(digest.hex())
}

impl Workshop {
    fn new() -> Self {
        let folder = tempfile::Builder::new()
            .prefix("runnel-image")
            .tempdir_in("/dev/shm")
            .expect("memory has a file system");
        let seed = folder.path().join("seed");
        publish(&seed);
        let parts = Parts::of(&seed);
        fs::remove_dir_all(&seed).expect("the seed can be removed");
        fs::create_dir_all(folder.path().join("blobs/sha256")).expect("a folder can be made");
        Self {
            folder,
            seed: parts,
            files: Files::new(),
            compressor: zstd::bulk::Compressor::new(1).expect("zstd has memory"),
        }
    }

    /// Has the folder hold these files, and no others.
    fn write(&mut self, files: Files) {
        let folder = self.folder.path();
        for (path, bytes) in &files {
            if self.files.remove(path).as_ref() != Some(bytes) {
                fs::write(folder.join(path), bytes).expect("memory takes a file");
            }
        }
        for path in self.files.keys() {
            fs::remove_file(folder.join(path)).expect("what was written can be removed");
        }
        self.files = files;
    }

    /// The image of these parts; `mended` says which digests are made right.
    fn assemble(&mut self, parts: Parts, mended: u8) -> Files {
        let mut files = Files::new();
        let mut add = |bytes: Vec<u8>| {
            let (digest, len) = (BlobDigest::of(&bytes), bytes.len());
            files.insert(path_of(digest), bytes);
            (digest, len)
        };
        let state = self.compressor.compress(&parts.state).expect("zstd has memory");
        let mut root = parts.root.clone();
        if mended & 1 == 0 {
            mend_root(&mut root, &parts.index);
        }
        let mut manifest = parts.manifest.clone();
        if mended & 2 == 0
            && let Ok(mut json) = serde_json::from_slice::<Value>(&manifest)
        {
            mend_manifest(&mut json, &state, &root, &parts);
            manifest = json.to_string().into_bytes();
        }
        for blob in [state, parts.layer, parts.index, root] {
            add(blob);
        }
        let (digest, len) = add(manifest);
        let mut index_json = parts.index_json;
        if mended & 4 == 0
            && let Ok(mut json) = serde_json::from_slice::<Value>(&index_json)
            && let Some(descriptor) = json.pointer_mut("/manifests/0").filter(|found| found.is_object())
        {
            descriptor["digest"] = digest.to_string().into();
            descriptor["size"] = len.into();
            index_json = json.to_string().into_bytes();
        }
        files.insert("index.json".into(), index_json);
        files.insert("oci-layout".into(), parts.marker);
        files
    }
}

/// Gives the only segment of the root the digest and the length of what is in the index.
fn mend_root(root: &mut [u8], index: &[u8]) {
    let segment = index.get(INDEX_BLOB_HEADER.len()..).unwrap_or_default();
    if let Some(entry) = root.get_mut(16..52) {
        entry[..4].copy_from_slice(&(segment.len() as u32).to_le_bytes());
        entry[4..].copy_from_slice(blake3::hash(segment).as_bytes());
    }
}

/// Has the manifest name the parts, where it still names something of their kind.
fn mend_manifest(manifest: &mut Value, state: &[u8], root: &[u8], parts: &Parts) {
    let name = |descriptor: &mut Value, bytes: &[u8]| {
        if !descriptor.is_object() {
            return;
        }
        descriptor["digest"] = BlobDigest::of(bytes).to_string().into();
        descriptor["size"] = bytes.len().into();
        if descriptor.get("data").is_some() {
            descriptor["data"] = BASE64.encode(bytes).into();
        }
    };
    if let Some(config) = manifest.get_mut("config") {
        name(config, state);
    }
    let layers = manifest.get_mut("layers").and_then(Value::as_array_mut);
    for descriptor in layers.into_iter().flatten() {
        match descriptor.get("mediaType").and_then(Value::as_str) {
            Some(LAYER) => name(descriptor, &parts.layer),
            Some(INDEX) => name(descriptor, &parts.index),
            Some(INDEX_ROOT) => name(descriptor, root),
            _ => {}
        }
    }
}

/// Publishes a small image: data, zeros, data, and half a chunk of data; a state with a section and a first chunk.
fn publish(target: &Path) {
    let publication = Publication::begin(target).expect("an image can be begun");
    let data = |seed: u8, len: usize| -> Vec<u8> { (0..len).map(|at| seed ^ (at / 100) as u8).collect() };
    let chunk_size = ChunkSize::new(ChunkSize::MIN).expect("it is a size");
    let bytes = 4 * CHUNK + CHUNK / 2;
    let wanted = BTreeSet::from([ChunkIndex(3)]);
    let mut writer =
        VolumeWriter::new(&publication, bytes as u64, chunk_size, wanted).expect("a volume can be begun");
    let mut compressor = ChunkCompressor::new(1).expect("zstd has memory");
    let mut push = |writer: &mut VolumeWriter, plain: &[u8]| {
        let mut frames = Vec::new();
        let chunk = CompressedChunk {
            frame_bytes: compressor
                .append_frame(plain, &mut frames)
                .expect("zstd has memory"),
            digest: ChunkDigest::of(plain),
        };
        writer.push_frames(&frames, &[chunk]).expect("memory takes all");
    };
    push(&mut writer, &data(1, CHUNK));
    writer.push_zeros(2).expect("memory takes all");
    push(&mut writer, &data(2, CHUNK));
    push(&mut writer, &data(3, CHUNK / 2));
    let written = writer
        .finish(&publication, VolumeName::Memory)
        .expect("memory takes all");
    let section = SavedSection {
        kind: "clock".to_owned(),
        id: String::new(),
        version: 1,
        state: serde_json::json!({ "guest_ns": 1, "host_wall_ns": 2 }),
    };
    let mut state = MachineState::new(1, vec![section]);
    let firsts = written.wanted.iter();
    state.first_chunks = firsts
        .map(|(chunk, entry)| FirstChunk {
            volume: VolumeName::Memory,
            chunk: *chunk,
            entry: entry.clone(),
        })
        .collect();
    let encoded = state.encode().expect("a state has a JSON form");
    let draft = ManifestDraft {
        state: publication.add(&encoded).expect("memory takes all"),
        state_inline: Some(encoded),
        volumes: vec![written.volume],
        working_set: None,
        parent: None,
        urls: Default::default(),
    };
    publication
        .publish(&draft, Some("latest"))
        .expect("an image can be published");
}

impl Parts {
    fn of(seed: &Path) -> Self {
        let image = Image::open_directory(seed, &Wanted::Only).expect("the seed is an image");
        let read = |path: PathBuf| fs::read(path).expect("the seed is there");
        let blob = |digest: BlobDigest| read(seed.join(path_of(digest)));
        let volume = &image.manifest.volumes[0];
        let state = image.state().expect("the seed has a state");
        Self {
            state: serde_json::to_vec(&state).expect("a state has a JSON form"),
            layer: blob(volume.layers[0].digest),
            index: blob(volume.index.digest),
            root: volume.root.to_bytes(),
            manifest: blob(image.digest()),
            index_json: read(seed.join("index.json")),
            marker: read(seed.join("oci-layout")),
        }
    }

    fn part(&mut self, number: u8) -> &mut Vec<u8> {
        match number % 8 {
            0 => &mut self.state,
            1 => &mut self.manifest,
            2 => &mut self.root,
            3 => &mut self.index_json,
            4 => &mut self.marker,
            // What is largest, and read last.
            5 => &mut self.index,
            _ => &mut self.layer,
        }
    }

    /// Overwrites, inserts, removes or repeats some bytes of a part; the offset counts from the end in every other.
    fn edit(&mut self, input: &mut Input<'_>) {
        let (number, how, at) = (input.u8(), input.u8(), usize::from(input.u16()));
        let len = usize::from(input.u8() % 64);
        let part = self.part(number);
        let at = at.min(part.len());
        let at = if how & 0x80 == 0 { at } else { part.len() - at };
        let end = (at + len).min(part.len());
        match how % 4 {
            0 => {
                let bytes = input.bytes(end - at);
                part[at..at + bytes.len()].copy_from_slice(bytes);
            }
            1 => drop(part.splice(at..at, input.bytes(len).iter().copied())),
            2 => drop(part.drain(at..end)),
            _ => {
                let again = part[at..end].to_vec();
                drop(part.splice(end..end, again));
            }
        }
    }
}

/// A part of the valid image, for whose reader is fed with it alone.
pub(crate) fn seed_part(name: &str) -> Vec<u8> {
    WORKSHOP.with_borrow(|workshop| {
        let seed = workshop.seed.clone();
        match name {
            "state" => seed.state,
            "root" => seed.root,
            "manifest" => seed.manifest,
            _ => seed.index_json,
        }
    })
}

/// Which digests stay as they are, then edits of the parts of a valid image.
pub fn image(bytes: &[u8]) -> bool {
    let mut input = Input::new(bytes);
    WORKSHOP.with_borrow_mut(|workshop| {
        let mended = input.u8();
        let mut parts = workshop.seed.clone();
        for _ in 0..EDITS_MAX {
            if input.is_empty() {
                break;
            }
            parts.edit(&mut input);
        }
        let files = workshop.assemble(parts, mended);
        workshop.write(files);
        read(workshop.folder.path())
    })
}

/// Opens and verifies the image. Whether it is sound.
fn read(folder: &Path) -> bool {
    let Ok(layout) = Layout::open(folder) else {
        return false;
    };
    let opened = Image::open_directory(folder, &Wanted::Only);
    if let Err(error) = &opened {
        let _ = error.is_damage();
    }
    let report = match verify(&layout, &Wanted::Only, 1, &VerifyProgress::default()) {
        Ok(report) => report,
        Err(error) => {
            let has_no_manifest = opened.is_err() || matches!(error, ImageError::State(_));
            assert!(has_no_manifest, "an image that opens can be verified: {error}");
            return false;
        }
    };
    if !report.is_sound() {
        assert!(report.findings.iter().all(|finding| !finding.trace().is_empty()));
        // What can be read of it is not wrong: it fails, or comes to its digests.
        if let Ok(image) = opened {
            let _ = image.state();
            let _ = read_volumes(&image);
        }
        return false;
    }
    let image = opened.expect("an image that is sound can be opened");
    image.state().expect("an image that is sound has a state");
    for (layer, plain) in read_volumes(&image).expect("every chunk of a sound image can be read") {
        assert_eq!(plain_of(&layer), plain, "zstd makes the volume of a layer");
    }
    true
}

type Volumes = Vec<(Vec<u8>, Vec<u8>)>;

/// Of each volume its layer, and its bytes; `None` if a chunk cannot be had.
fn read_volumes(image: &Image) -> Option<Volumes> {
    let mut volumes = Vec::new();
    let mut decoder = ChunkDecoder::new().expect("zstd has memory");
    for volume in &image.manifest.volumes {
        let (root, index) = (&volume.root, image.index(volume));
        if root.volume_bytes() > CONTENT_BYTES_MAX {
            return None;
        }
        let read = |layer: usize, start: u64, len: u64| {
            let mut bytes = vec![0; usize::try_from(len).ok()?];
            let read = image.store.read_range(&volume.layers[layer], start, &mut bytes);
            read.is_ok().then_some(bytes)
        };
        let mut plain = vec![0; root.volume_bytes() as usize];
        for chunk in (0..root.chunks()).map(ChunkIndex) {
            let range = root.chunk_size().range_of(chunk, root.volume_bytes());
            if let Entry::Data(stored) = index.entry(chunk).ok()? {
                let layer = usize::from(stored.layer.0);
                let frame = read(layer, stored.frame.start, stored.frame.len)?;
                let into = &mut plain[range.start as usize..][..range.len as usize];
                decoder.decode(&frame, &stored.digest, into).ok()?;
                assert_eq!(ChunkDigest::of(into), stored.digest);
            }
        }
        volumes.push((read(0, 0, volume.layers[0].bytes)?, plain));
    }
    Some(volumes)
}

fn plain_of(layer: &[u8]) -> Vec<u8> {
    let mut decoder = zstd::Decoder::with_buffer(layer).expect("zstd has memory");
    let mut plain = Vec::new();
    let read = std::io::Read::read_to_end(&mut decoder, &mut plain);
    read.expect("stock zstd reads the layers of a sound image");
    plain
}
