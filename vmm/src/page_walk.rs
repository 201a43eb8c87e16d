//! Which pages a vCPU touches first when it runs again: a walk through the guest's own page tables (Intel SDM volume 3,
//! §4.5; AMD APM volume 2, §5.3).
//!
//! A resume asks for these before it has read anything else of the image. The guest may have written nonsense into its
//! tables; then the walk ends early, and the pages come by fault.

use std::collections::BTreeSet;

use kvm_bindings::{kvm_regs, kvm_sregs};
use runnel_snapshot::units::PAGE_SIZE;
use vm_memory::GuestAddress;

const CR0_PAGING: u64 = 1 << 31;
const CR4_FIVE_LEVELS: u64 = 1 << 12;
const EFER_LONG_MODE_ACTIVE: u64 = 1 << 10;

const ENTRY_PRESENT: u64 = 1 << 0;
const ENTRY_LARGE: u64 = 1 << 7;
/// Bits 12 to 51: the address of the next table or of the page.
const ENTRY_ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// The registers that say where a vCPU goes on.
#[derive(Clone, Copy, Debug)]
pub struct Bearings<'r> {
    /// RIP and RSP are taken from here.
    pub regs: &'r kvm_regs,
    /// CS and SS bases, GDT, IDT, task state and page tables are taken from here.
    pub sregs: &'r kvm_sregs,
}

/// The pages of guest RAM, by their first address, that the vCPU needs for its next instruction, its stack, its
/// descriptor tables and the first interrupt, page tables included. `read` reads eight bytes of guest RAM, or says that
/// there is no RAM at that address.
pub fn first_pages(
    bearings: Bearings<'_>,
    read: impl Fn(GuestAddress) -> Option<u64>,
) -> BTreeSet<GuestAddress> {
    let Bearings { regs, sregs } = bearings;
    let linear = [
        sregs.cs.base.wrapping_add(regs.rip),
        // The next instruction may reach into the next page.
        sregs.cs.base.wrapping_add(regs.rip).wrapping_add(15),
        sregs.ss.base.wrapping_add(regs.rsp),
        // A push goes below.
        sregs.ss.base.wrapping_add(regs.rsp).wrapping_sub(8),
        sregs.gdt.base,
        sregs.idt.base,
        // Where an interrupt finds its stack.
        sregs.tr.base,
    ];
    let mut pages = BTreeSet::new();
    for address in linear {
        walk(sregs, address, &read, &mut pages);
    }
    pages
}

/// Adds the page at a linear address, and the tables on the way to it.
fn walk(
    sregs: &kvm_sregs,
    linear: u64,
    read: &impl Fn(GuestAddress) -> Option<u64>,
    pages: &mut BTreeSet<GuestAddress>,
) {
    if sregs.cr0 & CR0_PAGING == 0 {
        pages.insert(page_of(linear));
        return;
    }
    if sregs.efer & EFER_LONG_MODE_ACTIVE == 0 {
        return; // 32-bit paging: a guest that is still booting, which has few pages anyway
    }
    let levels = if sregs.cr4 & CR4_FIVE_LEVELS == 0 { 4 } else { 5 };
    let mut table = sregs.cr3 & ENTRY_ADDRESS;
    for level in (1..=levels).rev() {
        let shift = 12 + 9 * (level - 1);
        let at = GuestAddress(table + ((linear >> shift) & 0x1ff) * 8);
        let Some(entry) = read(at) else { return };
        pages.insert(page_of(at.0));
        if entry & ENTRY_PRESENT == 0 {
            return;
        }
        let is_page = level == 1 || (level <= 3 && entry & ENTRY_LARGE != 0);
        if is_page {
            let inside = (1 << shift) - 1;
            pages.insert(page_of((entry & ENTRY_ADDRESS & !inside) | (linear & inside)));
            return;
        }
        table = entry & ENTRY_ADDRESS;
    }
}

fn page_of(address: u64) -> GuestAddress {
    GuestAddress(address & !(PAGE_SIZE - 1))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// Guest memory that holds page-table entries and nothing else.
    #[derive(Default)]
    struct Tables(BTreeMap<u64, u64>);

    impl Tables {
        fn put(&mut self, table: u64, index: u64, entry: u64) -> &mut Self {
            self.0.insert(table + index * 8, entry);
            self
        }

        fn pages(&self, sregs: &kvm_sregs, regs: &kvm_regs) -> Vec<u64> {
            let read = |at: GuestAddress| (at.0 < 1 << 30).then(|| self.0.get(&at.0).copied().unwrap_or(0));
            first_pages(Bearings { regs, sregs }, read)
                .into_iter()
                .map(|page| page.0)
                .collect()
        }
    }

    fn long_mode(cr3: u64) -> kvm_sregs {
        kvm_sregs {
            cr0: CR0_PAGING,
            cr3,
            efer: EFER_LONG_MODE_ACTIVE,
            ..Default::default()
        }
    }

    #[test]
    fn small_and_large_pages_are_found_with_the_tables_on_the_way() {
        let mut tables = Tables::default();
        // Linear 0x40_3008 through four levels; linear 0 (descriptor tables) in a page of 2 MiB at 0x80_0000.
        tables
            .put(0x1000, 0, 0x2003)
            .put(0x2000, 0, 0x3003)
            .put(0x3000, 2, 0x4003)
            .put(0x4000, 3, 0x9003);
        tables.put(0x3000, 0, 0x80_0083);
        let regs = kvm_regs {
            rip: 0x40_3000,
            rsp: 0x40_3ff0,
            ..Default::default()
        };
        let pages = tables.pages(&long_mode(0x1000), &regs);
        assert_eq!(pages, [0x1000, 0x2000, 0x3000, 0x4000, 0x9000, 0x80_0000]);
    }

    #[test]
    fn an_instruction_at_the_end_of_a_page_brings_the_next_one() {
        let mut tables = Tables::default();
        tables
            .put(0x1000, 0, 0x2003)
            .put(0x2000, 0, 0x3003)
            .put(0x3000, 0, 0x4003);
        tables
            .put(0x4000, 0, 0xa003)
            .put(0x4000, 1, 0x9003)
            .put(0x4000, 2, 0x8003);
        let regs = kvm_regs {
            rip: 0x1ffe,
            rsp: 0x1800,
            ..Default::default()
        };
        let pages = tables.pages(&long_mode(0x1000), &regs);
        assert_eq!(pages, [0x1000, 0x2000, 0x3000, 0x4000, 0x8000, 0x9000, 0xa000]);
    }

    #[test]
    fn tables_that_point_nowhere_or_at_themselves_end_the_walk() {
        let mut tables = Tables::default();
        tables.put(0x1000, 0, ENTRY_ADDRESS | 3); // beyond RAM
        assert_eq!(tables.pages(&long_mode(0x1000), &kvm_regs::default()), [0x1000]);
        let mut tables = Tables::default();
        tables.put(0x1000, 0, 0x1003);
        assert_eq!(tables.pages(&long_mode(0x1000), &kvm_regs::default()), [0x1000]);
        assert_eq!(tables.pages(&long_mode(1 << 40), &kvm_regs::default()), [0u64; 0]);
    }

    #[test]
    fn without_paging_the_linear_address_is_the_page() {
        let regs = kvm_regs {
            rip: 0x7c00,
            rsp: 0x7000,
            ..Default::default()
        };
        let pages = Tables::default().pages(&kvm_sregs::default(), &regs);
        assert_eq!(pages, [0, 0x6000, 0x7000]);
    }
}
