//! Images that earlier versions wrote: all of each is read, and its machine goes on where this host can carry it.

#![allow(clippy::unwrap_used)] // An assertion, in helpers of tests as in tests.

use runnel_devices::virtio::transport::MmioTransport;
use runnel_devices::{i8042::I8042, serial::Serial, virtio::block::Block};
use runnel_snapshot::image::layout::Layout;
use runnel_snapshot::image::reference::Wanted;
use runnel_snapshot::section::{SavedSection, Section};
use runnel_snapshot::verify::{VerifyProgress, verify};
use runnel_tests::bare::tell;
use runnel_tests::forge;
use runnel_tests::golden;
use runnel_tests::monitor::Monitor;
use runnel_vmm::engine::fuzz::reads_description;
use runnel_vmm::microvm::{CompatibilityError, check_compatibility};
use runnel_vmm::state::{Clock, Interrupts, Timer, vcpu::Vcpu};
use serde_json::json;

/// What a monitor says that could read a machine, and lacks something of its processor.
const LIKE_ITS_OWN: &str = "resume the machine on a host like its own";

#[test]
fn golden_images_are_sound_and_their_volumes_what_they_were() {
    let all = golden::all();
    assert!(!all.is_empty());
    for image in all {
        let layout = Layout::open(&image.image()).unwrap();
        let report = verify(&layout, &Wanted::Only, 2, &VerifyProgress::default()).unwrap();
        let findings: Vec<_> = report.findings.iter().map(|finding| finding.trace()).collect();
        assert!(report.is_sound(), "{}: {findings:#?}", image.version());
        let volumes = golden::volumes_of(&forge::open(&image.image()));
        assert_eq!(volumes, *image.volumes(), "{}", image.version());
    }
}

/// Reads a section as its kind's state, as a restore does first.
fn reads(section: SavedSection) -> bool {
    fn is<S: Section>(section: SavedSection) -> bool {
        section.state_of::<S>().is_ok()
    }
    match section.kind.as_str() {
        Vcpu::KIND => is::<Vcpu<'_>>(section),
        Interrupts::KIND => is::<Interrupts<'_>>(section),
        Timer::KIND => is::<Timer<'_>>(section),
        Clock::KIND => is::<Clock<'_>>(section),
        Serial::KIND => is::<Serial>(section),
        I8042::KIND => is::<I8042>(section),
        MmioTransport::<Block>::KIND => is::<MmioTransport<Block>>(section),
        _ => reads_description(section),
    }
}

#[test]
fn every_section_of_a_golden_image_is_read() {
    for image in golden::all() {
        let state = forge::open(&image.image()).state().unwrap();
        assert!(!state.sections.is_empty() && !state.first_chunks.is_empty());
        for section in state.sections {
            let name = format!("{}: {} {:?}", image.version(), section.kind, section.id);
            assert!(reads(section), "{name}");
        }
    }
}

#[test]
fn the_machine_of_a_golden_image_goes_on_where_this_host_can_carry_it() {
    for image in golden::all() {
        let record = forge::open(&image.image()).state().unwrap().compatibility;
        if let Err(lacks @ CompatibilityError::Incompatible(_)) = check_compatibility(&record) {
            println!("skipped: {}: {lacks}", image.version());
            continue;
        }
        let mut machine = Monitor::start();
        let request = json!({"image": image.image(), "resume_vm": true});
        let (status, answer) = machine.ask("PUT", "/snapshot/load", &request);
        // A register, or a clock, that only the vCPU itself could be asked for.
        if status == 400 && answer.to_string().contains(LIKE_ITS_OWN) {
            println!("skipped: {}: {answer}", image.version());
            continue;
        }
        assert_eq!(status, 204, "{}: {answer}", image.version());
        for (told, says) in image.dialogue() {
            tell(&mut machine, told, says);
        }
    }
}
