//! Unmodified Debian kernels under Runnel: what they find, and how they end.

#![allow(
    clippy::unwrap_used,
    reason = "without the standard harness clippy takes this for no test"
)]

use std::fs::File;
use std::process::ExitCode;
use std::time::Duration;

use runnel_tests::lab::linux_guest::LinuxGuest;
use runnel_tests::lab::suite::Suite;
use runnel_tests::lab::tap::Tap;
use runnel_tests::lab::{Level, level};

fn main() -> ExitCode {
    Suite {
        carries: false,
        host_kernels: &["6.12-cloud", "6.1-cloud"],
        memory_mib: 3072,
        deadline: Duration::from_secs(900),
        programs: &["runnel-vmm"],
        things: &[
            "kernel/6.1-cloud",
            "kernel/6.1",
            "kernel/6.12-cloud",
            "guest/6.1-cloud",
            "guest/6.1",
            "guest/6.12-cloud",
        ],
        tests: &[
            ("kvm_runs_what_linux_needs", kvm_runs_what_linux_needs),
            (
                "debian_6_1_finds_every_device_and_switches_off",
                debian_6_1_finds_every_device_and_switches_off,
            ),
            (
                "debian_6_12_finds_every_device_and_switches_off",
                debian_6_12_finds_every_device_and_switches_off,
            ),
            (
                "debian_6_12_has_a_generation_identifier",
                debian_6_12_has_a_generation_identifier,
            ),
            (
                "an_elf_kernel_boots_with_four_vcpus",
                an_elf_kernel_boots_with_four_vcpus,
            ),
            ("a_reboot_ends_the_monitor", a_reboot_ends_the_monitor),
            (
                "what_is_typed_on_the_console_arrives",
                what_is_typed_on_the_console_arrives,
            ),
            (
                "debian_6_1_of_the_full_flavour_finds_every_device_and_its_generation_identifier",
                debian_6_1_of_the_full_flavour_finds_every_device_and_its_generation_identifier,
            ),
        ],
    }
    .main()
}

fn kvm_runs_what_linux_needs() {
    assert_eq!(level::of_this_machine(), Level::Linux);
}

fn debian_6_1_finds_every_device_and_switches_off() {
    finds_every_device_and_switches_off("6.1-cloud", "6.1.");
}

fn debian_6_12_finds_every_device_and_switches_off() {
    finds_every_device_and_switches_off("6.12-cloud", "6.12.");
}

fn finds_every_device_and_switches_off(kernel: &str, release: &str) {
    let folder = tempfile::tempdir().unwrap();
    let (writable, read_only) = (folder.path().join("writable"), folder.path().join("read-only"));
    File::create(&writable).unwrap().set_len(8 << 20).unwrap();
    File::create(&read_only).unwrap().set_len(1 << 20).unwrap();
    let tap = Tap::new("tap0", "172.16.0.1/24");

    let steps = "kernel,disks,write:vda:runnel,sum:vdb,net:172.16.0.2/24:172.16.0.1,rng,off";
    let mut guest = LinuxGuest::new(kernel, steps)
        .vcpus(2)
        .drive("data", &writable, false)
        .drive("fixed", &read_only, true)
        .interface(tap.name(), "06:00:ac:10:00:02")
        .entropy()
        .start();

    guest.expect_all(&[("guest", "up")]);
    assert!(guest.expect("kernel.release").starts_with(release));
    guest.expect_all(&[
        ("kernel.cpus", "2"),
        ("kernel.clocksource", "kvm-clock"),
        ("disk.vda.bytes", "8388608"),
        ("disk.vda.read_only", "0"),
        ("disk.vdb.bytes", "1048576"),
        ("disk.vdb.read_only", "1"),
        ("write.vda", "ok"),
        ("sum.vdb", "b6d81b360a5672d80c27430f39153e2c"), // a MiB of zeros
        ("net.mac", "06:00:ac:10:00:02"),
        ("net.received", "3"),
        ("rng.name", "virtio_rng.0"),
        ("rng.bytes", "64"),
    ]);
    assert_eq!(guest.end().code(), Some(0));
    let content = std::fs::read(&writable).unwrap();
    assert!(
        content[1 << 20..2 << 20].starts_with(b"runnel\nrunnel\n"),
        "the guest's writes are in the file"
    );
}

fn debian_6_12_has_a_generation_identifier() {
    // The cloud kernel 6.1 is built without the driver.
    let mut guest = LinuxGuest::new("6.12-cloud", "kernel,off").start();
    guest.expect_all(&[("kernel.vmgenid", "1")]);
    assert_eq!(guest.end().code(), Some(0));
}

fn an_elf_kernel_boots_with_four_vcpus() {
    let mut guest = LinuxGuest::new("6.1-cloud", "kernel,off").elf().vcpus(4).start();
    guest.expect_all(&[("kernel.cpus", "4")]);
    assert_eq!(guest.end().code(), Some(0));
}

fn a_reboot_ends_the_monitor() {
    // Nothing on the command line says how. One of several vCPUs goes back to real mode, the others are stopped.
    for (kernel, vcpus) in [("6.1-cloud", 1), ("6.12-cloud", 2)] {
        let mut guest = LinuxGuest::new(kernel, "reboot").vcpus(vcpus).start();
        guest.expect_all(&[("guest", "up")]);
        assert_eq!(guest.end().code(), Some(0), "{kernel}");
    }
}

fn what_is_typed_on_the_console_arrives() {
    let mut guest = LinuxGuest::new("6.1-cloud", "shell").start();
    guest.expect_all(&[("shell", "ready")]);
    guest.type_line("echo sum=$((1000 + 234))");
    guest.expect_all(&[("sum", "1234"), ("exit", "0")]);
    guest.type_line("false");
    guest.expect_all(&[("exit", "1")]);
    guest.type_line("off");
    assert_eq!(guest.end().code(), Some(0));
}

/// Debian's third kernel: that for hardware, with the driver that its cloud flavour leaves out.
fn debian_6_1_of_the_full_flavour_finds_every_device_and_its_generation_identifier() {
    finds_every_device_and_switches_off("6.1", "6.1.");
    let mut guest = LinuxGuest::new("6.1", "kernel,off").start();
    let release = guest.expect("kernel.release");
    assert!(!release.contains("cloud"), "{release}");
    guest.expect_all(&[("kernel.vmgenid", "1")]);
    assert_eq!(guest.end().code(), Some(0));
}
