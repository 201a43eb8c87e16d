//! Where passwords and tokens of registries are: the files that container tools write.

use std::path::{Path, PathBuf};

use runnel_agent::remote::{Credentials, CredentialsError};

/// `$REGISTRY_AUTH_FILE`, else `~/.docker/config.json` if there is one.
pub(crate) fn usual_credentials() -> Option<PathBuf> {
    let named = std::env::var_os("REGISTRY_AUTH_FILE").map(PathBuf::from);
    named.or_else(|| {
        let home = std::env::var_os("HOME")?;
        Some(Path::new(&home).join(".docker/config.json")).filter(|path| path.is_file())
    })
}

/// Reads them.
///
/// # Errors
/// When the file cannot be read or understood. That there is none is no error.
pub(crate) fn credentials() -> Result<Credentials, CredentialsError> {
    usual_credentials().map_or_else(|| Ok(Credentials::default()), |path| Credentials::read(&path))
}
