//! The network side of Runnel: serves images, reads them from remote stores, and fetches, verifies and keeps chunks
//! for the machines of a host.
//!
//! **Architecture invariants.** Nothing in here is linked into the monitor, and nothing in here touches KVM or a
//! guest. A peer, a server and an image are all untrusted: no length is believed before it was held against a cap,
//! and no byte reaches a page file before it matched its digest.

pub mod agent;
pub mod cli;
mod failed_reads;
pub mod remote;
pub mod serve;
pub mod tls;
mod traffic;

pub use traffic::Traffic;
