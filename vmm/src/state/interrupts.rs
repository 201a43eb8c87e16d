//! The interrupt controllers that all vCPUs share (two 8259s, the I/O APIC), and the interval timer.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip, kvm_pit_state2,
};
use runnel_snapshot::machine::Paused;
use runnel_snapshot::section::Section;
use serde::{Deserialize, Serialize};

use super::StateError;
use crate::kvm::{Vm, failed};

/// The controllers of a VM.
#[derive(Debug)]
pub struct Interrupts<'a> {
    /// Whose.
    pub vm: &'a Vm,
}

/// Their registers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InterruptsState {
    /// The first 8259.
    pub pic_master: kvm_irqchip,
    /// The second 8259.
    pub pic_slave: kvm_irqchip,
    /// The I/O APIC.
    pub io_apic: kvm_irqchip,
}

impl<'a> Section for Interrupts<'a> {
    const KIND: &'static str = "interrupts";
    const VERSION: u32 = 1;
    type State = InterruptsState;
    type Deps = &'a Vm;
    type Error = StateError;

    fn save(&self, _: &Paused<'_>) -> Result<InterruptsState, StateError> {
        let chip = |chip_id| {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            self.vm
                .fd()
                .get_irqchip(&mut chip)
                .map_err(failed("read an interrupt controller"))?;
            Ok::<_, StateError>(chip)
        };
        Ok(InterruptsState {
            pic_master: chip(KVM_IRQCHIP_PIC_MASTER)?,
            pic_slave: chip(KVM_IRQCHIP_PIC_SLAVE)?,
            io_apic: chip(KVM_IRQCHIP_IOAPIC)?,
        })
    }

    fn restore(vm: &'a Vm, state: InterruptsState) -> Result<Self, StateError> {
        let chips = [
            (KVM_IRQCHIP_PIC_MASTER, state.pic_master),
            (KVM_IRQCHIP_PIC_SLAVE, state.pic_slave),
            (KVM_IRQCHIP_IOAPIC, state.io_apic),
        ];
        for (chip_id, chip) in chips {
            // Which one it is, is ours to say.
            let chip = kvm_irqchip { chip_id, ..chip };
            vm.fd()
                .set_irqchip(&chip)
                .map_err(failed("set an interrupt controller"))?;
        }
        Ok(Self { vm })
    }
}

/// The interval timer of a VM.
#[derive(Debug)]
pub struct Timer<'a> {
    /// Whose.
    pub vm: &'a Vm,
}

impl<'a> Section for Timer<'a> {
    const KIND: &'static str = "interval-timer";
    const VERSION: u32 = 1;
    type State = kvm_pit_state2;
    type Deps = &'a Vm;
    type Error = StateError;

    fn save(&self, _: &Paused<'_>) -> Result<kvm_pit_state2, StateError> {
        Ok(self
            .vm
            .fd()
            .get_pit2()
            .map_err(failed("read the interval timer"))?)
    }

    fn restore(vm: &'a Vm, state: kvm_pit_state2) -> Result<Self, StateError> {
        vm.fd()
            .set_pit2(&state)
            .map_err(failed("set the interval timer"))?;
        Ok(Self { vm })
    }
}
