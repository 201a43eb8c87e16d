//! The manifest of an image: OCI's JSON (image-spec 1.1, manifest.md, descriptor.md), and what Runnel reads in it.
//!
//! The manifest's `layers` hold, for each volume, under the annotation [`VOLUME`]: its layers in order, its index,
//! and the index's root, whose content is also inline (`data`), so that one request brings what a resume needs to
//! find its first chunks. The machine state is inline too, unless it is unusually large: it is needed at once, and
//! would cost a resume from afar a round trip of its own.

use std::collections::{BTreeMap, BTreeSet};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use crate::blobs::Blob;
use crate::digest::BlobDigest;
use crate::index::{IndexRoot, LAYERS_MAX, RootError};
use crate::source::SourceVolume;
use crate::volume::VolumeName;

/// The manifest's own media type.
pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// What kind of artifact the manifest describes.
pub const IMAGE: &str = "application/vnd.runnel.image.v1";
/// Machine state: JSON, compressed.
pub const MACHINE_STATE: &str = "application/vnd.runnel.machine-state.v1+json+zstd";
/// A layer: chunks of one volume.
pub const LAYER: &str = "application/vnd.runnel.volume.v1+zstd";
/// The segments of a volume's index.
pub const INDEX: &str = "application/vnd.runnel.volume-index.v1";
/// The root of a volume's index.
pub const INDEX_ROOT: &str = "application/vnd.runnel.volume-index-root.v1";
/// The chunks that a resumed machine touches first, in order.
pub const WORKING_SET: &str = "application/vnd.runnel.working-set.v1";

/// Annotation of a descriptor: the volume it belongs to.
pub const VOLUME: &str = "vnd.runnel.volume";
/// Annotation of a layer: `full` or `diff`, as [`LayerKind`] explains, or a kind that a later version brings.
pub const LAYER_KIND: &str = "vnd.runnel.layer";
/// Annotation of the manifest: the digest of the manifest that this image descends from.
pub const PARENT: &str = "vnd.runnel.parent";

/// What a layer has of its volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerKind {
    /// Every byte, in order. It lies below all others; alone, it is the volume.
    Full,
    /// What changed since the layers below it: whole chunks, and pages of chunks.
    Diff,
}

impl LayerKind {
    /// As the annotation [`LAYER_KIND`] says it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Diff => "diff",
        }
    }
}

/// Where blobs can be had that are not with their image: whole URLs, of http and https.
pub type Urls = BTreeMap<BlobDigest, Vec<String>>;

/// The most URLs of one layer that are read; more are left out.
pub const URLS_MAX: usize = 16;

/// The longest of them; a longer one is left out.
pub const URL_BYTES_MAX: usize = 2048;

/// What registries accept as a manifest, 4 MiB.
pub const MANIFEST_BYTES_MAX: u64 = 4 << 20;

/// The largest machine state that is inline: with the rest of the manifest it still fits into what a server sends on a
/// new connection before it must wait for an answer (RFC 6928, 14 KiB).
pub const INLINE_STATE_BYTES_MAX: usize = 8 << 10;

/// More volumes than a machine can have drives.
pub const VOLUMES_MAX: usize = 128;

/// Why a manifest is refused.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// It is no OCI manifest.
    #[error("the manifest is not JSON of an OCI image manifest")]
    Json(#[from] serde_json::Error),
    /// It describes something else, or something newer.
    #[error(
        "the manifest's {what} is {found:?}, and this Runnel reads {expected:?}: it is no Runnel image, or a newer Runnel wrote it"
    )]
    Kind {
        /// Which field.
        what: &'static str,
        /// What it says.
        found: String,
        /// What it should say.
        expected: &'static str,
    },
    /// A descriptor is not understood.
    #[error("blob {digest} of the manifest: {reason}")]
    Descriptor {
        /// The blob.
        digest: BlobDigest,
        /// What is wrong.
        reason: String,
    },
    /// A descriptor is of a kind that a later version brings.
    #[error("blob {digest} of the manifest: {what}, which this Runnel does not read: use a newer one")]
    Newer {
        /// The blob.
        digest: BlobDigest,
        /// What it is.
        what: String,
    },
    /// A volume lacks something.
    #[error("volume {volume} of the manifest: {reason}")]
    Volume {
        /// Which volume.
        volume: VolumeName,
        /// What is wrong.
        reason: String,
    },
    /// The inline root of an index makes no sense.
    #[error("volume {volume} of the manifest has no usable index root")]
    Root {
        /// Which volume.
        volume: VolumeName,
        /// What is wrong.
        #[source]
        source: RootError,
    },
    /// The manifest would be, or is, larger than registries accept.
    #[error(
        "a manifest of {bytes} bytes is larger than the {MANIFEST_BYTES_MAX} that registries accept: the image's volumes are too large together"
    )]
    TooLarge {
        /// Its length.
        bytes: u64,
    },
    /// Anything else.
    #[error("the manifest is not usable: {0}")]
    Unusable(String),
}

/// An OCI descriptor. Fields that Runnel does not know are ignored, as the specification asks.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What the blob is.
    pub media_type: String,
    /// The blob's name.
    pub digest: BlobDigest,
    /// The blob's length.
    pub size: u64,
    /// Where else the blob can be had, as far as that is text.
    #[serde(default, deserialize_with = "texts", skip_serializing_if = "Vec::is_empty")]
    pub urls: Vec<String>,
    /// The blob's content, base64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<String>,
    /// What the descriptor's subject is, where the descriptor says it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// What the blob is for.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

/// Those of a list that are text; none of what is no list. An image is good without.
fn texts<'d, D: Deserializer<'d>>(from: D) -> Result<Vec<String>, D::Error> {
    let list = match Value::deserialize(from)? {
        Value::Array(list) => list,
        _ => Vec::new(),
    };
    let text = |value: Value| match value {
        Value::String(text) => Some(text),
        _ => None,
    };
    Ok(list.into_iter().filter_map(text).collect())
}

impl Descriptor {
    /// A descriptor without annotations.
    #[must_use]
    pub fn new(media_type: &str, blob: Blob) -> Self {
        Self {
            media_type: media_type.to_owned(),
            digest: blob.digest,
            size: blob.bytes,
            urls: Vec::new(),
            data: None,
            artifact_type: None,
            annotations: BTreeMap::new(),
        }
    }

    /// The blob it describes.
    #[must_use]
    pub fn blob(&self) -> Blob {
        Blob {
            digest: self.digest,
            bytes: self.size,
        }
    }

    fn annotated(mut self, key: &str, value: &str) -> Self {
        self.annotations.insert(key.to_owned(), value.to_owned());
        self
    }
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct OciManifest {
    schema_version: u32,
    #[serde(default)]
    media_type: String,
    #[serde(default)]
    artifact_type: String,
    config: Descriptor,
    #[serde(default)]
    layers: Vec<Descriptor>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    annotations: BTreeMap<String, String>,
}

/// A volume of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageVolume {
    /// Its name.
    pub name: VolumeName,
    /// Its layers, as [`crate::index::LayerNumber`] counts them, the lowest first.
    pub layers: Vec<Blob>,
    /// Whether the first of them is a full one: it is not where each of its frames was overwritten by now. All others are
    /// diff layers.
    pub has_full_layer: bool,
    /// The blob of its index's segments.
    pub index: Blob,
    /// The root of its index.
    pub root: IndexRoot,
}

impl ImageVolume {
    /// The layers with their kinds.
    pub fn layers_with_kinds(&self) -> impl Iterator<Item = (Blob, LayerKind)> {
        let kind = |number| match number {
            0 if self.has_full_layer => LayerKind::Full,
            _ => LayerKind::Diff,
        };
        let layers = self.layers.iter().enumerate();
        layers.map(move |(number, blob)| (*blob, kind(number)))
    }

    /// The volume, as a source of chunks has it.
    #[must_use]
    pub fn as_source(&self) -> SourceVolume {
        SourceVolume {
            name: self.name.clone(),
            bytes: self.root.volume_bytes(),
            chunk_size: self.root.chunk_size(),
        }
    }

    /// How long the layers are, as [`crate::index::IndexReader`] wants to know it.
    #[must_use]
    pub fn layer_bytes(&self) -> Vec<u64> {
        self.layers.iter().map(|layer| layer.bytes).collect()
    }

    /// What the volume takes in its image.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        let blobs = self.layers.iter().chain([&self.index]).map(|blob| blob.bytes);
        // The lengths are a manifest's word.
        blobs.fold(self.root_blob().bytes, u64::saturating_add)
    }

    /// The blob that holds the root.
    #[must_use]
    pub fn root_blob(&self) -> Blob {
        let bytes = self.root.to_bytes();
        Blob {
            digest: BlobDigest::of(&bytes),
            bytes: bytes.len() as u64,
        }
    }
}

/// A manifest that was checked: every volume is complete, every number within its cap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageManifest {
    /// The digest of the manifest's bytes.
    pub digest: BlobDigest,
    /// The machine state.
    pub state: Blob,
    /// Its bytes, if they are inline; they match its digest.
    pub state_inline: Option<Vec<u8>>,
    /// The volumes, each name once.
    pub volumes: Vec<ImageVolume>,
    /// The recorded working set.
    pub working_set: Option<Blob>,
    /// The image that this one descends from.
    pub parent: Option<BlobDigest>,
    /// Where layers can be had that need not be with the image. Nobody has looked whether they can.
    pub urls: Urls,
}

/// What a manifest is made from.
#[derive(Clone, Debug)]
pub struct ManifestDraft {
    /// The machine state.
    pub state: Blob,
    /// Its bytes, which go inline if they are few.
    pub state_inline: Option<Vec<u8>>,
    /// The volumes.
    pub volumes: Vec<ImageVolume>,
    /// The recorded working set.
    pub working_set: Option<Blob>,
    /// The image that this one descends from.
    pub parent: Option<BlobDigest>,
    /// Where the layers can be had that are not with the image.
    pub urls: Urls,
}

impl ManifestDraft {
    /// The manifest's bytes.
    ///
    /// # Errors
    /// When it would be too large.
    pub fn to_bytes(&self) -> Result<Vec<u8>, ManifestError> {
        let mut layers: Vec<Descriptor> = self.volumes.iter().flat_map(volume_descriptors).collect();
        for layer in layers.iter_mut().filter(|layer| layer.media_type == LAYER) {
            layer.urls = self.urls.get(&layer.digest).cloned().unwrap_or_default();
        }
        layers.extend(self.working_set.map(|blob| Descriptor::new(WORKING_SET, blob)));
        let mut config = Descriptor::new(MACHINE_STATE, self.state);
        let inline = self.state_inline.as_ref();
        config.data = inline
            .filter(|bytes| bytes.len() <= INLINE_STATE_BYTES_MAX)
            .map(|bytes| BASE64.encode(bytes));
        let manifest = OciManifest {
            schema_version: 2,
            media_type: MANIFEST.to_owned(),
            artifact_type: IMAGE.to_owned(),
            config,
            layers,
            annotations: self
                .parent
                .map(|parent| (PARENT.to_owned(), parent.to_string()))
                .into_iter()
                .collect(),
        };
        let bytes = serde_json::to_vec_pretty(&manifest)?;
        if bytes.len() as u64 > MANIFEST_BYTES_MAX {
            return Err(ManifestError::TooLarge {
                bytes: bytes.len() as u64,
            });
        }
        Ok(bytes)
    }
}

fn volume_descriptors(volume: &ImageVolume) -> Vec<Descriptor> {
    let name = volume.name.to_string();
    let layer = |(blob, kind): (Blob, LayerKind)| {
        Descriptor::new(LAYER, blob)
            .annotated(VOLUME, &name)
            .annotated(LAYER_KIND, kind.name())
    };
    let mut descriptors: Vec<Descriptor> = volume.layers_with_kinds().map(layer).collect();
    descriptors.push(Descriptor::new(INDEX, volume.index).annotated(VOLUME, &name));
    let mut root = Descriptor::new(INDEX_ROOT, volume.root_blob()).annotated(VOLUME, &name);
    root.data = Some(BASE64.encode(volume.root.to_bytes()));
    descriptors.push(root);
    descriptors
}

impl ImageManifest {
    /// Reads a manifest. Whoever asked for a digest compares it with [`Self::digest`].
    ///
    /// # Errors
    /// When it is no manifest of an image, incomplete, or of a newer Runnel.
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        if bytes.len() as u64 > MANIFEST_BYTES_MAX {
            return Err(ManifestError::TooLarge {
                bytes: bytes.len() as u64,
            });
        }
        let manifest: OciManifest = serde_json::from_slice(bytes)?;
        if manifest.schema_version != 2 {
            return Err(ManifestError::Unusable(format!(
                "its schemaVersion is {}, not 2",
                manifest.schema_version
            )));
        }
        expect_kind("artifactType", &manifest.artifact_type, IMAGE)?;
        expect_kind("config mediaType", &manifest.config.media_type, MACHINE_STATE)?;
        let parent = match manifest.annotations.get(PARENT) {
            Some(text) => Some(
                text.parse()
                    .map_err(|error| ManifestError::Unusable(format!("{PARENT}: {error}")))?,
            ),
            None => None,
        };
        let (volumes, working_set) = read_layers(&manifest.layers)?;
        let urls = read_urls(&manifest.layers);
        Ok(Self {
            digest: BlobDigest::of(bytes),
            state: manifest.config.blob(),
            state_inline: read_inline(&manifest.config)?,
            volumes,
            working_set,
            parent,
            urls,
        })
    }

    /// Every blob of the image except the manifest, each once.
    #[must_use]
    pub fn blobs(&self) -> Vec<Blob> {
        let volumes = self.volumes.iter().flat_map(|volume| {
            let own = [volume.index, volume.root_blob()];
            volume.layers.iter().copied().chain(own)
        });
        let mut seen = BTreeSet::new();
        let all = std::iter::once(self.state).chain(volumes).chain(self.working_set);
        all.filter(|blob| seen.insert(blob.digest)).collect()
    }
}

/// Where layers can be had, as far as that is said in a way that is understood: what is not says nothing against them.
fn read_urls(descriptors: &[Descriptor]) -> Urls {
    let is_usable = |url: &&String| {
        let has_scheme = url.starts_with("http://") || url.starts_with("https://");
        has_scheme && url.len() <= URL_BYTES_MAX && url.bytes().all(|c| c.is_ascii_graphic())
    };
    let layers = descriptors
        .iter()
        .filter(|descriptor| descriptor.media_type == LAYER);
    let urls = layers.map(|layer| {
        let urls = layer.urls.iter().filter(is_usable).take(URLS_MAX);
        (layer.digest, urls.cloned().collect::<Vec<_>>())
    });
    urls.filter(|(_, urls)| !urls.is_empty()).collect()
}

fn expect_kind(what: &'static str, found: &str, expected: &'static str) -> Result<(), ManifestError> {
    if found == expected {
        return Ok(());
    }
    Err(ManifestError::Kind {
        what,
        found: found.chars().take(100).collect(),
        expected,
    })
}

/// A volume of which not everything was seen yet.
#[derive(Default)]
struct Parts {
    layers: Vec<Blob>,
    has_full_layer: bool,
    index: Option<Blob>,
    root: Option<IndexRoot>,
}

fn read_layers(descriptors: &[Descriptor]) -> Result<(Vec<ImageVolume>, Option<Blob>), ManifestError> {
    let mut working_set = None;
    // In the order of their first mention.
    let mut volumes: Vec<(VolumeName, Parts)> = Vec::new();
    for descriptor in descriptors {
        let refuse = |reason: String| ManifestError::Descriptor {
            digest: descriptor.digest,
            reason,
        };
        if descriptor.media_type == WORKING_SET {
            if working_set.replace(descriptor.blob()).is_some() {
                return Err(refuse("it is a second working set".into()));
            }
            continue;
        }
        let name = descriptor
            .annotations
            .get(VOLUME)
            .ok_or_else(|| refuse(format!("it has no {VOLUME}")))?;
        let name: VolumeName = name
            .parse()
            .map_err(|error| refuse(format!("{VOLUME}: {error}")))?;
        let position = match volumes.iter().position(|(other, _)| *other == name) {
            Some(position) => position,
            None if volumes.len() < VOLUMES_MAX => {
                volumes.push((name.clone(), Parts::default()));
                volumes.len() - 1
            }
            None => return Err(refuse(format!("more than {VOLUMES_MAX} volumes"))),
        };
        let (_, parts) = &mut volumes[position];
        read_descriptor(descriptor, &name, parts)?;
    }
    let volumes = volumes
        .into_iter()
        .map(|(name, parts)| complete(name, parts))
        .collect::<Result<_, _>>()?;
    Ok((volumes, working_set))
}

fn read_descriptor(
    descriptor: &Descriptor,
    volume: &VolumeName,
    parts: &mut Parts,
) -> Result<(), ManifestError> {
    let refuse = |reason: String| {
        Err(ManifestError::Descriptor {
            digest: descriptor.digest,
            reason,
        })
    };
    let newer = |what: String| {
        Err(ManifestError::Newer {
            digest: descriptor.digest,
            what,
        })
    };
    match descriptor.media_type.as_str() {
        LAYER => match descriptor.annotations.get(LAYER_KIND).map(String::as_str) {
            _ if parts.layers.len() >= usize::from(LAYERS_MAX) => {
                return refuse(format!("volume {volume} has more than {LAYERS_MAX} layers"));
            }
            Some("full") if parts.has_full_layer => {
                return refuse(format!("it is a second full layer of volume {volume}"));
            }
            Some("full") if !parts.layers.is_empty() => {
                return refuse(format!("it is a full layer of volume {volume} over others"));
            }
            Some("full") => {
                parts.has_full_layer = true;
                parts.layers.push(descriptor.blob());
            }
            Some("diff") => parts.layers.push(descriptor.blob()),
            kind => {
                let kind = kind.unwrap_or("no").chars().take(40).collect::<String>();
                return newer(format!("it is a layer of {kind} kind"));
            }
        },
        INDEX => {
            if parts.index.replace(descriptor.blob()).is_some() {
                return refuse(format!("it is a second index of volume {volume}"));
            }
        }
        INDEX_ROOT => {
            if parts.root.replace(read_root(descriptor, volume)?).is_some() {
                return refuse(format!("it is a second index root of volume {volume}"));
            }
        }
        other => {
            let other: String = other.chars().take(100).collect();
            return newer(format!("its media type is {other:?}"));
        }
    }
    Ok(())
}

fn read_root(descriptor: &Descriptor, volume: &VolumeName) -> Result<IndexRoot, ManifestError> {
    let bytes = read_inline(descriptor)?.ok_or_else(|| ManifestError::Descriptor {
        digest: descriptor.digest,
        reason: "an index root must be inline".to_owned(),
    })?;
    IndexRoot::parse(&bytes).map_err(|source| ManifestError::Root {
        volume: volume.clone(),
        source,
    })
}

/// The inline content of a descriptor, if it has any.
fn read_inline(descriptor: &Descriptor) -> Result<Option<Vec<u8>>, ManifestError> {
    let refuse = |reason: &str| ManifestError::Descriptor {
        digest: descriptor.digest,
        reason: reason.to_owned(),
    };
    let Some(data) = descriptor.data.as_deref() else {
        return Ok(None);
    };
    let bytes = BASE64
        .decode(data)
        .map_err(|_| refuse("its inline content is not base64"))?;
    if bytes.len() as u64 != descriptor.size || BlobDigest::of(&bytes) != descriptor.digest {
        return Err(refuse("its inline content does not match its digest"));
    }
    Ok(Some(bytes))
}

fn complete(volume: VolumeName, parts: Parts) -> Result<ImageVolume, ManifestError> {
    let Parts {
        layers,
        has_full_layer,
        index: Some(index),
        root: Some(root),
    } = parts
    else {
        return Err(ManifestError::Volume {
            volume,
            reason: "its index or the index's root is missing".into(),
        });
    };
    if usize::from(root.layers()) != layers.len() || layers.is_empty() {
        let reason = format!(
            "its index is over {} layers, and {} are there",
            root.layers(),
            layers.len()
        );
        return Err(ManifestError::Volume { volume, reason });
    }
    if root.index_bytes() != index.bytes {
        let reason = format!(
            "its index should have {} bytes and has {}",
            root.index_bytes(),
            index.bytes
        );
        return Err(ManifestError::Volume { volume, reason });
    }
    Ok(ImageVolume {
        name: volume,
        layers,
        has_full_layer,
        index,
        root,
    })
}

#[cfg(test)]
mod tests;
