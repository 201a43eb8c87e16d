//! From a routed request and its body to what it asks for.

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::error::RequestError;
use super::route::Endpoint;
use crate::config::{
    CreateSnapshotBody, DriveBody, InterfaceBody, LoadSnapshotBody, MachineBody, MachineUpdate,
};
use crate::control::{OperationKind, Request};

/// What a request asks for, and of whom.
#[derive(Debug)]
pub(super) enum Call {
    /// Of the control thread.
    Control(Request),
    /// `GET /`.
    InstanceInfo,
    /// `GET /version`.
    Version,
    /// `GET /snapshot/progress`.
    Progress,
    /// `DELETE /snapshot/create` or `/snapshot/load`.
    Cancel(OperationKind),
}

/// A call, and what is to be said of deprecated fields that it used.
#[derive(Debug)]
pub(super) struct Parsed {
    pub(super) call: Call,
    pub(super) deprecation: Option<&'static str>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ActionBody {
    action_type: ActionType,
}

#[derive(Deserialize)]
enum ActionType {
    FlushMetrics,
    InstanceStart,
    SendCtrlAltDel,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct VmBody {
    state: WantedState,
}

#[derive(Deserialize)]
enum WantedState {
    Paused,
    Resumed,
}

fn json<T: DeserializeOwned>(body: &[u8]) -> Result<T, RequestError> {
    Ok(serde_json::from_slice(body)?)
}

/// Finds out what is asked for. `name` is there where the endpoint's path has one.
pub(super) fn parse(endpoint: Endpoint, name: Option<&str>, body: &[u8]) -> Result<Parsed, RequestError> {
    let mut deprecation = None;
    let call = match endpoint {
        Endpoint::InstanceInfo => Call::InstanceInfo,
        Endpoint::Version => Call::Version,
        Endpoint::Progress => Call::Progress,
        Endpoint::CancelCreate => Call::Cancel(OperationKind::Create),
        Endpoint::CancelLoad => Call::Cancel(OperationKind::Load),
        Endpoint::GetMachineConfig => Call::Control(Request::GetMachineConfig),
        Endpoint::VmConfig => Call::Control(Request::GetVmConfig),
        Endpoint::PutMachineConfig => {
            let machine: MachineBody = json(body)?;
            deprecation = deprecated_template(machine.cpu_template.is_some());
            Call::Control(Request::PutMachineConfig(machine))
        }
        Endpoint::PatchMachineConfig => {
            let update: MachineUpdate = json(body)?;
            if update.is_empty() {
                return Err(RequestError::EmptyPatch);
            }
            deprecation = deprecated_template(update.cpu_template.is_some());
            Call::Control(Request::PatchMachineConfig(update))
        }
        Endpoint::BootSource => Call::Control(Request::PutBootSource(json(body)?)),
        Endpoint::Drive => Call::Control(Request::PutDrive(drive(name, body)?)),
        Endpoint::NetworkInterface => Call::Control(Request::PutInterface(interface(name, body)?)),
        Endpoint::Entropy => Call::Control(Request::PutEntropy(json(body)?)),
        Endpoint::GuestChannel => Call::Control(Request::PutGuestChannel(json(body)?)),
        Endpoint::Serial => Call::Control(Request::PutSerial(json(body)?)),
        Endpoint::Logger => Call::Control(Request::PutLogger(json(body)?)),
        Endpoint::Actions => Call::Control(match json::<ActionBody>(body)?.action_type {
            ActionType::FlushMetrics => Request::FlushMetrics,
            ActionType::InstanceStart => Request::InstanceStart,
            ActionType::SendCtrlAltDel => Request::SendCtrlAltDel,
        }),
        Endpoint::VmState => Call::Control(match json::<VmBody>(body)?.state {
            WantedState::Paused => Request::Pause,
            WantedState::Resumed => Request::Resume,
        }),
        Endpoint::CreateSnapshot => Call::Control(Request::CreateSnapshot(
            json::<CreateSnapshotBody>(body)?.try_into()?,
        )),
        Endpoint::LoadSnapshot => {
            let load: LoadSnapshotBody = json(body)?;
            deprecation = load.deprecation();
            Call::Control(Request::LoadSnapshot(load.try_into()?))
        }
    };
    Ok(Parsed { call, deprecation })
}

fn deprecated_template(is_given: bool) -> Option<&'static str> {
    is_given.then_some("/machine-config: cpu_template field is deprecated.")
}

fn drive(name: Option<&str>, body: &[u8]) -> Result<DriveBody, RequestError> {
    let drive: DriveBody = json(body)?;
    if name == Some(drive.drive_id.as_str()) {
        Ok(drive)
    } else {
        Err(RequestError::DriveId)
    }
}

fn interface(name: Option<&str>, body: &[u8]) -> Result<InterfaceBody, RequestError> {
    let interface: InterfaceBody = json(body)?;
    if name == Some(interface.iface_id.as_str()) {
        Ok(interface)
    } else {
        Err(RequestError::InterfaceId {
            path: name.unwrap_or_default().to_owned(),
            body: interface.iface_id,
        })
    }
}
