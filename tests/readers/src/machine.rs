//! What a monitor makes a machine from: sections, the record of what it needs, a kernel, and page tables.

use std::cell::RefCell;
use std::collections::BTreeMap;

use kvm_bindings::{kvm_cpuid_entry2, kvm_regs, kvm_sregs};
use runnel_devices::i8042::{I8042, I8042Deps};
use runnel_devices::interrupt::Interrupt;
use runnel_devices::serial::{Serial, SerialDeps};
use runnel_snapshot::block_store::GuestRam;
use runnel_snapshot::machine::Paused;
use runnel_snapshot::section::{SavedSection, Section};
use runnel_vmm::boot::{self, Source};
use runnel_vmm::compatibility;
use runnel_vmm::engine::fuzz::reads_description;
use runnel_vmm::layout::RamLayout;
use runnel_vmm::page_walk::{Bearings, first_pages};
use runnel_vmm::state::{Clock, Interrupts, Timer, vcpu::Vcpu};
use serde_json::Value;
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::input::Input;
use crate::messages::in_memory;

/// A section of any kind that needs no KVM to be read; those of virtio devices are a target of their own.
pub fn sections(bytes: &[u8]) -> bool {
    let Ok(section) = serde_json::from_slice::<SavedSection>(bytes) else {
        return false;
    };
    let interrupt = || Interrupt::new().expect("an event can be had");
    match section.kind.as_str() {
        Serial::KIND => {
            let deps = || SerialDeps {
                interrupt: interrupt(),
                output: Box::new(std::io::sink()),
            };
            survives::<Serial>(section, deps)
        }
        I8042::KIND => {
            let deps = || I8042Deps {
                reset: EventFd::new(0).expect("an event can be had"),
                interrupt: interrupt(),
            };
            survives::<I8042>(section, deps)
        }
        Vcpu::KIND => is_plain::<Vcpu<'_>>(section),
        Interrupts::KIND => is_plain::<Interrupts<'_>>(section),
        Timer::KIND => is_plain::<Timer<'_>>(section),
        Clock::KIND => is_plain::<Clock<'_>>(section),
        _ => reads_description(section),
    }
}

/// Rebuilds the device, saves it, and has it come back the same.
fn survives<S: Section>(section: SavedSection, deps: impl Fn() -> S::Deps) -> bool {
    let restored = |section: SavedSection| S::restore(deps(), section.state_of::<S>().ok()?).ok();
    let Some(device) = restored(section) else {
        return false;
    };
    let save = |device: &S| {
        let Ok(state) = device.save(&Paused::until(|| ())) else {
            panic!("what stands cannot be saved");
        };
        SavedSection::of::<S>("", &state).expect("state has a JSON form")
    };
    let saved = save(&device);
    let again = restored(saved.clone()).expect("what was saved can be restored");
    assert_eq!(save(&again), saved);
    true
}

/// Reads what KVM would be given, and writes it as it was.
fn is_plain<S: Section>(section: SavedSection) -> bool {
    let id = section.id.clone();
    let Ok(state) = section.state_of::<S>() else {
        return false;
    };
    let saved = SavedSection::of::<S>(id.clone(), &state).expect("state has a JSON form");
    let again = saved
        .clone()
        .state_of::<S>()
        .expect("what was written can be read");
    assert_eq!(SavedSection::of::<S>(id, &again).ok(), Some(saved));
    true
}

/// What a host must have, held against one that has next to nothing and one that has all.
pub fn compatibility(bytes: &[u8]) -> bool {
    let Ok(record) = serde_json::from_slice::<BTreeMap<String, Value>>(bytes) else {
        return false;
    };
    let on = |host: &[kvm_cpuid_entry2], answer: i32| {
        let checked = compatibility::check(&record, host, &|_| answer);
        if let Err(error) = &checked {
            assert!(!error.to_string().is_empty());
        }
        checked.is_ok()
    };
    let least = on(&[], 0);
    let leaf = |function, index| kvm_cpuid_entry2 {
        function,
        index,
        eax: u32::MAX,
        ebx: u32::MAX,
        ecx: u32::MAX,
        edx: u32::MAX,
        ..kvm_cpuid_entry2::default()
    };
    let all: Vec<_> = [0, 1, 6, 7, 0xd, 0x14, 0x8000_0001, 0x8000_0007, 0x8000_0008]
        .into_iter()
        .flat_map(|function| (0..2).map(move |index| leaf(function, index)))
        .collect();
    on(&all, i32::MAX) || least
}

/// How much RAM a kernel is loaded into.
const RAM_BYTES: u64 = 32 << 20;

/// A kernel, and behind it what it would find as its initial RAM disk: the bytes again.
pub fn kernel(bytes: &[u8]) -> bool {
    thread_local! {
        static RAM: GuestRam = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM_BYTES as usize)])
            .expect("memory can be had");
    }
    let layout = RamLayout::new(RAM_BYTES).expect("it is a machine's");
    let (mut kernel, mut initrd) = (in_memory(bytes), in_memory(bytes));
    let source = Source {
        kernel: &mut kernel,
        initrd: Some(&mut initrd),
        command_line: "console=ttyS0",
    };
    RAM.with(|ram| boot::load(ram, layout, source).is_ok())
}

/// Registers, then what guest memory holds, over and over.
pub fn page_walk(bytes: &[u8]) -> bool {
    let mut input = Input::new(bytes);
    let mut sregs = kvm_sregs {
        cr0: input.u64(),
        cr3: input.u64(),
        cr4: input.u64(),
        efer: input.u64(),
        ..kvm_sregs::default()
    };
    (sregs.cs.base, sregs.ss.base, sregs.tr.base) = (input.u64(), input.u64(), input.u64());
    (sregs.gdt.base, sregs.idt.base) = (input.u64(), input.u64());
    let regs = kvm_regs {
        rip: input.u64(),
        rsp: input.u64(),
        ..kvm_regs::default()
    };
    let memory = input.rest();
    let reads = RefCell::new(0);
    let read = |at: GuestAddress| {
        *reads.borrow_mut() += 1;
        let words = (memory.len() / 8) as u64;
        let word = at.0.checked_div(8)?.checked_rem(words)? as usize * 8;
        let bytes = memory[word..].first_chunk()?;
        Some(u64::from_le_bytes(*bytes))
    };
    let bearings = Bearings {
        regs: &regs,
        sregs: &sregs,
    };
    let pages = first_pages(bearings, read);
    // Seven addresses, five levels of tables and the page of each.
    assert!(pages.len() <= 7 * 6 && *reads.borrow() <= 7 * 5);
    assert!(pages.iter().all(|page| page.0.is_multiple_of(4096)));
    !pages.is_empty()
}
