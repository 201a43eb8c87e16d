//! TLS for both ends: a server's certificate and key, and whom a client trusts. Version 1.2 and 1.3, by rustls.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore, ServerConfig};

/// Where systems keep the certificates of the authorities that they trust: Debian, Fedora, SUSE, Alpine.
const SYSTEM_AUTHORITIES: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// Why TLS cannot be spoken.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A PEM file cannot be read.
    #[error("{path} cannot be read as PEM: it should hold {expected}")]
    Pem {
        /// Which file.
        path: PathBuf,
        /// What should be in it.
        expected: &'static str,
        /// What is wrong.
        #[source]
        source: Box<pem::Error>,
    },
    /// A PEM file has no certificate.
    #[error("{0} holds no certificate")]
    NoCertificate(PathBuf),
    /// No authorities.
    #[error(
        "this system has no certificates of authorities in {}: install ca-certificates, or name a file of your own",
        SYSTEM_AUTHORITIES.join(", ")
    )]
    NoAuthorities,
    /// Certificate and key do not go together, or are of a kind that is not supported.
    #[error("the certificate in {certificate} cannot be used with the key in {key}")]
    Unusable {
        /// The chain.
        certificate: PathBuf,
        /// The key.
        key: PathBuf,
        /// What is wrong.
        #[source]
        source: rustls::Error,
    },
    /// Nothing that both rustls and its cryptography support.
    #[error("TLS cannot be set up")]
    Setup(#[from] rustls::Error),
}

/// A server's identity, as PEM files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Its certificate, and those between it and its authority.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

impl Identity {
    pub(crate) fn server_config(&self) -> Result<Arc<ServerConfig>, TlsError> {
        let chain = certificates(&self.certificate)?;
        let key = PrivateKeyDer::from_pem_file(&self.key).map_err(pem_error(&self.key, "a private key"))?;
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .map_err(|source| TlsError::Unusable {
                certificate: self.certificate.clone(),
                key: self.key.clone(),
                source,
            })?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }
}

/// A client that trusts the authorities in `authorities`, or those of the system.
pub(crate) fn client_config(authorities: Option<&Path>) -> Result<Arc<ClientConfig>, TlsError> {
    let path = match authorities {
        Some(path) => path,
        None => SYSTEM_AUTHORITIES
            .iter()
            .map(Path::new)
            .find(|path| path.exists())
            .ok_or(TlsError::NoAuthorities)?,
    };
    let mut roots = RootCertStore::empty();
    // A bundle may hold old certificates that rustls does not take; the others count.
    let (taken, _) = roots.add_parsable_certificates(certificates(path)?);
    if taken == 0 {
        return Err(TlsError::NoCertificate(path.to_owned()));
    }
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let failed = || pem_error(path, "certificates");
    let chain: Vec<_> = CertificateDer::pem_file_iter(path)
        .map_err(failed())?
        .collect::<Result<_, _>>()
        .map_err(failed())?;
    if chain.is_empty() {
        return Err(TlsError::NoCertificate(path.to_owned()));
    }
    Ok(chain)
}

fn pem_error<'a>(path: &'a Path, expected: &'static str) -> impl FnOnce(pem::Error) -> TlsError + 'a {
    move |source| TlsError::Pem {
        path: path.to_owned(),
        expected,
        source: Box::new(source),
    }
}
