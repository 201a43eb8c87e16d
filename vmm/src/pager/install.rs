//! Puts pages into guest memory: the volume's pages are found in the mapping, and the kernel's partial answers are
//! carried through to the end.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use runnel_snapshot::pager::{InstallError, PageInstaller, Protector};
use runnel_snapshot::units::{PAGE_SIZE, PageIndex};

use super::uffd::{BACKOFF_MAX, BACKOFF_MIN, Installed, Userfaultfd};

/// An address in this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HostAddress(pub u64);

/// A piece of guest memory as this process sees it. RAM above the hole below 4 GiB is a mapping of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostMapping {
    /// Where it is mapped; a page's first byte.
    pub start: HostAddress,
    /// How long it is: whole pages.
    pub bytes: u64,
    /// Which page of the `memory` volume is mapped first.
    pub first_page: PageIndex,
}

impl HostMapping {
    fn pages(&self) -> u64 {
        self.bytes / PAGE_SIZE
    }

    /// The page of the volume that is mapped at `address`.
    pub(super) fn page_at(&self, address: HostAddress) -> Option<PageIndex> {
        let offset = address
            .0
            .checked_sub(self.start.0)
            .filter(|offset| *offset < self.bytes)?;
        Some(PageIndex(self.first_page.0 + offset / PAGE_SIZE))
    }

    /// Where `page` is mapped, and how many pages follow it in this mapping, itself included.
    fn address_of(&self, page: PageIndex) -> Option<(HostAddress, u64)> {
        let index = page
            .0
            .checked_sub(self.first_page.0)
            .filter(|index| *index < self.pages())?;
        Some((
            HostAddress(self.start.0 + index * PAGE_SIZE),
            self.pages() - index,
        ))
    }
}

/// Pages that cannot be installed for want of host memory are tried this often before the machine counts as stalled.
const TRIES_MAX: u32 = 12;

#[derive(Clone)]
pub(super) struct Installer {
    pub(super) uffd: Arc<Userfaultfd>,
    pub(super) mappings: Vec<HostMapping>,
}

impl Installer {
    /// Installs a run of pages with `call`, mapping by mapping.
    fn install(
        &self,
        mut first: PageIndex,
        mut count: u64,
        call: impl Fn(HostAddress, u64) -> Installed,
    ) -> Result<(), InstallError> {
        while count > 0 {
            let found = self.mappings.iter().find_map(|mapping| mapping.address_of(first));
            let (address, pages) = found.ok_or_else(|| {
                InstallError::Host(first, io::Error::other("the page is not mapped in this process"))
            })?;
            let pages = pages.min(count);
            self.install_mapped(first, address, pages * PAGE_SIZE, &call)?;
            first.0 += pages;
            count -= pages;
        }
        Ok(())
    }

    fn write_protect(&self, mut first: PageIndex, mut count: u64, protect: bool) -> io::Result<()> {
        while count > 0 {
            let found = self.mappings.iter().find_map(|mapping| mapping.address_of(first));
            let (address, pages) = found.ok_or(io::ErrorKind::NotFound)?;
            let pages = pages.min(count);
            self.uffd.write_protect(address, pages * PAGE_SIZE, protect)?;
            first.0 += pages;
            count -= pages;
        }
        Ok(())
    }

    fn install_mapped(
        &self,
        first: PageIndex,
        start: HostAddress,
        bytes: u64,
        call: &impl Fn(HostAddress, u64) -> Installed,
    ) -> Result<(), InstallError> {
        let mut done = 0;
        let mut tries = 0;
        let mut some_were_there = false;
        while done < bytes {
            let page = PageIndex(first.0 + done / PAGE_SIZE);
            match call(HostAddress(start.0 + done), bytes - done) {
                Installed::All => break,
                Installed::Part(more, _) if more > 0 => {
                    done += more;
                    tries = 0;
                }
                Installed::Part(_, error) => match error.raw_os_error() {
                    // Somebody else's fault brought it.
                    Some(libc::EEXIST) => {
                        some_were_there = true;
                        done += PAGE_SIZE;
                    }
                    Some(libc::EFAULT) => return Err(InstallError::NotInPageFile(page)),
                    // The memory map is changing, or the host is short of memory for a moment.
                    Some(libc::EAGAIN | libc::ENOMEM) if tries < TRIES_MAX => {
                        std::thread::sleep(backoff(tries));
                        tries += 1;
                    }
                    _ => return Err(InstallError::Host(page, error)),
                },
            }
        }
        if some_were_there {
            // Installing wakes waiters of the pages it installs, but not of those that were there: a second thread
            // may have faulted on one of them just before it came.
            self.uffd
                .wake(start, bytes)
                .map_err(|error| InstallError::Host(first, error))?;
        }
        Ok(())
    }
}

fn backoff(tries: u32) -> Duration {
    BACKOFF_MIN.saturating_mul(1 << tries.min(16)).min(BACKOFF_MAX)
}

/// Write protection through the mappings of an [`Installer`].
impl Protector for Installer {
    fn protect(&self, first: PageIndex, count: u64) -> io::Result<()> {
        self.write_protect(first, count, true)
    }

    fn unprotect(&self, first: PageIndex, count: u64) -> io::Result<()> {
        self.write_protect(first, count, false)
    }
}

impl PageInstaller for Installer {
    fn map(&self, first: PageIndex, count: u64) -> Result<(), InstallError> {
        self.install(first, count, |start, bytes| self.uffd.map(start, bytes))
    }

    fn zero(&self, first: PageIndex, count: u64) -> Result<(), InstallError> {
        self.install(first, count, |start, bytes| self.uffd.zero(start, bytes))
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    /// Eight pages from here on, of the volume's page 3 on.
    const START: u64 = 1 << 32;

    fn installer() -> Installer {
        let mapping = HostMapping {
            start: HostAddress(START),
            bytes: 8 * PAGE_SIZE,
            first_page: PageIndex(3),
        };
        Installer {
            uffd: Arc::new(Userfaultfd::open().unwrap()),
            mappings: vec![mapping],
        }
    }

    fn part(pages: u64, errno: i32) -> Installed {
        Installed::Part(pages * PAGE_SIZE, io::Error::from_raw_os_error(errno))
    }

    #[test]
    fn what_the_kernel_left_out_for_a_moment_is_installed_from_there_on() {
        let answers = RefCell::new(vec![
            Installed::All,
            part(0, libc::ENOMEM),
            part(3, libc::EAGAIN),
            part(0, libc::EAGAIN),
            part(2, libc::EAGAIN),
        ]);
        let asked = RefCell::new(Vec::new());
        let installed = installer().install(PageIndex(4), 7, |start, bytes| {
            let page = (start.0 - START) / PAGE_SIZE;
            asked.borrow_mut().push((page, bytes / PAGE_SIZE));
            answers.borrow_mut().pop().unwrap()
        });
        installed.unwrap();
        assert_eq!(asked.into_inner(), [(1, 7), (3, 5), (3, 5), (6, 2), (6, 2)]);
    }

    #[test]
    fn a_host_that_stays_short_of_memory_is_named_with_the_page() {
        for errno in [libc::EAGAIN, libc::ENOMEM] {
            let tries = RefCell::new(0);
            let installed = installer().install(PageIndex(5), 2, |_, _| {
                *tries.borrow_mut() += 1;
                part(0, errno)
            });
            let Err(InstallError::Host(PageIndex(5), error)) = installed else {
                panic!("{installed:?}");
            };
            assert_eq!(error.raw_os_error(), Some(errno));
            assert_eq!(tries.into_inner(), TRIES_MAX + 1);
        }
    }

    #[test]
    fn what_is_not_in_the_page_file_and_what_is_not_mapped_are_told_apart() {
        let answers = RefCell::new(vec![part(0, libc::EFAULT), part(1, libc::EAGAIN)]);
        let installed = installer().install(PageIndex(4), 2, |_, _| answers.borrow_mut().pop().unwrap());
        assert!(
            matches!(installed, Err(InstallError::NotInPageFile(PageIndex(5)))),
            "{installed:?}"
        );
        let installed = installer().install(PageIndex(10), 2, |_, _| Installed::All);
        assert!(
            matches!(installed, Err(InstallError::Host(PageIndex(11), _))),
            "{installed:?}"
        );
    }
}
