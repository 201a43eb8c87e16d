//! `runnel serve`: images for other hosts.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;
use runnel_agent::serve::{CONNECTIONS_MAX, ImageServer, Repositories, ServeSettings, Token};
use runnel_agent::tls::Identity;
use serde_json::json;

use super::Failure;
use crate::exit::Exit;
use crate::images::ImageStore;
use crate::output::{OutputArgs, print, print_json};
use crate::signals::Signals;

const HELP: &str = "\
Serves the pull half of a registry: `runnel resume http://HOST:PORT/NAME` runs an image of it, and skopeo, oras and
podman can copy from it. A folder serves each image in it under the name of its directory; NAME=DIR gives another one.
Without DIR, the local store is served.

Images hold guests' memory. Beyond this host's loopback it takes a token and TLS, or --insecure on a network that is
yours alone.

Examples:
    runnel serve ~/images
    runnel serve web=./web-v1 --listen 10.0.0.1:5000 --token-file token --tls-cert cert.pem --tls-key key.pem
    openssl rand -hex 32 > token        makes a token";

/// Let other hosts pull images
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(crate) struct ServeArgs {
    /// Image directories, folders of them, or NAME=DIR
    #[arg(value_name = "DIR")]
    directories: Vec<String>,

    /// Where to listen; port 0 takes any that is free
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:5000")]
    listen: SocketAddr,

    /// File with the token that clients must give
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,

    /// Certificate for TLS, and those between it and its authority, in PEM
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,

    /// The certificate's key, in PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,

    /// Listen beyond loopback without token and TLS
    #[arg(long)]
    insecure: bool,

    /// Connections at a time
    #[arg(long, value_name = "COUNT", default_value_t = CONNECTIONS_MAX)]
    max_connections: usize,

    #[command(flatten)]
    output: OutputArgs,
}

impl ServeArgs {
    fn repositories(&self) -> Result<Repositories, Failure> {
        let mut repositories = Repositories::default();
        if self.directories.is_empty() {
            repositories.add(ImageStore::of_this_user()?.path())?;
        }
        for text in &self.directories {
            match text.split_once('=') {
                Some((name, path)) => repositories.add_named(name, path.as_ref())?,
                None => repositories.add(text.as_ref())?,
            }
        }
        Ok(repositories)
    }
}

pub(crate) fn run(args: &ServeArgs) -> Result<Exit, Failure> {
    let signals = Signals::take()?;
    let token = args.token_file.as_deref().map(Token::read).transpose()?;
    let tls = args.tls_cert.clone().zip(args.tls_key.clone());
    let tls = tls.map(|(certificate, key)| Identity { certificate, key });
    let scheme = if tls.is_some() { "https" } else { "http" };
    let server = ImageServer::start(ServeSettings {
        listen: args.listen,
        repositories: args.repositories()?,
        token,
        tls,
        insecure: args.insecure,
        connections_max: args.max_connections,
    })?;
    let url = format!("{scheme}://{}", server.address());
    match args.output.json {
        true => print_json(&json!({ "url": url, "address": server.address().to_string() }))?,
        false => print(&format!("serving at {url}; Ctrl-C ends it\n"))?,
    }
    let signal = signals.wait()?;
    server.stop();
    // To be ended is what it waits for, so that is no failure.
    tracing::debug!(signal, "ended");
    Ok(Exit::Done)
}
