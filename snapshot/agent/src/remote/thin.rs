//! Thin images: what is with them is read there, and the layers that are not where their manifest says that they are.

use std::collections::HashMap;
use std::sync::Arc;

use runnel_snapshot::blobs::{Blob, BlobError, BlobStore};
use runnel_snapshot::digest::BlobDigest;
use runnel_snapshot::image::Image;

use super::blobs::{Layout, RemoteBlobs};
use super::client::{Client, RemoteSettings};
use super::credentials::Credentials;
use super::error::RemoteError;
use super::url::{Origin, Url};
use crate::failed_reads::FailedReads;
use crate::traffic::Traffic;

/// The most stores of one image that are asked: a manifest could name any number of servers.
const STORES_MAX: usize = 16;

/// The blobs of a thin image.
pub struct ThinBlobs {
    here: Arc<dyn BlobStore>,
    /// The stores of each layer that is not there, the one to ask first in front.
    away: HashMap<BlobDigest, Vec<Arc<RemoteBlobs>>>,
    traffic: Arc<Traffic>,
}

impl ThinBlobs {
    /// Of an image whose layers `away` are not in its store. Connections to where the first of them is are opened meanwhile.
    /// Nobody chose the servers but whoever wrote the manifest: passwords and tokens go to none without TLS, but on this
    /// host.
    ///
    /// # Errors
    /// When one of them is nowhere that requests can go to.
    pub fn open(image: &Image, away: &[Blob], settings: &RemoteSettings) -> Result<Self, RemoteError> {
        let traffic = Arc::new(Traffic::default());
        let mut stores: Vec<(Origin, Layout, String, Arc<RemoteBlobs>)> = Vec::new();
        let mut store_of = |(origin, layout, name): (Origin, Layout, String)| {
            let known = stores
                .iter()
                .find(|known| (&known.0, known.1, &known.2) == (&origin, layout, &name));
            if let Some((.., store)) = known {
                return Ok(Some(store.clone()));
            }
            if stores.len() >= STORES_MAX {
                return Ok(None);
            }
            let mut settings = settings.clone();
            if !origin.is_private() {
                settings.credentials = Credentials::default();
            }
            let client = Client::counting(origin.clone(), settings, Arc::clone(&traffic));
            if stores.is_empty() {
                client.warm_up()?;
            }
            let store = Arc::new(RemoteBlobs::new(Arc::new(client), layout, &name));
            stores.push((origin, layout, name, store.clone()));
            Ok::<_, RemoteError>(Some(store))
        };
        let mut found = HashMap::new();
        for layer in away {
            let urls = image.manifest.urls.get(&layer.digest).into_iter().flatten();
            let places = urls.filter_map(|url| place_of(url, &layer.digest));
            let stores = places.map(&mut store_of).filter_map(Result::transpose);
            let stores = stores.collect::<Result<Vec<_>, _>>()?;
            if stores.is_empty() {
                return Err(RemoteError::NoPlace(layer.digest));
            }
            found.insert(layer.digest, stores);
        }
        Ok(Self {
            here: Arc::clone(&image.store),
            away: found,
            traffic,
        })
    }

    /// The stores of a layer that is not with the image, the one to ask first in front.
    #[must_use]
    pub fn stores_of(&self, layer: &Blob) -> &[Arc<RemoteBlobs>] {
        self.away.get(&layer.digest).map_or(&[], Vec::as_slice)
    }

    /// What went over the wire for the image.
    #[must_use]
    pub fn traffic(&self) -> &Arc<Traffic> {
        &self.traffic
    }
}

impl BlobStore for ThinBlobs {
    fn read_range(&self, blob: &Blob, offset: u64, into: &mut [u8]) -> Result<(), BlobError> {
        self.read_right(blob, offset, into, &mut |_| true).map(drop)
    }

    fn read_right(
        &self,
        blob: &Blob,
        offset: u64,
        into: &mut [u8],
        are_right: &mut dyn FnMut(&[u8]) -> bool,
    ) -> Result<bool, BlobError> {
        let Some(stores) = self.away.get(&blob.digest) else {
            return self.here.read_right(blob, offset, into, are_right);
        };
        let mut failed = FailedReads::default();
        for store in stores {
            let read = store.read_right(blob, offset, into, are_right);
            if failed.take(store.base(), blob, read).is_ok() {
                return Ok(true);
            }
        }
        failed.end(blob)
    }
}

/// The server, the kind of store and the name there of a blob's URL, if it is one of that blob.
fn place_of(url: &str, digest: &BlobDigest) -> Option<(Origin, Layout, String)> {
    let Url { origin, target } = Url::parse(url).ok()?;
    let (layout, name) = [Layout::Registry, Layout::Plain].into_iter().find_map(|layout| {
        let name = layout.name_in(&target, digest)?;
        Some((layout, name.to_owned()))
    })?;
    Some((origin, layout, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blobs_url_leads_to_its_store_and_to_no_other_blob() {
        let digest = BlobDigest::of(b"layer");
        let hex = digest.hex();
        let place = |url: &str| {
            place_of(url, &digest).map(|(origin, layout, name)| (origin.to_string(), layout, name))
        };
        let origin = "http://far:5000".to_owned();
        for layout in [Layout::Registry, Layout::Plain] {
            let url = format!("{origin}{}", layout.blob_target("a/web", &digest));
            assert_eq!(place(&url), Some((origin.clone(), layout, "a/web".to_owned())));
        }
        let other = BlobDigest::of(b"another").hex();
        for strange in [
            format!("http://far/v2/web/blobs/sha256:{other}"),
            format!("http://far/web/blobs/sha256/{other}"),
            format!("http://far/web/{hex}"),
            format!("http://far/v2/blobs/sha256:{hex}"),
            format!("http://far/v2//blobs/sha256:{hex}"),
            "no URL".to_owned(),
        ] {
            assert_eq!(place(&strange), None, "{strange}");
        }
    }
}
