//! `runnel serve`: images for other hosts.

use std::net::{SocketAddr, ToSocketAddrs};
use std::num::NonZero;
use std::path::{Path, PathBuf};

use clap::Args;
use runnel_agent::serve::{CONNECTIONS_MAX, ImageServer, Inventory, Repositories, ServeSettings, Token};
use runnel_agent::tls::Identity;
use serde_json::{Value, json};

use super::Failure;
use crate::exit::Exit;
use crate::held::{Held, hold};
use crate::images::{ImageStore, StoreError};
use crate::output::{OutputArgs, print, print_json, tell};
use crate::signals::Signals;
use crate::size::parse_count;

const HELP: &str = "\
Serves the pull half of a registry: `runnel resume http://HOST:PORT/NAME` runs an image of it, and skopeo, oras and
podman can copy from it, and find the names at /v2/_catalog. An image of the local store is served under its name; an
image's directory, and each image of a folder, under the name of the directory; NAME=IMAGE gives another one. Without
IMAGE, all of the local store is served, as are images that appear in it, or in a folder, later. An image whose list or
manifest cannot be used, or a part of which is missing or truncated, is left out, and said so; `runnel verify` looks
further. While it is being served, `runnel image rm` leaves an image alone.

Images hold guests' memory. Beyond this host's loopback it takes a token and TLS, or --insecure on a network that is
yours alone.

Examples:
    runnel serve
    runnel serve web-v1 db-v1
    runnel serve web=./web-v1 --listen 10.0.0.1:5000 --token-file token --tls-cert cert.pem --tls-key key.pem
    (umask 077; openssl rand -hex 32 > token)   makes a token that nobody else can read
    openssl req -x509 -newkey rsa:2048 -nodes -days 365 -keyout key.pem -out cert.pem -subj /CN=HOST \\
        -addext subjectAltName=IP:10.0.0.1 -addext basicConstraints=critical,CA:FALSE
                                                makes a certificate; others take it with --tls-ca cert.pem
    skopeo login --username any --password-stdin --cert-dir DIR --authfile auth.json 10.0.0.1:5000 < token
                                                makes what others give as --credentials auth.json; DIR has ca.crt: cert.pem";

/// A name without an image, or the other way round.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} lacks a side: give NAME=IMAGE, as in web=./web-v1")]
struct HalfNamed(String);

/// Nothing that was named can be served, and nothing more can appear.
#[derive(Debug, thiserror::Error)]
#[error("nothing can be served: {}", reasons(.0))]
struct NothingToServe(Vec<(PathBuf, String)>);

fn reasons(skipped: &[(PathBuf, String)]) -> String {
    let reasons = skipped
        .iter()
        .map(|(path, reason)| format!("{}: {reason}", path.display()));
    reasons.collect::<Vec<_>>().join("; ")
}

/// Let other hosts pull images
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(crate) struct ServeArgs {
    /// Images of the local store, directories of images, folders of them, or NAME=IMAGE
    #[arg(value_name = "IMAGE")]
    images: Vec<String>,

    /// Where to listen: an address, or a name that stands for one, and a port; port 0 takes any that is free
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:5000", value_parser = address)]
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
    #[arg(long, value_name = "COUNT", default_value_t = CONNECTIONS_MAX, value_parser = parse_count)]
    max_connections: NonZero<usize>,

    #[command(flatten)]
    output: OutputArgs,
}

impl ServeArgs {
    fn repositories(&self) -> Result<Repositories, Failure> {
        let mut repositories = Repositories::default();
        if self.images.is_empty() {
            let store = ImageStore::of_this_user()?;
            let is_mistyped = store.missing().is_some();
            store.create()?;
            if is_mistyped {
                let store = store.path().display();
                tell(format_args!(
                    "RUNNEL_IMAGES is {store}, which was not there and was made"
                ));
            }
            repositories.add(store.path())?;
        }
        for text in &self.images {
            match text.split_once('=') {
                Some((name, image)) if name.is_empty() || image.is_empty() => {
                    return Err(HalfNamed(text.clone()).into());
                }
                Some((name, image)) => repositories.add_named(name, &directory(image)?)?,
                None => repositories.add(&directory(text)?)?,
            }
        }
        Ok(repositories)
    }
}

/// The directory that is meant: of a name, an image of the store, or else what is there; a path, which need not be there
/// yet.
fn directory(text: &str) -> Result<PathBuf, StoreError> {
    let path = Path::new(text);
    if text.contains('/') {
        return Ok(path.to_owned());
    }
    ImageStore::of_this_user()?.image(text).or_else(|unknown| {
        if path.is_dir() {
            Ok(path.to_owned())
        } else {
            Err(unknown)
        }
    })
}

/// Where to listen, as somebody writes it.
fn address(text: &str) -> Result<SocketAddr, String> {
    let found = text.to_socket_addrs();
    let found =
        found.map_err(|error| format!("give an address and a port, as in 127.0.0.1:5000 ({error})"))?;
    // A name may stand for both; clients that are given an address know the older one.
    found
        .min_by_key(SocketAddr::is_ipv6)
        .ok_or_else(|| format!("{text} has no address"))
}

fn skipped(inventory: &Inventory) -> Vec<Value> {
    let skipped = inventory.skipped.iter();
    skipped
        .map(|(path, reason)| json!({ "path": path, "reason": reason }))
        .collect()
}

/// What is served, a URL a line.
fn describe(url: &str, inventory: &Inventory) -> String {
    if inventory.served.is_empty() {
        return "no image is there yet\n".to_owned();
    }
    let names = inventory.served.keys();
    names.map(|name| format!("    {url}/{name}\n")).collect()
}

pub(crate) fn run(args: &ServeArgs) -> Result<Exit, Failure> {
    let signals = Signals::take()?;
    let token = args.token_file.as_deref().map(Token::read).transpose()?;
    let tls = args.tls_cert.clone().zip(args.tls_key.clone());
    let tls = tls.map(|(certificate, key)| Identity { certificate, key });
    let scheme = if tls.is_some() { "https" } else { "http" };
    let repositories = args.repositories()?;
    let inventory = repositories.inventory();
    if inventory.served.is_empty() && !repositories.may_grow() {
        return Err(NothingToServe(inventory.skipped).into());
    }
    // Those that are still to come are not there to be held.
    let there = repositories.directories().filter(|path| path.is_dir());
    let _held: Vec<Held> = there.filter_map(hold).collect();
    let server = ImageServer::start(ServeSettings {
        listen: args.listen,
        repositories,
        token,
        tls,
        insecure: args.insecure,
        connections_max: args.max_connections,
    })?;
    let url = format!("{scheme}://{}", server.address());
    if !args.output.json {
        for (path, reason) in &inventory.skipped {
            tell(format_args!("{} is not served: {reason}", path.display()));
        }
    }
    match args.output.json {
        true => print_json(&json!({
            "url": url,
            "address": server.address().to_string(),
            "images": inventory.served,
            "skipped": skipped(&inventory),
        }))?,
        false => print(&format!(
            "serving at {url}; Ctrl-C ends it\n{}",
            describe(&url, &inventory)
        ))?,
    }
    let signal = signals.wait()?;
    server.stop();
    // To be ended is what it waits for, so that is no failure.
    tracing::debug!(signal, "ended");
    Ok(Exit::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_to_listen_at_is_its_address_and_what_is_none_is_told_what_is_needed() {
        assert_eq!(address("[::1]:5000").unwrap().to_string(), "[::1]:5000");
        let local = address("localhost:5000").unwrap();
        assert!(local.ip().is_loopback() && local.port() == 5000, "{local}");
        for text in ["", "localhost", "5000", ":x", "127.0.0.1:99999"] {
            let told = address(text).unwrap_err();
            assert!(told.contains("127.0.0.1:5000"), "{text}: {told}");
        }
    }
}
