//! The local store: a folder of image directories, each under its name.
//!
//! A bare name means an image of the store; what has a slash is a path. The folder is `$RUNNEL_IMAGES`, else
//! `$XDG_DATA_HOME/runnel/images`, else `/var/lib/runnel/images` for root and `~/.local/share/runnel/images` for others.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use runnel_agent::remote::{BadUrl, Origin};
use runnel_snapshot::image::folder::looks_like_image;
use runnel_snapshot::image::reference::{BadReference, ImageReference, is_name};
use runnel_snapshot::shell::shell_word;

/// Why an image cannot be found.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    /// There is no place for it.
    #[error("there is no folder for images: set RUNNEL_IMAGES to one")]
    NoPlace,
    /// The variable means another folder in each directory.
    #[error("RUNNEL_IMAGES is {0:?}: it must be an absolute path")]
    Relative(PathBuf),
    /// What the variable names is not there.
    #[error(
        "RUNNEL_IMAGES is {0}, and there is no such folder: set it right if it is mistyped; else make it (`mkdir -p {word}`), or let the first snapshot do so",
        word = shell_word(.0)
    )]
    NoStore(PathBuf),
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
    /// Where nothing is written to.
    #[error(
        "{0} is another host's, and images are pulled, never pushed: save it here under a name, and let others pull it with `runnel serve`, or copy its directory into a registry with skopeo"
    )]
    Pushed(String),
    /// A directory where an image's name should be.
    #[error("{0} is a directory, and the image needs a name of its own in it, as in {example}", example = shell_word(in_folder(.0)))]
    NoNameIn(String),
    /// Something that only begins like a URL.
    #[error("{0:?} is neither a directory nor a URL: an image of a server begins with http:// or https://")]
    HalfUrl(String),
    /// There is nothing of that path.
    #[error("there is no image {0}: no such directory")]
    NotThere(PathBuf),
    /// There is something else.
    #[error("{0} is no image: it has neither oci-layout nor index.json and blobs")]
    NoImage(PathBuf),
    /// The images are one folder further down.
    #[error("{folder} is a folder of images: give one of them, as in {example}", folder = .folder.display(), example = shell_word(.example))]
    Folder {
        /// The folder.
        folder: PathBuf,
        /// The first image in it.
        example: PathBuf,
    },
    /// A server's image without what says so.
    #[error("there is no directory {0}: an image of a server begins with its scheme, as in {example}", example = shell_word(format!("http://{}", .0)))]
    NoScheme(String),
    /// The name cannot be one.
    #[error(
        "{0:?} cannot be an image's name: lower-case letters and digits, with '.', '_' or '-' between; a directory is written with a slash, as in {example}",
        example = beside(.0)
    )]
    BadName(String),
    /// No such image.
    #[error(
        "no image named {name} in {store}: `runnel image ls` lists them; a directory is written with a slash, as in {example}",
        example = beside(name)
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
    /// Nor does it name a server.
    #[error(transparent)]
    Server(#[from] BadUrl),
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

impl StoreError {
    /// Whether no store could have what was typed.
    pub(crate) fn is_usage(&self) -> bool {
        matches!(
            self,
            Self::NoName | Self::BadName(_) | Self::HalfUrl(_) | Self::Reference(_) | Self::Server(_)
        )
    }
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
    /// Whether somebody has said where it is.
    is_named: bool,
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
                true => Ok(Self { path, is_named: true }),
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
        Self {
            path,
            is_named: false,
        }
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
        match path.symlink_metadata() {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(io_error("looking into the store for", &path)(source))
            }
            _ => Err(self.missing().unwrap_or_else(|| StoreError::Unknown {
                name: name.to_owned(),
                store: self.path.clone(),
            })),
        }
    }

    /// Whether the store was made.
    ///
    /// # Errors
    /// When that cannot be seen.
    pub(crate) fn is_there(&self) -> Result<bool, StoreError> {
        self.path.try_exists().map_err(io_error("finding", &self.path))
    }

    /// That there is no store where somebody has said that one is.
    pub(crate) fn missing(&self) -> Option<StoreError> {
        let is_missing = self.is_named && !self.path.exists();
        is_missing.then(|| StoreError::NoStore(self.path.clone()))
    }

    /// What `text` refers to: a URL, a path, or an image of the store, with a tag or a digest if it has one.
    ///
    /// # Errors
    /// When it is neither.
    pub(crate) fn resolve(&self, text: &str) -> Result<ImageReference, StoreError> {
        let reference: ImageReference = text.parse()?;
        let (path, wanted) = match reference {
            ImageReference::Directory { path, wanted } => (path, wanted),
            ImageReference::Remote { ref base, .. } => {
                // Whoever mistyped a server is told so before anything is started for it.
                Origin::parse(base)?;
                return Ok(reference);
            }
        };
        let path = match bare_name(&path) {
            None if lacks_scheme(text) && !path.exists() => {
                return Err(StoreError::NoScheme(text.to_owned()));
            }
            None => image_at(path, text)?,
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
        if text.contains("://") || begins_like_url(text) || lacks_scheme(text) && !path.exists() {
            return Err(StoreError::Pushed(text.to_owned()));
        }
        if path.file_name().is_none() || text.ends_with('/') && path.is_dir() {
            return Err(StoreError::NoNameIn(text.to_owned()));
        }
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

/// The image at a path that was given as `text`.
fn image_at(path: PathBuf, text: &str) -> Result<PathBuf, StoreError> {
    if looks_like_image(&path) {
        return Ok(path);
    }
    match path.metadata() {
        Ok(found) if found.is_dir() => {}
        Ok(_) => return Err(StoreError::NoImage(path)),
        Err(_) if begins_like_url(text) => return Err(StoreError::HalfUrl(text.to_owned())),
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            return Err(io_error("reading", &path)(source));
        }
        Err(_) => return Err(StoreError::NotThere(path)),
    }
    let entries = path.read_dir().map_err(io_error("reading", &path))?;
    let images = entries.flatten().map(|entry| entry.path());
    match images.filter(|path| looks_like_image(path)).min() {
        Some(example) => Err(StoreError::Folder {
            folder: path,
            example,
        }),
        None => Err(StoreError::NoImage(path)),
    }
}

/// Whether somebody who wrote that meant a URL.
fn begins_like_url(text: &str) -> bool {
    text.starts_with("http:/") || text.starts_with("https:/")
}

/// An image's path in a directory, for an example.
fn in_folder(folder: &str) -> String {
    format!("{}/web", folder.trim_end_matches('/'))
}

/// The path of a directory here, for an example.
fn beside(name: &str) -> String {
    shell_word(format!("./{name}"))
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
        let path = folder.path().join("web");
        let by_path = store.resolve(path.to_str().unwrap()).unwrap();
        assert_eq!(directory(by_path).0, path);
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
            assert!(told.ends_with(&shell_word(format!("http://{text}"))), "{told}");
        }
        for text in ["./a:5000/web", "/srv/a:5000/web", "a:b/web", ":5000/web"] {
            let reference = store.resolve(text);
            assert!(matches!(reference, Err(StoreError::NotThere(_))), "{text}");
        }
    }

    #[test]
    fn advice_can_be_typed_as_it_is_also_where_a_name_has_blanks() {
        let folder = tempfile::tempdir().unwrap();
        let store = store_with(&folder, "my web");
        let told = store
            .resolve(folder.path().to_str().unwrap())
            .unwrap_err()
            .to_string();
        assert!(told.ends_with("/my web'"), "{told}");
        for refused in [
            store.resolve("my db"),
            store.destination("my db").map(|_| unreachable!()),
        ] {
            let told = refused.unwrap_err().to_string();
            assert!(told.ends_with("as in './my db'"), "{told}");
        }
    }

    #[test]
    fn a_path_without_an_image_says_what_is_there() {
        let folder = tempfile::tempdir().unwrap();
        let store = store_with(&folder, "web");
        fs::create_dir(folder.path().join("empty")).unwrap();
        fs::write(folder.path().join("file"), "").unwrap();
        let told = |path: &Path| store.resolve(path.to_str().unwrap()).unwrap_err().to_string();
        for (name, reason) in [
            ("none", "no such directory"),
            ("empty", "is no image"),
            ("file", "is no image"),
        ] {
            let told = told(&folder.path().join(name));
            assert!(told.contains(reason), "{told}");
        }
        let told = told(folder.path());
        let example = folder.path().join("web");
        assert!(
            told.contains("a folder of images") && told.ends_with(example.to_str().unwrap()),
            "{told}"
        );
        for text in ["http:/10.0.0.1:5000/web", "https:/host/web"] {
            let refused = store.resolve(text);
            assert!(matches!(refused, Err(StoreError::HalfUrl(_))), "{text}");
        }
    }

    #[test]
    fn a_new_image_is_neither_pushed_nor_a_directory_that_is_there() {
        let folder = tempfile::tempdir().unwrap();
        let store = ImageStore::at(folder.path().to_owned());
        for text in ["http://10.0.0.1:5000/web", "https:/host/web", "10.0.0.1:5000/web"] {
            let told = store.destination(text).unwrap_err().to_string();
            assert!(
                told.contains("never pushed") && told.contains("runnel serve"),
                "{told}"
            );
        }
        for text in ["./", ".", "..", "/", &format!("{}/", folder.path().display())] {
            let refused = store.destination(text);
            assert!(matches!(refused, Err(StoreError::NoNameIn(_))), "{text}");
        }
    }

    #[test]
    fn a_store_that_cannot_be_read_is_not_called_empty() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        // Whoever is root may read any folder; nobody looks into a file.
        let store = ImageStore::at(file);
        let refused = store.image("web");
        assert!(matches!(refused, Err(StoreError::Io { .. })), "{refused:?}");
    }
}
