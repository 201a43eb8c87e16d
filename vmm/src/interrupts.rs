//! The interrupt controllers and the interval timer that KVM keeps, as sections.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip, kvm_pit_state2,
};
use runnel_snapshot::machine::Paused;
use runnel_snapshot::section::Section;
use serde::{Deserialize, Serialize};

use crate::kvm::{KvmError, Vm};

/// The two PICs and the I/O APIC.
pub struct InterruptControllers<'v>(pub &'v Vm);

/// Their state: KVM's structures, as bytes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct InterruptControllersState {
    /// The first PIC.
    pub pic_master: kvm_irqchip,
    /// The second PIC.
    pub pic_slave: kvm_irqchip,
    /// The I/O APIC.
    pub io_apic: kvm_irqchip,
}

impl Section for InterruptControllers<'_> {
    const KIND: &'static str = "interrupt-controllers";
    const VERSION: u32 = 1;
    type State = InterruptControllersState;
    type Deps = Self;
    type Error = KvmError;

    fn save(&self, _: &Paused<'_>) -> Result<InterruptControllersState, KvmError> {
        Ok(InterruptControllersState {
            pic_master: self.0.interrupt_controller(KVM_IRQCHIP_PIC_MASTER)?,
            pic_slave: self.0.interrupt_controller(KVM_IRQCHIP_PIC_SLAVE)?,
            io_apic: self.0.interrupt_controller(KVM_IRQCHIP_IOAPIC)?,
        })
    }

    fn restore(vm: Self, mut state: InterruptControllersState) -> Result<Self, KvmError> {
        // Which chip it is stands in the bytes too; an image cannot swap them.
        state.pic_master.chip_id = KVM_IRQCHIP_PIC_MASTER;
        state.pic_slave.chip_id = KVM_IRQCHIP_PIC_SLAVE;
        state.io_apic.chip_id = KVM_IRQCHIP_IOAPIC;
        for chip in [&state.pic_master, &state.pic_slave, &state.io_apic] {
            vm.0.set_interrupt_controller(chip)?;
        }
        Ok(vm)
    }
}

/// The 8254, port 0x61 included.
pub struct IntervalTimer<'v>(pub &'v Vm);

impl Section for IntervalTimer<'_> {
    const KIND: &'static str = "interval-timer";
    const VERSION: u32 = 1;
    type State = kvm_pit_state2;
    type Deps = Self;
    type Error = KvmError;

    fn save(&self, _: &Paused<'_>) -> Result<kvm_pit_state2, KvmError> {
        self.0.interval_timer()
    }

    fn restore(vm: Self, state: kvm_pit_state2) -> Result<Self, KvmError> {
        vm.0.set_interval_timer(&state)?;
        Ok(vm)
    }
}
