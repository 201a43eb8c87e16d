//! What each crate may be built from: architecture's arrows, and nothing of TLS or remote stores in the monitor.

use std::collections::BTreeSet;
use std::process::Command;

/// The crates that `package` is built from, itself included, without what its tests need.
fn tree(package: &str) -> BTreeSet<String> {
    let output = Command::new(env!("CARGO"))
        .args([
            "tree",
            "--offline",
            "--edges",
            "normal,build",
            "--prefix",
            "none",
            "--format",
            "{p}",
            "--package",
        ])
        .arg(package)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs");
    assert!(
        output.status.success(),
        "cargo tree: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let text = String::from_utf8(output.stdout).expect("cargo prints text");
    text.lines()
        .filter_map(|line| line.split(' ').next())
        .map(str::to_owned)
        .collect()
}

/// Ours among them.
fn ours(package: &str) -> Vec<String> {
    tree(package)
        .into_iter()
        .filter(|name| name == "runnel" || name.starts_with("runnel-"))
        .collect()
}

#[test]
fn nothing_of_tls_or_remote_stores_is_in_the_monitor() {
    const PARTS: [&str; 3] = ["tls", "ssl", "webpki"];
    const NAMES: [&str; 9] = [
        "aws-lc-rs",
        "curl",
        "h2",
        "hickory-resolver",
        "object_store",
        "quinn",
        "reqwest",
        "ring",
        "ureq",
    ];
    // Its name has the three letters by chance.
    const KVM: &str = "kvm-ioctls";
    let is_of_the_network = |name: &String| {
        name != KVM && (NAMES.contains(&name.as_str()) || PARTS.iter().any(|part| name.contains(part)))
    };
    let found: Vec<String> = tree("runnel-vmm").into_iter().filter(is_of_the_network).collect();
    assert!(found.is_empty(), "the monitor is built from {found:?}");
}

#[test]
fn crates_import_each_other_as_the_architecture_says() {
    assert_eq!(ours("runnel-snapshot"), ["runnel-snapshot"]);
    assert_eq!(ours("runnel-devices"), ["runnel-devices", "runnel-snapshot"]);
    assert_eq!(
        ours("runnel-vmm"),
        ["runnel-devices", "runnel-snapshot", "runnel-vmm"]
    );
    assert_eq!(ours("runnel-agent"), ["runnel-agent", "runnel-snapshot"]);
    let tool = ours("runnel");
    for other in ["runnel-vmm", "runnel-devices", "runnel-tests"] {
        assert!(
            !tool.contains(&other.to_owned()),
            "the tool is built from {other}"
        );
    }
}
