//! Whether guest code runs on the processor, found out by running some.
//!
//! Some KVMs interpret guest code and lack what no kernel does without: `IRET`, SSE. The CPU's name does not tell,
//! so a VM of one page of code tries both.

use std::arch::global_asm;
use std::error::Error;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment, kvm_sregs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// The port to which the probe's guest writes [`ANSWER`].
const PORT: u16 = 0x10;
/// Twice 21, added up in an SSE register.
const ANSWER: u8 = 42;

global_asm!(
    ".pushsection .rodata",
    "runnel_guest_probe_start:",
    // Return from an interrupt that never happened, to the next instruction.
    "mov rax, rsp",
    "push 0x10",
    "push rax",
    "pushfq",
    "push 0x08",
    "lea rax, [rip + 2f]",
    "push rax",
    "iretq",
    "2:",
    "mov ecx, 21",
    "movd xmm0, ecx",
    "paddd xmm0, xmm0",
    "movd eax, xmm0",
    "out {port}, al",
    "hlt",
    "runnel_guest_probe_end:",
    ".popsection",
    port = const PORT,
);

unsafe extern "C" {
    static runnel_guest_probe_start: u8;
    static runnel_guest_probe_end: u8;
}

fn probe_code() -> &'static [u8] {
    let start = &raw const runnel_guest_probe_start;
    let end = &raw const runnel_guest_probe_end;
    // SAFETY: both labels stand in the block above, in this order, in read-only data that lives for ever.
    unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) }
}

// Where the probe's tables and code lie in its 64 KiB of guest memory.
const GDT: u64 = 0x500;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const DIRECTORY: u64 = 0x3000;
const STACK_TOP: u64 = 0x8000;
const CODE: u64 = 0x8000;
const MEMORY_BYTES: usize = 0x10000;

/// Runs the probe's guest in a VM of its own.
pub(super) fn runs_iret_and_sse(kvm: &Kvm) -> Result<bool, Box<dyn Error>> {
    let vm = kvm.create_vm()?;
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)])?;
    // A flat code segment and a flat data segment, at selectors 8 and 16.
    for (index, descriptor) in [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff_u64]
        .into_iter()
        .enumerate()
    {
        memory.write_obj(descriptor, GuestAddress(GDT + 8 * index as u64))?;
    }
    // The first 2 MiB, mapped one to one: present, writable, and in the last level a large page.
    memory.write_obj(PDPT | 3, GuestAddress(PML4))?;
    memory.write_obj(DIRECTORY | 3, GuestAddress(PDPT))?;
    memory.write_obj(0x83_u64, GuestAddress(DIRECTORY))?;
    memory.write_slice(probe_code(), GuestAddress(CODE))?;

    let slot = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY_BYTES as u64,
        userspace_addr: memory.get_host_address(GuestAddress(0))?.addr() as u64,
    };
    // SAFETY: the mapping has this length, and `memory` outlives the vCPU, which this function alone runs.
    unsafe { vm.set_user_memory_region(slot) }?;

    let mut vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
    vcpu.set_sregs(&long_mode(vcpu.get_sregs()?))?;
    vcpu.set_regs(&kvm_regs {
        rip: CODE,
        rsp: STACK_TOP,
        rflags: 2,
        ..Default::default()
    })?;
    Ok(matches!(vcpu.run()?, VcpuExit::IoOut(PORT, [ANSWER])))
}

/// 64-bit mode with paging and SSE switched on.
fn long_mode(mut sregs: kvm_sregs) -> kvm_sregs {
    const CODE_SEGMENT: kvm_segment = kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: 8,
        type_: 0xb,
        present: 1,
        dpl: 0,
        db: 0,
        s: 1,
        l: 1,
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    };
    const DATA_SEGMENT: kvm_segment = kvm_segment {
        selector: 16,
        type_: 3,
        db: 1,
        l: 0,
        ..CODE_SEGMENT
    };
    sregs.cs = CODE_SEGMENT;
    (sregs.ds, sregs.es, sregs.ss) = (DATA_SEGMENT, DATA_SEGMENT, DATA_SEGMENT);
    sregs.gdt.base = GDT;
    sregs.gdt.limit = 3 * 8 - 1;
    sregs.cr3 = PML4;
    sregs.cr4 = 1 << 5 | 1 << 9 | 1 << 10; // PAE, OSFXSR, OSXMMEXCPT
    sregs.cr0 = 1 << 31 | 1 << 1 | 1 << 4 | 1; // paging, MP, ET, protection
    sregs.efer = 1 << 8 | 1 << 10; // long mode enabled and active
    sregs
}
