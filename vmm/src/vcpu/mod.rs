//! The vCPUs of a machine: a thread each, and the gate at which they stand.
//!
//! ```text
//!            let_run                    left (the machine ended)
//! STANDING ───────────► RUNNING ──────────────────────────────────► GONE
//!    ▲                     │                                          ▲
//!    └─────────────────────┘ kicked, and KVM_RUN has finished         │
//!    └────────────────────────────────────────────────────────────────┘ quit
//! ```
//!
//! A vCPU leaves `KVM_RUN` for good only where KVM said `EINTR`: by then the half-done port or memory access of an
//! earlier exit has been finished, so that its registers can be saved.
//!
//! **Locks.** A running vCPU's thread holds its `VcpuFd` lock; everybody else takes it only while the vCPU stands.
//! The gate's lock is held for moments, and no other lock is taken under it.

mod gate;
mod kick;
mod run;
mod setup;

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use kvm_ioctls::VcpuFd;
use vmm_sys_util::errno;

use crate::board::Buses;
use crate::exit::EndSignal;
use crate::kvm::{ImmediateExit, KvmError};
use gate::{Gate, Wanted};

pub use setup::{set_up_boot_vcpu, set_up_for_long_mode};

/// Why the vCPUs do not do as they are told.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// A thread cannot be started.
    #[error("cannot start the thread of vCPU {vcpu}")]
    Thread {
        /// Its number.
        vcpu: u8,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The signal that kicks vCPUs cannot be prepared.
    #[error("cannot prepare the signal that interrupts vCPUs")]
    Signal(#[source] errno::Error),
    /// KVM refused.
    #[error("vCPU {vcpu} cannot be set up")]
    Kvm {
        /// Its number.
        vcpu: u8,
        /// What it refused.
        source: KvmError,
    },
}

/// The vCPUs that did not come to a stand before the caller gave up: each waits for a page of guest RAM.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("vCPUs {0:?} wait for guest memory that has not arrived, and cannot be paused before it does")]
pub struct Stuck(pub Vec<u8>);

/// All vCPUs of a machine.
pub struct Vcpus {
    gate: Arc<Gate>,
    vcpus: Vec<Vcpu>,
}

struct Vcpu {
    fd: Arc<Mutex<VcpuFd>>,
    immediate_exit: Arc<ImmediateExit>,
    /// Taken when it is joined.
    thread: Option<JoinHandle<()>>,
}

impl Vcpus {
    /// Starts a thread for each of `fds`, in order of their numbers; they stand until [`let_run`](Self::let_run).
    ///
    /// # Errors
    /// When threads or signals cannot be had; none runs then.
    pub fn start(fds: Vec<VcpuFd>, buses: &Arc<Buses>, end: &EndSignal) -> Result<Self, VcpuError> {
        kick::prepare().map_err(VcpuError::Signal)?;
        let mut started = Self {
            gate: Arc::new(Gate::new(fds.len())),
            vcpus: Vec::with_capacity(fds.len()),
        };
        for (fd, number) in fds.into_iter().zip(0u8..) {
            let fd = Arc::new(Mutex::new(fd));
            let immediate_exit = Arc::new(ImmediateExit::of(&fd));
            let runner = run::Runner {
                number,
                fd: Arc::clone(&fd),
                immediate_exit: Arc::clone(&immediate_exit),
                gate: Arc::clone(&started.gate),
                buses: Arc::clone(buses),
                end: end.clone(),
            };
            let thread = std::thread::Builder::new()
                .name(format!("vcpu{number}"))
                .spawn(move || runner.run())
                .map_err(|source| VcpuError::Thread { vcpu: number, source })?;
            started.vcpus.push(Vcpu {
                fd,
                immediate_exit,
                thread: Some(thread),
            });
        }
        Ok(started)
    }

    /// Lets all of them run.
    pub fn let_run(&self) {
        self.gate.want(Wanted::Run, || {});
    }

    /// Asks all of them to stand, and does not wait. Those in a page fault stand once it is answered.
    pub fn ask_to_stand(&self) {
        self.gate.want(Wanted::Stand, || self.raise_flags());
        self.signal_all();
    }

    /// Makes all of them stand, and waits until they do.
    ///
    /// A vCPU that waits for a page of guest RAM cannot be interrupted on every kernel. Whoever knows that the page
    /// may never come says so through `give_up`, which is asked again and again while somebody is still missing.
    ///
    /// # Errors
    /// Who is missing, when `give_up` says true; all of them run on then.
    pub fn stand(&self, give_up: &dyn Fn() -> bool) -> Result<(), Stuck> {
        self.ask_to_stand();
        match self.gate.wait_until_all_stand(give_up) {
            Ok(()) => Ok(()),
            Err(missing) => {
                self.let_run();
                Err(Stuck(missing))
            }
        }
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.vcpus.len()
    }

    /// Each vCPU's KVM object, in order of their numbers. Waits for a vCPU that runs: for those that stand alone.
    pub fn fds(&self) -> impl Iterator<Item = MutexGuard<'_, VcpuFd>> {
        self.vcpus
            .iter()
            .map(|vcpu| vcpu.fd.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Tells guests that keep KVM's clock that they stood still, so that their watchdogs do not take it for a hang.
    /// While they stand.
    pub fn tell_of_pause(&self) {
        for fd in self.fds() {
            // Refused where the guest has no such clock.
            let _ = fd.kvmclock_ctrl();
        }
    }

    /// As [`tell_of_pause`](Self::tell_of_pause), while some of them may not stand: those in a fault are left out.
    pub fn tell_of_hold(&self) {
        for vcpu in &self.vcpus {
            if let Ok(fd) = vcpu.fd.try_lock() {
                // Refused where the guest has no such clock.
                let _ = fd.kvmclock_ctrl();
            }
        }
    }

    fn raise_flags(&self) {
        for vcpu in &self.vcpus {
            vcpu.immediate_exit.set(true);
        }
    }

    fn signal_all(&self) {
        for thread in self.vcpus.iter().filter_map(|vcpu| vcpu.thread.as_ref()) {
            kick::kick(thread);
        }
    }
}

impl Drop for Vcpus {
    /// Ends the threads. One that waits for a page which never comes is left behind: it ends with the process.
    fn drop(&mut self) {
        self.gate.want(Wanted::Quit, || self.raise_flags());
        self.signal_all();
        let missing = self.gate.wait_a_moment_until_all_are_gone();
        for (vcpu, number) in self.vcpus.iter_mut().zip(0u8..) {
            if let Some(thread) = vcpu.thread.take()
                && !missing.contains(&number)
            {
                // A panic in a vCPU's thread has been printed already; there is nobody left to tell.
                let _ = thread.join();
            }
        }
    }
}

impl fmt::Debug for Vcpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vcpus")
            .field("count", &self.vcpus.len())
            .finish_non_exhaustive()
    }
}
