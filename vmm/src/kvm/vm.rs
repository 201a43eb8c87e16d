//! A VM: memory slots with dirty logging, interrupt controllers, event descriptors.

use kvm_bindings::{
    KVM_MEM_LOG_DIRTY_PAGES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{IoEventAddress, VcpuFd, VmFd};
use runnel_snapshot::block_store::GuestRam;
use runnel_snapshot::units::PAGE_SIZE;
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::{KvmError, failed};
use crate::layout;

/// A VM, with the RAM that was given to it.
#[derive(Debug)]
pub struct Vm {
    fd: VmFd,
    /// Kept mapped for as long as KVM may look at it.
    ram: Option<GuestRam>,
}

/// Whether KVM records which pages the vCPUs write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DirtyLog {
    /// It does.
    On,
    /// It does not, which is faster.
    Off,
}

impl Vm {
    pub(super) fn new(kvm: &kvm_ioctls::Kvm) -> Result<Self, KvmError> {
        let fd = kvm.create_vm().map_err(failed("create a VM"))?;
        Ok(Self { fd, ram: None })
    }

    /// The VM itself, for the calls that move its state.
    pub(crate) fn fd(&self) -> &VmFd {
        &self.fd
    }

    /// Gives `ram` to the guest, one memory slot a region.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn set_ram(&mut self, ram: GuestRam, log: DirtyLog) -> Result<(), KvmError> {
        // Kept before KVM learns of it: should a later slot fail, the earlier ones stay mapped.
        let ram = self.ram.insert(ram);
        set_slots(&self.fd, ram, log)
    }

    /// Takes KVM's log of written pages: one bitmap a region of RAM, a bit a page, cleared by this.
    ///
    /// # Errors
    /// When KVM refuses, for instance because logging is off.
    pub fn take_dirty_log(&self) -> Result<Vec<Vec<u64>>, KvmError> {
        let Some(ram) = &self.ram else {
            return Ok(Vec::new());
        };
        ram.iter()
            .zip(0..)
            // A region is at most RAM_BYTES_MAX, which fits a usize.
            .map(|(region, slot)| {
                self.fd
                    .get_dirty_log(slot, usize::try_from(region.len()).unwrap_or(usize::MAX))
            })
            .collect::<Result<_, _>>()
            .map_err(failed("say which pages were written"))
    }

    /// Adds the interrupt controllers and the interval timer, in the kernel. Before the first vCPU.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn create_interrupt_controllers(&self) -> Result<(), KvmError> {
        // KVM's own pages must lie where no RAM is; its default is just above ours. An address needs no more than 32 bits.
        let tss = usize::try_from(layout::KVM_TSS.start).unwrap_or(usize::MAX);
        self.fd
            .set_tss_address(tss)
            .map_err(failed("place its task state segment"))?;
        self.fd
            .set_identity_map_address(layout::KVM_IDENTITY_MAP.start)
            .map_err(failed("place its identity map"))?;
        self.fd
            .create_irq_chip()
            .map_err(failed("create the interrupt controllers"))?;
        // Port 0x61 is answered by KVM: kernels calibrate the TSC with it where they have nothing better.
        let pit = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        self.fd
            .create_pit2(pit)
            .map_err(failed("create the interval timer"))
    }

    /// Adds a vCPU. After the interrupt controllers, so that it has a local APIC.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn create_vcpu(&self, number: u8) -> Result<VcpuFd, KvmError> {
        self.fd
            .create_vcpu(u64::from(number))
            .map_err(failed("create a vCPU"))
    }

    /// Makes a write of `value`, 32 bits, to `address` signal `event` instead of leaving the guest.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn kick_by(&self, event: &EventFd, address: GuestAddress, value: u32) -> Result<(), KvmError> {
        self.fd
            .register_ioevent(event, &IoEventAddress::Mmio(address.raw_value()), value)
            .map_err(failed("turn a queue's notifications into events"))
    }

    /// Makes `event` raise the edge-triggered interrupt line `gsi`.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn interrupt_by(&self, event: &EventFd, gsi: u32) -> Result<(), KvmError> {
        self.fd
            .register_irqfd(event, gsi)
            .map_err(failed("turn events into interrupts"))
    }
}

fn set_slots(fd: &VmFd, ram: &GuestRam, log: DirtyLog) -> Result<(), KvmError> {
    let flags = match log {
        DirtyLog::On => KVM_MEM_LOG_DIRTY_PAGES,
        DirtyLog::Off => 0,
    };
    for (region, slot) in ram.iter().zip(0..) {
        let start = region.start_addr();
        let host = ram.get_host_address(start).map_err(|_| KvmError::NoHostAddress {
            start: start.raw_value(),
        })?;
        debug_assert!(region.len().is_multiple_of(PAGE_SIZE));
        let slot = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: start.raw_value(),
            memory_size: region.len(),
            userspace_addr: host as u64,
        };
        // SAFETY: the region is a mapping of `memory_size` bytes at `userspace_addr`, which `Vm` keeps (through `ram`)
        // until after its descriptor is closed; regions of one GuestRam never overlap.
        unsafe { fd.set_user_memory_region(slot) }.map_err(failed("take guest RAM"))?;
    }
    Ok(())
}
