//! The monitor: one process a machine, its API on a unix socket.
//!
//! **Architecture invariant.** It opens no network socket, its taps aside, and links nothing of TLS or remote stores:
//! chunks of remote images come from the agent, over a unix socket.

pub mod acpi;
pub mod api;
pub mod board;
pub mod boot;
pub mod cli;
pub mod compatibility;
pub mod config;
pub mod console;
pub mod control;
pub mod cpuid;
pub mod engine;
pub mod exit;
pub mod guest_channel;
pub mod kvm;
pub mod layout;
pub mod logger;
pub mod memory;
pub mod microvm;
pub mod msrs;
pub mod page_walk;
pub mod pager;
pub mod power;
pub mod state;
pub mod vcpu;
pub mod version;
pub mod vmgenid;
