//! How people name images: a directory, or `http(s)://host:port/name`, each with a tag or a digest if they like.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::digest::BlobDigest;

/// Which of a store's images.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Wanted {
    /// The only one, or the one named `latest`.
    #[default]
    Only,
    /// The one of this name: a tag.
    Named(String),
    /// The one whose manifest has this digest.
    Pinned(BlobDigest),
}

/// A reference to an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageReference {
    /// A directory of this host: `/images/web`, `./web@sha256:…`.
    Directory {
        /// Where it is.
        path: PathBuf,
        /// Which image of it.
        wanted: Wanted,
    },
    /// An image of a server: `https://host:5000/team/web:v1`.
    Remote {
        /// Scheme, host and port, without a slash at the end.
        base: String,
        /// The repository: one or more path components.
        name: String,
        /// Which image of it.
        wanted: Wanted,
    },
}

/// Text that names no image.
#[derive(Debug, thiserror::Error)]
#[error("{text:?} names no image: {reason}")]
pub struct BadReference {
    text: String,
    reason: &'static str,
}

impl FromStr for ImageReference {
    type Err = BadReference;

    fn from_str(text: &str) -> Result<Self, BadReference> {
        let refuse = |reason| BadReference {
            text: without_secret(text).chars().take(200).collect(),
            reason,
        };
        let (rest, pin) = match text.split_once("@sha256:") {
            Some((rest, hex)) => {
                let digest = format!("sha256:{hex}").parse();
                (
                    rest,
                    Some(digest.map_err(|_| refuse("after @ comes sha256: and 64 lower-case hex digits"))?),
                )
            }
            None => (text, None),
        };
        let scheme_end = rest.find("://");
        let Some(scheme_end) = scheme_end else {
            if rest.is_empty() {
                return Err(refuse(
                    "give a directory, or http(s)://host:port/name[:tag|@sha256:…]",
                ));
            }
            let wanted = pin.map_or(Wanted::Only, Wanted::Pinned);
            return Ok(Self::Directory {
                path: rest.into(),
                wanted,
            });
        };
        if !matches!(&rest[..scheme_end], "http" | "https") {
            return Err(refuse("only http:// and https:// are spoken"));
        }
        let authority_start = scheme_end + 3;
        let slash = rest[authority_start..].find('/').map(|at| authority_start + at);
        let slash = slash.ok_or_else(|| refuse("the image's name is missing: http(s)://host:port/name"))?;
        let (base, path) = (&rest[..slash], &rest[slash + 1..]);
        if base.contains('@') {
            return Err(refuse(
                "a user and a password or token are not given in a URL, but in a file, with --credentials",
            ));
        }
        if base.len() == authority_start {
            return Err(refuse("between // and / stand a host and perhaps a port"));
        }
        let (name, tag) = match path.split_once(':') {
            Some((name, tag)) => (name, Some(tag)),
            None => (path, None),
        };
        if !is_name(name) {
            return Err(refuse(
                "a name is lower-case letters, digits and . _ - in components divided by /",
            ));
        }
        let wanted = match (pin, tag) {
            // A tag beside a digest is for the reader's eyes, as in docker's references.
            (Some(digest), _) => Wanted::Pinned(digest),
            (None, Some(tag)) if is_tag(tag) => Wanted::Named(tag.to_owned()),
            (None, Some(_)) => return Err(refuse("a tag is up to 128 letters, digits and . _ -")),
            (None, None) => Wanted::Only,
        };
        Ok(Self::Remote {
            base: base.to_owned(),
            name: name.to_owned(),
            wanted,
        })
    }
}

/// A URL without what may be a user and a password in it, for messages, which others may read: without all before its
/// last `@`, but for that of a digest.
#[must_use]
pub fn without_secret(text: &str) -> String {
    let Some((scheme, rest)) = text.split_once("://") else {
        return text.to_owned();
    };
    // A digest stands behind an image's name.
    let pin = rest.rfind("@sha256:").filter(|at| rest[..*at].contains('/'));
    let (located, pin) = rest.split_at(pin.unwrap_or(rest.len()));
    match located.rsplit_once('@') {
        Some((_, host)) => format!("{scheme}://…@{host}{pin}"),
        None => text.to_owned(),
    }
}

impl ImageReference {
    /// Whether the other leads to the same directory or the same name on the same server, whichever image it wants of
    /// those there.
    #[must_use]
    pub fn is_same_place(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Directory { path, .. }, Self::Directory { path: other, .. }) => path == other,
            (
                Self::Remote { base, name, .. },
                Self::Remote {
                    base: other_base,
                    name: other_name,
                    ..
                },
            ) => (base, name) == (other_base, other_name),
            _ => false,
        }
    }
}

impl fmt::Display for ImageReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let wanted = match self {
            Self::Directory { path, wanted } => {
                write!(f, "{}", path.display())?;
                wanted
            }
            Self::Remote { base, name, wanted } => {
                write!(f, "{base}/{name}")?;
                wanted
            }
        };
        match wanted {
            Wanted::Only => Ok(()),
            Wanted::Named(tag) => write!(f, ":{tag}"),
            Wanted::Pinned(digest) => write!(f, "@{digest}"),
        }
    }
}

/// OCI distribution specification: components of lower-case letters and digits, joined by separators.
#[must_use]
pub fn is_name(name: &str) -> bool {
    let component = |text: &str| {
        let ends = [text.bytes().next(), text.bytes().last()];
        ends.iter()
            .all(|end| end.is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit()))
            && text
                .bytes()
                .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || b"._-".contains(&c))
    };
    name.len() <= 255 && name.split('/').all(component)
}

/// OCI distribution specification: `[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}`.
#[must_use]
pub fn is_tag(tag: &str) -> bool {
    (1..=128).contains(&tag.len())
        && !tag.starts_with(['.', '-'])
        && tag
            .bytes()
            .all(|c| c.is_ascii_alphanumeric() || b"._-".contains(&c))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn no_message_repeats_a_password() {
        for text in [
            "http://user:secret@host/web",
            "http://user:sec/ret@host/web@sha256:00",
            "http://user:secret@sha256:00",
        ] {
            let told = without_secret(text);
            assert!(!told.contains("user") && !told.contains("ret"), "{told}");
        }
        for text in [
            "http://host:5000/web:v1",
            "http://host/web@sha256:00",
            "./web@home",
        ] {
            assert_eq!(without_secret(text), text);
        }
    }

    #[test]
    fn references_survive_their_text() {
        let digest = BlobDigest::of(b"m");
        for text in [
            "/images/web".to_owned(),
            "web".into(),
            format!("./web@{digest}"),
            "http://127.0.0.1:7070/web".into(),
            "https://registry.example/team/web:v1.2".into(),
            "http://[::1]:7070/web:latest".into(),
            format!("http://host/web@{digest}"),
        ] {
            assert_eq!(text.parse::<ImageReference>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn text_that_names_no_image_is_refused_with_its_reason() {
        for (text, reason) in [
            ("", "directory"),
            ("ftp://host/web", "http"),
            ("http://host", "name"),
            ("http://host/", "lower-case"),
            ("http:///web", "host"),
            (
                "http://user:secret@host/web",
                "\"http://…@host/web\" names no image: a user and a password or token",
            ),
            ("http://host/../web", "lower-case"),
            ("http://host/Web", "lower-case"),
            ("http://host/web:", "tag"),
            ("http://host/web:-x", "tag"),
            ("http://host/web@sha256:12", "64"),
        ] {
            let error = text.parse::<ImageReference>().unwrap_err().to_string();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn whatever_is_accepted_survives_its_text(text in "(https?://)?[a-zA-Z0-9./:@_-]{0,40}") {
            if let Ok(reference) = text.parse::<ImageReference>() {
                prop_assert_eq!(reference.to_string().parse::<ImageReference>().unwrap(), reference);
            }
        }
    }
}
