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
            _ => true,
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
