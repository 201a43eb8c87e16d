//! A user of the tool, who runs its commands as processes.

#![allow(
    dead_code,
    reason = "each test file is a program of its own and uses what it needs"
)]

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use runnel_snapshot::capture::{CaptureSettings, Captured, Job, VolumeSource};
use runnel_snapshot::digest::BlobDigest;
use runnel_snapshot::image::Image;
use runnel_snapshot::image::below::BelowImage;
use runnel_snapshot::image::layout::Layout;
use runnel_snapshot::image::reference::Wanted;
use runnel_snapshot::pager::PageSet;
use runnel_snapshot::section::SavedSection;
use runnel_snapshot::state::MachineState;
use runnel_snapshot::units::{PAGE_SIZE, PageIndex};
use runnel_snapshot::volume::VolumeName;
use serde_json::Value;
use tempfile::TempDir;

pub(crate) const CHUNK: usize = 64 << 10;

/// A user with a store and a runtime directory of his own.
pub(crate) struct User {
    pub(crate) folder: TempDir,
}

impl User {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("run")).unwrap();
        fs::create_dir(folder.path().join("images")).unwrap();
        Self { folder }
    }

    pub(crate) fn store(&self) -> PathBuf {
        self.folder.path().join("images")
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_runnel"));
        command
            .args(arguments)
            .current_dir(self.folder.path())
            .env("XDG_RUNTIME_DIR", self.folder.path().join("run"))
            .env("RUNNEL_IMAGES", self.store())
            .env("HOME", self.folder.path())
            .stdin(Stdio::null());
        command
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// What a command that must succeed prints.
    pub(crate) fn output(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.output(arguments)).unwrap()
    }

    /// Saves the machine of an image again, a page of its memory changed, as a diff over that one.
    pub(crate) fn capture_over(&self, name: &str, below: &str) -> Captured {
        let path = self.store().join(below);
        let image = Image::open_directory(&path, &Wanted::Only).unwrap();
        let layout = Arc::new(Layout::open(&path).unwrap());
        let [memory, root] = &image.manifest.volumes[..] else {
            panic!("a machine of memory and a drive")
        };
        let mut changed = PageSet::new(memory.root.volume_bytes() / PAGE_SIZE);
        changed.insert_run(PageIndex(1), 1);
        let changes = VolumeSource::Changes {
            content: Arc::new(vec![7_u8; 4 * CHUNK]),
            changed,
            compares: false,
            below: BelowImage::whole(Arc::clone(&layout)),
            base: memory.clone(),
        };
        let unchanged = VolumeSource::Unchanged {
            below: BelowImage::whole(layout),
            volume: root.clone(),
        };
        let volumes = vec![(memory.name.clone(), changes), (root.name.clone(), unchanged)];
        let job = Job::new(CaptureSettings::default(), volumes).unwrap();
        let job = job.with_parent(image.digest());
        job.run(&self.store().join(name), image.state().unwrap()).unwrap()
    }

    /// Saves a machine of two volumes into the store: memory of data, zeros, zeros and data, and a drive of zeros.
    pub(crate) fn capture(&self, name: &str, parent: Option<BlobDigest>) -> Captured {
        let mut memory = vec![0; 4 * CHUNK];
        for (number, at) in [0, 3 * CHUNK].into_iter().enumerate() {
            for (offset, byte) in memory[at..at + CHUNK].iter_mut().enumerate() {
                *byte = (offset % 251) as u8 ^ number as u8;
            }
        }
        let volumes = vec![
            (VolumeName::Memory, VolumeSource::Content(Arc::new(memory))),
            (
                VolumeName::Drive("root".into()),
                VolumeSource::Content(Arc::new(vec![0_u8; 2 * CHUNK])),
            ),
        ];
        let section = |id: &str| SavedSection {
            kind: "vcpu".into(),
            id: id.into(),
            version: 1,
            state: Value::Null,
        };
        let machine = SavedSection {
            kind: "machine".into(),
            state: serde_json::json!({ "drives": [
                { "id": "root", "in_image": true, "bytes": 2 * CHUNK, "is_read_only": false },
                { "id": "scratch", "in_image": false, "bytes": 1 << 20, "is_read_only": true },
            ] }),
            ..section("")
        };
        let state = MachineState::new(1_700_000_000_000, vec![section("0"), section("1"), machine]);
        let mut job = Job::new(CaptureSettings::default(), volumes).unwrap();
        if let Some(parent) = parent {
            job = job.with_parent(parent);
        }
        job.run(&self.store().join(name), state).unwrap()
    }
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
