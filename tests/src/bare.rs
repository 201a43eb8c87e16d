//! Machines with the bare guest: booted, saved, loaded, told what to do.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::bare_guest;
use crate::monitor::{DEADLINE, Monitor, Question};

/// RAM of a machine, unless a test says otherwise.
pub const MIB: u64 = 64;

/// How often something is looked at that nobody announces.
const LOOK: Duration = Duration::from_millis(5);

/// Configures a machine that obeys `words` and then listens, without starting it.
///
/// # Panics
/// When the monitor refuses.
pub fn configure(monitor: &Monitor, vcpus: u32, words: &str) {
    monitor.demand(
        "PUT",
        "/machine-config",
        &json!({"vcpu_count": vcpus, "mem_size_mib": MIB}),
    );
    monitor.demand(
        "PUT",
        "/boot-source",
        &json!({"kernel_image_path": bare_guest(), "boot_args": words}),
    );
}

/// Starts the machine that was configured, and waits until it listens.
///
/// # Panics
/// When it does not.
pub fn start(monitor: &mut Monitor) {
    monitor.demand("PUT", "/actions", &json!({"action_type": "InstanceStart"}));
    monitor.wait_for_console("listening=1");
}

/// A machine that has obeyed `words` and listens.
///
/// # Panics
/// When there is none to be had.
#[must_use]
pub fn booted(words: &str) -> Monitor {
    let mut monitor = Monitor::start();
    configure(&monitor, 1, words);
    start(&mut monitor);
    monitor
}

/// Random bytes in a machine's memory, which no compressor makes fewer: where they are, how many there are, and what the
/// guest makes of them.
#[derive(Debug)]
pub struct Noise {
    start: u64,
    bytes: u64,
    sum: String,
}

impl Noise {
    /// Has the guest look whether they are all still there.
    ///
    /// # Panics
    /// When they are not.
    pub fn check(&self, monitor: &mut Monitor) {
        monitor.type_line(&self.words());
        assert_eq!(monitor.wait_for_console("sum="), self.sum);
    }

    /// What the guest is told to look at all of them; it says `sum=`.
    #[must_use]
    pub fn words(&self) -> String {
        format!("sum:{:#x}:{}", self.start, self.bytes)
    }

    /// What it says then.
    #[must_use]
    pub fn answer(&self) -> &str {
        &self.sum
    }
}

/// A machine with so many random bytes in its memory, which has obeyed `words` and listens.
///
/// # Panics
/// When there is none to be had.
#[must_use]
pub fn booted_with_noise(bytes: u64, words: &str) -> (Monitor, Noise) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("noise");
    let mut random = vec![0; usize::try_from(bytes).expect("it fits into memory")];
    let source = File::open("/dev/urandom").and_then(|mut source| source.read_exact(&mut random));
    source.expect("random bytes are to be had");
    std::fs::write(&path, random).expect("a file can be written");
    let mut monitor = Monitor::start();
    configure(&monitor, 1, words);
    let boot = json!({"kernel_image_path": bare_guest(), "initrd_path": path, "boot_args": words});
    monitor.demand("PUT", "/boot-source", &boot);
    monitor.demand("PUT", "/actions", &json!({"action_type": "InstanceStart"}));
    let guest = monitor.wait_for_console("guest=bare");
    let start = guest
        .split("initrd=0x")
        .nth(1)
        .and_then(|rest| rest.split(' ').next())
        .and_then(|digits| u64::from_str_radix(digits, 16).ok())
        .expect("the guest says where its initrd is");
    monitor.wait_for_console("listening=1");
    let mut noise = Noise {
        start,
        bytes,
        sum: String::new(),
    };
    monitor.type_line(&noise.words());
    noise.sum = monitor.wait_for_console("sum=");
    (monitor, noise)
}

/// Saves a machine to an image.
///
/// # Panics
/// When it cannot be saved.
pub fn save(monitor: &Monitor, image: &Path) {
    monitor.demand("PUT", "/snapshot/create", &json!({"image_path": image}));
}

/// Asks a machine to save itself to an image, and does not wait for it.
#[must_use]
pub fn saving(monitor: &Monitor, image: &Path) -> Question {
    let create = json!({"image_path": image});
    Question::put(monitor.socket(), "PUT", "/snapshot/create", &create)
}

/// Has a guest begin what it does round by round, as `words` say, and waits until it does: before it has read them they
/// are its serial port's, and a machine that is saved then has not begun.
///
/// # Panics
/// When it does not begin.
pub fn begin_rounds(monitor: &mut Monitor, words: &str) {
    monitor.type_line(words);
    monitor.wait_for_console("begun=");
}

/// Has a guest end what it does round by round (`churn`, `diskchurn`, …); all of its rounds must have been right.
///
/// # Panics
/// When one was not: what it found was not of one moment.
pub fn end_rounds(monitor: &mut Monitor, what: &str) {
    monitor.type_line("");
    let answer = monitor.wait_for_console(&format!("{what}="));
    assert!(answer.starts_with(&format!("{what}=right rounds=")), "{answer}");
}

/// A machine as `request` says.
///
/// # Panics
/// When it cannot be loaded.
#[must_use]
pub fn load(request: &Value) -> Monitor {
    let monitor = Monitor::start();
    monitor.demand("PUT", "/snapshot/load", request);
    monitor
}

/// A machine resumed from an image of this host.
///
/// # Panics
/// When it cannot be loaded.
#[must_use]
pub fn resumed(image: &Path) -> Monitor {
    load(&json!({"image": image, "resume_vm": true}))
}

/// Tells the guest `words`, and holds what it says against `answer`.
///
/// # Panics
/// When it says something else.
pub fn tell(monitor: &mut Monitor, words: &str, answer: &str) {
    monitor.type_line(words);
    hear(monitor, answer);
}

/// Holds what the guest says next of `answer`'s kind against it.
///
/// # Panics
/// When it says something else.
pub fn hear(monitor: &mut Monitor, answer: &str) {
    let (name, _) = answer.split_once('=').expect("an answer is NAME=VALUE");
    assert_eq!(monitor.wait_for_console(&format!("{name}=")), answer);
}

/// What `GET /` says.
///
/// # Panics
/// When it does not answer.
#[must_use]
pub fn about(monitor: &Monitor) -> Value {
    monitor.demand("GET", "/", &Value::Null)
}

/// Waits until the machine is stalled; says why.
///
/// # Panics
/// When it never is.
#[must_use]
pub fn wait_until_stalled(monitor: &Monitor) -> Value {
    let mut stalled = Value::Null;
    wait_until("the machine is stalled", || {
        stalled = about(monitor)["stalled"].clone();
        !stalled.is_null()
    });
    stalled
}

/// Looks until `holds` says so.
///
/// # Panics
/// When it never does.
pub fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !holds() {
        assert!(Instant::now() < deadline, "never: {what}");
        thread::sleep(LOOK);
    }
}

/// Asks for something that must be refused; gives the reason.
///
/// # Panics
/// When it is granted.
#[must_use]
pub fn refusal(monitor: &Monitor, verb: &str, path: &str, body: &Value) -> String {
    let (status, answer) = monitor.ask(verb, path, body);
    assert_eq!(status, 400, "{verb} {path} {body}: {answer}");
    answer["fault_message"]
        .as_str()
        .unwrap_or_else(|| panic!("no reason: {answer}"))
        .to_owned()
}
