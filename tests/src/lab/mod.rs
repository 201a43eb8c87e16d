//! The lab: on what a test runs. Which guests this machine's KVM can run, and the nested host for all others.
//!
//! Two levels. At [`Level::Bare`] KVM interprets guest code: enough for the bare test guest, not for Linux. At
//! [`Level::Linux`] it runs unmodified kernels. A test asks [`has`] before it starts; a [`Suite`](suite::Suite)
//! carries itself into a nested host instead of being skipped.
//!
//! With `RUNNEL_LAB=full` (as in CI) a test that lacks its level fails; without it, the test says why it is skipped.

pub mod evidence;
pub mod hosts;
pub mod level;
pub mod linux_guest;
pub mod nested;
pub mod relay;
pub mod suite;
pub mod tap;

use std::env;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

pub use hosts::TwoHosts;
pub use level::Level;

/// Whether this machine runs guests of `level`; if not, says so, and that the test is skipped.
///
/// # Panics
/// When it does not, under `RUNNEL_LAB=full`.
#[must_use]
pub fn has(level: Level) -> bool {
    let found = level::of_this_machine();
    if found >= level {
        return true;
    }
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    skip(&format!("{test} needs {level}, and this machine has {found}"));
    false
}

/// Says why something is not tested here.
///
/// # Panics
/// Under `RUNNEL_LAB=full`, where everything must be.
pub fn skip(reason: &str) {
    assert!(!is_full(), "{reason}; under RUNNEL_LAB=full that is a failure");
    say(&format!("skipped: {reason}"));
}

/// Says something that is to be seen of a test that passes too: the test harness keeps back what is printed.
pub fn say(words: &str) {
    // Whoever closed standard error does not want to know.
    let _ = writeln!(std::io::stderr(), "{words}");
}

/// Whether everything must run, as in CI.
#[must_use]
pub fn is_full() -> bool {
    env::var_os("RUNNEL_LAB").is_some_and(|value| value == "full")
}

/// Whether this process runs in the nested host.
#[must_use]
pub fn is_nested() -> bool {
    env::var_os("RUNNEL_LAB_HOST").is_some_and(|value| value == "nested")
}

/// Where the programs under test are: `RUNNEL_PROGRAMS`, or the folder that cargo builds them into.
///
/// # Panics
/// When the program is not there: `cargo test` alone builds no programs of other packages.
#[must_use]
pub fn program(name: &str) -> PathBuf {
    let folder = env::var_os("RUNNEL_PROGRAMS")
        .map(PathBuf::from)
        .unwrap_or_else(|| {
            // target/<profile>/deps/<test>-<hash>, or target/<profile>/<program>
            let own = env::current_exe().expect("a process knows its own program");
            let folder = own.parent().expect("a program lies in a folder");
            if folder.ends_with("deps") {
                folder.parent().expect("deps lies in a folder")
            } else {
                folder
            }
            .to_owned()
        });
    let path = folder.join(name);
    assert!(
        path.exists(),
        "{} is not there: build it with `cargo build --workspace`",
        path.display()
    );
    path
}

/// A thing of the lab, as `resources/lab/need` names it: `kernel/6.1-cloud`, `guest/6.12-cloud`. It is made if it is
/// not there, which takes seconds to minutes the first time.
///
/// # Panics
/// When it cannot be made; in the nested host, when it was not carried along.
#[must_use]
pub fn thing(name: &str) -> PathBuf {
    if is_nested() {
        let folder = env::var_os("RUNNEL_LAB_DIR").expect("RUNNEL_LAB_DIR is set in the nested host");
        let path = Path::new(&folder).join(name);
        assert!(
            path.exists(),
            "{name} is not in the nested host: the suite must name it"
        );
        return path;
    }
    let need = script("need");
    let made = Command::new(&need).arg(name).stderr(Stdio::inherit()).output();
    let made = made.unwrap_or_else(|error| panic!("cannot run {}: {error}", need.display()));
    assert!(made.status.success(), "cannot make {name}: {}", made.status);
    PathBuf::from(String::from_utf8_lossy(&made.stdout).trim_end())
}

/// The folder of what was carried, beside the tests in the nested host.
const CARRIED: &str = "carried";

/// What the tests left in the nested host before this one, in a suite that [carries](suite::Suite::carries): a folder.
/// `None` where there is no nested host.
#[must_use]
pub fn carried() -> Option<PathBuf> {
    is_nested().then(|| Path::new("/lab/in").join(CARRIED))
}

/// Where to leave what is to be carried to the next nested host. `None` where there is no nested host.
#[must_use]
pub fn leave() -> Option<PathBuf> {
    is_nested().then(|| PathBuf::from("/lab/scratch/out"))
}

/// A script of `resources/lab`.
fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../resources/lab")
        .join(name)
}
