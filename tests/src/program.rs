//! Runnel's programs, as built from the sources that are here.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use crate::lab;

/// The program `name`, built in the same profile as the test that asks for it. Built
/// once more if need be, so that no test runs an old one; in the nested host, the one that was carried along, and where
/// `RUNNEL_PROGRAMS` names a folder, the one there.
///
/// # Panics
/// When it cannot be built.
#[must_use]
pub fn program(name: &str) -> PathBuf {
    if lab::is_nested() || std::env::var_os("RUNNEL_PROGRAMS").is_some() {
        return lab::program(name); // carried along: there is nothing to build with; or built for a purpose
    }
    static BUILT: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    // target/<profile>/deps/<test>, or target/<profile>/<program>
    let test = std::env::current_exe().expect("a test knows where it is");
    let folder = test
        .ancestors()
        .skip(1)
        .find(|folder| !folder.ends_with("deps"))
        .expect("a test lies in target/<profile>");
    // Held while building: whoever asks meanwhile waits for the same.
    let mut built = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
    if !built.contains(name) {
        build(name, folder);
        built.insert(name.to_owned());
    }
    folder.join(name)
}

fn build(name: &str, folder: &Path) {
    let mut build = Command::new(env!("CARGO"));
    build.args(["build", "--quiet", "--offline", "--workspace", "--bin", name]);
    // There are no examples, but with them cargo turns on what tests turn on in all that the program is made of: this is
    // the one that is there when all was built at once, and nothing is compiled another time.
    build.arg("--examples");
    build.args(folder.ends_with("release").then_some("--release"));
    // What cargo tells a test of its own package makes build scripts run again that look at it, and ring compile anew.
    for (variable, _) in std::env::vars_os() {
        let text = variable.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            build.env_remove(&variable);
        }
    }
    // Where this test was built, wherever that is.
    build
        .arg("--target-dir")
        .arg(folder.parent().expect("a profile's folder lies in target"));
    let status = build
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .status()
        .expect("cargo runs");
    assert!(status.success(), "cargo build --bin {name}: {status}");
}
