//! The device status: the steps by which a driver brings a device to work, and the reset that takes all of them back
//! (virtio 1.2 §2.1, §3.1.1).

use super::queues::QueueRegisters;
use super::{
    ACKNOWLEDGE, Active, DRIVER, DRIVER_OK, FAILED, FEATURES_OK, MmioTransport, NEEDS_RESET, Refused,
    Registers, VirtioDevice,
};

impl<D: VirtioDevice> MmioTransport<D> {
    pub(super) fn write_status(&self, registers: &mut Registers<D>, value: u32) -> Result<(), Refused> {
        let value = u8::try_from(value).map_err(|_| Refused)?;
        if value == 0 {
            self.reset(registers);
            return Ok(());
        }
        // A driver only adds steps; what it reads back from NEEDS_RESET it may write again, which means nothing.
        let wanted = value & !NEEDS_RESET;
        if registers.status & !wanted != 0 {
            return Err(Refused);
        }
        self.take_steps(registers, wanted & !registers.status)
    }

    /// Takes the steps in `new`, in their order, each only after those before it.
    fn take_steps(&self, registers: &mut Registers<D>, new: u8) -> Result<(), Refused> {
        if new & !(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED) != 0 {
            return Err(Refused);
        }
        if new & FAILED != 0 {
            registers.status |= FAILED;
            *self.unit.lock() = None;
        }
        for (step, before) in [
            (ACKNOWLEDGE, 0),
            (DRIVER, ACKNOWLEDGE),
            (FEATURES_OK, DRIVER),
            (DRIVER_OK, FEATURES_OK),
        ] {
            if new & step == 0 {
                continue;
            }
            if !registers.has(before) || registers.has(FAILED) {
                return Err(Refused);
            }
            match step {
                // Left unset, which is how the driver learns of it (§3.1.1 step 6).
                FEATURES_OK if !registers.features_acceptable() => return Err(Refused),
                DRIVER_OK => {
                    registers.status |= DRIVER_OK;
                    self.start(registers);
                }
                _ => registers.status |= step,
            }
        }
        Ok(())
    }

    /// Puts the active half in place and calls it for each queue: the driver may have filled them already.
    fn start(&self, registers: &mut Registers<D>) {
        if self.link.is_broken() {
            return;
        }
        let positions = vec![(0, 0); registers.queues.len()];
        match self.activate(registers, &positions) {
            Ok(active) => {
                *self.unit.lock() = Some(active);
                self.kick_all();
            }
            Err(error) => {
                self.link.break_device(D::KIND, &*error);
            }
        }
    }

    /// The active half for the registers as they are, its queues at `positions`: next available, next used.
    pub(super) fn activate(
        &self,
        registers: &mut Registers<D>,
        positions: &[(u16, u16)],
    ) -> Result<Active, Box<dyn std::error::Error + Send + Sync>> {
        let features = registers.driver_features;
        let mut queues = Vec::with_capacity(registers.queues.len());
        for (queue, position) in registers.queues.iter().zip(positions) {
            let built = queue
                .ready
                .then(|| queue.build(&self.ram, features, *position, &self.link));
            queues.push(built.transpose()?);
        }
        Ok(Active {
            device: registers.device.activate(features)?,
            queues,
            is_resting: false,
        })
    }

    fn reset(&self, registers: &mut Registers<D>) {
        // First the active half: the driver's memory is its own again when this returns.
        *self.unit.lock() = None;
        self.link.reset();
        registers.device.reset();
        registers.status = 0;
        registers.driver_features = 0;
        registers.device_features_select = 0;
        registers.driver_features_select = 0;
        registers.queue_select = 0;
        registers.queues.iter_mut().for_each(QueueRegisters::reset);
    }
}
