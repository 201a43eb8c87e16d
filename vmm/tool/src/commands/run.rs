//! `runnel run`: boots a machine.

use std::path::PathBuf;

use clap::{ArgGroup, Args};
use serde_json::{Value, json};

use super::Failure;
use crate::boot::{Boot, DriveFlag, NetFlag};
use crate::drives::warn_of_rests;
use crate::exit::Exit;
use crate::foreground::{Afterwards, start_and_attend};
use crate::monitor::{Monitor, MonitorError};
use crate::signals::Signals;
use crate::size::parse_mebibytes;
use crate::state::{MachineName, Record, StateFolder};
use crate::taps::HostInterfaces;

/// What Linux needs to be told to speak on the serial console, and to end the monitor when it panics.
const CMDLINE: &str = "console=ttyS0 panic=-1";

const HELP: &str = "\
The guest's serial console is joined to this terminal. Ctrl-] leaves it, and the machine runs on; a hang-up or a
SIGTERM of this command ends the machine. When the guest has ended, a line on standard error says how, and the exit code is
the monitor's: 0 if it switched itself off or asked for a reset, 3 after a triple fault (`runnel-vmm --help` lists the
others).

Examples:
    runnel run --kernel vmlinuz --initrd initrd.img --memory 512M --vcpus 2
    runnel run --kernel vmlinuz --initrd initrd.img --drive path=disk.img,root --net tap=tap0 --rng --name web --detach
    runnel run --config machine.json
A configuration file is Firecracker's; paths with commas, cache types and CPU options are given there.

`runnel logs NAME` prints the monitor's log: vmm.log in the machine's folder, $XDG_RUNTIME_DIR/runnel/machines/NAME, and
ended/NAME.log beside machines once it has ended (in /run/runnel for root without XDG_RUNTIME_DIR).";

/// Boot a machine
#[derive(Debug, Args)]
#[command(after_help = HELP, group(ArgGroup::new("what").required(true).args(["kernel", "config"])))]
pub(crate) struct RunArgs {
    /// ELF vmlinux or bzImage to boot
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,

    /// Initial RAM file system
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Option<PathBuf>,

    /// The kernel's command line
    #[arg(long, value_name = "TEXT", default_value = CMDLINE)]
    cmdline: String,

    /// Guest memory, 32M to 64G: a number of MiB, or with K, M or G
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = parse_mebibytes)]
    memory: u64,

    /// vCPUs, 1 to 32
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=32))]
    vcpus: u64,

    /// A drive, again for each: [id=ID,]path=PATH[,ro][,root][,partuuid=UUID]. An id is 1 to 64 letters, digits and '_';
    /// drive0, drive1, … by position unless given
    #[arg(long = "drive", value_name = "DRIVE")]
    drives: Vec<DriveFlag>,

    /// A network interface, again for each: [id=ID,]tap=TAP[,mac=MAC][,mtu=MTU]. Ids are as drives' are; eth0, eth1, …
    /// by position unless given
    #[arg(long = "net", value_name = "INTERFACE")]
    interfaces: Vec<NetFlag>,

    /// Give the guest an entropy device
    #[arg(long)]
    rng: bool,

    /// Have KVM log which pages the guest writes: diff snapshots take less time then, and the guest writes somewhat slower
    #[arg(long)]
    track_dirty_pages: bool,

    /// Give the guest a second serial port (ttyS1), over which its agent is asked to prepare for snapshots
    #[arg(long)]
    guest_channel: bool,

    /// Take all of that from Firecracker's configuration file
    #[arg(long, value_name = "FILE", conflicts_with_all = ["kernel", "cmdline", "memory", "vcpus", "drives", "interfaces", "rng", "track_dirty_pages", "guest_channel"])]
    config: Option<PathBuf>,

    /// What the machine is called, 1 to 64 letters, digits and hyphens; m1, m2, … unless given
    #[arg(long)]
    name: Option<MachineName>,

    /// Let the machine run by itself, and print its name
    #[arg(long, short)]
    detach: bool,

    /// With --detach: print name and sockets as JSON
    #[arg(long, requires = "detach")]
    json: bool,
}

impl RunArgs {
    fn boot(&self) -> Result<Boot, Failure> {
        if let Some(path) = &self.config {
            return Ok(Boot::from_file(path)?);
        }
        let mut source = json!({ "kernel_image_path": self.kernel, "boot_args": self.cmdline });
        if let Some(initrd) = &self.initrd {
            source["initrd_path"] = json!(initrd);
        }
        let mut boot = Boot::new(source, self.vcpus, self.memory);
        for (number, drive) in self.drives.iter().enumerate() {
            boot.add_drive(number, drive)?;
        }
        for (number, interface) in self.interfaces.iter().enumerate() {
            boot.add_interface(number, interface)?;
        }
        if self.rng {
            boot.add_entropy();
        }
        if self.track_dirty_pages {
            boot.track_dirty_pages();
        }
        if self.guest_channel {
            boot.add_guest_channel();
        }
        Ok(boot)
    }
}

pub(crate) fn run(args: &RunArgs) -> Result<Exit, Failure> {
    let signals = Signals::take()?;
    let boot = args.boot()?;
    let state = StateFolder::open()?;
    let monitor = Monitor::start(&state, args.name.as_ref())?;
    monitor.folder().record(&Record {
        kernel: Some(boot.kernel.clone()),
        vcpus: boot.vcpus,
        memory_mib: boot.memory_mib,
        ..Record::now()
    })?;
    let put = |monitor: &Monitor<'_>, path: &str, body: &Value| {
        let put = monitor.api().put(path, body);
        put.map_err(|error| monitor.refused(&error))
    };
    let before = HostInterfaces::now();
    for request in &boot.requests {
        let refused = put(&monitor, &request.path, &request.body);
        refused.map_err(|error| match error {
            MonitorError::Mistyped(reason) => MonitorError::Mistyped(boot.told_of(&request.path, &reason)),
            other => other,
        })?;
    }
    let start = |monitor: &Monitor<'_>| {
        put(monitor, "/actions", &json!({ "action_type": "InstanceStart" }))?;
        before.warn_of_new(boot.taps());
        warn_of_rests(boot.drive_files());
        Ok::<_, MonitorError>(None)
    };
    start_and_attend(monitor, Afterwards::new(args.detach, args.json), &signals, start)
}
