//! Images of servers: registries (OCI distribution specification), and image layouts on any HTTP server.
//!
//! Threads call in here and block; each request borrows one of the kept connections, so there are as many requests in
//! flight as there are threads that ask, and no event loop between a chunk and the thread that decodes it. What comes
//! is believed in nothing: lengths are held against caps, manifests and states against their digests here and in
//! [`runnel_snapshot`], chunks against theirs by whoever reads them.
//!
//! ```text
//!   RemoteBlobs ──► Client ──► Pool ──► Connection      what is asked, how, over which, the socket
//!                     │ redirects, challenges, busy servers
//! ```

mod answer;
mod blobs;
mod client;
mod connection;
mod credentials;
mod error;
#[doc(hidden)]
pub mod fuzz;
mod kept;
mod pool;
mod thin;
mod url;

pub use blobs::RemoteBlobs;
pub use client::RemoteSettings;
pub use credentials::{Credentials, CredentialsError, usual_credentials};
pub use error::RemoteError;
pub use kept::KeptConnections;
pub use thin::ThinBlobs;
pub use url::{BadUrl, Origin};

use std::sync::Arc;

use runnel_snapshot::blobs::BlobStore;
use runnel_snapshot::digest::BlobDigest;
use runnel_snapshot::image::Image;
use runnel_snapshot::image::layout::{INDEX_JSON_BYTES_MAX, Listing};
use runnel_snapshot::image::manifest::{ImageManifest, MANIFEST, MANIFEST_BYTES_MAX};
use runnel_snapshot::image::reference::Wanted;

use blobs::Layout;
use client::{Asked, Client};
use url::Url;

/// An image of a server, open.
#[derive(Clone)]
pub struct RemoteImage {
    /// The image; its store is `blobs`.
    pub image: Image,
    /// The manifest's bytes.
    pub manifest: Vec<u8>,
    /// Where its blobs are read.
    pub blobs: Arc<RemoteBlobs>,
}

impl RemoteImage {
    /// Opens the image `name` at `base`, as an [`ImageReference`](runnel_snapshot::image::reference::ImageReference)
    /// gives them. Only the manifest is read; connections for what comes next are opened meanwhile.
    ///
    /// # Errors
    /// When there is no such image, or the server cannot be had or does not let us in.
    pub fn open(
        base: &str,
        name: &str,
        wanted: &Wanted,
        settings: RemoteSettings,
    ) -> Result<Self, RemoteError> {
        let client = Arc::new(Client::new(Origin::parse(base)?, settings));
        client.warm_up()?;
        let (layout, url, manifest) = find_manifest(&client, name, wanted)?;
        let parsed =
            ImageManifest::parse(&manifest).map_err(|source| RemoteError::Manifest { url, source })?;
        tracing::info!(base, name, digest = %parsed.digest, "an image is open");
        let blobs = Arc::new(RemoteBlobs::new(client, layout, name));
        let image = Image {
            manifest: Arc::new(parsed),
            store: Arc::clone(&blobs) as Arc<dyn BlobStore>,
        };
        Ok(Self {
            image,
            manifest,
            blobs,
        })
    }
}

/// Finds out what kind of server it is by asking it: most are registries.
fn find_manifest(
    client: &Client,
    name: &str,
    wanted: &Wanted,
) -> Result<(Layout, String, Vec<u8>), RemoteError> {
    match registry_manifest(client, name, wanted) {
        Ok((url, manifest)) => Ok((Layout::Registry, url, manifest)),
        // A server that is no registry may answer anything; what the second way says is heard only if it is better.
        Err(
            first @ (RemoteError::Missing { .. }
            | RemoteError::Denied { status: 403, .. }
            | RemoteError::Status { .. }),
        ) => match plain_manifest(client, name, wanted) {
            Ok((url, manifest)) => Ok((Layout::Plain, url, manifest)),
            Err(RemoteError::Missing { .. }) if matches!(first, RemoteError::Missing { .. }) => {
                Err(RemoteError::NoSuchImage(format!(
                    "{} has no image {name} {}, neither as a registry nor as a directory: check name, tag and digest",
                    client.base(),
                    describe(wanted),
                )))
            }
            Err(second @ (RemoteError::NoSuchImage(_) | RemoteError::Manifest { .. })) => Err(second),
            Err(_) => Err(first),
        },
        Err(error) => Err(error),
    }
}

fn registry_manifest(client: &Client, name: &str, wanted: &Wanted) -> Result<(String, Vec<u8>), RemoteError> {
    let reference = match wanted {
        Wanted::Only => "latest".to_owned(),
        Wanted::Named(tag) => tag.clone(),
        Wanted::Pinned(digest) => digest.to_string(),
    };
    let target = format!("/v2/{name}/manifests/{reference}");
    let (url, manifest) = read_document(client, &target, Some(MANIFEST), MANIFEST_BYTES_MAX)?;
    check_pin(&url, &manifest, wanted)?;
    Ok((url, manifest))
}

fn plain_manifest(client: &Client, name: &str, wanted: &Wanted) -> Result<(String, Vec<u8>), RemoteError> {
    let digest = match wanted {
        Wanted::Pinned(digest) => *digest,
        wanted => {
            let target = format!("/{name}/index.json");
            let (url, index) = read_document(client, &target, None, INDEX_JSON_BYTES_MAX)?;
            let listing = Listing::parse(&index).map_err(|error| RemoteError::Answer {
                url: url.clone(),
                reason: format!("it is no image layout's list: {error}"),
            })?;
            let chosen = listing.choose(wanted).ok_or_else(|| {
                let (wanted, present) = (describe(wanted), listing.describe());
                RemoteError::NoSuchImage(format!("{url} lists no image {wanted}: it has {present}"))
            })?;
            chosen.digest
        }
    };
    let target = Layout::Plain.blob_target(name, &digest);
    let (url, manifest) = read_document(client, &target, None, MANIFEST_BYTES_MAX)?;
    check_pin(&url, &manifest, &Wanted::Pinned(digest))?;
    Ok((url, manifest))
}

fn read_document(
    client: &Client,
    target: &str,
    accept: Option<&str>,
    bytes_max: u64,
) -> Result<(String, Vec<u8>), RemoteError> {
    let url = Url {
        origin: client.base().clone(),
        target: target.to_owned(),
    };
    let asked = Asked {
        accept,
        ..Asked::default()
    };
    let mut found = client.get(&url, asked)?;
    let body = found
        .answer
        .read_rest(bytes_max)
        .map_err(|error| client.broken(&found.url, error))?;
    let text = found.url.to_string();
    client.finish(found);
    Ok((text, body))
}

/// Whoever pins a digest is protected against every later byte, beginning with these.
fn check_pin(url: &str, manifest: &[u8], wanted: &Wanted) -> Result<(), RemoteError> {
    let Wanted::Pinned(digest) = wanted else {
        return Ok(());
    };
    let found = BlobDigest::of(manifest);
    if found == *digest {
        return Ok(());
    }
    let url = url.to_owned();
    let reason = format!("its digest is {found}, and {digest} was asked for");
    Err(RemoteError::Answer { url, reason })
}

fn describe(wanted: &Wanted) -> String {
    match wanted {
        Wanted::Only => "that is the only one, or tagged latest".to_owned(),
        Wanted::Named(tag) => format!("tagged {tag}"),
        Wanted::Pinned(digest) => format!("with digest {digest}"),
    }
}
