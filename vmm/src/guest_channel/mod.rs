//! The guest channel: a second serial port (COM2; `/dev/ttyS1` in Linux) at which an agent in the guest hears that a
//! snapshot is about to be made and that it is over, so that databases flush, file systems freeze, and services reseed.
//!
//! # The protocol, version 1
//!
//! Lines of ASCII that end in `\n`, of at most [`LINE_BYTES_MAX`] bytes; words are parted by one space. Empty lines mean
//! nothing: an agent may begin with one, and the monitor does, since either may have gone on from an image in the middle
//! of a line. What is no line of this protocol is ignored and counted. The words of one side are not the other's, so
//! that a terminal that echoes does no harm.
//!
//! ```text
//! guest    hello 1                    an agent is there, and speaks version 1; more words are for people
//!          ready ID                   what ID asked for is done: now
//!          failed ID REASON…          it cannot be done
//!          bye                        the agent ends
//! monitor  prepare ID DEADLINE_MS     a snapshot is to be made: flush, freeze, and say ready; who takes longer than
//!                                     DEADLINE_MS is not waited for
//!          resumed ID                 that snapshot has been made, has failed or was called off: go on
//!          restored GENERATION        this machine goes on from an image, and others may too: go on, and reseed
//! ```
//!
//! An ID is 16 hexadecimal digits, and no two are the same, on no two machines: an answer that comes late, or from
//! before the image, is none. A GENERATION is 32, new at every resume from an image. As the agent sees it:
//!
//! ```text
//!              prepare                  ready
//!   at work ────────────► preparing ────────────► frozen
//!      ▲                      │ failed, resumed,    │ resumed, restored,
//!      └──────────────────────┴─ restored ──────────┴─ a deadline of its own
//! ```
//!
//! and as the monitor does ([`Conversation`]):
//!
//! ```text
//!                       hello                      prepare
//!   nobody is there ◄──────────► an agent is there ────────► asked ── ready, failed, the deadline ──► pause, or not
//!                        bye             ▲                                                              │
//!                                        └─────────────────────────── resumed ◄─────────────────────────┘
//! ```
//!
//! `prepare` is always followed by `resumed`, unless the monitor dies, and in the machine that an image becomes by
//! `restored`: an agent must also go on by itself after a while. `resources/guest-agent` is one.
//!
//! **Never**: believes the guest. It may say anything, at any speed, or nothing: a line is cut at its cap, an answer is
//! waited for until its deadline, and what the guest does not read is kept up to [`OUTBOX_BYTES_MAX`].

mod conversation;
#[doc(hidden)]
pub mod fuzz;
mod line;
mod port;
mod state;

pub use conversation::{Answer, Conversation, NotAsked, OUTBOX_BYTES_MAX};
pub use line::{FromGuest, Generation, HookId, LINE_BYTES_MAX};
pub use port::{GuestChannel, GuestChannelError};
pub use state::ChannelState;
