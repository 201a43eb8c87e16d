//! Volumes of images on this host that the machine's own volumes were at one moment: what a diff lies over, and what need
//! not be captured again.

use std::collections::BTreeMap;
use std::sync::Arc;

use runnel_snapshot::capture::VolumeSource;
use runnel_snapshot::digest::BlobDigest;
use runnel_snapshot::image::layout::Layout;
use runnel_snapshot::image::manifest::ImageVolume;
use runnel_snapshot::index::LAYERS_MAX;
use runnel_snapshot::volume::VolumeName;

use super::drives::FileIdentity;

/// What a volume was: the volume of an image, in a directory of this host.
#[derive(Clone)]
pub(super) struct Base {
    /// The image's directory.
    pub(super) layout: Arc<Layout>,
    /// The volume there.
    pub(super) volume: ImageVolume,
    /// The image.
    pub(super) image: BlobDigest,
    /// The file that it was captured from, if that is a drive which the guest may only read.
    pub(super) file: Option<FileIdentity>,
}

impl Base {
    /// As the source of a volume that is still the same.
    pub(super) fn unchanged(&self) -> VolumeSource {
        VolumeSource::Unchanged {
            layout: self.layout.clone(),
            volume: self.volume.clone(),
        }
    }

    /// Whether the image has not been removed since.
    fn is_there(&self) -> bool {
        let mut blobs = self.volume.layers.iter().chain([&self.volume.index]);
        blobs.all(|blob| self.layout.open_blob(blob).is_ok())
    }

    /// Whether a volume of one layer more is possible.
    pub(super) fn has_room_for_a_layer(&self) -> bool {
        self.volume.layers.len() < usize::from(LAYERS_MAX) - 1
    }
}

/// The base of each volume that has one.
#[derive(Default)]
pub(super) struct Bases(BTreeMap<VolumeName, Base>);

impl Bases {
    /// The volume `name` is that of an image now.
    pub(super) fn set(&mut self, name: VolumeName, base: Base) {
        self.0.insert(name, base);
    }

    /// Those whose images have not been removed since. Looks at every blob.
    pub(super) fn that_are_there(&self) -> BTreeMap<VolumeName, Base> {
        let there = self.0.iter().filter(|(_, base)| base.is_there());
        there.map(|(name, base)| (name.clone(), base.clone())).collect()
    }
}
