//! What it takes to fork a machine a hundred times: how soon the last clone runs, and what each costs the host.
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
const FORKS: usize = 3;
/// How long after the last clone runs nothing changes any more.
const AT_REST: Duration = Duration::from_secs(2);
/// Longer than any clone takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// Forks a machine whose memory is `content`.
///
/// # Errors
/// When a clone does not run.
pub(crate) fn measure(content: &Path, metrics: &mut Metrics) -> io::Result<()> {
    let user = User::new();
    save(&user, content)?;
    // One that stays: the copy that all share is there then.
    user.output(&["fork", "web-v1", "-n", "1", "--name", "first"]);
    wait_until_resident(&user);
    let (mut times, mut host, mut own) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..FORKS {
        std::thread::sleep(AT_REST);
        let before = available_kib()?;
        let asked = Instant::now();
        let number = CLONES.to_string();
        let made = user.output(&["fork", "web-v1", "-n", &number, "--name", "c", "--json"]);
        let made: Value = serde_json::from_str(&made)?;
        let machines = made["machines"].as_array().into_iter().flatten();
        let consoles = machines.filter_map(|machine| machine["console_socket"].as_str());
        let consoles: Vec<&str> = consoles.collect();
        assert_eq!(consoles.len(), CLONES);
        consoles.iter().try_for_each(|console| has_run(console))?;
        times.push(asked.elapsed());
        std::thread::sleep(AT_REST);
        host.push(before.saturating_sub(available_kib()?) as f64 / CLONES as f64);
        own.push(proportional_kib(&user)? as f64 / CLONES as f64);
        user.output(&["kill", "--all"]);
        user.output(&["fork", "web-v1", "-n", "1", "--name", "first"]);
        wait_until_resident(&user);
    }
    metrics.add("fork_100_first_instruction_ms", Samples::milliseconds(&times));
    metrics.add("fork_host_kib_per_clone", Samples::new("KiB", host));
    metrics.add("fork_pss_kib_per_clone", Samples::new("KiB", own));
    Ok(())
}

fn save(user: &User, content: &Path) -> io::Result<()> {
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
    user.output(&["snapshot", "web", "web-v1"]);
    user.output(&["kill", "web"]);
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

/// What the clones' processes have, pages that several have shared out among them; the first one is not counted.
fn proportional_kib(user: &User) -> io::Result<u64> {
    let machines = user
        .machines()
        .into_iter()
        .filter(|machine| machine["name"] != "first-1");
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
