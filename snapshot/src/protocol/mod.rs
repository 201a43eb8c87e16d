//! The chunk protocol between a monitor and an agent of the same host, over a unix socket of type `SOCK_SEQPACKET`:
//! one message a packet, descriptors ride along.
//!
//! ```text
//!   monitor                                   agent
//!      │ Hello {protocol, image} ─────────────► │   opens the image; may take round trips
//!      │ ◄──── Opened {digest, volumes} + files │   or Refused {reason, transient}, and hangs up
//!      │                                        │
//!      │ Ask {urgency, chunks} ───────────────► │   any number, at any time, again to lift the urgency
//!      │ Cancel {chunks} ─────────────────────► │
//!      │ ◄────────────── Arrived {chunk, what}… │   each chunk asked for is answered once, and some that were not
//!      │ ◄─── Failed {chunk, reason, transient} │
//!      │                                        │
//!      │ Status ──────────────────────────────► │   instead of Hello, by whoever is curious
//!      │ ◄──── Status {images, bytes moved} ─── │   and hangs up
//!      │                                        │
//!      │ WantIndex {image, volume} ───────────► │   instead of Hello, by whoever saves what changed since an open image
//!      │ ◄──── Index {where blobs are} + file ─ │   or Refused, and hangs up
//!      │                                        │
//!      │ Adopt {image, volume} + file ────────► │   instead of Hello: the volume is in this file, which is sealed
//!      │ ◄────────── Adopted, or Refused ────── │   and hangs up
//!      │                                        │
//!      ╳ hangs up: the agent forgets what it was asked
//!      ╳ the agent dies: the monitor connects again, says Hello with the digest it was told, and asks again
//! ```
//!
//! With `Opened` come these descriptors, in this order: the image's machine state (the blob as the image holds it), its
//! manifest, and one *page file* a volume, open for reading alone. A chunk is in its page file, verified, before its
//! `Arrived` is sent. After a reconnection the page files must be the same files; that is what the agent's page
//! directory is for.
//!
//! An agent also tells of chunks that were not asked for: of those of the image's working set, which it fetches by itself.
//!
//! A chunk that has arrived may be taken out of its page file again, at any time and without a message: who reads page
//! files looks at the [`Marks`](crate::source::Marks) behind the volume. Version 1 of the protocol did not, and is refused;
//! version 2 had neither `WantIndex` nor `Adopt`.
//!
//! **Adopted files.** A machine that an image was made of may have the image's memory in a file that nobody can change any
//! more, and hand it to the agent, which holds all of it against the image first. It is the page file of that volume then:
//! whole from the start, without marks, and never another. A monitor that has such a page file needs no other, whichever
//! a later agent has; it hands it to that one first. To be given once more the very file that it has is `Adopted` too.
//!
//! **Versions.** `Hello` names the protocol's version; an agent that does not speak it refuses with the versions that it
//! does. Fields may be added to the JSON of `Hello`, `Opened`, `Refused` and `Status` within a version; a new message or another
//! layout of an old one is a new version.
//!
//! **Trust.** A monitor believes nothing about lengths; it does rely on its agent for the bytes of the page files, as the
//! agent is the one that verifies them.

mod client;
mod message;
mod socket;

#[doc(hidden)]
pub use client::read_opening;
pub use client::{AgentImage, AgentSource, ConnectError, Opening, hand_over, is_answering, status};
pub use message::{
    Adopt, AdoptedVolume, AgentStatus, BadMessage, CHUNKS_MAX, CacheStatus, FromAgent, FromMonitor, Hello,
    ImageStatus, IndexFound, MESSAGE_BYTES_MAX, Opened, OpenedVolume, PROTOCOL_VERSION, PoolStatus, Refused,
    VOLUMES_MAX, WantIndex,
};
pub use socket::{PacketListener, PacketSocket};
