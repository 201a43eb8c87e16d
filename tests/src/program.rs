//! Runnel's programs, as built from the sources that are here.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The program `name`, built in the same profile as the test that asks for it. Built once more if need be, so that no
/// test runs an old one.
///
/// # Panics
/// When it cannot be built.
#[must_use]
pub fn program(name: &str) -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(build).join(name)
}

/// Builds all programs, and says where they are.
fn build() -> PathBuf {
    // target/<profile>/deps/<test>
    let test = std::env::current_exe().expect("a test knows where it is");
    let folder = test
        .ancestors()
        .nth(2)
        .expect("a test lies in target/<profile>/deps")
        .to_owned();
    let Some(cargo) = option_env!("CARGO").map(Path::new).filter(|cargo| cargo.exists()) else {
        // Carried into a nested host, where there is nothing to build with.
        return folder;
    };
    let mut build = Command::new(cargo);
    build.args([
        "build",
        "--quiet",
        "--offline",
        "--package",
        "runnel-vmm",
        "--bins",
    ]);
    build.args(folder.ends_with("release").then_some("--release"));
    // Where this test was built, wherever that is.
    build
        .arg("--target-dir")
        .arg(folder.parent().expect("a profile's folder lies in target"));
    let status = build
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .status()
        .expect("cargo runs");
    assert!(status.success(), "cargo build: {status}");
    folder
}
