//! Paths of the pull half (OCI distribution specification 1.1, "Endpoints"): end-1, end-2, end-3 and end-8; and
//! Docker's catalog.

use runnel_snapshot::digest::BlobDigest;
use runnel_snapshot::image::reference::{is_name, is_tag};

/// What a path asks for. Names, tags and digests were checked: none of them can leave its directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Route {
    /// `/v2/`: is this a registry, and may I pull?
    Version,
    /// `/v2/_catalog`: which repositories are there? Docker's registry has it, and many clients ask for it.
    Catalog,
    /// `/v2/<name>/manifests/<tag or digest>`
    Manifest {
        /// The repository.
        name: String,
        /// Which manifest.
        reference: Reference,
    },
    /// `/v2/<name>/blobs/<digest>`
    Blob {
        /// The repository.
        name: String,
        /// Which blob.
        digest: BlobDigest,
    },
    /// `/v2/<name>/tags/list`
    Tags {
        /// The repository.
        name: String,
    },
}

/// Which manifest of a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Reference {
    /// By its name.
    Tag(String),
    /// By its digest.
    Digest(BlobDigest),
}

/// Why a path is answered with 404 or 400: the codes of the specification's error bodies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BadPath {
    /// It is none of the specification's.
    Unknown,
    /// Its name is none.
    Name,
    /// Its digest is none, or not a SHA-256.
    Digest,
    /// Its tag is none.
    Tag,
}

/// Reads the path of a request.
pub(super) fn parse(path: &str) -> Result<Route, BadPath> {
    let rest = path.strip_prefix("/v2").ok_or(BadPath::Unknown)?;
    if matches!(rest, "" | "/") {
        return Ok(Route::Version);
    }
    if rest == "/_catalog" {
        return Ok(Route::Catalog);
    }
    // From the end: names have slashes of their own.
    let mut parts = rest.rsplitn(3, '/');
    let (last, kind, name) = (parts.next(), parts.next(), parts.next());
    let (Some(last), Some(kind), Some(name)) = (last, kind, name) else {
        return Err(BadPath::Unknown);
    };
    let checked_name = || match name.strip_prefix('/') {
        Some(name) if is_name(name) => Ok(name.to_owned()),
        _ => Err(BadPath::Name),
    };
    match kind {
        "manifests" => {
            let reference = if last.contains(':') {
                Reference::Digest(last.parse().map_err(|_| BadPath::Digest)?)
            } else if is_tag(last) {
                Reference::Tag(last.to_owned())
            } else {
                return Err(BadPath::Tag);
            };
            Ok(Route::Manifest {
                name: checked_name()?,
                reference,
            })
        }
        "blobs" => Ok(Route::Blob {
            digest: last.parse().map_err(|_| BadPath::Digest)?,
            name: checked_name()?,
        }),
        "tags" if last == "list" => Ok(Route::Tags {
            name: checked_name()?,
        }),
        _ => Err(BadPath::Unknown),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_specifications_paths_are_understood() {
        let digest = BlobDigest::of(b"x");
        let name = "team/web".to_owned();
        assert_eq!(parse("/v2/"), Ok(Route::Version));
        assert_eq!(parse("/v2"), Ok(Route::Version));
        assert_eq!(parse("/v2/_catalog"), Ok(Route::Catalog));
        assert_eq!(
            parse("/v2/team/web/manifests/v1.2"),
            Ok(Route::Manifest {
                name: name.clone(),
                reference: Reference::Tag("v1.2".into())
            })
        );
        assert_eq!(
            parse(&format!("/v2/team/web/manifests/{digest}")),
            Ok(Route::Manifest {
                name: name.clone(),
                reference: Reference::Digest(digest)
            })
        );
        assert_eq!(
            parse(&format!("/v2/team/web/blobs/{digest}")),
            Ok(Route::Blob {
                name: name.clone(),
                digest
            })
        );
        assert_eq!(parse("/v2/team/web/tags/list"), Ok(Route::Tags { name }));
    }

    #[test]
    fn paths_that_would_lead_elsewhere_are_refused() {
        let hex = "a".repeat(64);
        for (path, expected) in [
            ("/".to_owned(), BadPath::Unknown),
            ("/etc/passwd".into(), BadPath::Unknown),
            ("/v2/web".into(), BadPath::Unknown),
            ("/v2/web/uploads/x".into(), BadPath::Unknown),
            (format!("/v2/../blobs/sha256:{hex}"), BadPath::Name),
            (format!("/v2/web/../../x/blobs/sha256:{hex}"), BadPath::Name),
            (format!("/v2//web/blobs/sha256:{hex}"), BadPath::Name),
            (format!("/v2/%2e%2e/blobs/sha256:{hex}"), BadPath::Name),
            (format!("/v2/.web.partial-1-1/blobs/sha256:{hex}"), BadPath::Name),
            ("/v2/web/blobs/../../secret".into(), BadPath::Unknown),
            ("/v2/web/blobs/sha256:..".into(), BadPath::Digest),
            (format!("/v2/web/blobs/sha512:{hex}"), BadPath::Digest),
            ("/v2/web/manifests/..".into(), BadPath::Tag),
            ("/v2/web/manifests/sha256:12".into(), BadPath::Digest),
        ] {
            assert_eq!(parse(&path), Err(expected), "{path}");
        }
    }
}
