//! What may be asked at any time, also while the control thread is busy for seconds.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;

use super::guest::{Paging, Residency, Stalled, Waits};
use super::operation::{Operation, OperationKind, Progress};
use crate::config::InstanceId;
use crate::version::{FIRECRACKER_VERSION, RUNNEL_VERSION};

/// Where the machine is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum VmState {
    /// It is being configured.
    #[serde(rename = "Not started")]
    NotStarted,
    /// Its vCPUs run.
    Running,
    /// Its vCPUs stand still.
    Paused,
}

/// What `GET /` answers: Firecracker's four fields, and ours.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct InstanceInfo {
    /// The machine's name.
    pub id: String,
    /// Where it is in its life.
    pub state: VmState,
    /// The version of Firecracker whose API is spoken.
    pub vmm_version: &'static str,
    /// What Firecracker's clients expect here.
    pub app_name: &'static str,
    /// Runnel's own version.
    pub runnel_version: &'static str,
    /// Why the machine is stalled, if it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stalled: Option<Stalled>,
    /// Whether an agent in the guest has announced itself, if there is a channel for one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest_agent: Option<bool>,
}

/// What may be asked at any time. Its lock is held for a few assignments; what it asks of [`Paging`] does not wait.
pub struct Status {
    id: InstanceId,
    shared: Mutex<Shared>,
}

struct Shared {
    state: VmState,
    /// The one under way, or the last one.
    operation: Option<Arc<Operation>>,
    paging: Option<Arc<dyn Paging>>,
    agent: Option<Arc<AtomicBool>>,
    /// Nothing that takes long is begun or waited for any more.
    is_ending: bool,
}

impl Status {
    /// Of a machine that is not started.
    #[must_use]
    pub fn new(id: InstanceId) -> Arc<Self> {
        let shared = Shared {
            state: VmState::NotStarted,
            operation: None,
            paging: None,
            agent: None,
            is_ending: false,
        };
        Arc::new(Self {
            id,
            shared: Mutex::new(shared),
        })
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        // Every change is one assignment, so even a panic would leave something whole.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the machine is in its life.
    #[must_use]
    pub fn state(&self) -> VmState {
        self.shared().state
    }

    pub(super) fn set_state(&self, state: VmState) {
        self.shared().state = state;
    }

    pub(super) fn adopt(
        &self,
        state: VmState,
        paging: Option<Arc<dyn Paging>>,
        agent: Option<Arc<AtomicBool>>,
    ) {
        let mut shared = self.shared();
        shared.state = state;
        shared.paging = paging;
        shared.agent = agent;
    }

    /// A new operation takes the place of the last one.
    pub(crate) fn begin(&self, kind: OperationKind) -> Arc<Operation> {
        let operation = Operation::new(kind);
        let mut shared = self.shared();
        if shared.is_ending {
            operation.cancel();
        }
        shared.operation = Some(Arc::clone(&operation));
        operation
    }

    /// Answers `GET /`.
    #[must_use]
    pub fn instance_info(&self) -> InstanceInfo {
        let (state, paging, agent) = {
            let shared = self.shared();
            (shared.state, shared.paging.clone(), shared.agent.clone())
        };
        InstanceInfo {
            id: self.id.to_string(),
            state,
            vmm_version: FIRECRACKER_VERSION,
            app_name: "Firecracker",
            runnel_version: RUNNEL_VERSION,
            stalled: paging.and_then(|paging| paging.stalled()),
            guest_agent: agent.map(|agent| agent.load(Ordering::Relaxed)),
        }
    }

    /// How far the operation under way is, or how the last one ended.
    #[must_use]
    pub fn progress(&self) -> Option<Progress> {
        let operation = self.shared().operation.clone();
        operation.map(|operation| operation.progress())
    }

    /// How much of each volume has arrived; empty if all was there from the start.
    #[must_use]
    pub fn residency(&self) -> Vec<Residency> {
        let paging = self.shared().paging.clone();
        paging.map(|paging| paging.residency()).unwrap_or_default()
    }

    /// How long chunks were waited for, by a machine whose volumes were not all there from the start.
    #[must_use]
    pub fn waits(&self) -> Option<Waits> {
        let paging = self.shared().paging.clone();
        paging.map(|paging| paging.waits())
    }

    /// Cancels the operation under way if it is a `kind`. Whether there was one.
    #[must_use]
    pub fn cancel(&self, kind: OperationKind) -> bool {
        let operation = self.shared().operation.clone();
        operation.is_some_and(|operation| operation.kind() == kind && operation.cancel())
    }

    /// Cancels whatever is under way, and whatever begins yet: the monitor is to end.
    pub(super) fn cancel_all(&self) {
        self.shared().is_ending = true;
        for kind in [OperationKind::Create, OperationKind::Load] {
            // Nothing is lost if there was none.
            let _ = self.cancel(kind);
        }
    }

    /// Whether the monitor is to end.
    pub(super) fn is_ending(&self) -> bool {
        self.shared().is_ending
    }
}
