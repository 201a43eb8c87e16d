//! A machine as a stream: the image format, the index, chunks, the pager's logic, overlays and the chunk protocol.
//!
//! A machine is a small *machine state* plus a few large *volumes* (guest RAM and disks). A volume is cut into
//! *chunks*. Snapshot, stream, resume and fork are each a way of moving chunks between stores while the machine
//! runs, ordered so that what is needed first arrives first.
//!
//! **Architecture invariants.** This crate names no device, calls no KVM and opens no network socket; everything in
//! it is written against traits and is tested without KVM. Bytes read from an image or a peer are untrusted: no
//! length is believed before it was held against a cap.

pub mod blobs;
pub mod block_store;
pub mod capture;
pub mod causes;
pub mod copy_before_write;
pub mod decode;
pub mod digest;
pub mod dirty_pages;
mod give_way;
pub mod image;
pub mod index;
pub mod layer;
pub mod machine;
pub mod overlay;
pub mod pager;
pub mod protocol;
pub mod section;
pub mod shell;
pub mod source;
pub mod state;
pub mod units;
mod unnamed;
mod varint;
pub mod verify;
pub mod volume;
pub mod working_set;
