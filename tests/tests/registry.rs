//! Images in Debian's `docker-registry`, where `skopeo` puts them. Bare guests. (`bad_images.rs` has stock `zstd`.)
//!
//! What is missing of them, and of what the lab makes, is said, and the test skipped; with `RUNNEL_LAB=full` that is a
//! failure.

#![allow(clippy::unwrap_used)] // An assertion, in helpers of tests as in tests.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use runnel_tests::bare::{booted, save, wait_until};
use runnel_tests::lab;
use runnel_tests::user::{User, succeeded};
use serde_json::{Value, json};
use tempfile::TempDir;

/// How often another port is tried: one that was free a moment ago may be taken.
const PORTS_MAX: u32 = 20;

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Whether the program is here; if not, says that the test is skipped.
fn is_installed(name: &str) -> bool {
    let is_there = Command::new(name).arg("--version").output().is_ok();
    let reason =
        format!("there is no {name}: `apt-get install {name}`, or `resources/lab/need packages` as root");
    if !is_there {
        lab::skip(&reason);
    }
    is_there
}

/// Whether the lab's things can be made here: of Debian's packages, by root.
fn lab_is_possible() -> bool {
    let is_root = fs::metadata("/proc/self").unwrap().uid() == 0;
    let is_possible = is_root && Path::new("/etc/debian_version").exists();
    if !is_possible {
        lab::skip("the registry is Debian's, and root alone gets it");
    }
    is_possible
}

/// Debian's registry on loopback, keeping what it gets in a folder that goes with it.
struct Registry {
    process: Child,
    address: SocketAddr,
    _folder: TempDir,
}

impl Registry {
    fn start() -> Self {
        let registry_program = lab::thing("registry");
        for _ in 0..PORTS_MAX {
            let folder = tempfile::tempdir().unwrap();
            let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
            let config = folder.path().join("config.yml");
            let blobs = folder.path().join("blobs");
            fs::write(&config, configuration(&blobs, address)).unwrap();
            let log = File::create(folder.path().join("log")).unwrap();
            let mut process = Command::new(&registry_program)
                .arg("serve")
                .arg(&config)
                .stdin(Stdio::null())
                .stdout(log.try_clone().unwrap())
                .stderr(log)
                .spawn()
                .unwrap();
            let mut has_ended = false;
            wait_until("the registry listens, or has ended", || {
                has_ended = process.try_wait().unwrap().is_some();
                has_ended || answers(address)
            });
            if has_ended {
                eprintln!("{}", fs::read_to_string(folder.path().join("log")).unwrap());
                continue;
            }
            return Self {
                process,
                address,
                _folder: folder,
            };
        }
        panic!("no port out of {PORTS_MAX} is free for the registry");
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Nothing but files and a port: no log of each request, no proxy, no redirects.
fn configuration(blobs: &Path, address: SocketAddr) -> String {
    json!({
        "version": 0.1,
        "log": {"level": "warn"},
        "storage": {"filesystem": {"rootdirectory": blobs}},
        "http": {"addr": address.to_string()},
    })
    .to_string()
}

/// Whether whoever listens there speaks the registry's protocol.
fn answers(address: SocketAddr) -> bool {
    let ask = || {
        let mut stream = TcpStream::connect(address)?;
        stream.write_all(b"GET /v2/ HTTP/1.0\r\n\r\n")?;
        let mut answer = [0; 64];
        let count = stream.read(&mut answer)?;
        Ok::<bool, std::io::Error>(answer[..count].starts_with(b"HTTP/1.0 200"))
    };
    ask().unwrap_or(false)
}

/// The image's manifest, and its digest, as `index.json` names it.
fn manifest_of(image: &Path) -> (String, Value) {
    let read = |path: &Path| -> Value { serde_json::from_slice(&fs::read(path).unwrap()).unwrap() };
    let index = read(&image.join("index.json"));
    let digest = index["manifests"][0]["digest"].as_str().unwrap().to_owned();
    let manifest = read(&blob(image, &digest));
    (digest, manifest)
}

fn blob(image: &Path, digest: &str) -> std::path::PathBuf {
    let (algorithm, hex) = digest.split_once(':').unwrap();
    image.join("blobs").join(algorithm).join(hex)
}

#[test]
fn an_image_that_skopeo_puts_into_a_registry_runs_from_there() {
    if !is_installed("skopeo") || !lab_is_possible() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    let machine = booted("fill:8m:4m:7 count:3");
    save(&machine, &image);
    drop(machine);
    let (digest, _) = manifest_of(&image);

    let registry = Registry::start();
    let source = format!("oci:{}", image.display());
    let name = format!("{}/machines/web", registry.address);
    let copy = Command::new("skopeo")
        .args(["copy", "--quiet", "--dest-tls-verify=false", &source])
        .arg(format!("docker://{name}:v1"))
        .output();
    succeeded(copy.unwrap());
    // All that is left of it.
    fs::remove_dir_all(&image).unwrap();

    for reference in [format!("http://{name}:v1"), format!("http://{name}@{digest}")] {
        // Each with an agent of its own, which has nothing yet.
        let user = User::new();
        let resume = user
            .command(&["resume", &reference, "--detach", "--name", "far"])
            .output();
        succeeded(resume.unwrap());
        let heard = user.converse("far", "checkfill:8m:4m:7\ncount:1\npoweroff\n");
        assert!(heard.contains("checkfill=right"), "{reference}: {heard}");
        assert!(heard.contains("count=4"), "{reference}: {heard}");
    }
}

#[test]
fn a_digest_that_the_registry_has_not_is_refused_by_name() {
    if !is_installed("skopeo") || !lab_is_possible() {
        return;
    }
    let registry = Registry::start();
    let user = User::new();
    let reference = format!(
        "http://{}/machines/web@sha256:{}",
        registry.address,
        "0".repeat(64)
    );
    let output = user
        .command(&["resume", &reference, "--detach"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = text(&output.stderr);
    assert!(said.contains("machines/web"), "{said}");
}

/// `--raw`, since without it skopeo wants a container's configuration, which no artifact has.
#[test]
fn skopeo_shows_an_images_manifest() {
    if !is_installed("skopeo") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    save(&booted("count:1"), &image);
    let (_, manifest) = manifest_of(&image);
    let inspect = Command::new("skopeo")
        .args(["inspect", "--raw"])
        .arg(format!("oci:{}", image.display()))
        .output();
    let shown: Value = serde_json::from_str(&succeeded(inspect.unwrap())).unwrap();
    assert_eq!(shown, manifest);
    assert!(!shown["layers"].as_array().unwrap().is_empty());
}
