//! What is served under which name: image directories, and folders of them.
//!
//! Nothing is kept of a directory between requests: an image that appears (by a rename, so whole) is served, one that
//! is removed is not.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use runnel_snapshot::image::layout::{Layout, LayoutError};
use runnel_snapshot::image::reference::is_name;

/// Why a directory cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum RepositoryError {
    /// There is no such directory.
    #[error("{0} is not a directory: give an image's directory, or a folder of them")]
    NotADirectory(PathBuf),
    /// Its name, or the given one, is none of a repository.
    #[error(
        "{name:?} cannot be the name of a repository (lower-case letters, digits, '.', '_', '-', and '/' between components): serve it as NAME={path}"
    )]
    BadName {
        /// The name.
        name: String,
        /// The directory.
        path: PathBuf,
    },
    /// Two directories want one name.
    #[error(
        "{first} and {second} would both be served as {name}: give one of them another name, as NAME={second}"
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
            self.folders.push(path);
            return Ok(());
        }
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        self.insert(name, path)
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
            return Err(RepositoryError::Twice {
                name,
                first: first.clone(),
                second: path,
            });
        }
        self.named.insert(name, path);
        Ok(())
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

fn is_layout(path: &Path) -> bool {
    path.join("oci-layout").is_file()
}

#[cfg(test)]
mod tests {
    use std::fs;

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
    fn names_that_are_impossible_or_taken_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        layout(&folder.path().join("Web"));
        layout(&folder.path().join("a/web"));
        layout(&folder.path().join("b/web"));
        let mut repositories = Repositories::default();
        let bad = repositories.add(&folder.path().join("Web")).unwrap_err();
        assert!(bad.to_string().contains("NAME="), "{bad}");
        repositories.add(&folder.path().join("a/web")).unwrap();
        assert!(matches!(
            repositories.add(&folder.path().join("b/web")),
            Err(RepositoryError::Twice { .. })
        ));
        assert!(matches!(
            repositories.add(&folder.path().join("none")),
            Err(RepositoryError::NotADirectory(_))
        ));
    }
}
