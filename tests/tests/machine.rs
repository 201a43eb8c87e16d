//! Machines of the monitor's library, without its process: the bare guest on this host's KVM.

#![allow(clippy::unwrap_used)] // An assertion, in helpers of tests as in tests.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use runnel_snapshot::section::SavedSection;
use runnel_tests::bare_guest;
use runnel_vmm::config::{BootSource, MemorySize, MicrovmConfig, Serial, VcpuCount};
use runnel_vmm::exit::{EndSignal, Ended};
use runnel_vmm::layout::{self, RamLayout};
use runnel_vmm::memory;
use runnel_vmm::microvm::{self, Microvm, Saved};
use runnel_vmm::state::vcpu::{Vcpu, VcpuState};
use runnel_vmm::state::{self, Msr, Resumption};
use serde_json::json;
use tempfile::TempDir;
use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion};

/// Far longer than anything here takes: a test that waits so long has failed.
const DEADLINE: Duration = Duration::from_secs(30);

// Model-specific registers, and an interrupt that nothing else here uses.
const IA32_TSC: u32 = 0x10;
const IA32_APIC_BASE: u32 = 0x1b;
const IA32_TSC_ADJUST: u32 = 0x3b;
const IA32_TSC_DEADLINE: u32 = 0x6e0;
const X2APIC_SPURIOUS: u32 = 0x80f;
const X2APIC_REQUEST: u32 = 0x820;
const X2APIC_TIMER: u32 = 0x832;
const TIMER_VECTOR: u8 = 0x44;

/// A machine with the bare guest, and the other end of its serial console.
struct Bare {
    machine: Microvm,
    end: EndSignal,
    console: BufReader<UnixStream>,
    /// How much of what the guest printed was read.
    heard_bytes: u64,
    _folder: TempDir,
}

impl Bare {
    fn new(command_line: &str) -> Self {
        Self::with(|config| {
            config.boot_source = Some(BootSource {
                kernel: bare_guest().to_owned(),
                initrd: None,
                boot_args: Some(command_line.to_owned()),
            });
        })
    }

    fn with(configure: impl FnOnce(&mut MicrovmConfig)) -> Self {
        Self::made(configure, |config, end| Microvm::build(config, end).unwrap())
    }

    fn made(
        configure: impl FnOnce(&mut MicrovmConfig),
        make: impl FnOnce(&MicrovmConfig, &EndSignal) -> Microvm,
    ) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("console");
        let end = EndSignal::new().unwrap();
        let mut config = MicrovmConfig::default();
        config.machine.memory = MemorySize::from_mib(64).unwrap();
        config.serial = Serial::Socket(socket.clone());
        configure(&mut config);
        let machine = make(&config, &end);
        let console = UnixStream::connect(socket).unwrap();
        console.set_read_timeout(Some(DEADLINE)).unwrap();
        Self {
            machine,
            end,
            console: BufReader::new(console),
            heard_bytes: 0,
            _folder: folder,
        }
    }

    fn started(command_line: &str) -> Self {
        let mut bare = Self::new(command_line);
        bare.machine.unpause();
        assert!(bare.line().starts_with("guest=bare ram="));
        bare
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        let read = self.console.read_line(&mut line);
        assert!(
            read.is_ok(),
            "{read:?} after {line:?}; ended: {:?}",
            self.end.ended()
        );
        self.heard_bytes += line.len() as u64;
        line.trim_end().to_owned()
    }

    /// What a guest that stands has printed and nobody has read yet.
    fn everything_printed(&mut self) -> String {
        let written = self
            .machine
            .board()
            .serial()
            .metrics()
            .written_bytes
            .load(Ordering::Relaxed);
        let mut rest = vec![0; usize::try_from(written - self.heard_bytes).unwrap()];
        self.console.read_exact(&mut rest).unwrap();
        self.heard_bytes = written;
        String::from_utf8(rest).unwrap()
    }

    fn tell(&mut self, words: &str) -> String {
        writeln!(self.console.get_mut(), "{words}").unwrap();
        self.line()
    }
}

/// What is left of a machine that was saved: its RAM, its sections as text, and what it was made of.
struct Remains {
    ram: Arc<File>,
    layout: RamLayout,
    sections: String,
    config: MicrovmConfig,
}

impl Bare {
    /// Pauses and saves the machine, and ends it.
    fn save(mut self, config: MicrovmConfig) -> Remains {
        self.machine.pause(&|| false).unwrap();
        let sections = serde_json::to_string(&self.machine.save().unwrap()).unwrap();
        let region = self.machine.ram().iter().next().unwrap();
        let ram = Arc::clone(region.file_offset().unwrap().arc());
        Remains {
            ram,
            layout: self.machine.layout(),
            sections,
            config,
        }
    }

    fn restore(remains: &Remains) -> Self {
        Self::restore_of(remains, serde_json::from_str(&remains.sections).unwrap())
    }

    /// With other sections than those that were saved.
    fn restore_of(remains: &Remains, sections: Vec<SavedSection>) -> Self {
        Self::restore_with(remains, sections, Resumption::WhereItWas)
    }

    fn restore_with(remains: &Remains, sections: Vec<SavedSection>, clock: Resumption) -> Self {
        Self::made(
            |config| {
                let serial = config.serial.clone();
                *config = remains.config.clone();
                config.serial = serial;
            },
            |config, end| {
                let saved = Saved {
                    config,
                    ram: Arc::new(memory::resumed(remains.layout, &remains.ram).unwrap()),
                    layout: remains.layout,
                    sections,
                    stores: &mut microvm::open_file,
                    clock,
                };
                Microvm::restore(saved, end).unwrap()
            },
        )
    }
}

fn of_64_mib() -> MicrovmConfig {
    let mut config = MicrovmConfig::default();
    config.machine.memory = MemorySize::from_mib(64).unwrap();
    config
}

#[test]
fn a_saved_machine_goes_on_counting_where_it_was_as_often_as_it_is_restored() {
    let mut bare = Bare::started("count:0");
    // At a random place in the line: what was printed so far is what the next machine does not print again.
    for expected in 1..=20 {
        assert_eq!(bare.line(), format!("count={expected}"));
    }
    bare.machine.pause(&|| false).unwrap();
    let printed = bare.everything_printed();
    let remains = bare.save(of_64_mib());
    for _ in 0..2 {
        let mut clone = Bare::restore(&remains);
        clone.machine.unpause();
        let first = printed.clone() + &clone.line() + "\n";
        let counts: Vec<u64> = first
            .lines()
            .map(|line| line.strip_prefix("count=").unwrap().parse().unwrap())
            .collect();
        assert!(
            counts.iter().copied().eq(21..21 + counts.len() as u64),
            "{counts:?}"
        );
        let mut expected = *counts.last().unwrap();
        for _ in 0..5 {
            expected += 1;
            assert_eq!(clone.line(), format!("count={expected}"));
        }
    }
}

#[test]
fn registers_and_clocks_come_back_and_time_does_not_run_backwards() {
    let mut bare = Bare::started("");
    assert_eq!(bare.line(), "listening=1");
    // KERNEL_GS_BASE, TSC_AUX, IA32_SYSENTER_EIP: registers that nothing here uses.
    for msr in ["0xc0000102", "0x176"] {
        assert_eq!(bare.tell(&format!("wrmsr:{msr}:0x1234567")), "wrmsr=done");
    }
    // IA32_MTRR_DEF_TYPE as no machine starts with it: on, with fixed ranges, and write-back.
    assert_eq!(bare.tell("wrmsr:0x2ff:0xc06"), "wrmsr=done");
    let tsc = |line: String| line.strip_prefix("tsc=").unwrap().parse::<u64>().unwrap();
    let before = tsc(bare.tell("tsc"));
    let mut clone = Bare::restore(&bare.save(of_64_mib()));
    clone.machine.unpause();
    assert!(tsc(clone.tell("tsc")) > before);
    for msr in ["0xc0000102", "0x176"] {
        assert_eq!(clone.tell(&format!("rdmsr:{msr}")), "rdmsr=0x1234567");
    }
    assert_eq!(clone.tell("rdmsr:0x2ff"), "rdmsr=0xc06");
}

#[test]
fn pages_that_the_guest_writes_are_logged_if_that_was_asked_for() {
    let at = |address: u64| (address / 4096 / 64, 1 << (address / 4096 % 64));
    let is_logged = |bare: &Bare, address| {
        let log = bare.machine.vm().take_dirty_log().unwrap();
        let (word, bit) = at(address);
        log[0][usize::try_from(word).unwrap()] & bit != 0
    };
    let tracking = |tracks: bool| {
        let mut bare = Bare::with(|config| {
            config.machine.track_dirty_pages = tracks;
            config.boot_source = Some(BootSource {
                kernel: bare_guest().to_owned(),
                initrd: None,
                boot_args: Some(String::new()),
            });
        });
        bare.machine.unpause();
        assert!(bare.line().starts_with("guest=bare"));
        assert_eq!(bare.line(), "listening=1");
        bare
    };
    let writes = |bare: &mut Bare| {
        let _ = is_logged(bare, 0x90_0000);
        assert_eq!(bare.tell("poke:0x900000:5"), "poke=done");
        assert!(is_logged(bare, 0x90_0000));
        assert_eq!(bare.tell("peek:0xa00000"), "peek=0x0");
        assert!(!is_logged(bare, 0x90_0000), "taken, it begins anew");
        assert!(!is_logged(bare, 0xa0_0000), "it was read");
    };
    let mut bare = tracking(true);
    writes(&mut bare);
    let mut config = of_64_mib();
    config.machine.track_dirty_pages = true;
    let mut restored = Bare::restore(&bare.save(config));
    restored.machine.unpause();
    writes(&mut restored);
    assert!(tracking(false).machine.vm().take_dirty_log().is_err());
}

#[test]
fn each_machine_has_a_generation_identifier_of_its_own() {
    let id = |bare: &Bare| {
        let mut id = [0; 16];
        bare.machine
            .ram()
            .read_slice(&mut id, layout::VMGENID.address())
            .unwrap();
        id
    };
    let mut bare = Bare::started("");
    assert_eq!(bare.line(), "listening=1");
    let mut seen = vec![id(&bare)];
    let remains = bare.save(of_64_mib());
    for _ in 0..2 {
        let clone = id(&Bare::restore(&remains));
        assert!(!seen.contains(&clone));
        seen.push(clone);
    }
}

#[test]
fn a_machine_may_be_resumed_where_it_was_saved_and_not_where_a_feature_is_missing() {
    let mut bare = Bare::started("");
    bare.machine.pause(&|| false).unwrap();
    let mut record = bare.machine.compatibility().unwrap();
    microvm::check_compatibility(&record).unwrap();
    // Features that no processor has.
    record.insert("cpuid.7.0.ebx".to_owned(), "0xffffffff".into());
    let refusal = microvm::check_compatibility(&record).unwrap_err().to_string();
    assert!(
        refusal.contains("cpuid.7.0.ebx bit") || refusal.contains("avx512"),
        "{refusal}"
    );
}

#[test]
fn what_a_machine_was_saved_with_is_recorded_and_an_older_record_asks_for_less() {
    let mut bare = Bare::started("");
    bare.machine.pause(&|| false).unwrap();
    let mut record = bare.machine.compatibility().unwrap();
    let new = [
        "cpuid.physical_address_bits",
        "xcr0",
        "kvm.capabilities",
        "tsc.khz",
    ];
    for name in new {
        assert!(record.contains_key(name), "{name}: {record:?}");
    }
    assert_eq!(record["kvm.capabilities"]["KVM_CAP_IRQCHIP"], 1);
    record.insert("cpuid.physical_address_bits".to_owned(), 64.into());
    record.insert("xcr0".to_owned(), "0x8000000000000001".into());
    let refusal = microvm::check_compatibility(&record).unwrap_err().to_string();
    assert!(refusal.contains("physical addresses of 64 bits"), "{refusal}");
    assert!(refusal.contains("xcr0 bit 63"), "{refusal}");
    record.retain(|name, _| !new.contains(&name.as_str()));
    microvm::check_compatibility(&record).unwrap();
}

/// The sections of `remains`, its only vCPU changed.
fn with_vcpu(remains: &Remains, change: impl FnOnce(&mut VcpuState)) -> Vec<SavedSection> {
    let mut sections: Vec<SavedSection> = serde_json::from_str(&remains.sections).unwrap();
    let section = sections
        .iter_mut()
        .find(|section| section.kind == "vcpu")
        .unwrap();
    let mut state = section.clone().state_of::<Vcpu<'_>>().unwrap();
    change(&mut state);
    *section = SavedSection::of::<Vcpu<'_>>(section.id.clone(), &state).unwrap();
    sections
}

#[test]
fn a_register_that_this_host_does_not_take_is_refused_by_its_name() {
    const IA32_XSS: u32 = 0xda0;
    let mut bare = Bare::started("");
    assert_eq!(bare.line(), "listening=1");
    let remains = bare.save(of_64_mib());
    let sections = with_vcpu(&remains, |vcpu| {
        vcpu.msrs.retain(|msr| msr.0 != IA32_XSS);
        vcpu.msrs.push(Msr(IA32_XSS, u64::MAX));
    });
    let refusal = refusal(&remains, sections).unwrap();
    assert!(refusal.contains("IA32_XSS (MSR 0xda0)"), "{refusal}");
}

#[test]
fn a_counter_of_another_frequency_is_scaled_or_refused_with_both() {
    let mut bare = Bare::started("");
    assert_eq!(bare.line(), "listening=1");
    let remains = bare.save(of_64_mib());
    let mut own = 0;
    let sections = with_vcpu(&remains, |vcpu| {
        own = vcpu.tsc_khz;
        vcpu.tsc_khz *= 2;
    });
    assert_ne!(own, 0, "KVM knows the frequency of its counters");
    let refusal = refusal(&remains, sections);
    if runnel_vmm::kvm::describe().scales_tsc {
        assert_eq!(refusal, None);
    } else {
        let refusal = refusal.unwrap();
        let both = [own * 2, own].map(|khz| refusal.contains(&format!("{khz} kHz")));
        assert_eq!(both, [true, true], "{refusal}");
    }
}

#[test]
fn extended_state_that_is_longer_than_this_hosts_is_refused_with_both_lengths() {
    let mut bare = Bare::started("");
    assert_eq!(bare.line(), "listening=1");
    let remains = bare.save(of_64_mib());
    let with_bytes = |bytes: usize| {
        let sections = with_vcpu(&remains, |vcpu| vcpu.xsave.resize(bytes / 4, 0));
        refusal(&remains, sections)
    };
    // No host has a megabyte of it. That it has as much as it says is seen at the border.
    let told = with_bytes(1 << 20).unwrap();
    let (_, rest) = told.split_once("this host has ").unwrap();
    let host: usize = rest.split(':').next().unwrap().parse().unwrap();
    assert_eq!(with_bytes(host), None);
    let told = with_bytes(host + 4).unwrap();
    let both = format!(
        "{} bytes of extended processor state, and this host has {host}",
        host + 4
    );
    assert!(told.contains(&both), "{told}");
}

/// Why a machine cannot be rebuilt from these sections.
fn refusal(remains: &Remains, sections: Vec<SavedSection>) -> Option<String> {
    let folder = tempfile::tempdir().unwrap();
    let mut config = of_64_mib();
    config.serial = Serial::Socket(folder.path().join("console"));
    let saved = Saved {
        config: &config,
        ram: Arc::new(memory::resumed(remains.layout, &remains.ram).unwrap()),
        layout: remains.layout,
        sections,
        stores: &mut microvm::open_file,
        clock: Resumption::WhereItWas,
    };
    let restored = Microvm::restore(saved, &EndSignal::new().unwrap());
    restored.err().map(|error| error.to_string())
}

/// Sets the deadline of the guest's timer so many ticks of its counter from now. The guest takes no interrupts: they
/// stay requested.
fn arm_timer(bare: &mut Bare, ticks: u64) {
    const X2APIC: u64 = 0xfee0_0d00;
    const DEADLINE_MODE: u64 = 0b10 << 17;
    for (msr, value) in [
        (IA32_APIC_BASE, X2APIC),
        (X2APIC_SPURIOUS, 0x1ff),
        (X2APIC_TIMER, DEADLINE_MODE | u64::from(TIMER_VECTOR)),
    ] {
        assert_eq!(bare.tell(&format!("wrmsr:{msr:#x}:{value:#x}")), "wrmsr=done");
    }
    let now: u64 = bare.tell("tsc").strip_prefix("tsc=").unwrap().parse().unwrap();
    let then = now + ticks;
    let armed = bare.tell(&format!("wrmsr:{IA32_TSC_DEADLINE:#x}:{then:#x}"));
    assert_eq!(armed, "wrmsr=done");
}

/// Waits until the timer's interrupt is requested; false if it is not in time.
fn timer_fires(bare: &mut Bare) -> bool {
    let request = X2APIC_REQUEST + u32::from(TIMER_VECTOR) / 32;
    let bit = format!("rdmsr={:#x}", 1 << (TIMER_VECTOR % 32));
    let until = Instant::now() + DEADLINE;
    while Instant::now() < until {
        if bare.tell(&format!("rdmsr:{request:#x}")) == bit {
            return true;
        }
    }
    false
}

#[test]
fn the_timer_of_a_guest_that_was_up_for_a_month_fires_when_it_is_due() {
    let mut bare = Bare::started("");
    assert_eq!(bare.line(), "listening=1");
    // Seconds, whatever the counter's frequency is.
    arm_timer(&mut bare, 10_000_000_000);
    let remains = bare.save(of_64_mib());
    // The counter of the new machine begins at nothing: by that one the deadline is a month away.
    let sections = with_vcpu(&remains, |vcpu| {
        let month = u64::from(vcpu.tsc_khz) * 1000 * 86400 * 30;
        for msr in &mut vcpu.msrs {
            if [IA32_TSC, IA32_TSC_DEADLINE].contains(&msr.0) {
                assert_ne!(msr.1, 0, "it has not fired before it was saved");
                msr.1 += month;
            }
        }
    });
    let mut clone = Bare::restore_of(&remains, sections);
    clone.machine.unpause();
    assert!(timer_fires(&mut clone));
}

#[test]
fn a_timer_that_is_overdue_when_the_clock_goes_forward_fires_at_once() {
    let mut bare = Bare::started("");
    assert_eq!(bare.line(), "listening=1");
    // Minutes, whatever the counter's frequency is; and an hour goes by.
    arm_timer(&mut bare, 1_000_000_000_000);
    let remains = bare.save(of_64_mib());
    let mut sections: Vec<SavedSection> = serde_json::from_str(&remains.sections).unwrap();
    let clock = sections.iter_mut().find(|section| section.kind == "clock");
    let saved_at = &mut clock.unwrap().state["host_wall_ns"];
    *saved_at = (saved_at.as_u64().unwrap() - 3_600_000_000_000).into();
    let mut clone = Bare::restore_with(&remains, sections, Resumption::Forward);
    clone.machine.unpause();
    assert!(timer_fires(&mut clone));
}

#[test]
fn a_deadline_that_was_lost_while_saving_is_due_at_once_on_resume() {
    const VECTOR: u8 = 0xec;
    // Registers of the local APIC: the timer, and the word of requests that holds the vector.
    const TIMER: usize = 0x320;
    const REQUEST: usize = 0x200 + VECTOR as usize / 32 * 16 + VECTOR as usize % 32 / 8;
    let mut bare = Bare::started("");
    assert_eq!(bare.line(), "listening=1");
    let remains = bare.save(of_64_mib());
    let sections = with_vcpu(&remains, |vcpu| {
        // TSC-deadline mode, not masked, and neither a deadline nor its interrupt: it fired between two reads.
        for (byte, value) in [VECTOR, 0, 4, 0].into_iter().enumerate() {
            vcpu.lapic.regs[TIMER + byte] = value.cast_signed();
        }
        for msr in vcpu.msrs.iter_mut().filter(|msr| msr.0 == IA32_TSC_DEADLINE) {
            msr.1 = 0;
        }
    });
    let remains = Remains {
        sections: serde_json::to_string(&sections).unwrap(),
        ..remains
    };
    let resumed = Bare::restore(&remains);
    let mut sections = resumed.machine.save().unwrap();
    let vcpu = state::take::<Vcpu<'_>>(&mut sections, "0").unwrap();
    let is_requested = vcpu.lapic.regs[REQUEST].cast_unsigned() >> (VECTOR % 8) & 1 == 1;
    let is_due = vcpu
        .msrs
        .iter()
        .any(|msr| msr.0 == IA32_TSC_DEADLINE && msr.1 != 0);
    assert!(is_requested || is_due, "the tick is lost for good");
}

#[test]
fn an_unknown_section_and_a_missing_one_are_refused_by_name() {
    let mut bare = Bare::started("");
    assert_eq!(bare.line(), "listening=1");
    let remains = bare.save(of_64_mib());
    let refusal = |change: &dyn Fn(&mut Vec<SavedSection>)| {
        let mut sections = serde_json::from_str(&remains.sections).unwrap();
        change(&mut sections);
        let folder = tempfile::tempdir().unwrap();
        let mut config = of_64_mib();
        config.serial = Serial::Socket(folder.path().join("console"));
        let saved = Saved {
            config: &config,
            ram: Arc::new(memory::resumed(remains.layout, &remains.ram).unwrap()),
            layout: remains.layout,
            sections,
            stores: &mut microvm::open_file,
            clock: Resumption::WhereItWas,
        };
        Microvm::restore(saved, &EndSignal::new().unwrap())
            .unwrap_err()
            .to_string()
    };
    let unknown = refusal(&|sections| {
        let mut strange = sections[0].clone();
        strange.kind = "flux-capacitor".to_owned();
        sections.push(strange);
    });
    assert!(unknown.contains("flux-capacitor"), "{unknown}");
    let missing = refusal(&|sections| sections.retain(|section| section.kind != "clock"));
    assert!(missing.contains("\"clock\""), "{missing}");
    let newer = refusal(&|sections| sections.iter_mut().for_each(|section| section.version += 1));
    assert!(newer.contains("newer Runnel"), "{newer}");
}

#[test]
fn the_bare_guest_fills_memory_and_switches_itself_off() {
    let mut bare = Bare::started("fill:4m:1m:7 checkfill:4m:1m:7 checkfill:4m:2m:7 count:2 poweroff");
    assert_eq!(bare.line(), "fill=done");
    assert_eq!(bare.line(), "checkfill=right");
    assert_eq!(bare.line(), "checkfill=wrong page=0x500000 holds=0x0");
    assert_eq!(bare.line(), "count=1");
    assert_eq!(bare.line(), "count=2");
    assert_eq!(bare.end.wait(DEADLINE), Some(&Ended::PowerOff));
}

#[test]
fn kicks_and_interrupts_of_a_drive_do_not_pass_through_the_vcpus_way_out() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    File::create(&path).unwrap().set_len(1 << 20).unwrap();
    let drive =
        json!({"drive_id": "data", "path_on_host": path, "is_root_device": false, "is_read_only": false});
    let with_drive = |config: &mut MicrovmConfig| {
        config
            .put_drive(serde_json::from_value(drive.clone()).unwrap())
            .unwrap();
        config.boot_source = Some(BootSource {
            kernel: bare_guest().to_owned(),
            initrd: None,
            boot_args: Some(String::new()),
        });
    };
    let counted = |bare: &Bare| -> BTreeMap<_, _> {
        bare.machine.board().virtio()[0]
            .device
            .counters()
            .into_iter()
            .collect()
    };
    let mut bare = Bare::with(with_drive);
    bare.machine.unpause();
    assert!(bare.line().starts_with("guest=bare"));
    assert_eq!(bare.line(), "listening=1");
    let works = |bare: &mut Bare, seed: u64| {
        let before = counted(bare);
        let filled = bare.tell(&format!("diskfill:0:256k:{seed}"));
        assert!(filled.starts_with("diskfill="), "{filled}");
        let after = counted(bare);
        assert!(after["writes"] > before["writes"], "{before:?} {after:?}");
        assert!(after["interrupts"] > before["interrupts"], "{before:?} {after:?}");
        assert_eq!(after["register_kicks"], 0);
    };
    works(&mut bare, 1);
    let mut config = of_64_mib();
    with_drive(&mut config);
    let mut restored = Bare::restore(&bare.save(config));
    restored.machine.unpause();
    works(&mut restored, 2);
}

/// A saved vCPU's time stamp counter, without what the guest itself has added to it.
fn own_counter(vcpu: &VcpuState) -> u64 {
    let value = |index| vcpu.msrs.iter().find(|msr| msr.0 == index).map(|msr| msr.1);
    let added = value(IA32_TSC_ADJUST).unwrap_or(0);
    value(IA32_TSC).unwrap().wrapping_sub(added)
}

#[test]
fn the_smallest_machine_and_one_of_32_vcpus_and_half_of_the_hosts_memory_run() {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap();
    let total_kib: u64 = info.split_whitespace().nth(1).unwrap().parse().unwrap();
    let largest = (total_kib / 1024 / 2).min(65536);
    for (mib, vcpus) in [(32, 1), (largest, 32)] {
        let with = |config: &mut MicrovmConfig| {
            config.machine.memory = MemorySize::from_mib(mib).unwrap();
            config.machine.vcpus = VcpuCount::new(vcpus).unwrap();
        };
        let mut bare = Bare::with(|config| {
            with(config);
            config.boot_source = Some(BootSource {
                kernel: bare_guest().to_owned(),
                initrd: None,
                boot_args: Some("count:1".to_owned()),
            });
        });
        bare.machine.unpause();
        let introduction = bare.line();
        let ram = introduction
            .split(' ')
            .find_map(|field| field.strip_prefix("ram="));
        let hidden = (mib << 20) - ram.unwrap().parse::<u64>().unwrap();
        assert!(hidden < 1 << 20, "all but the hole below 1 MiB: {introduction}");
        assert_eq!(bare.line(), "count=1");
        assert_eq!(bare.line(), "listening=1");
        bare.machine.pause(&|| false).unwrap();
        let saved = bare.machine.save().unwrap();
        let saved_vcpus = saved.into_iter().filter(|section| section.kind == "vcpu");
        let counters: Vec<u64> = saved_vcpus
            .map(|section| own_counter(&section.state_of::<Vcpu<'_>>().unwrap()))
            .collect();
        // Read one after the other, and those of one moment all the same.
        assert_eq!(counters, vec![counters[0]; usize::from(vcpus)]);
        bare.machine.unpause();
        assert_eq!(bare.tell("count:1"), "count=2");
    }
}

#[test]
fn a_guest_that_jumps_to_the_bios_resets_the_machine() {
    let mut bare = Bare::started("");
    assert_eq!(bare.line(), "listening=1");
    let remains = bare.save(of_64_mib());
    let mut sections: Vec<SavedSection> = serde_json::from_str(&remains.sections).unwrap();
    let vcpu = sections
        .iter_mut()
        .find(|section| section.kind == "vcpu")
        .unwrap();
    let mut state: VcpuState = serde_json::from_value(vcpu.state.take()).unwrap();
    // Real mode, as a guest leaves paging and protection for it.
    (state.regs.rip, state.regs.rflags) = (0xfff0, 2);
    let sregs = &mut state.sregs;
    (sregs.cr0, sregs.cr4, sregs.efer) = (0x10, 0, 0);
    for (segment, selector) in [(&mut sregs.cs, 0xf000), (&mut sregs.ds, 0), (&mut sregs.ss, 0)] {
        (segment.selector, segment.base) = (selector, u64::from(selector) << 4);
        (segment.limit, segment.l, segment.db, segment.g) = (0xffff, 0, 0, 0);
    }
    vcpu.state = serde_json::to_value(&state).unwrap();

    let mut resets = Bare::restore_of(&remains, sections);
    resets.machine.unpause();
    assert_eq!(resets.end.wait(DEADLINE), Some(&Ended::Reset));
}

#[test]
fn each_way_to_end_is_told_from_the_others() {
    let ways = [
        ("poweroff", Ended::PowerOff),
        ("reset", Ended::Reset),
        ("i8042reset", Ended::Reset),
        ("triplefault", Ended::TripleFault),
    ];
    for (word, how) in ways {
        assert_eq!(Bare::started(word).end.wait(DEADLINE), Some(&how), "{word}");
    }
}

#[test]
fn the_guest_does_what_is_typed_however_much_it_is() {
    let mut bare = Bare::started("");
    assert_eq!(bare.line(), "listening=1");
    assert_eq!(bare.tell("poke:0x500000:77"), "poke=done");
    assert_eq!(bare.tell("peek:0x500000"), "peek=0x4d");
    // Far more than the port's FIFO holds: what does not fit is held back.
    let blanks = " ".repeat(200);
    assert_eq!(bare.tell(&format!("{blanks}count:1")), "count=1");
    for expected in 2..20 {
        assert_eq!(bare.tell("count:1"), format!("count={expected}"));
    }
}

#[test]
fn a_paused_guest_stands_and_goes_on_where_it_was() {
    let mut bare = Bare::started("count:0");
    let mut expected = 0;
    for _ in 0..50 {
        bare.machine.pause(&|| false).unwrap();
        let written = || {
            let metrics = bare.machine.board().serial().metrics();
            metrics.written_bytes.load(Ordering::Relaxed)
        };
        let before = written();
        std::thread::yield_now();
        assert_eq!(written(), before);
        bare.machine.unpause();
        for _ in 0..3 {
            expected += 1;
            assert_eq!(bare.line(), format!("count={expected}"));
        }
    }
}
