//! The local store: a folder of image directories, each under its name.
//!
//! A bare name means an image of the store; what has a slash is a path. The folder is `$RUNNEL_IMAGES`, else
//! `$XDG_DATA_HOME/runnel/images`, else `/var/lib/runnel/images` for root and `~/.local/share/runnel/images` for others.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use runnel_snapshot::image::folder::looks_like_image;
use runnel_snapshot::image::reference::{BadReference, ImageReference, is_name};

/// Why an image cannot be found.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    /// There is no place for it.
    #[error("there is no folder for images: set RUNNEL_IMAGES to one")]
    NoPlace,
    /// The variable means another folder in each directory.
    #[error("RUNNEL_IMAGES is {0:?}: it must be an absolute path")]
    Relative(PathBuf),
    /// There is no name.
    #[error("the image has no name: give one, or a path with a slash in it")]
    NoName,
    /// A path, where images of the store are looked after.
    #[error(
        "{path:?} is a path, and this is for images of the local store, {store}, by their names: a directory elsewhere is yours to remove"
    )]
    NotOfStore {
        /// The path.
        path: String,
        /// The folder.
        store: PathBuf,
    },
    /// A server's image without what says so.
    #[error("there is no directory {0}: an image of a server begins with its scheme, as in http://{0}")]
    NoScheme(String),
    /// The name cannot be one.
    #[error(
        "{0:?} cannot be an image's name: lower-case letters and digits, with '.', '_' or '-' between; a directory is written with a slash, as in ./{0}"
    )]
    BadName(String),
    /// No such image.
    #[error(
        "no image named {name} in {store}: `runnel image ls` lists them; a directory is written with a slash, as in ./{name}"
    )]
    Unknown {
        /// The name.
        name: String,
        /// The folder.
        store: PathBuf,
    },
    /// The text names no image.
    #[error(transparent)]
    Reference(#[from] BadReference),
    /// The system refused.
    #[error("{what} {path} failed")]
    Io {
        /// What was attempted.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
}

fn io_error<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> StoreError + 'a {
    move |source| StoreError::Io {
        what,
        path: path.to_owned(),
        source,
    }
}

/// The folder of images. It need not exist.
#[derive(Clone, Debug)]
pub(crate) struct ImageStore {
    path: PathBuf,
}

impl ImageStore {
    /// The store of this user.
    ///
    /// # Errors
    /// When there is no place for one.
    pub(crate) fn of_this_user() -> Result<Self, StoreError> {
        let folder = |variable: &str| {
            let path = std::env::var_os(variable).map(PathBuf::from);
            path.filter(|path| !path.as_os_str().is_empty())
        };
        if let Some(path) = folder("RUNNEL_IMAGES") {
            return match path.is_absolute() {
                true => Ok(Self::at(path)),
                false => Err(StoreError::Relative(path)),
            };
        }
        // Relative ones do not count, says the XDG base directory specification.
        let absolute = |variable: &str| folder(variable).filter(|path| path.is_absolute());
        let path = absolute("XDG_DATA_HOME").map(|data| data.join("runnel/images"));
        let path = path.or_else(|| match rustix::process::geteuid().is_root() {
            true => Some("/var/lib/runnel/images".into()),
            false => Some(absolute("HOME")?.join(".local/share/runnel/images")),
        });
        path.map(Self::at).ok_or(StoreError::NoPlace)
    }

    fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// Its folder.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The directory of the image of that name.
    ///
    /// # Errors
    /// When there is none.
    pub(crate) fn image(&self, name: &str) -> Result<PathBuf, StoreError> {
        // Whatever was copied there counts, also under a name that no snapshot is given; hidden ones are unfinished.
        if bare_name(Path::new(name)).is_none_or(|name| name.starts_with('.')) {
            return Err(StoreError::NotOfStore {
                path: name.to_owned(),
                store: self.path.clone(),
            });
        }
        let path = self.path.join(name);
        if looks_like_image(&path) {
            return Ok(path);
        }
        Err(StoreError::Unknown {
            name: name.to_owned(),
            store: self.path.clone(),
        })
    }

    /// What `text` refers to: a URL, a path, or an image of the store, with a tag or a digest if it has one.
    ///
    /// # Errors
    /// When it is neither.
    pub(crate) fn resolve(&self, text: &str) -> Result<ImageReference, StoreError> {
        let reference: ImageReference = text.parse()?;
        let ImageReference::Directory { path, wanted } = reference else {
            return Ok(reference);
        };
        let path = match bare_name(&path) {
            None if lacks_scheme(text) && !path.exists() => {
                return Err(StoreError::NoScheme(text.to_owned()));
            }
            None => path,
            Some(name) => match self.image(name) {
                Ok(path) => path,
                // Whoever types the name of a directory beside him means it.
                Err(_) if looks_like_image(&path) => path,
                Err(unknown) => return Err(unknown),
            },
        };
        let path = std::path::absolute(&path).map_err(io_error("resolving", &path))?;
        Ok(ImageReference::Directory { path, wanted })
    }

    /// Where an image that is to be called `text` goes: into the store if it is a bare name, which makes the store.
    ///
    /// # Errors
    /// When it cannot be a name, or the store not be made.
    pub(crate) fn destination(&self, text: &str) -> Result<PathBuf, StoreError> {
        if text.is_empty() {
            return Err(StoreError::NoName);
        }
        let path = Path::new(text);
        let Some(name) = bare_name(path) else {
            return std::path::absolute(path).map_err(io_error("resolving", path));
        };
        if !is_single_name(name) {
            return Err(StoreError::BadName(name.to_owned()));
        }
        self.create()?;
        Ok(self.path.join(name))
    }

    /// Makes its folder, if it is not there.
    ///
    /// # Errors
    /// When it cannot be made.
    pub(crate) fn create(&self) -> Result<(), StoreError> {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&self.path);
        made.map_err(io_error("creating", &self.path))
    }
}

/// Whether `text` begins with a host and a port, as in `10.0.0.1:5000/web`.
fn lacks_scheme(text: &str) -> bool {
    let port = text
        .split_once('/')
        .and_then(|(server, _)| server.rsplit_once(':'));
    port.is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
}

/// The name that a path is, if it is nothing but a name.
fn bare_name(path: &Path) -> Option<&str> {
    path.to_str()
        .filter(|text| !text.contains('/') && !matches!(*text, "" | "." | ".."))
}

fn is_single_name(name: &str) -> bool {
    is_name(name) && !name.contains('/')
}

#[cfg(test)]
mod tests {
    use std::fs;

    use runnel_snapshot::image::reference::Wanted;

    use super::*;

    fn store_with(folder: &tempfile::TempDir, name: &str) -> ImageStore {
        let image = folder.path().join(name);
        fs::create_dir(&image).unwrap();
        fs::write(image.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        fs::write(image.join("index.json"), r#"{"schemaVersion":2,"manifests":[]}"#).unwrap();
        ImageStore::at(folder.path().to_owned())
    }

    fn directory(reference: ImageReference) -> (PathBuf, Wanted) {
        match reference {
            ImageReference::Directory { path, wanted } => (path, wanted),
            remote => panic!("{remote}"),
        }
    }

    #[test]
    fn a_bare_name_is_an_image_of_the_store_and_a_slash_makes_a_path() {
        let folder = tempfile::tempdir().unwrap();
        let store = store_with(&folder, "web");
        assert_eq!(
            directory(store.resolve("web").unwrap()).0,
            folder.path().join("web")
        );
        let here = std::env::current_dir().unwrap();
        assert_eq!(directory(store.resolve("./web").unwrap()).0, here.join("web"));
        let unknown = store.resolve("db").unwrap_err().to_string();
        assert!(unknown.contains("runnel image ls"), "{unknown}");
        let remote = store.resolve("http://127.0.0.1:5000/web:v1").unwrap();
        assert_eq!(remote.to_string(), "http://127.0.0.1:5000/web:v1");
    }

    #[test]
    fn a_digest_stays_with_the_name() {
        let folder = tempfile::tempdir().unwrap();
        let store = store_with(&folder, "web");
        let pinned = format!("web@sha256:{}", "0".repeat(64));
        let (path, wanted) = directory(store.resolve(&pinned).unwrap());
        assert_eq!(path, folder.path().join("web"));
        assert!(matches!(wanted, Wanted::Pinned(_)));
    }

    #[test]
    fn a_new_image_goes_into_the_store_unless_it_has_a_path() {
        let folder = tempfile::tempdir().unwrap();
        let store = ImageStore::at(folder.path().join("deep/images"));
        assert_eq!(
            store.destination("web").unwrap(),
            folder.path().join("deep/images/web")
        );
        assert!(store.path().is_dir());
        assert_eq!(store.destination("/srv/web").unwrap(), Path::new("/srv/web"));
        assert!(matches!(store.destination("Web!"), Err(StoreError::BadName(_))));
        assert!(matches!(store.destination(""), Err(StoreError::NoName)));
    }

    #[test]
    fn a_server_without_its_scheme_is_no_directory_that_is_missing() {
        let folder = tempfile::tempdir().unwrap();
        let store = ImageStore::at(folder.path().to_owned());
        for text in ["10.0.0.1:5000/web", "localhost:5000/team/web", "[::1]:80/web"] {
            let told = store.resolve(text).unwrap_err().to_string();
            assert!(told.ends_with(&format!("http://{text}")), "{told}");
        }
        for text in ["./a:5000/web", "/srv/a:5000/web", "a:b/web", ":5000/web"] {
            let reference = store.resolve(text);
            assert!(
                matches!(reference, Ok(ImageReference::Directory { .. })),
                "{text}"
            );
        }
    }
}
