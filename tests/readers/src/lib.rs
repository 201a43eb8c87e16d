//! Every reader of untrusted bytes, as a function of bytes: what `tests/fuzz` feeds with strange ones, and the tests
//! here with those that were kept.
//!
//! A reader must not panic, and memory and time that it takes are bounded; beyond that, each function here asserts what
//! holds of whatever its reader accepts: it lies within the caps, it survives being written and read again, one reader
//! agrees with another. A function says whether its bytes were accepted, so that seeds can be held to be valid.
//!
//! Where plain bytes would be refused at once, by a digest above all, a function builds what it feeds from its bytes:
//! it mends the digests, or puts the bytes where a part of a valid whole was ([`image()`]).
//!
//! **Never** leaves this process: files are in memory, and the paths and addresses that are read are not followed.

mod answers;
mod documents;
mod frames;
mod image;
mod index;
mod input;
mod machine;
mod messages;
mod names;
mod requests;
mod rings;
pub mod seeds;
mod store;
mod transport;
mod working_set;

pub use answers::{credentials, http_answer, http_fields};
pub use documents::{index_json, machine_state, manifest};
pub use frames::{chunk_frame, seek_table, zero_frame};
pub use image::image;
pub use index::{index_root, index_segment};
pub use machine::{compatibility, kernel, page_walk, sections};
pub use messages::{from_agent, from_monitor, guest_channel, opening};
pub use names::names;
pub use requests::{api_request, config_file, serve_request};
pub use rings::{virtio_block, virtio_net};
pub use transport::{device_state, virtio_registers};
pub use working_set::working_set;

/// A reader. Whether it accepted the bytes.
pub type Reader = fn(&[u8]) -> bool;

/// All of them, by name: a fuzz target, and a folder of the corpus, each.
pub const READERS: [(&str, Reader); 29] = [
    ("api_request", api_request),
    ("chunk_frame", chunk_frame),
    ("compatibility", compatibility),
    ("config_file", config_file),
    ("credentials", credentials),
    ("device_state", device_state),
    ("from_agent", from_agent),
    ("from_monitor", from_monitor),
    ("guest_channel", guest_channel),
    ("http_answer", http_answer),
    ("http_fields", http_fields),
    ("image", image),
    ("index_json", index_json),
    ("index_root", index_root),
    ("index_segment", index_segment),
    ("kernel", kernel),
    ("machine_state", machine_state),
    ("manifest", manifest),
    ("names", names),
    ("opening", opening),
    ("page_walk", page_walk),
    ("sections", sections),
    ("seek_table", seek_table),
    ("serve_request", serve_request),
    ("virtio_block", virtio_block),
    ("virtio_net", virtio_net),
    ("virtio_registers", virtio_registers),
    ("working_set", working_set),
    ("zero_frame", zero_frame),
];
