//! Golden images: images that some version of Runnel wrote, kept, with what is known of them from then.
//!
//! `tests/golden/<version>/image` is the image, `known.json` beside it the lengths and digests of its volumes, and what
//! its guest says to whom it wakes up to. [`make`] writes both, with the Runnel of today; `tests/golden/README.md` says
//! when.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use runnel_snapshot::digest::ChunkDigest;
use runnel_snapshot::image::Image;
use runnel_snapshot::image::chunk_reader::ChunkReader;
use runnel_snapshot::units::ChunkIndex;
use runnel_snapshot::volume::VolumeName;
use serde_json::{Value, json};

use crate::bare::{save, start, tell};
use crate::monitor::Monitor;
use crate::{bare_guest, forge};

/// The least that a machine may have, almost all of it zeros: these files are kept for ever.
const MEMORY_MIB: u64 = 32;

/// The drive of a golden machine.
const DRIVE_BYTES: u64 = 256 << 10;

/// What the guest has done when it is saved.
const BEFORE: [(&str, &str); 2] = [
    ("fill:8m:4k:7", "fill=done"),
    ("diskfill:8:4k:5", "diskfill=right"),
];

/// What it is told when it wakes up, and says then.
const AFTER: [(&str, &str); 4] = [
    ("count:1", "count=4"),
    ("checkfill:8m:4k:7", "checkfill=right"),
    ("checkdisk:8:4k:5", "checkdisk=right"),
    ("checkdiskzero:16:4k", "checkdiskzero=right"),
];

/// An image that is kept.
#[derive(Debug)]
pub struct Golden {
    folder: PathBuf,
    known: Value,
}

/// All that are kept, by version.
///
/// # Panics
/// When one is not whole.
#[must_use]
pub fn all() -> Vec<Golden> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden");
    let entries = fs::read_dir(&folder).expect("golden images are kept");
    let entries = entries.map(|entry| entry.expect("the folder can be read").path());
    let mut folders: Vec<_> = entries.filter(|path| path.is_dir()).collect();
    folders.sort();
    let read = |folder: PathBuf| {
        let known = fs::read(folder.join("known.json")).expect("it is known what is in it");
        let known = serde_json::from_slice(&known).expect("what is known is JSON");
        Golden { folder, known }
    };
    folders.into_iter().map(read).collect()
}

impl Golden {
    /// Where the image is.
    #[must_use]
    pub fn image(&self) -> PathBuf {
        self.folder.join("image")
    }

    /// Its version, for people.
    #[must_use]
    pub fn version(&self) -> String {
        self.folder
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned()
    }

    /// What its volumes came to when it was written.
    #[must_use]
    pub fn volumes(&self) -> &Value {
        &self.known["volumes"]
    }

    /// What its guest is told, and says.
    pub fn dialogue(&self) -> impl Iterator<Item = (&str, &str)> {
        let lines = self.known["dialogue"].as_array().into_iter().flatten();
        lines.filter_map(|line| Some((line["told"].as_str()?, line["says"].as_str()?)))
    }
}

/// Length and BLAKE3 of each volume's bytes, read chunk by chunk through index, store and decoder.
///
/// # Panics
/// When a chunk cannot be had.
#[must_use]
pub fn volumes_of(image: &Image) -> Value {
    let volumes = image.manifest.volumes.iter().map(|volume| {
        let plain = bytes_of(image, &volume.name);
        let about = json!({"bytes": plain.len(), "blake3": ChunkDigest::of(&plain).to_string()});
        (volume.name.to_string(), about)
    });
    json!(volumes.collect::<BTreeMap<_, _>>())
}

/// A volume's bytes, read in the same way.
///
/// # Panics
/// When a chunk cannot be had.
#[must_use]
pub fn bytes_of(image: &Image, name: &VolumeName) -> Vec<u8> {
    let volume = image.volume(name).expect("the image has the volume");
    let (root, index) = (&volume.root, image.index(volume));
    let mut reader = ChunkReader::default();
    let mut plain = vec![0; usize::try_from(root.volume_bytes()).expect("it fits into memory")];
    for chunk in (0..root.chunks()).map(ChunkIndex) {
        let range = root.chunk_size().range_of(chunk, root.volume_bytes());
        let entry = index.entry(chunk).expect("the index has every chunk");
        let into = &mut plain[range.start as usize..][..range.len as usize];
        let read = reader.read(&*image.store, &volume.layers, &entry, into);
        read.expect("the layers have the chunk");
    }
    plain
}

/// Has a machine with a drive of its own saved to `folder`, and writes down what is known of it.
///
/// # Panics
/// When it cannot be: `folder` is there already, for one.
pub fn make(folder: &Path) {
    fs::create_dir_all(folder).expect("a folder can be made");
    let workshop = tempfile::tempdir().expect("a temporary folder");
    let disk = workshop.path().join("disk");
    let file = File::create(&disk).expect("a disk can be made");
    file.set_len(DRIVE_BYTES).expect("it takes a length");
    let text = b"The end of the drive of a golden image.\n";
    let written = file.write_all_at(text, DRIVE_BYTES - 512);
    written.expect("the disk can be written");

    let mut monitor = Monitor::start();
    for (path, body) in [
        (
            "/machine-config",
            json!({"vcpu_count": 1, "mem_size_mib": MEMORY_MIB}),
        ),
        (
            "/boot-source",
            json!({"kernel_image_path": bare_guest(), "boot_args": "count:3"}),
        ),
        (
            "/drives/data",
            json!({"drive_id": "data", "path_on_host": disk, "is_root_device": false}),
        ),
    ] {
        monitor.demand("PUT", path, &body);
    }
    start(&mut monitor);
    for (told, says) in BEFORE {
        tell(&mut monitor, told, says);
    }
    let image = folder.join("image");
    save(&monitor, &image);
    let dialogue = AFTER.map(|(told, says)| json!({"told": told, "says": says}));
    let known = json!({"volumes": volumes_of(&forge::open(&image)), "dialogue": dialogue});
    let known = serde_json::to_string_pretty(&known).expect("it has a JSON form");
    fs::write(folder.join("known.json"), known + "\n").expect("it can be written down");
}
