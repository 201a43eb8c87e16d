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
