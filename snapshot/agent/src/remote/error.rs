//! Why something could not be had from a server, and whether asking again can help.

use std::io;

use runnel_snapshot::digest::BlobDigest;
use runnel_snapshot::image::manifest::ManifestError;

use super::credentials::CredentialsError;
use super::url::{BadUrl, Origin};
use crate::tls::TlsError;

/// Why a remote store could not deliver.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// A layer of a thin image is nowhere that a request can go to.
    #[error(
        "layer {0} is not with its image, and the manifest names no URL of a registry's or a directory's blob for it: copy \
         the layer there"
    )]
    NoPlace(BlobDigest),
    /// The host's name has no address.
    #[error("the address of {origin} cannot be found: check the name, and this host's DNS")]
    Resolve {
        /// Which server.
        origin: Origin,
        /// The resolver's reason.
        #[source]
        source: io::Error,
    },
    /// Nobody answers.
    #[error("cannot connect to {origin}")]
    Connect {
        /// Which server.
        origin: Origin,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The server is not who it says, or its authority is not trusted.
    #[error("{origin} is not trusted: if its authority is your own, name its certificate with --tls-ca")]
    Untrusted {
        /// Which server.
        origin: Origin,
        /// What is wrong with its certificate.
        #[source]
        source: io::Error,
    },
    /// The server shows a certificate that may only sign others, as `openssl req -x509` makes it unless told.
    #[error(
        "{origin} shows an authority's certificate (CA:TRUE) as its own, which no client should take: give the server one that is none, as `openssl req -x509` makes with -addext basicConstraints=critical,CA:FALSE, or one that the authority signed"
    )]
    Authority {
        /// Which server.
        origin: Origin,
    },
    /// Somebody answers, and knows no TLS.
    #[error("{origin} does not speak TLS: if its server has no certificate, its images begin with http://")]
    NoTls {
        /// Which server.
        origin: Origin,
    },
    /// A connection that was there went away, or nothing came for too long.
    #[error("the connection to {origin} failed while {doing}")]
    Broken {
        /// Which server.
        origin: Origin,
        /// What was going on.
        doing: &'static str,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// What came is no HTTP, or says other things than were asked for.
    #[error("the answer to {url} is not usable: {reason}")]
    Answer {
        /// What was asked for.
        url: String,
        /// What is wrong.
        reason: String,
    },
    /// The server does not know it.
    #[error("{url} does not exist on the server")]
    Missing {
        /// What was asked for.
        url: String,
    },
    /// The server wants to know who asks, or does not let them.
    #[error("the server refuses {url} with status {status}: {advice}")]
    Denied {
        /// What was asked for.
        url: String,
        /// 401 or 403.
        status: u16,
        /// What to do.
        advice: String,
    },
    /// The server asks for patience.
    #[error("{origin} is busy (status {status}): it wants to be asked again in {seconds} s")]
    Busy {
        /// Which server.
        origin: Origin,
        /// 429 or 503.
        status: u16,
        /// What it asks for.
        seconds: u64,
    },
    /// Any other status.
    #[error("{url} is answered with status {status}")]
    Status {
        /// What was asked for.
        url: String,
        /// The status.
        status: u16,
    },
    /// A redirect that is not followed.
    #[error("{url} is redirected, and that is not followed: {reason}")]
    Redirect {
        /// What was asked for.
        url: String,
        /// Why not.
        reason: String,
    },
    /// The server sends whole blobs only.
    #[error(
        "{origin} ignores ranges, and {bytes} bytes would have to be read for each chunk: use a server that knows ranges, or copy the image here"
    )]
    NoRanges {
        /// Which server.
        origin: Origin,
        /// How much would have to be skipped.
        bytes: u64,
    },
    /// A URL makes no sense.
    #[error(transparent)]
    Url(#[from] BadUrl),
    /// TLS cannot be spoken.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The credentials cannot be read.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    /// There is no such image, or not the one that was asked for.
    #[error("{0}")]
    NoSuchImage(String),
    /// The manifest makes no sense.
    #[error("the manifest at {url} is not usable")]
    Manifest {
        /// Where it came from.
        url: String,
        /// What is wrong.
        #[source]
        source: ManifestError,
    },
}

impl RemoteError {
    /// Whether asking again can help.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Resolve { .. }
            | Self::Connect { .. }
            | Self::NoTls { .. }
            | Self::Broken { .. }
            | Self::Answer { .. }
            | Self::Busy { .. } => true,
            Self::Status { status, .. } => *status >= 500 || *status == 408,
            _ => false,
        }
    }
}
