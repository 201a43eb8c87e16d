//! What the control thread can be asked for, and what it answers.

use crate::config::{
    BootSourceBody, CreateSnapshot, DriveBody, EntropyBody, GuestChannelBody, InterfaceBody, LoadSnapshot,
    LoggerBody, MachineBody, MachineUpdate, SerialBody, WholeFile,
};

/// A request, in the API's words. Bodies are checked by the control thread, since whether they make sense can depend
/// on what is configured already.
#[derive(Debug)]
#[allow(missing_docs)] // Each is a path of the API.
pub enum Request {
    GetMachineConfig,
    GetVmConfig,
    PutLogger(LoggerBody),
    PutSerial(SerialBody),
    PutMachineConfig(MachineBody),
    PatchMachineConfig(MachineUpdate),
    PutBootSource(BootSourceBody),
    PutDrive(DriveBody),
    PutInterface(InterfaceBody),
    PutEntropy(EntropyBody),
    PutGuestChannel(GuestChannelBody),
    InstanceStart,
    SendCtrlAltDel,
    FlushMetrics,
    Pause,
    Resume,
    CreateSnapshot(CreateSnapshot),
    LoadSnapshot(LoadSnapshot),
}

impl Request {
    /// Whether it is answered while a snapshot of the machine is made. What changes whether the machine runs waits as long
    /// as it `must_stand` for the snapshot.
    pub(super) fn goes_beside_a_snapshot(&self, must_stand: bool) -> bool {
        match self {
            Self::CreateSnapshot(_) => false,
            Self::Pause | Self::Resume => !must_stand,
            Self::GetMachineConfig | Self::GetVmConfig | Self::SendCtrlAltDel | Self::FlushMetrics
            // Refused in a moment, for the machine was started.
            | Self::PutLogger(_)
            | Self::PutSerial(_)
            | Self::PutMachineConfig(_)
            | Self::PatchMachineConfig(_)
            | Self::PutBootSource(_)
            | Self::PutDrive(_)
            | Self::PutInterface(_)
            | Self::PutEntropy(_)
            | Self::PutGuestChannel(_)
            | Self::InstanceStart
            | Self::LoadSnapshot(_) => true,
        }
    }
}

/// What a request that succeeded is answered with.
#[derive(Debug, PartialEq)]
pub enum Reply {
    /// Nothing.
    Empty,
    /// `machine-config`.
    Machine(MachineBody),
    /// The whole machine.
    Config(Box<WholeFile>),
}
