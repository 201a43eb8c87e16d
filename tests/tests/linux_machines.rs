//! Unmodified Debian kernels on the monitor's library: what must be the same after a save and a restore.
//!
//! One guest is at work with everything at once (`resources/lab/guest/work.c`): values in vector registers on every
//! CPU, writes that are read back past the cache, a TCP stream, lines on its console. It is saved and restored again
//! and again, at once, after ten minutes, after a month, and must not notice more than it should.

#![allow(clippy::unwrap_used)] // An assertion, in helpers of tests as in tests.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Once};
use std::thread;
use std::time::{Duration, Instant};

use runnel_snapshot::section::SavedSection;
use runnel_tests::lab;
use runnel_tests::lab::suite::Suite;
use runnel_tests::lab::tap::Tap;
use runnel_vmm::config::{BootSource, MemorySize, MicrovmConfig, Serial, VcpuCount};
use runnel_vmm::exit::{EndSignal, Ended};
use runnel_vmm::layout::RamLayout;
use runnel_vmm::memory;
use runnel_vmm::microvm::{self, Microvm, Saved};
use runnel_vmm::state::Resumption;
use runnel_vmm::state::vcpu::VcpuState;
use serde_json::json;
use tempfile::TempDir;
use vm_memory::{Bytes as _, GuestMemoryBackend as _, GuestMemoryRegion as _};

/// A guest takes 10 seconds to its first word where its host is emulated, and several times as much where that is busy.
/// Shorter than [`LONG_SLEEP`].
const DEADLINE: Duration = Duration::from_secs(240);

/// A sleep of the guest that ends within [`DEADLINE`] only if the guest's time is set forward.
const LONG_SLEEP: Duration = Duration::from_secs(400);

/// How long a machine is away, as its image says it.
const AWAY: Duration = Duration::from_secs(600);

/// How much the guest's whole seconds, read by a shell, may be off.
const ROUNDING: Duration = Duration::from_secs(2);

/// Where the guest's stream goes.
const STREAM: &str = "172.16.0.1:7000";

const IA32_TSC: u32 = 0x10;
const IA32_TSC_DEADLINE: u32 = 0x6e0;

fn main() -> ExitCode {
    Suite {
        carries: false,
        host_kernels: &["6.12-cloud"],
        memory_mib: 2048,
        deadline: Duration::from_secs(1500),
        programs: &[],
        things: &[
            "kernel/6.1-cloud",
            "kernel/6.12-cloud",
            "guest/6.1-cloud",
            "guest/6.12-cloud",
        ],
        tests: &[
            ("linux_6_12_with_1_vcpu_comes_back_as_it_was", || {
                comes_back_as_it_was("6.12-cloud", 1, KVM_CLOCK)
            }),
            ("linux_6_12_with_4_vcpus_comes_back_as_it_was", || {
                comes_back_as_it_was("6.12-cloud", 4, KVM_CLOCK)
            }),
            ("linux_6_1_on_the_time_stamp_counter_comes_back_as_it_was", || {
                comes_back_as_it_was("6.1-cloud", 1, TIME_STAMP_COUNTER)
            }),
            (
                "a_busy_linux_is_not_called_hung_by_its_own_kernel",
                a_busy_linux_is_not_called_hung,
            ),
            ("ctrl_alt_del_restarts_linux", ctrl_alt_del_restarts_linux),
        ],
    }
    .main()
}

/// What a guest keeps its time by, and what makes it do so.
struct ClockSource {
    name: &'static str,
    argument: &'static str,
}

const KVM_CLOCK: &ClockSource = &ClockSource {
    name: "kvm-clock",
    argument: "",
};

/// What Linux prefers on hosts whose counter never stops; it does not trust an emulated one by itself.
const TIME_STAMP_COUNTER: &ClockSource = &ClockSource {
    name: "tsc",
    argument: "clocksource=tsc tsc=reliable",
};

fn comes_back_as_it_was(kernel: &str, vcpus: u8, source: &ClockSource) {
    let folder = tempfile::tempdir().unwrap();
    let tap = Tap::new("tap0", "172.16.0.1/24");
    echo();
    let arguments = format!(
        "{} lab=kernel,net:172.16.0.2/24:172.16.0.1,shell",
        source.argument
    );
    let mut linux = Linux::boot(with_disk_and_network(
        config(kernel, vcpus, &arguments),
        &folder,
        &tap,
    ));
    assert_eq!(linux.value("kernel.cpus"), vcpus.to_string());
    assert_eq!(linux.value("kernel.clocksource"), source.name);
    assert_eq!(linux.value("net.received"), "3");
    linux.value("shell");
    linux.tell(&format!(
        "dmesg -c >/dev/null; work registers disk:/dev/vda stream:{STREAM} &"
    ));
    linux.works(&["registers", "disk", "stream"]);

    // At once. The machine with one vCPU looks as if it had been up for a month, so that a deadline that is counted by
    // another counter than its own is as far away; Linux then mistrusts its counter, and says so.
    let is_old = vcpus == 1 && source.name == KVM_CLOCK.name;
    let but_for: &[&str] = if is_old { &[" unstable "] } else { &[] };
    // Long before the sleep is over, however slow the host is.
    let (from, before) = (Instant::now(), linux.clock());
    linux.sleep(Duration::from_secs(5));
    let mut saved = linux.save_now("echo typed=$((6 * 7))");
    if is_old {
        saved.age_counters(Duration::from_secs(30 * 86400));
    }
    saved.age_clock(AWAY);
    let mut linux = saved.restore(Resumption::WhereItWas);
    let came = linux.values(["typed", "slept"]);
    assert_eq!(came["typed"], "42");
    let slept: u128 = came["slept"].parse().unwrap();
    assert!(slept >= 5000, "a sleep of 5 s was over after {slept} ms");
    linux.works(&["registers", "disk", "stream"]);
    let after = linux.clock();
    assert!(after.uptime >= before.uptime, "{before:?} {after:?}");
    assert!(
        after.wall - before.wall <= from.elapsed() + ROUNDING,
        "{before:?} {after:?}"
    );
    linux.is_content(but_for);

    // And again, several times in a row.
    for round in 0..2 {
        linux = linux
            .save(&format!("echo typed={round}"))
            .restore(Resumption::WhereItWas);
        assert_eq!(linux.value("typed"), round.to_string());
    }
    linux.works(&["registers", "disk", "stream"]);
    linux.is_content(but_for);

    // After ten minutes: all clocks go forward, and what is overdue is done at once.
    // Nothing may compute meanwhile: Linux takes the time for that of the process that runs, and lets it wait.
    linux.tell("killall -USR1 work");
    linux.sleep(LONG_SLEEP);
    let (from, before) = (Instant::now(), linux.clock());
    let mut saved = linux.save("");
    saved.age_clock(AWAY);
    let mut linux = saved.restore(Resumption::Forward);
    let slept: u128 = linux.value("slept").parse().unwrap();
    assert!(slept >= LONG_SLEEP.as_millis(), "{slept} ms");
    let after = linux.clock();
    let passed = after.wall - before.wall;
    assert!(
        passed >= AWAY - ROUNDING && passed <= AWAY + from.elapsed() + ROUNDING,
        "{before:?} {after:?}"
    );
    linux.works(&["disk", "stream"]);
    linux.is_content(but_for);
    if kernel.starts_with("6.12") {
        // The cloud kernel 6.1 has no driver for VMGenID.
        assert_eq!(linux.reseeds, 4, "once for each restore");
    }
    linux.tell("off");
    assert_eq!(linux.end.wait(DEADLINE), Some(&Ended::PowerOff));
}

/// A CPU that was idle is no witness: its kernel does not expect anything of it. So the shell itself counts, with nothing
/// but its own words, and is one task: of several Linux would have one make up for the others' ten minutes.
fn a_busy_linux_is_not_called_hung() {
    let mut linux = Linux::boot(config("6.12-cloud", 1, "lab=kernel,shell"));
    linux.value("shell");
    linux.tell(
        "dmesg -c >/dev/null; n=0; \
         while [ $n -lt 100000 ]; do n=$((n + 1)); [ $((n % 1000)) = 0 ] && echo beat=$n; done",
    );
    linux.value("beat");
    let mut saved = linux.save_now("echo typed=1");
    saved.age_clock(AWAY);
    let mut linux = saved.restore(Resumption::Forward);
    linux.value("beat");
    // When it has counted to the end.
    assert_eq!(linux.value("typed"), "1");
    linux.is_content(&[]);
}

fn ctrl_alt_del_restarts_linux() {
    let mut linux = Linux::boot(config("6.12-cloud", 1, "reboot=k lab=kernel,count"));
    linux.value("count");
    linux.machine.board().keyboard().press_ctrl_alt_del().unwrap();
    assert_eq!(linux.end.wait(DEADLINE), Some(&Ended::Reset));
}

fn config(kernel: &str, vcpus: u8, arguments: &str) -> MicrovmConfig {
    let mut config = MicrovmConfig::default();
    config.machine.memory = MemorySize::from_mib(192).unwrap();
    config.machine.vcpus = VcpuCount::new(vcpus).unwrap();
    config.entropy = true;
    config.boot_source = Some(BootSource {
        kernel: lab::thing(&format!("kernel/{kernel}")).join("vmlinuz"),
        initrd: Some(lab::thing(&format!("guest/{kernel}"))),
        boot_args: Some(format!("console=ttyS0 quiet panic=-1 {arguments}")),
    });
    config
}

fn with_disk_and_network(mut config: MicrovmConfig, folder: &TempDir, tap: &Tap) -> MicrovmConfig {
    let disk = folder.path().join("disk");
    File::create(&disk).unwrap().set_len(16 << 20).unwrap();
    let drive =
        json!({"drive_id": "data", "path_on_host": disk, "is_root_device": false, "is_read_only": false});
    config.put_drive(serde_json::from_value(drive).unwrap()).unwrap();
    let interface = json!({"iface_id": "net", "host_dev_name": tap.name(), "guest_mac": "06:00:ac:10:00:02"});
    config
        .put_interface(serde_json::from_value(interface).unwrap())
        .unwrap();
    config
}

/// Sends back whatever comes to [`STREAM`]'s port, for as long as this process lives.
fn echo() {
    static STARTED: Once = Once::new();
    STARTED.call_once(|| {
        let listener = TcpListener::bind("0.0.0.0:7000").unwrap();
        thread::spawn(move || {
            let send_back = |stream: TcpStream| std::io::copy(&mut &stream, &mut &stream);
            for stream in listener.incoming() {
                thread::spawn(move || send_back(stream.unwrap()));
            }
        });
    });
}

/// What the guest's clocks show.
#[derive(Clone, Copy, Debug)]
struct Shown {
    wall: Duration,
    uptime: Duration,
}

/// A machine, and the other end of its console.
struct Linux {
    machine: Microvm,
    config: MicrovmConfig,
    end: EndSignal,
    console: UnixStream,
    /// How much of what this machine printed was heard.
    heard_bytes: u64,
    heard: Heard,
    /// How often the guest has noticed that it is a copy.
    reseeds: usize,
    _folder: TempDir,
}

/// Lines that a failure shows of what came before it.
const LINES_KEPT: usize = 8;

/// What was heard of the guest, by whichever machine it was printed.
#[derive(Clone, Default)]
struct Heard {
    /// Nobody has looked at it yet; the last line may be half of one.
    bytes: Vec<u8>,
    /// The lines that were looked at last, as they came: a line that is broken shows by what broke it.
    before: VecDeque<String>,
    /// The number of the last line of counters.
    last: Option<u64>,
}

impl Linux {
    fn boot(config: MicrovmConfig) -> Self {
        Self::made(config, |config, end| Microvm::build(config, end).unwrap())
    }

    fn made(mut config: MicrovmConfig, make: impl FnOnce(&MicrovmConfig, &EndSignal) -> Microvm) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("console");
        config.serial = Serial::Socket(socket.clone());
        let end = EndSignal::new().unwrap();
        let mut machine = make(&config, &end);
        let console = UnixStream::connect(socket).unwrap();
        console.set_read_timeout(Some(DEADLINE)).unwrap();
        machine.unpause();
        Self {
            machine,
            config,
            end,
            console,
            heard_bytes: 0,
            heard: Heard::default(),
            reseeds: 0,
            _folder: folder,
        }
    }

    #[track_caller]
    fn hear(&mut self) {
        let mut bytes = [0; 4096];
        let read = self.console.read(&mut bytes);
        let last = String::from_utf8_lossy(&self.heard.bytes);
        assert!(
            matches!(read, Ok(1..)),
            "{read:?}; ended: {:?}; last heard: {last}",
            self.end.ended()
        );
        let read = read.unwrap();
        self.heard_bytes += read as u64;
        self.heard.bytes.extend_from_slice(&bytes[..read]);
    }

    /// The next line. Those of counters count up without a gap, and none is an error.
    #[track_caller]
    fn line(&mut self) -> String {
        let end = loop {
            match self.heard.bytes.iter().position(|byte| *byte == b'\n') {
                Some(end) => break end,
                None => self.hear(),
            }
        };
        let line: Vec<u8> = self.heard.bytes.drain(..=end).collect();
        let line = String::from_utf8_lossy(&line).into_owned();
        let before = &mut self.heard.before;
        assert!(!line.contains("error="), "{before:?} {line:?}");
        if let Some(work) = counter(&line, "work") {
            let expected = self.heard.last.map_or(1, |last| last + 1);
            assert_eq!(work, expected, "{before:?} {line:?}");
            self.heard.last = Some(work);
        }
        before.push_back(line.clone());
        if before.len() > LINES_KEPT {
            before.pop_front();
        }
        line.trim().to_owned()
    }

    /// The next line that begins with `key=`, and what follows.
    #[track_caller]
    fn value(&mut self, key: &'static str) -> String {
        self.values([key]).remove(key).unwrap()
    }

    /// The next line of each of `keys`, in the order in which they come.
    #[track_caller]
    fn values<const N: usize>(&mut self, keys: [&'static str; N]) -> HashMap<&'static str, String> {
        let until = Instant::now() + DEADLINE;
        let mut found = HashMap::new();
        while found.len() < N {
            let line = self.line();
            for key in keys {
                if let Some(value) = line.strip_prefix(key).and_then(|rest| rest.strip_prefix('=')) {
                    found.entry(key).or_insert(value.to_owned());
                }
            }
            if Instant::now() >= until {
                let (then, now) = (self.timers(), self.timers());
                panic!(
                    "{keys:?} did not come, but {found:?}; the guest's clock and timers, twice: {then:#?} {now:#?}"
                );
            }
        }
        found
    }

    /// What the guest's kernel knows of its clock, and of what it waits for: lines of `timer_list`, its uptime first.
    #[track_caller]
    fn timers(&mut self) -> Vec<String> {
        self.tell("cat /proc/uptime /proc/timer_list; echo timers=end");
        // Its shell may be what does not get on, while others say that they do.
        let until = Instant::now() + DEADLINE / 4;
        let goes_on = |line: &String| line != "timers=end" && Instant::now() < until;
        let lines = std::iter::from_fn(|| Some(self.line()).filter(goes_on));
        lines.filter(|line| !line.starts_with("work=")).collect()
    }

    /// Types a line.
    fn tell(&mut self, words: &str) {
        writeln!(self.console, "{words}").unwrap();
    }

    /// Has a process sleep for so long, and waits until it has begun.
    #[track_caller]
    fn sleep(&mut self, duration: Duration) {
        self.tell(&format!("work sleep:{} &", duration.as_secs()));
        self.value("sleeping");
    }

    /// Waits until each of `jobs` of the guest has got on.
    #[track_caller]
    fn works(&mut self, jobs: &[&str]) {
        let until = Instant::now() + DEADLINE;
        let mut first = HashMap::new();
        let mut waiting = jobs.to_vec();
        while !waiting.is_empty() {
            let line = self.line();
            if counter(&line, "work").is_some() {
                waiting.retain(|job| {
                    let now = counter(&line, job).unwrap();
                    // Two rounds more: the first may have been over before.
                    now < first.entry(*job).or_insert(now).saturating_add(2)
                });
            }
            assert!(Instant::now() < until, "{waiting:?} do not get on: {line}");
        }
    }

    #[track_caller]
    fn clock(&mut self) -> Shown {
        self.tell("clock");
        let mut seconds = |key: &'static str| Duration::from_secs_f64(self.value(key).parse().unwrap());
        Shown {
            wall: seconds("clock.wall"),
            uptime: seconds("clock.uptime"),
        }
    }

    /// Takes the kernel's messages, which are no complaints but for those that contain a word of `but_for`.
    #[track_caller]
    fn is_content(&mut self, but_for: &[&str]) {
        self.tell("dmesg -c >/run/messages; sed 's/^/message=/' /run/messages; echo messages=end");
        let complaints = [
            "soft lockup",
            "stall",
            "unstable",
            "hung",
            "BUG",
            "WARNING",
            "virtio",
            "timed out",
            "I/O error",
        ];
        loop {
            let line = self.line();
            if line == "messages=end" {
                break;
            }
            let Some(message) = line.strip_prefix("message=") else {
                continue;
            };
            self.reseeds += usize::from(message.contains("due to virtual machine fork"));
            assert!(
                !complaints.iter().any(|word| message.contains(word))
                    || but_for.iter().any(|word| message.contains(word)),
                "{message}"
            );
        }
    }

    /// Pauses the machine in the middle of its output, types `words` into what stands, saves it, and ends it.
    #[track_caller]
    fn save(mut self, words: &str) -> Remains {
        // The first line of a burst; the rest is on its way.
        while !self.line().starts_with("work=") || self.heard.last.unwrap() % 8 != 1 {}
        self.save_now(words)
    }

    /// The same, wherever in its output it is.
    #[track_caller]
    fn save_now(mut self, words: &str) -> Remains {
        self.machine.pause(&|| false).unwrap();
        self.tell(words);
        let sections = loop {
            let sections = self.machine.save().unwrap();
            let serial = sections.iter().find(|section| section.kind == "serial").unwrap();
            if serial.state["received"].as_array().unwrap().len() == words.len() + 1 {
                break sections;
            }
            thread::yield_now();
        };
        let written = self
            .machine
            .board()
            .serial()
            .metrics()
            .written_bytes
            .load(Ordering::Relaxed);
        while self.heard_bytes < written {
            self.hear();
        }
        // RAM may be mapped privately, and is the next machine's own.
        let mut file = tempfile::tempfile_in("/dev/shm").unwrap();
        for region in self.machine.ram().iter() {
            let len = usize::try_from(region.len()).unwrap();
            let ram = self.machine.ram();
            ram.write_all_volatile_to(region.start_addr(), &mut file, len)
                .unwrap();
        }
        Remains {
            ram: Arc::new(file),
            layout: self.machine.layout(),
            sections,
            config: self.config.clone(),
            heard: self.heard.clone(),
            reseeds: self.reseeds,
        }
    }
}

/// The number after `key=` in a line of several.
fn counter(line: &str, key: &str) -> Option<u64> {
    let value = line
        .split(' ')
        .find_map(|part| part.strip_prefix(key)?.strip_prefix('='));
    value?.parse().ok()
}

/// What is left of a machine that was saved.
struct Remains {
    ram: Arc<File>,
    layout: RamLayout,
    sections: Vec<SavedSection>,
    config: MicrovmConfig,
    heard: Heard,
    reseeds: usize,
}

impl Remains {
    /// As if it had been saved so long ago.
    fn age_clock(&mut self, by: Duration) {
        for section in self.sections.iter_mut().filter(|section| section.kind == "clock") {
            let then =
                section.state["host_wall_ns"].as_u64().unwrap() - u64::try_from(by.as_nanos()).unwrap();
            section.state["host_wall_ns"] = then.into();
        }
    }

    /// As if the host had been up for so much longer: the counters, and what is counted by them.
    fn age_counters(&mut self, by: Duration) {
        for section in self.sections.iter_mut().filter(|section| section.kind == "vcpu") {
            let mut state: VcpuState = serde_json::from_value(section.state.take()).unwrap();
            let ticks = u64::try_from(by.as_millis()).unwrap() * u64::from(state.tsc_khz);
            for msr in &mut state.msrs {
                // A deadline of 0 is none.
                if msr.0 == IA32_TSC || msr.0 == IA32_TSC_DEADLINE && msr.1 != 0 {
                    msr.1 += ticks;
                }
            }
            section.state = serde_json::to_value(&state).unwrap();
        }
    }

    fn restore(self, clock: Resumption) -> Linux {
        let Self {
            ram,
            layout,
            sections,
            config,
            heard,
            reseeds,
        } = self;
        let mut linux = Linux::made(config, |config, end| {
            let saved = Saved {
                config,
                ram: Arc::new(memory::resumed(layout, &ram).unwrap()),
                layout,
                sections,
                stores: &mut microvm::open_file,
                clock,
            };
            Microvm::restore(saved, end).unwrap()
        });
        (linux.heard, linux.reseeds) = (heard, reseeds);
        linux
    }
}
