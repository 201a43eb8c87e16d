//! The registers with which the boot processor enters a kernel, by Linux's 64-bit boot protocol
//! (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol").

use kvm_bindings::{kvm_fpu, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::GuestAddress;

use crate::boot::long_mode::{CODE_SELECTOR, DATA_SELECTOR, GDT_BYTES, TSS_SELECTOR};
use crate::kvm::{KvmError, failed};
use crate::layout;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// x87 control word and SSE control and status after `FNINIT` and reset.
const FPU_CONTROL: u16 = 0x37f;
const MXCSR_DEFAULT: u32 = 0x1f80;

/// Sets the registers of the boot processor to enter a kernel at `entry`. After its CPUID: newer kernels refuse long
/// mode to a processor that has not said that it knows it.
///
/// # Errors
/// When KVM refuses.
pub fn set_up_boot_vcpu(vcpu: &VcpuFd, entry: GuestAddress) -> Result<(), KvmError> {
    set_up_for_long_mode(vcpu)?;
    let regs = kvm_regs {
        rflags: 1 << 1, // Bit 1 is always set; interrupts are off.
        rip: entry.0,
        rsp: layout::BOOT_STACK.end() - 16,
        rbp: layout::BOOT_STACK.end() - 16,
        rsi: layout::ZERO_PAGE.start,
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(failed("set general registers"))?;
    let fpu = kvm_fpu {
        fcw: FPU_CONTROL,
        mxcsr: MXCSR_DEFAULT,
        ..Default::default()
    };
    vcpu.set_fpu(&fpu)
        .map_err(failed("set floating-point registers"))?;
    connect_legacy_interrupts(vcpu)
}

/// Sets segments, paging and control registers for long mode, on the tables that
/// [`boot::long_mode`](crate::boot::long_mode) writes.
///
/// # Errors
/// When KVM refuses.
pub fn set_up_for_long_mode(vcpu: &VcpuFd) -> Result<(), KvmError> {
    let mut sregs = vcpu.get_sregs().map_err(failed("read system registers"))?;
    let data = kvm_segment {
        selector: DATA_SELECTOR,
        limit: u32::MAX,
        type_: 3, // Read, write, accessed.
        present: 1,
        s: 1,
        g: 1,
        db: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment {
        selector: CODE_SELECTOR,
        type_: 11,
        l: 1,
        db: 0,
        ..data
    };
    sregs.tr = kvm_segment {
        selector: TSS_SELECTOR,
        limit: 0x67,
        type_: 11, // A busy 64-bit task state segment.
        present: 1,
        ..Default::default()
    };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.gdt.base = layout::BOOT_GDT.start;
    sregs.gdt.limit = GDT_BYTES - 1;
    (sregs.idt.base, sregs.idt.limit) = (0, 0);
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.cr3 = layout::BOOT_PAGE_TABLES.start;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
    vcpu.set_sregs(&sregs).map_err(failed("set system registers"))
}

/// Lets the 8259s' interrupts through on LINT0 and NMIs on LINT1, as firmware does (Intel SDM vol. 3A §11.5.1).
fn connect_legacy_interrupts(vcpu: &VcpuFd) -> Result<(), KvmError> {
    const LVT_LINT0: usize = 0x350;
    const LVT_LINT1: usize = 0x360;
    const MODE_NMI: u8 = 4;
    const MODE_EXTINT: u8 = 7;
    let mut lapic = vcpu.get_lapic().map_err(failed("read the local APIC"))?;
    for (register, mode) in [(LVT_LINT0, MODE_EXTINT), (LVT_LINT1, MODE_NMI)] {
        // The delivery mode is bits 8 to 10: the low bits of the second byte.
        let byte = &mut lapic.regs[register + 1];
        *byte = byte.cast_unsigned() as i8 & !7 | mode.cast_signed();
    }
    vcpu.set_lapic(&lapic).map_err(failed("set the local APIC"))
}
