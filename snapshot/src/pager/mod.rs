//! The pager's logic: which chunks a resumed machine has, which it waits for, and what a fault becomes.
//!
//! ```text
//!   userfaultfd event ──► MemoryPager ──demand──► Fetcher ──ask──► PageSource (image directory, agent)
//!   overlay read ───────────────wait───────────►    │   ◄─arrived/failed─┘
//!                          MemoryPager ◄─arrival────┘
//!                               └─map / zero─► PageInstaller (userfaultfd ioctls; a model in tests)
//! ```
//!
//! A fault that cannot be answered leaves the machine *stalled*: it waits, and says for what. It is never given
//! bytes that are not its own.
//!
//! This module knows nothing of userfaultfd or KVM: the monitor reads the events and implements [`PageInstaller`].

mod fetcher;
mod memory;
mod page_set;
mod touches;
mod waits;
mod write_protection;

pub use fetcher::{Fetcher, FetcherCounters, FetcherSettings, Stall};
pub use memory::{InstallError, MemoryPager, NoMemory, PageInstaller, PagerCounters};
pub use page_set::PageSet;
pub use waits::Waits;
pub use write_protection::{ProtectionCounters, Protector, WriteProtection};
