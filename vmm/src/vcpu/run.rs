//! The run loop of a vCPU: from an exit to the next entry.

use std::sync::{Arc, Mutex, PoisonError};

use kvm_ioctls::{VcpuExit, VcpuFd};

use runnel_devices::bus::{MmioAddress, PortAddress};

use super::gate::Gate;
use crate::board::Buses;
use crate::exit::{EndSignal, Ended};
use crate::kvm::{ImmediateExit, describe_internal_error};

/// What a vCPU's thread has.
pub(super) struct Runner {
    pub(super) number: u8,
    pub(super) fd: Arc<Mutex<VcpuFd>>,
    pub(super) immediate_exit: Arc<ImmediateExit>,
    pub(super) gate: Arc<Gate>,
    pub(super) buses: Arc<Buses>,
    pub(super) end: EndSignal,
}

/// Why a vCPU is outside of `KVM_RUN`, with nothing half done.
enum Left {
    /// Somebody kicked it.
    Kicked,
    /// It cannot go on.
    Ended(Ended),
}

impl Runner {
    pub(super) fn run(self) {
        while self.gate.pass(self.number, || self.immediate_exit.set(false)) {
            let mut fd = self.fd.lock().unwrap_or_else(PoisonError::into_inner);
            let left = self.run_until_kicked(&mut fd);
            drop(fd);
            if let Left::Ended(how) = left {
                self.gate.leave(self.number);
                self.end.end(how);
                return;
            }
        }
    }

    fn run_until_kicked(&self, fd: &mut VcpuFd) -> Left {
        loop {
            match fd.run() {
                Ok(VcpuExit::IoIn(port, data)) => self.buses.ports.read(PortAddress(port), data),
                Ok(VcpuExit::IoOut(port, data)) => self.buses.ports.write(PortAddress(port), data),
                Ok(VcpuExit::MmioRead(address, data)) => self.buses.mmio.read(MmioAddress(address), data),
                Ok(VcpuExit::MmioWrite(address, data)) => self.buses.mmio.write(MmioAddress(address), data),
                Ok(VcpuExit::Shutdown) => return Left::Ended(Ended::TripleFault),
                Ok(VcpuExit::InternalError) => return self.failed(describe_internal_error(fd)),
                Ok(VcpuExit::FailEntry(reason, cpu)) => {
                    return self.failed(format!("entry refused with reason {reason:#x} on host CPU {cpu}"));
                }
                Ok(exit) => {
                    let reason = format!("unexpected exit {exit:?}");
                    return self.failed(reason);
                }
                Err(error) if error.errno() == libc::EINTR => return Left::Kicked,
                // An application processor that waits to be started, woken for something else.
                Err(error) if error.errno() == libc::EAGAIN => {}
                Err(error) => return self.failed(format!("KVM_RUN failed: {error}")),
            }
        }
    }

    fn failed(&self, reason: String) -> Left {
        Left::Ended(Ended::VcpuFailed {
            vcpu: self.number,
            reason,
        })
    }
}
