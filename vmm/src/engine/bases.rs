//! Volumes of images that the machine's own volumes were at one moment: what a diff lies over, and what need not be captured
//! again.

use std::collections::BTreeMap;

use runnel_snapshot::capture::VolumeSource;
use runnel_snapshot::digest::BlobDigest;
use runnel_snapshot::image::below::BelowImage;
use runnel_snapshot::image::manifest::ImageVolume;
use runnel_snapshot::index::LAYERS_MAX;
use runnel_snapshot::volume::VolumeName;

use super::drives::FileIdentity;

/// What a volume was: the volume of an image.
#[derive(Clone)]
pub(super) struct Base {
    /// Where the image is.
    pub(super) place: BelowImage,
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
            below: self.place.clone(),
            volume: self.volume.clone(),
        }
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
    /// What the volume `name` was.
    pub(super) fn get(&self, name: &VolumeName) -> Option<&Base> {
        self.0.get(name)
    }

    /// The volume `name` is that of an image now.
    pub(super) fn set(&mut self, name: VolumeName, base: Base) {
        self.0.insert(name, base);
    }

    /// Those that a diff can lie over: of images that are here, which have not been removed since. Looks at every blob.
    pub(super) fn for_diff(&self) -> Self {
        self.those(|base| base.place.has(&base.volume))
    }

    /// Leaves out those over which no diff can lie, since their images are elsewhere and what it takes of them cannot be had.
    /// May take a while, as long as `goes_on` says so.
    pub(super) fn make_ready(&mut self, goes_on: &dyn Fn() -> bool) {
        self.0
            .retain(|name, base| match base.place.make_ready(&base.volume, goes_on) {
                Ok(()) => true,
                Err(error) => {
                    let (error, image) = (&error as &dyn std::error::Error, base.image);
                    tracing::warn!(error, %image, "a diff cannot lie over the image: {name} is saved whole");
                    false
                }
            });
    }

    /// Those that an image can have which lies over none: all of them is here. Looks at every blob.
    pub(super) fn for_full(&self) -> Self {
        self.those(|base| base.place.has_here(&base.volume))
    }

    fn those(&self, are: impl Fn(&Base) -> bool) -> Self {
        let those = self.0.iter().filter(|(_, base)| are(base));
        Self(those.map(|(name, base)| (name.clone(), base.clone())).collect())
    }
}
