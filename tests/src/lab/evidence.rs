//! What a host shows of a guest that did not do what it should, for whoever reads a failure on a machine that is gone:
//! whether its vCPUs run, rest or spin, whether timers fire, and what the host's kernel has to say.

use std::fmt::Write as _;
use std::fs;
use std::process::Command;
use std::thread;
use std::time::Duration;

/// How long counters are watched.
const WATCHED: Duration = Duration::from_secs(1);
const LOG_LINES_MAX: usize = 15;
/// Clock ticks of /proc in a second (proc(5)): the same on every Linux of this architecture.
const TICK: Duration = Duration::from_millis(10);

/// What a monitor's threads did in a second, and what KVM counted of its machine (`Documentation/virt/kvm/api.rst`,
/// statistics; they are in debugfs, which the nested host has mounted).
#[must_use]
pub fn of_monitor(pid: u32) -> String {
    let before = (threads(pid), counters(pid));
    thread::sleep(WATCHED);
    let after = (threads(pid), counters(pid));
    let mut text = format!("its monitor in {} s:", WATCHED.as_secs());
    for (name, state, ticks) in &after.0 {
        let earlier = before.0.iter().find(|(other, ..)| other == name);
        let ran = TICK * ticks.saturating_sub(earlier.map_or(0, |(.., ticks)| *ticks));
        let _ = write!(text, "\n  thread {name}: {state}, ran {} ms", ran.as_millis());
    }
    for (name, count) in &after.1 {
        let earlier = before.1.iter().find(|(other, _)| other == name);
        let more = count - earlier.map_or(0, |(_, count)| *count);
        if *count != 0 {
            let _ = write!(text, "\n  {name}: {count}, {more} of them now");
        }
    }
    text
}

/// The host's clock, whether its own timers fire, and the end of its kernel's log.
#[must_use]
pub fn of_host() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_else(|error| format!("{path}: {error}"));
    let clock = read("/sys/devices/system/clocksource/clocksource0/current_clocksource");
    let before = timer_interrupts();
    thread::sleep(WATCHED);
    let fired = timer_interrupts().saturating_sub(before);
    let log = Command::new("dmesg").output().map_or_else(
        |error| format!("no log of the kernel: {error}"),
        |output| String::from_utf8_lossy(&output.stdout).into_owned(),
    );
    let lines: Vec<&str> = log.lines().collect();
    let last = lines[lines.len().saturating_sub(LOG_LINES_MAX)..].join("\n  ");
    format!(
        "this host: clock source {}, load {}, {fired} timer interrupts in {} s; the end of its kernel's log:\n  {last}",
        clock.trim_end(),
        read("/proc/loadavg").trim_end(),
        WATCHED.as_secs(),
    )
}

/// Name, state and CPU time in ticks of each thread: the fields 3, 14 and 15 of `stat` (proc(5)).
fn threads(pid: u32) -> Vec<(String, String, u32)> {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return Vec::new();
    };
    let of_task = |path: std::path::PathBuf| {
        let stat = fs::read_to_string(path.join("stat")).ok()?;
        let (before, after) = stat.rsplit_once(") ")?;
        let (_, name) = before.split_once('(')?;
        let fields: Vec<&str> = after.split(' ').collect();
        let ticks = |field: usize| fields.get(field - 3)?.parse::<u32>().ok();
        Some((
            format!("{name} {}", path.file_name()?.to_string_lossy()),
            (*fields.first()?).to_owned(),
            ticks(14)? + ticks(15)?,
        ))
    };
    tasks.flatten().filter_map(|task| of_task(task.path())).collect()
}

/// What KVM counts of the machines of this process, by name.
fn counters(pid: u32) -> Vec<(String, i64)> {
    let mut found = Vec::new();
    let folders = fs::read_dir("/sys/kernel/debug/kvm")
        .into_iter()
        .flatten()
        .flatten();
    for folder in folders.filter(|folder| {
        folder
            .file_name()
            .to_string_lossy()
            .starts_with(&format!("{pid}-"))
    }) {
        for file in fs::read_dir(folder.path()).into_iter().flatten().flatten() {
            let count = fs::read_to_string(file.path())
                .ok()
                .and_then(|text| text.trim().parse().ok());
            if let Some(count) = count {
                found.push((file.file_name().to_string_lossy().into_owned(), count));
            }
        }
    }
    found.sort();
    found
}

/// How often the local APICs' timers interrupted: the line `LOC` of /proc/interrupts.
fn timer_interrupts() -> u64 {
    let interrupts = fs::read_to_string("/proc/interrupts").unwrap_or_default();
    let line = interrupts
        .lines()
        .find(|line| line.trim_start().starts_with("LOC:"));
    let numbers = line.into_iter().flat_map(str::split_whitespace);
    numbers.filter_map(|number| number.parse::<u64>().ok()).sum()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn a_thread_that_spins_has_run_and_one_that_sleeps_has_not() {
        let ended = AtomicBool::new(false);
        let text = thread::scope(|scope| {
            let spin = || {
                while !ended.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            };
            thread::Builder::new()
                .name("spins".to_owned())
                .spawn_scoped(scope, spin)
                .unwrap();
            let text = of_monitor(std::process::id());
            ended.store(true, Ordering::Relaxed);
            text
        });
        let spins = text.lines().find(|line| line.contains("thread spins "));
        let spins = spins.unwrap_or_else(|| panic!("{text}"));
        assert!(!spins.ends_with(", ran 0 ms"), "{text}");
    }

    #[test]
    fn a_host_has_a_clock_and_a_timer_that_fires() {
        let text = of_host();
        assert!(!text.contains("No such file"), "{text}");
        assert!(!text.contains(", 0 timer interrupts"), "{text}");
    }
}
