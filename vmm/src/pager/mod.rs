//! The pager: the thread of the monitor that reads page faults in guest memory and has them answered.
//!
//! The logic (which chunk to ask for, what a fault becomes) is `runnel_snapshot::pager`; here are the userfaultfd,
//! the calls that install pages, and the thread. The monitor alone creates and reads its userfaultfd: an event that a
//! dead reader had consumed would not come again, and when the last descriptor closes waiting readers would get
//! zeros.
//!
//! **Architecture invariant.** Of guest memory the pager's thread touches nothing but pages that the machine wrote itself,
//! to copy them before they are overwritten: those are there, or swapped out, and never wait for it. It takes no lock that
//! is held by a thread that touches any other.

mod install;
mod own_pages;
mod thread;
mod uffd;

pub use install::{HostAddress, HostMapping};
pub use own_pages::own_pages;
pub use thread::{Pager, PagerError, WriteWatch};
pub use uffd::{UffdError, check_host};

#[cfg(test)]
mod tests;
