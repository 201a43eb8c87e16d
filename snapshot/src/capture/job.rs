//! A capture: some volumes and a machine state, of one moment, become one image.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;
use std::sync::Arc;

use super::CaptureSettings;
use super::changes::{Changes, Hot, HotLayer, Merge};
use super::content::Content;
use super::image_content::ImageContent;
use super::pool::capture_volume;
use super::progress::{Progress, Stage};
use super::volume_writer::{VolumeWriter, WriteError, WrittenVolume};
use crate::blobs::{Blob, BlobError, BlobStore};
use crate::digest::BlobDigest;
use crate::image::below::{BelowError, BelowImage};
use crate::image::layout::Layout;
use crate::image::manifest::{ImageVolume, ManifestDraft, Urls};
use crate::image::publication::{Publication, PublishError};
use crate::image::reference::is_tag;
use crate::index::{Entry, IndexError, IndexReader, LAYERS_MAX};
use crate::pager::PageSet;
use crate::state::{FirstChunk, MachineState, StateError};
use crate::units::{ByteRange, ChunkIndex};
use crate::volume::VolumeName;
use crate::working_set::WorkingSet;

/// How much of an index is copied at a time.
const COPY_BYTES: usize = 1 << 20;

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// It was called off.
    #[error("the snapshot was cancelled")]
    Cancelled,
    /// Content cannot be read.
    #[error("reading {range} of volume {volume} failed")]
    Read {
        /// Which volume.
        volume: VolumeName,
        /// Which bytes.
        range: ByteRange,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// zstd cannot be set up.
    #[error("no compressor of level {level} can be set up")]
    Compressor {
        /// The level asked for.
        level: i32,
        /// zstd's reason.
        #[source]
        source: io::Error,
    },
    /// zstd failed.
    #[error("compressing {range} of volume {volume} failed")]
    Compress {
        /// Which volume.
        volume: VolumeName,
        /// Which bytes.
        range: ByteRange,
        /// zstd's reason.
        #[source]
        source: io::Error,
    },
    /// The image cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The image cannot be published.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// The state cannot be encoded.
    #[error(transparent)]
    State(#[from] StateError),
    /// A volume that did not change, or what a volume lies over, cannot be taken over.
    #[error("the volume {volume} cannot be taken over from {from}")]
    TakeOver {
        /// Which volume.
        volume: VolumeName,
        /// The image that has it.
        from: String,
        /// Why.
        #[source]
        source: Box<TakeOverError>,
    },
    /// The index of the image that a volume's changes lie over cannot be had.
    #[error("the index of the image that volume {volume} lies over cannot be read")]
    Below {
        /// Which volume.
        volume: VolumeName,
        /// Why.
        #[source]
        source: Box<IndexError>,
    },
    /// Changes of a volume that is not that of the image.
    #[error(
        "volume {volume} has {bytes} bytes, and that of the image which it should lie over {below}: capture all of it"
    )]
    OtherLength {
        /// Which volume.
        volume: VolumeName,
        /// Its length.
        bytes: u64,
        /// That of the image's.
        below: u64,
    },
    /// Changes over as many layers as there may be.
    #[error(
        "volume {0} lies over {LAYERS_MAX} layers already, as many as there may be: capture all of it, or make one of them \
         with `runnel image squash`"
    )]
    TooManyLayers(VolumeName),
    /// Two volumes of one name.
    #[error("there are two volumes named {0}")]
    Twice(VolumeName),
    /// No thread can be started.
    #[error("no thread that compresses can be started")]
    Thread(#[source] io::Error),
}

/// Why a volume of another image cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum TakeOverError {
    /// Its index cannot be had.
    #[error(transparent)]
    Below(#[from] BelowError),
    /// Its index makes no sense.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// Its index, as a blob.
    #[error(transparent)]
    Blob(#[from] BlobError),
}

/// Where a volume comes from.
pub enum VolumeSource {
    /// It is captured.
    Content(Arc<dyn Content>),
    /// It is byte for byte the volume of an image: a read-only drive that was captured before.
    Unchanged {
        /// Where the image is.
        below: BelowImage,
        /// The volume there.
        volume: ImageVolume,
    },
    /// It lies over the volume of an image, and is as long. What changed becomes a diff layer, and the image's
    /// layers that are still used are taken over; the new image is cut into chunks as that one is.
    Changes {
        /// The volume as it is now. Only chunks with changed pages are read.
        content: Arc<dyn Content>,
        /// The pages that may differ from the image's: all others are as they are there.
        changed: PageSet,
        /// Whether most of them are as they are there, and are to be told apart by their digests.
        compares: bool,
        /// Where the image below is.
        below: BelowImage,
        /// The volume there.
        base: ImageVolume,
    },
    /// It is byte for byte the volume of an image, and becomes one full layer, cut into chunks as it is there.
    Squashed(Arc<ImageContent>),
    /// It is byte for byte the volume of an image of this host, with a layer over the others that has some of its chunks
    /// again, laid together.
    HotFirst {
        /// Where the image's blobs are read.
        store: Arc<dyn BlobStore>,
        /// The image's directory.
        layout: Arc<Layout>,
        /// The volume there.
        base: ImageVolume,
        /// The chunks, each once, in the order in which they are to lie.
        chunks: Vec<ChunkIndex>,
    },
}

impl VolumeSource {
    fn bytes(&self) -> u64 {
        match self {
            Self::Content(content) | Self::Changes { content, .. } => content.bytes(),
            Self::Unchanged { volume, .. } => volume.root.volume_bytes(),
            Self::HotFirst { base, .. } => base.root.volume_bytes(),
            Self::Squashed(content) => content.bytes(),
        }
    }
}

/// What is to be captured.
pub struct Job {
    settings: CaptureSettings,
    volumes: Vec<(VolumeName, VolumeSource)>,
    /// The chunks whose entries go into the machine state.
    first_chunks: Vec<(VolumeName, ChunkIndex)>,
    parent: Option<BlobDigest>,
    working_set: Option<Recorded>,
    name: Option<String>,
    progress: Arc<Progress>,
}

/// Where a working set comes from.
enum Recorded {
    /// From another image of the same chunks, which lies there.
    Of(Arc<Layout>, Blob),
    New(WorkingSet),
}

/// An image that was made.
#[derive(Clone, Debug)]
pub struct Captured {
    /// Its manifest.
    pub manifest: Blob,
    /// Its volumes.
    pub volumes: Vec<ImageVolume>,
    /// Where the layers can be had that are not with it.
    pub urls: Urls,
}

impl Job {
    /// A capture of these volumes, all as they were at one moment.
    ///
    /// # Errors
    /// When two have the same name.
    pub fn new(
        settings: CaptureSettings,
        volumes: Vec<(VolumeName, VolumeSource)>,
    ) -> Result<Self, CaptureError> {
        let mut names = BTreeSet::new();
        if let Some((name, _)) = volumes.iter().find(|(name, _)| !names.insert(name)) {
            return Err(CaptureError::Twice(name.clone()));
        }
        let progress = Progress::new(
            volumes
                .iter()
                .map(|(name, source)| (name.clone(), source.bytes())),
        );
        let progress = Arc::new(progress);
        Ok(Self {
            settings,
            volumes,
            first_chunks: Vec::new(),
            parent: None,
            working_set: None,
            name: None,
            progress,
        })
    }

    /// The chunks that a resume needs first, the most urgent first: their places are written into the machine state.
    #[must_use]
    pub fn with_first_chunks(mut self, first_chunks: Vec<(VolumeName, ChunkIndex)>) -> Self {
        self.first_chunks = first_chunks;
        self
    }

    /// The image that this one descends from: the one below it, or that of which the machine was resumed.
    #[must_use]
    pub fn with_parent(mut self, parent: BlobDigest) -> Self {
        self.parent = Some(parent);
        self
    }

    /// The working set of an image that is written anew, which lies in `layout`.
    #[must_use]
    pub fn with_working_set(mut self, layout: Arc<Layout>, working_set: Blob) -> Self {
        self.working_set = Some(Recorded::Of(layout, working_set));
        self
    }

    /// What was recorded with a machine of this image's volumes.
    #[must_use]
    pub fn with_recorded(mut self, working_set: WorkingSet) -> Self {
        self.working_set = Some(Recorded::New(working_set));
        self
    }

    /// The name of the image in its `index.json`: a tag.
    #[must_use]
    pub fn with_name(mut self, name: String) -> Self {
        self.name = Some(name);
        self
    }

    /// To watch it, and to call it off, from another thread.
    #[must_use]
    pub fn progress(&self) -> Arc<Progress> {
        Arc::clone(&self.progress)
    }

    /// Makes the image at `target`, which must not exist.
    ///
    /// # Errors
    /// When anything fails or it was cancelled; nothing is left of the image then.
    pub fn run(self, target: &Path, mut state: MachineState) -> Result<Captured, CaptureError> {
        // Hours of copying must not end at this.
        if let Some(name) = self.name.as_ref().filter(|name| !is_tag(name)) {
            return Err(PublishError::BadName(name.clone()).into());
        }
        let publication = Publication::begin(target)?;
        let mut volumes = Vec::new();
        let mut places: BTreeMap<(VolumeName, ChunkIndex), Entry> = BTreeMap::new();
        for (position, (name, source)) in self.volumes.iter().enumerate() {
            let wanted = self.first_chunks.iter().filter(|(volume, _)| volume == name);
            let wanted: BTreeSet<ChunkIndex> = wanted.map(|(_, chunk)| *chunk).collect();
            let WrittenVolume { volume, wanted } = match source {
                VolumeSource::Content(content) => self.capture(
                    &publication,
                    position,
                    name,
                    content.as_ref(),
                    &self.settings,
                    wanted,
                )?,
                VolumeSource::Squashed(content) => {
                    let chunk_size = content.chunk_size();
                    let settings = CaptureSettings {
                        chunk_size,
                        ..self.settings.clone()
                    };
                    self.capture(&publication, position, name, content.as_ref(), &settings, wanted)?
                }
                VolumeSource::Unchanged { below, volume } => {
                    self.take_over(&publication, position, name, below, volume, &wanted)?
                }
                VolumeSource::Changes {
                    content,
                    changed,
                    compares,
                    below,
                    base,
                } => {
                    let index = self.base_index(name, below, base)?;
                    let changes = Changes {
                        name,
                        content: content.as_ref(),
                        changed,
                        compares: *compares,
                        base,
                        index: &index,
                    };
                    self.capture_changes(&publication, position, changes, below, wanted)?
                }
                VolumeSource::HotFirst {
                    store,
                    layout,
                    base,
                    chunks,
                } => {
                    let index = self.base_index(name, &BelowImage::whole(layout.clone()), base)?;
                    let hot = Hot {
                        name,
                        store,
                        base,
                        index: &index,
                        chunks,
                    };
                    self.lay_together(&publication, position, hot, layout, wanted)?
                }
            };
            places.extend(
                wanted
                    .into_iter()
                    .map(|(chunk, entry)| ((name.clone(), chunk), entry)),
            );
            volumes.push(volume);
        }
        state.first_chunks = self
            .first_chunks
            .iter()
            .filter_map(|(volume, chunk)| {
                let entry = places.remove(&(volume.clone(), *chunk))?; // once, however often it is named
                Some(FirstChunk {
                    volume: volume.clone(),
                    chunk: *chunk,
                    entry,
                })
            })
            .collect();
        let working_set = match &self.working_set {
            None => None,
            Some(Recorded::Of(layout, blob)) => {
                publication.take_over(layout, blob)?;
                Some(*blob)
            }
            Some(Recorded::New(set)) => Some(publication.add(&set.to_bytes())?),
        };
        let state_bytes = state.encode()?;
        let state = publication.add(&state_bytes)?;
        self.progress.set_stage(Stage::Publishing);
        // The last moment at which nothing is there yet.
        if self.progress.is_cancelled() {
            return Err(CaptureError::Cancelled);
        }
        let draft = ManifestDraft {
            state,
            state_inline: Some(state_bytes),
            volumes,
            working_set,
            parent: self.parent,
            urls: publication.left(),
        };
        let manifest = publication.publish(&draft, self.name.as_deref())?;
        self.progress.set_stage(Stage::Published);
        Ok(Captured {
            manifest,
            volumes: draft.volumes,
            urls: draft.urls,
        })
    }

    fn capture(
        &self,
        publication: &Publication,
        position: usize,
        name: &VolumeName,
        content: &dyn Content,
        settings: &CaptureSettings,
        wanted: BTreeSet<ChunkIndex>,
    ) -> Result<WrittenVolume, CaptureError> {
        let mut writer = VolumeWriter::new(publication, content.bytes(), settings.chunk_size, wanted)?;
        capture_volume(name, content, settings, (&self.progress, position), &mut writer)?;
        let written = writer.finish(publication, name.clone())?;
        self.progress.set_stored(position, written.volume.stored_bytes());
        Ok(written)
    }

    fn capture_changes(
        &self,
        publication: &Publication,
        position: usize,
        changes: Changes<'_>,
        below: &BelowImage,
        wanted: BTreeSet<ChunkIndex>,
    ) -> Result<WrittenVolume, CaptureError> {
        let name = changes.name.clone();
        let merge = Merge::new(changes, &self.progress)?;
        if !merge.fits() {
            return Err(CaptureError::TooManyLayers(name));
        }
        // First, so that one that is missing is told before anything is read.
        for layer in merge.kept_layers() {
            publication.take_over_layer(below, &layer)?;
        }
        let written = merge.capture(&self.settings, publication, (&self.progress, position), wanted)?;
        self.progress.set_stored(position, written.volume.stored_bytes());
        Ok(written)
    }

    fn lay_together(
        &self,
        publication: &Publication,
        position: usize,
        hot: Hot<'_>,
        layout: &Layout,
        wanted: BTreeSet<ChunkIndex>,
    ) -> Result<WrittenVolume, CaptureError> {
        let layer = HotLayer::new(hot, &self.progress)?;
        for kept in layer.kept_layers() {
            publication.take_over(layout, &kept)?;
        }
        let written = layer.capture(
            self.settings.level,
            publication,
            (&self.progress, position),
            wanted,
        )?;
        self.progress.set_stored(position, written.volume.stored_bytes());
        Ok(written)
    }

    fn take_over(
        &self,
        publication: &Publication,
        position: usize,
        name: &VolumeName,
        below: &BelowImage,
        volume: &ImageVolume,
        wanted: &BTreeSet<ChunkIndex>,
    ) -> Result<WrittenVolume, CaptureError> {
        // Of an image of another host it comes with word of where its layers are.
        let index = self.base_index(name, below, volume)?;
        for layer in &volume.layers {
            publication.take_over_layer(below, layer)?;
        }
        match below {
            BelowImage::Here { layout, .. } => publication.take_over(layout, &volume.index)?,
            // What every image has with it, wherever its layers are.
            BelowImage::Away(_) => self.copy_index(publication, name, below, volume)?,
        }
        publication.add(&volume.root.to_bytes())?;
        let mut found = BTreeMap::new();
        for chunk in wanted {
            let entry = index.entry(*chunk);
            match entry.map_err(|error| not_taken_over(name, below, error.into()))? {
                Entry::Zero => {}
                entry => _ = found.insert(*chunk, entry),
            }
        }
        self.progress.add_done(position, volume.root.volume_bytes());
        self.progress.set_stored(position, volume.stored_bytes());
        Ok(WrittenVolume {
            volume: ImageVolume {
                name: name.clone(),
                ..volume.clone()
            },
            wanted: found,
        })
    }

    /// The index of a volume of the image below. Of one on another host it is waited for, unless this is called off.
    fn base_index(
        &self,
        name: &VolumeName,
        below: &BelowImage,
        volume: &ImageVolume,
    ) -> Result<IndexReader, CaptureError> {
        let index = below.index(volume, &|| !self.progress.is_cancelled());
        index.map_err(|error| self.unless_cancelled(not_taken_over(name, below, error.into())))
    }

    fn copy_index(
        &self,
        publication: &Publication,
        name: &VolumeName,
        below: &BelowImage,
        volume: &ImageVolume,
    ) -> Result<(), CaptureError> {
        let failed = |error| not_taken_over(name, below, error);
        let store = below.index_store(volume, &|| !self.progress.is_cancelled());
        let store = store.map_err(|error| self.unless_cancelled(failed(error.into())))?;
        let (blob, mut copy) = (volume.index, publication.blob()?);
        let mut piece = vec![0; COPY_BYTES];
        while copy.bytes() < blob.bytes {
            let left = usize::try_from(blob.bytes - copy.bytes()).unwrap_or(COPY_BYTES);
            let piece = &mut piece[..left.min(COPY_BYTES)];
            let read = store.read_range(&blob, copy.bytes(), piece);
            read.map_err(|error| failed(error.into()))?;
            copy.write(piece)?;
        }
        let found = copy.finish()?.digest;
        match found == blob.digest {
            true => Ok(()),
            false => Err(failed(TakeOverError::Blob(BlobError::Corrupt {
                digest: blob.digest,
                found,
            }))),
        }
    }

    /// What went wrong, or that it was called off: then nothing did.
    fn unless_cancelled(&self, error: CaptureError) -> CaptureError {
        match self.progress.is_cancelled() {
            true => CaptureError::Cancelled,
            false => error,
        }
    }
}

fn not_taken_over(name: &VolumeName, below: &BelowImage, source: TakeOverError) -> CaptureError {
    CaptureError::TakeOver {
        volume: name.clone(),
        from: below.to_string(),
        source: Box::new(source),
    }
}
