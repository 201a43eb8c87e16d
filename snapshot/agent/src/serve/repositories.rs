//! What is served under which name: image directories, and folders of them.
//!
//! Nothing is kept of a directory between requests: an image that appears (by a rename, so whole) is served, one that
//! is removed is not.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use runnel_snapshot::blobs::{Blob, BlobError};
use runnel_snapshot::causes::with_causes;
use runnel_snapshot::digest::BlobDigest;
use runnel_snapshot::image::layout::{Layout, LayoutError};
use runnel_snapshot::image::manifest::{Descriptor, MANIFEST_BYTES_MAX};
use runnel_snapshot::image::reference::is_name;
use runnel_snapshot::shell::shell_word;
use serde::Deserialize;

/// Why a directory cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum RepositoryError {
    /// There is no such directory.
    #[error("{0} is not a directory: give an image's directory, or a folder of them")]
    NotADirectory(PathBuf),
    /// Its name, or the given one, is none of a repository.
    #[error(
        "{name:?} cannot be the name of a repository (lower-case letters, digits, '.', '_', '-', and '/' between components): serve it under another, as {}",
        given(&usable(name), path)
    )]
    BadName {
        /// The name.
        name: String,
        /// The directory.
        path: PathBuf,
    },
    /// Two directories want one name.
    #[error(
        "{first} and {second} would both be served as {name}: give one of them another name, as {}",
        given("NAME", second)
    )]
    Twice {
        /// The name.
        name: String,
        /// Who has it.
        first: PathBuf,
        /// Who wants it too.
        second: PathBuf,
    },
}

/// What would be served if it were asked for now.
#[derive(Debug, Default)]
pub struct Inventory {
    /// The images, by name.
    pub served: BTreeMap<String, PathBuf>,
    /// What lies among them and is not, and why.
    pub skipped: Vec<(PathBuf, String)>,
}

/// The names that a server knows.
#[derive(Clone, Debug, Default)]
pub struct Repositories {
    named: BTreeMap<String, PathBuf>,
    folders: Vec<PathBuf>,
}

impl Repositories {
    /// Adds a directory: an image's under its own name, or a folder whose directories are served under theirs.
    ///
    /// # Errors
    /// When it is no directory, or its name is impossible or taken.
    pub fn add(&mut self, path: &Path) -> Result<(), RepositoryError> {
        // The name of "." is the name of what it stands for.
        let path = path
            .canonicalize()
            .ok()
            .filter(|path| path.is_dir())
            .ok_or_else(|| RepositoryError::NotADirectory(path.to_owned()))?;
        if !is_layout(&path) {
            if !self.folders.contains(&path) {
                self.folders.push(path);
            }
            return Ok(());
        }
        self.insert(name_of(&path), path)
    }

    /// Adds an image's directory under a name of its own; it may appear later.
    ///
    /// # Errors
    /// When the name is impossible or taken.
    pub fn add_named(&mut self, name: &str, path: &Path) -> Result<(), RepositoryError> {
        self.insert(name.to_owned(), path.to_owned())
    }

    fn insert(&mut self, name: String, path: PathBuf) -> Result<(), RepositoryError> {
        if !is_name(&name) {
            return Err(RepositoryError::BadName { name, path });
        }
        if let Some(first) = self.named.get(&name) {
            if is_same(first, &path) {
                return Ok(()); // once more the same
            }
            return Err(RepositoryError::Twice {
                name,
                first: first.clone(),
                second: path,
            });
        }
        self.named.insert(name, path);
        Ok(())
    }

    /// The directories that were added: images, and folders of them.
    pub fn directories(&self) -> impl Iterator<Item = &Path> {
        self.named.values().chain(&self.folders).map(PathBuf::as_path)
    }

    /// Whether an image may yet appear: in a folder, or at a place where nothing is now.
    #[must_use]
    pub fn may_grow(&self) -> bool {
        !self.folders.is_empty() || self.named.values().any(|path| !path.exists())
    }

    /// Looks what is there.
    #[must_use]
    pub fn inventory(&self) -> Inventory {
        let mut inventory = Inventory::default();
        for (name, path) in &self.named {
            inventory.look_at(name.clone(), path.clone());
        }
        for folder in &self.folders {
            let entries = match fs::read_dir(folder) {
                Ok(entries) => entries,
                Err(error) => {
                    inventory.skipped.push((folder.clone(), error.to_string()));
                    continue;
                }
            };
            let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
            paths.sort();
            for path in paths.into_iter().filter(|path| path.is_dir()) {
                let name = name_of(&path);
                // Images that are being written or removed are hidden.
                if !name.starts_with('.') {
                    inventory.look_at(name, path);
                }
            }
        }
        inventory
    }

    /// Where the image of that name is, if there is one now.
    pub(super) fn find(&self, name: &str) -> Option<PathBuf> {
        debug_assert!(is_name(name), "routes check names");
        if let Some(path) = self.named.get(name) {
            return Some(path.clone());
        }
        // One component: a folder's own directories, and nothing below them.
        let single = !name.contains('/');
        let mut candidates = self
            .folders
            .iter()
            .filter(|_| single)
            .map(|folder| folder.join(name));
        candidates.find(|path| is_layout(path))
    }

    /// The layout of that name; `None` if there is none.
    pub(super) fn open(&self, name: &str) -> Result<Option<Layout>, LayoutError> {
        self.find(name).map(|path| Layout::open(&path)).transpose()
    }
}

impl Inventory {
    /// Sorts a directory that is to be served as `name`, unless it cannot be.
    fn look_at(&mut self, name: String, path: PathBuf) {
        let reason = if !is_layout(&path) {
            "there is no image in it".to_owned()
        } else if !is_name(&name) {
            RepositoryError::BadName {
                name,
                path: path.clone(),
            }
            .to_string()
        } else if let Some(first) = self.served.get(&name) {
            if is_same(first, &path) {
                return;
            }
            let first = first.clone();
            RepositoryError::Twice {
                name,
                first,
                second: path.clone(),
            }
            .to_string()
        } else if let Err(error) = look_for_parts(&path) {
            with_causes(&error)
        } else {
            self.served.insert(name, path);
            return;
        };
        self.skipped.push((path, reason));
    }
}

/// Why nobody could run an image.
#[derive(Debug, thiserror::Error)]
pub(super) enum UnusableImage {
    /// What lists its parts.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// A part.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// A part that is on another host.
    #[error(
        "it is thin: its layer {0} is on another host, and `runnel image complete` fetches it: then it can be served"
    )]
    Thin(BlobDigest),
    /// Its manifest names no parts.
    #[error("its manifest is none")]
    Manifest(#[from] serde_json::Error),
}

/// The parts that a manifest names. Whatever else it says is its readers' to judge: they may be newer.
#[derive(Deserialize)]
struct Parts {
    config: Descriptor,
    layers: Vec<Descriptor>,
}

/// Whether an image of the layout can be had: its manifest, and every part that it names, each of its length. Digests
/// are for those who read it.
fn look_for_parts(path: &Path) -> Result<(), UnusableImage> {
    let layout = Layout::open(path)?.with_images()?;
    let look = |blob| read_manifest(&layout, &blob).map(drop);
    let images = layout.images().map(|(blob, _)| look(blob));
    // One that is sound is served; with none, what is wrong with the last says enough.
    images.reduce(Result::or).unwrap_or(Ok(()))
}

/// Reads a manifest of whose parts none is missing or truncated.
pub(super) fn read_manifest(layout: &Layout, manifest: &Blob) -> Result<Vec<u8>, UnusableImage> {
    let bytes = layout.read(manifest, MANIFEST_BYTES_MAX)?;
    let parts: Parts = serde_json::from_slice(&bytes)?;
    for part in [parts.config].iter().chain(&parts.layers) {
        match layout.open_blob(&part.blob()) {
            Err(BlobError::Missing { digest, .. }) if !part.urls.is_empty() => {
                return Err(UnusableImage::Thin(digest));
            }
            found => found?,
        };
    }
    Ok(bytes)
}

/// What is given to serve a directory under a name.
fn given(name: &str, path: &Path) -> String {
    shell_word(format!("{name}={}", path.display()))
}

/// A name that a repository can have, and that is as near to `name` as can be.
fn usable(name: &str) -> String {
    let letter = |c: char| match c.to_ascii_lowercase() {
        c if c.is_ascii_lowercase() || c.is_ascii_digit() || "._-/".contains(c) => c,
        _ => '-',
    };
    let text: String = name.chars().take(40).map(letter).collect();
    let text = text.trim_matches(|c: char| !c.is_ascii_alphanumeric()).to_owned();
    if is_name(&text) { text } else { "web".to_owned() }
}

fn is_same(first: &Path, second: &Path) -> bool {
    let real = |path: &Path| path.canonicalize().ok();
    first == second || real(first).is_some_and(|path| Some(path) == real(second))
}

fn name_of(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

fn is_layout(path: &Path) -> bool {
    path.join("oci-layout").is_file()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use runnel_snapshot::digest::BlobDigest;

    use super::*;

    fn layout(path: &Path) {
        fs::create_dir_all(path).unwrap();
        fs::write(path.join("oci-layout"), "{}").unwrap();
    }

    #[test]
    fn images_are_found_by_name_in_folders_as_they_appear() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().canonicalize().unwrap();
        layout(&root.join("web"));
        fs::create_dir(root.join("many")).unwrap();
        let mut repositories = Repositories::default();
        repositories.add(&root.join("web")).unwrap();
        repositories.add(&root.join("many")).unwrap();
        repositories.add_named("team/db", &root.join("later")).unwrap();

        assert_eq!(repositories.find("web"), Some(root.join("web")));
        assert_eq!(repositories.find("team/db"), Some(root.join("later")));
        assert_eq!(repositories.find("new"), None);
        layout(&root.join("many/new"));
        layout(&root.join("many/new/below"));
        assert_eq!(repositories.find("new"), Some(root.join("many/new")));
        assert_eq!(repositories.find("new/below"), None);
        assert_eq!(repositories.find("many"), None, "a folder is no image");
    }

    #[test]
    fn an_inventory_says_what_is_served_and_why_the_rest_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().canonicalize().unwrap();
        for image in [
            "many/Upper",
            "many/web",
            "many/bare",
            "many/broken",
            "many/cut",
            "many/hollow",
            "many/.hidden",
        ] {
            layout(&root.join(image));
        }
        let part = |kind: &str, bytes: &[u8], len: usize| {
            let digest = BlobDigest::of(bytes);
            format!(r#"{{"mediaType":"{kind}","digest":"{digest}","size":{len}}}"#)
        };
        let whole = format!(r#"{{"config":{},"layers":[]}}"#, part("application/x", b"c", 1));
        let truncated = format!(r#"{{"config":{},"layers":[]}}"#, part("application/x", b"c", 2));
        let kind = "application/vnd.oci.image.manifest.v1+json";
        let [manifest, cut] = [&whole, &truncated].map(|text| part(kind, text.as_bytes(), text.len()));
        for (image, text) in [("many/web", &whole), ("many/cut", &truncated)] {
            let blobs = root.join(image).join("blobs/sha256");
            fs::create_dir_all(&blobs).unwrap();
            for blob in [text.as_bytes(), b"c"] {
                fs::write(blobs.join(BlobDigest::of(blob).hex()), blob).unwrap();
            }
        }
        for (image, manifests) in [
            ("many/Upper", &*manifest),
            ("many/web", &*manifest),
            ("many/bare", ""),
            ("many/cut", &*cut),
            ("many/hollow", &*manifest),
        ] {
            let write = |file: &str, text: String| fs::write(root.join(image).join(file), text).unwrap();
            write("oci-layout", r#"{"imageLayoutVersion":"1.0.0"}"#.to_owned());
            write(
                "index.json",
                format!(r#"{{"schemaVersion":2,"manifests":[{manifests}]}}"#),
            );
        }
        fs::create_dir(root.join("many/empty")).unwrap();
        fs::write(root.join("many/file"), "").unwrap();
        let mut repositories = Repositories::default();
        repositories.add(&root.join("many")).unwrap();
        repositories.add_named("later", &root.join("later")).unwrap();

        let inventory = repositories.inventory();
        assert_eq!(
            inventory.served.into_iter().collect::<Vec<_>>(),
            [("web".to_owned(), root.join("many/web"))]
        );
        let skipped: Vec<_> = inventory.skipped.iter().map(|(path, _)| name_of(path)).collect();
        assert_eq!(
            skipped,
            ["later", "Upper", "bare", "broken", "cut", "empty", "hollow"]
        );
        assert!(
            inventory.skipped[1].1.contains("as upper="),
            "{:?}",
            inventory.skipped
        );
        assert!(
            inventory.skipped[4].1.contains("has 1 bytes instead of 2"),
            "{:?}",
            inventory.skipped
        );
    }

    #[test]
    fn names_that_are_impossible_or_taken_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        layout(&folder.path().join("Web"));
        layout(&folder.path().join("a/web"));
        layout(&folder.path().join("b/web"));
        let mut repositories = Repositories::default();
        let bad = repositories.add(&folder.path().join("Web")).unwrap_err();
        assert!(bad.to_string().contains("as web="), "{bad}");
        let bad = repositories.add_named("A B", Path::new("/web")).unwrap_err();
        assert!(bad.to_string().contains("as a-b=/web"), "{bad}");
        let bad = repositories.add_named("A", Path::new("/my web")).unwrap_err();
        assert!(bad.to_string().contains("as 'a=/my web'"), "{bad}");
        repositories.add(&folder.path().join("a/web")).unwrap();
        assert!(matches!(
            repositories.add(&folder.path().join("b/web")),
            Err(RepositoryError::Twice { .. })
        ));
        repositories.add(&folder.path().join("a/web")).unwrap();
        repositories
            .add_named("web", &folder.path().join("a/../a/web"))
            .unwrap();
        repositories.add(&folder.path().join("a")).unwrap();
        repositories.add(&folder.path().join("a")).unwrap();
        assert_eq!(repositories.directories().count(), 2, "each once");
        assert!(matches!(
            repositories.add(&folder.path().join("none")),
            Err(RepositoryError::NotADirectory(_))
        ));
    }
}
