//! Where passwords and tokens of registries are: the files that container tools write.

use std::path::{Path, PathBuf};

use runnel_agent::remote::{Credentials, CredentialsError};

/// Reads the given file, else `$REGISTRY_AUTH_FILE`, else `~/.docker/config.json` if there is one.
///
/// # Errors
/// When the file cannot be read or understood. That there is none by default is no error.
pub(crate) fn credentials(given: Option<&Path>) -> Result<Credentials, CredentialsError> {
    let named = given.map(Path::to_owned);
    if let Some(path) = named.or_else(|| std::env::var_os("REGISTRY_AUTH_FILE").map(PathBuf::from)) {
        return Credentials::read(&path);
    }
    let usual = std::env::var_os("HOME").map(|home| Path::new(&home).join(".docker/config.json"));
    match usual.filter(|path| path.is_file()) {
        Some(path) => Credentials::read(&path),
        None => Ok(Credentials::default()),
    }
}
