//! Unmodified Debian kernels on the monitor's library: what must be the same after a save and a restore.

#![allow(clippy::unwrap_used)] // An assertion, in helpers of tests as in tests.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use runnel_tests::lab;
use runnel_tests::lab::suite::Suite;
use runnel_vmm::config::{BootSource, MemorySize, MicrovmConfig, Serial, VcpuCount};
use runnel_vmm::exit::{EndSignal, Ended};
use runnel_vmm::memory;
use runnel_vmm::microvm::{self, Microvm, Saved};
use runnel_vmm::state::Resumption;
use tempfile::TempDir;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

/// A guest takes 10 seconds to its first word where its host is emulated.
const DEADLINE: Duration = Duration::from_secs(120);

fn main() -> ExitCode {
    Suite {
        host_kernels: &["6.12-cloud"],
        memory_mib: 2048,
        deadline: Duration::from_secs(600),
        programs: &[],
        things: &[
            "kernel/6.1-cloud",
            "kernel/6.12-cloud",
            "guest/6.1-cloud",
            "guest/6.12-cloud",
        ],
        tests: &[
            ("linux_6_12_with_1_vcpu_counts_on_after_a_restore", || {
                counts_on_after_a_restore("6.12-cloud", 1)
            }),
            ("linux_6_12_with_4_vcpus_counts_on_after_a_restore", || {
                counts_on_after_a_restore("6.12-cloud", 4)
            }),
            ("linux_6_1_with_2_vcpus_counts_on_after_a_restore", || {
                counts_on_after_a_restore("6.1-cloud", 2)
            }),
            ("ctrl_alt_del_restarts_linux", ctrl_alt_del_restarts_linux),
        ],
    }
    .main()
}

/// A machine, and the other end of its console.
struct Linux {
    machine: Microvm,
    end: EndSignal,
    console: BufReader<UnixStream>,
    _folder: TempDir,
}

impl Linux {
    fn made(config: &mut MicrovmConfig, make: impl FnOnce(&MicrovmConfig, &EndSignal) -> Microvm) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("console");
        config.serial = Serial::Socket(socket.clone());
        let end = EndSignal::new().unwrap();
        let mut machine = make(config, &end);
        let console = UnixStream::connect(socket).unwrap();
        console.set_read_timeout(Some(DEADLINE)).unwrap();
        machine.unpause();
        Self {
            machine,
            end,
            console: BufReader::new(console),
            _folder: folder,
        }
    }

    /// The next line that begins with `key=`, and what follows.
    fn value(&mut self, key: &str) -> String {
        loop {
            let mut line = String::new();
            let read = self.console.read_line(&mut line);
            assert!(matches!(read, Ok(1..)), "{read:?}; ended: {:?}", self.end.ended());
            if let Some((found, value)) = line.trim().split_once('=')
                && found == key
            {
                return value.to_owned();
            }
        }
    }
}

fn config(kernel: &str, vcpus: u8, steps: &str) -> MicrovmConfig {
    let mut config = MicrovmConfig::default();
    config.machine.memory = MemorySize::from_mib(192).unwrap();
    config.machine.vcpus = VcpuCount::new(vcpus).unwrap();
    config.entropy = true;
    config.boot_source = Some(BootSource {
        kernel: lab::thing(&format!("kernel/{kernel}")).join("vmlinuz"),
        initrd: Some(lab::thing(&format!("guest/{kernel}"))),
        boot_args: Some(format!("console=ttyS0 quiet reboot=k panic=-1 lab={steps}")),
    });
    config
}

fn counts_on_after_a_restore(kernel: &str, vcpus: u8) {
    let mut config = config(kernel, vcpus, "kernel,rng,count");
    let mut linux = Linux::made(&mut config, |config, end| Microvm::build(config, end).unwrap());
    assert_eq!(linux.value("kernel.cpus"), vcpus.to_string());
    let count = |linux: &mut Linux| linux.value("count").parse::<u64>().unwrap();
    while count(&mut linux) < 5 {}

    linux.machine.pause(&|| false).unwrap();
    let sections = linux.machine.save().unwrap();
    let layout = linux.machine.layout();
    let region = linux.machine.ram().iter().next().unwrap();
    let file: Arc<File> = Arc::clone(region.file_offset().unwrap().arc());
    drop(linux);

    let mut restored = Linux::made(&mut config, |config, end| {
        let ram = Arc::new(memory::resumed(layout, &file).unwrap());
        let stores = &mut microvm::open_file;
        let saved = Saved {
            config,
            ram,
            layout,
            sections,
            stores,
            clock: Resumption::WhereItWas,
        };
        Microvm::restore(saved, end).unwrap()
    });
    // The first line may be the rest of one that was begun before.
    let first = count(&mut restored);
    for expected in first + 1..first + 20 {
        assert_eq!(count(&mut restored), expected);
    }
}

fn ctrl_alt_del_restarts_linux() {
    let mut config = config("6.12-cloud", 1, "kernel,count");
    let mut linux = Linux::made(&mut config, |config, end| Microvm::build(config, end).unwrap());
    linux.value("count");
    linux.machine.board().keyboard().press_ctrl_alt_del().unwrap();
    assert_eq!(linux.end.wait(DEADLINE), Some(&Ended::Reset));
}
