//! Machines that are resumed with what they have around them: drives, taps, a host that goes away, RAM on both sides of
//! the hole. The bare guest on this host's KVM.

#![allow(clippy::unwrap_used)] // An assertion, in helpers of tests as in tests.

mod drives;
mod memory;
mod networks;
mod recorded;
mod served;
mod stalls;
mod time;
