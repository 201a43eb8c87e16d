//! Virtio devices behind their transport: rebuilt from saved state, and under a driver that writes what it likes into
//! their registers.

use std::cell::RefCell;
use std::sync::Arc;

use runnel_devices::bus::Offset;
use runnel_devices::event_loop::EventLoop;
use runnel_devices::interrupt::Interrupt;
use runnel_devices::virtio::block::CacheType;
use runnel_devices::virtio::registry::{self, Parts, Place};
use runnel_devices::virtio::transport::MmioDevice;
use runnel_snapshot::block_store::GuestRam;
use runnel_snapshot::machine::Paused;
use runnel_snapshot::section::SavedSection;
use vm_memory::{Bytes as _, GuestAddress};

use crate::input::Input;
use crate::rings::{Cable, RAM_BYTES, drive, interface, ram};

/// Steps that a driver takes.
const STEPS_MAX: usize = 64;

/// Inputs for which one event loop serves: devices stay on it until its end.
const INPUTS_PER_LOOP: usize = 64;

/// The event loop for the next input.
fn event_loop() -> Arc<EventLoop> {
    thread_local! {
        static CURRENT: RefCell<Option<(Arc<EventLoop>, usize)>> = const { RefCell::new(None) };
    }
    CURRENT.with_borrow_mut(|current| {
        if let Some((event_loop, served)) = current
            && *served < INPUTS_PER_LOOP
        {
            *served += 1;
            return Arc::clone(event_loop);
        }
        let event_loop = Arc::new(EventLoop::start("devices").expect("a thread can be had"));
        let before = current.replace((Arc::clone(&event_loop), 1));
        if let Some(over) = before.and_then(|(over, _)| Arc::into_inner(over)) {
            over.shut_down();
        }
        event_loop
    })
}

fn place(ram: &Arc<GuestRam>, event_loop: &Arc<EventLoop>) -> Place {
    Place {
        ram: Arc::clone(ram),
        interrupt: Interrupt::new().expect("an event can be had"),
        event_loop: Arc::clone(event_loop),
    }
}

fn parts(kind: &str, read_only: bool) -> Option<Parts> {
    Some(match kind {
        "virtio-block" => Parts::Block(drive(read_only, CacheType::Writeback)),
        "virtio-net" => Parts::Net(interface(Cable::new([100, 2000], 2))),
        "virtio-rng" => Parts::Rng,
        _ => return None,
    })
}

/// Saves a device while its event loop stands.
fn save(device: &Arc<dyn MmioDevice>, event_loop: &EventLoop) -> SavedSection {
    let frozen = EventLoop::freeze_all([event_loop], &|| false);
    let _frozen = frozen.expect("a device does not wait for ever");
    let saved = device.save_section("it", &Paused::until(|| ()));
    saved.expect("what stands can be saved")
}

/// Of each kind of device the section of one that no driver has touched, and of one that is set up.
pub(crate) fn saved_sections() -> Vec<SavedSection> {
    let steps: [&[u8]; 2] = [&[], &[3, 4, 0, 4, 1, 5]];
    let kinds = ["virtio-block", "virtio-net", "virtio-rng"];
    let saved = |kind: &str, steps: &[u8]| {
        let (ram, event_loop) = (ram(), event_loop());
        let these = parts(kind, false).expect("it is one of them");
        let device = registry::build(these, place(&ram, &event_loop)).expect("the device can be had");
        let mut input = Input::new(steps);
        while !input.is_empty() {
            step(&mut input, &device, &ram);
        }
        save(&device, &event_loop)
    };
    let each = kinds
        .iter()
        .flat_map(|kind| steps.map(|steps| saved(kind, steps)));
    each.collect()
}

/// A device's section as JSON; behind its line, RAM. What is accepted comes back as it was saved, and then goes on.
pub fn device_state(bytes: &[u8]) -> bool {
    let [section, memory] = crate::input::lines(bytes);
    let Ok(section) = serde_json::from_slice::<SavedSection>(section) else {
        return false;
    };
    let kind = section.kind.clone();
    let is_read_only = section.state["device"]["read_only"] == true;
    let Some(these) = parts(&kind, is_read_only) else {
        return false;
    };
    let (ram, event_loop) = (ram(), event_loop());
    let len = memory.len().min(RAM_BYTES as usize);
    let filled = ram.write_slice(&memory[..len], GuestAddress(0));
    filled.expect("it fits into RAM");
    let Ok(device) = registry::restore(section, these, place(&ram, &event_loop)) else {
        return false;
    };
    let saved = save(&device, &event_loop);
    let again = parts(&kind, is_read_only).map(|parts| {
        let again = registry::restore(saved.clone(), parts, place(&ram, &event_loop));
        again.expect("what was saved can be restored")
    });
    let again = again.expect("it is the same kind");
    assert_eq!(
        save(&again, &event_loop),
        saved,
        "a device that rests does not change"
    );
    device.resume();
    let _ = save(&device, &event_loop);
    true
}

/// Which device, then the steps of its driver. Whatever a driver can bring about can be saved and restored.
pub fn virtio_registers(bytes: &[u8]) -> bool {
    let mut input = Input::new(bytes);
    let which = input.u8();
    let kinds = ["virtio-block", "virtio-net", "virtio-rng"];
    let kind = kinds[usize::from(which) % kinds.len()];
    let is_read_only = which & 0x80 != 0;
    let these = || parts(kind, is_read_only).expect("it is one of them");
    let (ram, event_loop) = (ram(), event_loop());
    let device = registry::build(these(), place(&ram, &event_loop)).expect("the device can be had");
    for _ in 0..STEPS_MAX {
        if input.is_empty() {
            break;
        }
        step(&mut input, &device, &ram);
    }
    let saved = save(&device, &event_loop);
    let status = saved.state["transport"]["device_status"].as_u64();
    let again = registry::restore(saved, these(), place(&ram, &event_loop));
    again.expect("what a driver has brought about can be restored");
    // Whether it got as far as a device that is set up.
    status.is_some_and(|status| status & 4 != 0)
}

fn step(input: &mut Input<'_>, device: &Arc<dyn MmioDevice>, ram: &GuestRam) {
    match input.u8() % 8 {
        0 => {
            let (offset, len) = (input.u16(), usize::from(input.u8() % 9));
            device.read(Offset(offset.into()), &mut [0; 8][..len.min(8)]);
        }
        1 => {
            let offset = input.u16();
            let len = usize::from(input.u8() % 9);
            device.write(Offset(offset.into()), input.bytes(len));
        }
        2 => {
            let at = u64::from(input.u16());
            let len = usize::from(input.u8());
            let bytes = input.bytes(len.min((RAM_BYTES - at) as usize));
            ram.write_slice(bytes, GuestAddress(at))
                .expect("it fits into RAM");
        }
        3 => {
            // Up to here, as every driver begins; then it goes its own way.
            for (register, value) in [
                (0x70, 1),
                (0x70, 3),
                (0x24, 1),
                (0x20, 1),
                (0x24, 0),
                (0x20, 0),
                (0x70, 11),
            ] {
                write(device, register, value);
            }
        }
        4 => {
            let queue = u32::from(input.u8() % 2);
            let base = 0x1000 * (queue + 1);
            for (register, value) in [
                (0x30, queue),
                (0x38, 16),
                (0x80, base),
                (0x90, base + 0x400),
                (0xa0, base + 0x800),
                (0x44, 1),
            ] {
                write(device, register, value);
            }
        }
        5 => write(device, 0x70, 15),
        6 => write(device, 0x50, u32::from(input.u8() % 3)),
        _ => write(device, u32::from(input.u8()) * 4, input.u32()),
    }
}

fn write(device: &Arc<dyn MmioDevice>, register: u32, value: u32) {
    device.write(Offset(register.into()), &value.to_le_bytes());
}
