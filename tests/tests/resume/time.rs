//! The time that a machine goes on with.

use std::time::Duration;

use runnel_tests::bare::{booted, load, save, wait_until};
use runnel_tests::forge;
use runnel_tests::monitor::Monitor;
use serde_json::json;

/// How long the machine was away, as its image says it.
const AWAY: Duration = Duration::from_secs(3600);

/// In how many ticks of its counter the guest wants to be woken: minutes, whatever the counter's frequency is.
const ALARM: u64 = 1_000_000_000_000;

/// How often it is looked for an alarm that is not due.
const LOOKS: usize = 20;

const VECTOR: u64 = 0xec;

/// The deadline of the local APIC's timer.
const DEADLINE: u32 = 0x6e0;

/// Of the local APIC's registers of requests, the one that has the vector.
const REQUESTED: u32 = 0x820 + (VECTOR / 32) as u32;

fn write(machine: &mut Monitor, register: u32, value: u64) {
    machine.type_line(&format!("wrmsr:{register:#x}:{value:#x}"));
    machine.wait_for_console("wrmsr=done");
}

/// Sets the alarm. The guest takes no interrupts: they stay requested.
fn set_alarm(machine: &mut Monitor) {
    const BASE: (u32, u64) = (0x1b, 0xfee0_0d00); // on, as an x2APIC
    const SPURIOUS: (u32, u64) = (0x80f, 0x1ff);
    const TIMER: (u32, u64) = (0x832, 0b10 << 17 | VECTOR); // by deadline
    for (register, value) in [BASE, SPURIOUS, TIMER] {
        write(machine, register, value);
    }
    machine.type_line("tsc");
    let shown = machine.wait_for_console("tsc=");
    let now: u64 = shown.strip_prefix("tsc=").unwrap().parse().unwrap();
    write(machine, DEADLINE, now + ALARM);
}

fn has_rung(machine: &mut Monitor) -> bool {
    machine.type_line(&format!("rdmsr:{REQUESTED:#x}"));
    machine.wait_for_console("rdmsr=") == format!("rdmsr={:#x}", 1 << (VECTOR % 32))
}

#[test]
fn the_guests_time_goes_forward_with_the_hosts_clock_only_where_that_is_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    let mut machine = booted("");
    set_alarm(&mut machine);
    save(&machine, &image);
    drop(machine);
    forge::age(&image, AWAY);
    for where_it_was in [
        json!({"image": image, "resume_vm": true}),
        json!({"image": image, "resume_vm": true, "clock_realtime": false}),
    ] {
        let mut machine = load(&where_it_was);
        assert!((0..LOOKS).all(|_| !has_rung(&mut machine)), "{where_it_was}");
    }
    let mut machine = load(&json!({"image": image, "resume_vm": true, "clock_realtime": true}));
    wait_until("the alarm that is overdue rings", || has_rung(&mut machine));
}
