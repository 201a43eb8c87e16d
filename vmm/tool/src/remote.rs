//! How servers of other hosts are met: who to be at registries, and whose certificates to trust.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::process::Command;

use clap::Args;
use runnel_agent::remote::{Credentials, CredentialsError, RemoteSettings, usual_credentials};

/// Why a file that was given is of no use.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RemoteFlagError {
    /// `--credentials`.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    /// `--tls-ca`.
    #[error("the certificates in {path}, which --tls-ca names, cannot be read", path = path.display())]
    Authorities {
        /// Which file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
}

/// What a command is told of that.
#[derive(Clone, Debug, Args)]
pub(crate) struct RemoteFlags {
    /// Passwords and tokens of registries [default: $REGISTRY_AUTH_FILE, else ~/.docker/config.json]
    #[arg(long, value_name = "FILE")]
    credentials: Option<PathBuf>,

    /// Certificates of the authorities to trust, in PEM, in place of the system's
    #[arg(long, value_name = "FILE")]
    tls_ca: Option<PathBuf>,
}

impl RemoteFlags {
    /// The settings that they come to.
    ///
    /// # Errors
    /// When credentials cannot be read or understood. That there are none is no error.
    pub(crate) fn settings(&self) -> Result<RemoteSettings, CredentialsError> {
        let credentials = self.credentials.clone().or_else(usual_credentials);
        Ok(RemoteSettings {
            credentials: credentials
                .map_or_else(|| Ok(Credentials::default()), |path| Credentials::read(&path))?,
            authorities: self.tls_ca.clone(),
            ..RemoteSettings::default()
        })
    }

    /// Looks at the files that were given: an agent that runs already would never.
    ///
    /// # Errors
    /// When one cannot be read.
    pub(crate) fn check(&self) -> Result<(), RemoteFlagError> {
        if let Some(path) = &self.credentials {
            Credentials::read(path)?;
        }
        if let Some(path) = &self.tls_ca {
            File::open(path).map_err(|source| RemoteFlagError::Authorities {
                path: path.clone(),
                source,
            })?;
        }
        Ok(())
    }

    /// Whether there is anything to pass on.
    pub(crate) fn are_given(&self) -> bool {
        self.credentials.is_some() || self.tls_ca.is_some()
    }

    /// Passes on what was given to a command that takes the same flags.
    pub(crate) fn pass_on(&self, command: &mut Command) {
        let flags = [("--credentials", &self.credentials), ("--tls-ca", &self.tls_ca)];
        for (flag, file) in flags {
            if let Some(file) = file {
                command.arg(flag).arg(file);
            }
        }
    }
}
