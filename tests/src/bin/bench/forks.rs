//! What it takes to fork an image, or a machine, a hundred times: how soon the last clone runs, and what each costs the host.
//!
//! The guest watches its generation identifier, and halts when it sees another: it is a clone then, and has run.

use std::fs;
use std::io::{self, Read as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use runnel_tests::bare_guest;
use runnel_tests::user::{User, read_to};
use serde_json::Value;

use super::content::RAM_MIB;
use super::metrics::{Metrics, Samples};

const CLONES: usize = 100;
/// Their names begin with it.
const CLONE: &str = "clone";
const FORKS: usize = 3;
/// How long after the last clone runs nothing changes any more.
const AT_REST: Duration = Duration::from_secs(2);
/// Longer than any clone takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// Forks an image of a machine whose memory is `content`, and then such a machine while it runs.
///
/// # Errors
/// When a clone does not run.
pub(crate) fn measure(content: &Path, metrics: &mut Metrics) -> io::Result<()> {
    let user = User::new();
    boot(&user, content)?;
    user.output(&["snapshot", "web", "web-v1"]);
    user.output(&["kill", "web"]);
    let mut of_image = Vec::new();
    for _ in 0..FORKS {
        // One that stays: the copy that all share is there then.
        user.output(&["fork", "web-v1", "-n", "1", "--name", "first"]);
        wait_until_resident(&user);
        of_image.push(Fork::of(&user, "web-v1")?);
        user.output(&["kill", "--all"]);
    }
    Fork::add_to(metrics, "fork", &of_image);

    let mut of_machine = Vec::new();
    for _ in 0..FORKS {
        // Its first fork alone shares its memory.
        let user = User::new();
        boot(&user, content)?;
        of_machine.push(Fork::of(&user, "web")?);
    }
    Fork::add_to(metrics, "fork_machine", &of_machine);
    Ok(())
}

/// What a fork cost.
struct Fork {
    took: Duration,
    /// What the host has less, for each clone.
    host_kib: f64,
    /// What each clone's process has.
    own_kib: f64,
    /// What KVM's books of each clone's memory take of the host's.
    kvm_kib: f64,
}

impl Fork {
    fn of(user: &User, what: &str) -> io::Result<Self> {
        std::thread::sleep(AT_REST);
        let (before, books_before) = (available_kib()?, kvm_books_kib()?);
        let asked = Instant::now();
        let number = CLONES.to_string();
        let made = user.output(&["fork", what, "-n", &number, "--name", CLONE, "--json"]);
        let made: Value = serde_json::from_str(&made)?;
        let machines = made["machines"].as_array().into_iter().flatten();
        let consoles = machines.filter_map(|machine| machine["console_socket"].as_str());
        let consoles: Vec<&str> = consoles.collect();
        assert_eq!(consoles.len(), CLONES);
        consoles.iter().try_for_each(|console| has_run(console))?;
        let took = asked.elapsed();
        std::thread::sleep(AT_REST);
        let clones = CLONES as f64;
        Ok(Self {
            took,
            host_kib: before.saturating_sub(available_kib()?) as f64 / clones,
            own_kib: proportional_kib(user)? as f64 / clones,
            kvm_kib: kvm_books_kib()?.saturating_sub(books_before) as f64 / clones,
        })
    }

    fn add_to(metrics: &mut Metrics, name: &str, forks: &[Self]) {
        let took: Vec<_> = forks.iter().map(|fork| fork.took).collect();
        metrics.add(
            &format!("{name}_{CLONES}_first_instruction_ms"),
            Samples::milliseconds(&took),
        );
        let mut add = |what, of: fn(&Self) -> f64| {
            let samples = Samples::new("KiB", forks.iter().map(of).collect());
            metrics.add(&format!("{name}_{what}_kib_per_clone"), samples);
        };
        add("host", |fork| fork.host_kib);
        add("pss", |fork| fork.own_kib);
        add("kvm", |fork| fork.kvm_kib);
    }
}

/// Runs a machine named `web` whose memory holds `content`, until it knows who it is.
fn boot(user: &User, content: &Path) -> io::Result<()> {
    let memory = format!("{RAM_MIB}M");
    let path = |path: &Path| path.to_string_lossy().into_owned();
    let (kernel, content) = (path(bare_guest()), path(content));
    let machine = [
        "run", "--kernel", &kernel, "--initrd", &content, "--memory", &memory,
    ];
    let rest = ["--cmdline", "generation halt", "--name", "web", "--detach"];
    user.output(&[&machine[..], &rest].concat());
    let mut console = user.command(&["console", "web"]).spawn()?;
    read_to(&mut console, "generation=known");
    console.kill()?;
    console.wait()?;
    Ok(())
}

/// Waits until all of the first clone's memory is on this host.
fn wait_until_resident(user: &User) {
    let is_resident = || {
        let machines = user.machines();
        let mut volumes = machines
            .iter()
            .filter_map(|machine| machine["volumes"].as_array())
            .flatten();
        volumes.all(|volume| volume["bytes_resident"] == volume["bytes_total"])
    };
    runnel_tests::bare::wait_until("all of memory is resident", is_resident);
}

/// Reads a clone's console until it has said that it is one.
fn has_run(console: &str) -> io::Result<()> {
    let mut console = UnixStream::connect(console)?;
    console.set_read_timeout(Some(PATIENCE))?;
    let (mut heard, mut part) = (Vec::new(), [0; 256]);
    while !String::from_utf8_lossy(&heard).contains("generation=new") {
        match console.read(&mut part)? {
            0 => return Err(io::Error::other("a clone has ended before it ran")),
            count => heard.extend_from_slice(&part[..count]),
        }
    }
    Ok(())
}

/// Memory that the host could give to somebody else.
fn available_kib() -> io::Result<u64> {
    let all = fs::read_to_string("/proc/meminfo")?;
    field_kib(&all, "MemAvailable:")
}

/// What KVM has allocated for its books of guest memory: where it cannot have the processor translate guests' addresses, ten
/// bytes for each page (`memslot_rmap_alloc`, `kvm_page_track_create_memslot`).
fn kvm_books_kib() -> io::Result<u64> {
    let all = fs::read_to_string("/proc/vmallocinfo")?;
    let is_of_kvm = |line: &&str| line.contains("kvm") || line.contains("memslot");
    let bytes = |line: &str| line.split_whitespace().nth(1)?.parse::<u64>().ok();
    Ok(all.lines().filter(is_of_kvm).filter_map(bytes).sum::<u64>() >> 10)
}

/// What the clones' processes have, pages that several have shared out among them.
fn proportional_kib(user: &User) -> io::Result<u64> {
    let machines = user.machines().into_iter().filter(|machine| {
        machine["name"]
            .as_str()
            .is_some_and(|name| name.starts_with(CLONE))
    });
    let mut sum = 0;
    for machine in machines {
        let rollup = fs::read_to_string(format!("/proc/{}/smaps_rollup", machine["pid"]))?;
        sum += field_kib(&rollup, "Pss:")?;
    }
    Ok(sum)
}

fn field_kib(text: &str, name: &str) -> io::Result<u64> {
    let line = text.lines().find(|line| line.starts_with(name));
    let number = line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok());
    number.ok_or_else(|| io::Error::other(format!("the kernel says nothing of {name}")))
}
