//! Device models: the buses, the serial port, the virtio-mmio transport and the virtio devices behind it.
//!
//! **Architecture invariants.** This crate calls no KVM and opens no network socket (a tap is not one), and it does
//! not know the memory map: addresses, interrupts and files are handed in. Whatever a guest does costs it at most the
//! device that it did it to. State that is read back from an image is as hostile as a guest, and is checked before it
//! is used.

pub mod boot_timer;
pub mod bus;
pub mod event_loop;
pub mod i8042;
pub mod interrupt;
pub mod serial;
pub mod virtio;
