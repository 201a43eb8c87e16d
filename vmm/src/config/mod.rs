//! What a machine is to be made of: Firecracker's JSON on one side, values that were checked on the other.
//!
//! Each kind of thing has a *body* (the JSON, field for field as Firecracker's API and its `--config-file` take it,
//! unknown fields refused) and a *checked* type that the rest of the monitor works with. A body becomes a checked
//! value in one step, [`TryFrom`], which refuses what makes no sense and, by name, what this version cannot do:
//! nothing is accepted and then ignored. The way back, for `GET`, is [`From`].
//!
//! **Never**: builds a device, maps memory, or keeps a file open. Files are opened once to find out early that they
//! cannot be; whoever builds the machine opens them again, and may meet another file.

mod boot_source;
mod drive;
mod entropy;
mod guest_channel;
mod guest_hook;
mod host_file;
mod identifier;
mod limiter;
mod machine;
mod microvm;
mod network;
mod serial;
mod snapshot;
mod whole_file;

pub use boot_source::{BootSource, BootSourceBody, BootSourceError};
pub use drive::{CacheType, Drive, DriveBody, DriveError, IoEngine};
pub use entropy::{EntropyBody, EntropyError};
pub use guest_channel::GuestChannelBody;
pub use guest_hook::{GuestHook, GuestHookBody, HOOK_DEADLINE_MS_MAX, Otherwise};
pub use host_file::{Access, HostFileError};
pub use identifier::{BadIdentifier, InstanceId, ResourceId};
pub use limiter::{LimiterUnsupported, RateLimiterBody, TokenBucketBody};
pub use machine::{
    CpuTemplate, HugePages, Machine, MachineBody, MachineError, MachineUpdate, MemorySize, VcpuCount,
};
pub use microvm::{ConfigError, MicrovmConfig};
pub use network::{Interface, InterfaceBody, InterfaceError, MacAddress};
pub use serial::{Serial, SerialBody, SerialError};
pub use snapshot::{
    CreateSnapshot, CreateSnapshotBody, DriveOverride, Image, LoadFrom, LoadSnapshot, LoadSnapshotBody,
    MemoryBackendBody, MemoryBackendType, NetworkOverride, Record, RecordBody, SaveAs, SnapshotError,
    SnapshotHugePages, SnapshotType,
};
pub use whole_file::{LoggerBody, WholeFile, WholeFileError};
