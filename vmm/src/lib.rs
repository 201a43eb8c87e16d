//! The monitor: one process a machine, its API on a unix socket.
//!
//! **Architecture invariant.** It opens no network socket, its taps aside, and links nothing of TLS or remote stores:
//! chunks of remote images come from the agent, over a unix socket.

pub mod api;
pub mod cli;
pub mod config;
pub mod control;
pub mod exit;
pub mod logger;
pub mod pager;
pub mod version;
