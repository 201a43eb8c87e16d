//! `fctools` starts `runnel-vmm` as its Firecracker, configures it, boots the bare guest, pauses it, takes a snapshot,
//! loads that into another monitor and lets it go on, with the memory and the drive that it had.

#![allow(
    clippy::unwrap_used,
    reason = "a test fails by panicking, in the functions that it is made of too"
)]

use std::path::Path;
use std::time::Duration;

use fctools::process_spawner::DirectProcessSpawner;
use fctools::runtime::tokio::TokioRuntime;
use fctools::runtime::{Runtime, RuntimeChild};
use fctools::vm::api::{VmApi, VmApiError};
use fctools::vm::configuration::{InitMethod, VmConfiguration, VmConfigurationData};
use fctools::vm::models::{
    BootSource, CreateSnapshot, Drive, DriveCacheType, EntropyDevice, MachineConfiguration, SnapshotType,
};
use fctools::vm::shutdown::{VmShutdownAction, VmShutdownMethod};
use fctools::vm::snapshot::PrepareVmFromSnapshotOptions;
use fctools::vm::{Vm, VmState};
use fctools::vmm::arguments::{VmmApiSocket, VmmArguments};
use fctools::vmm::executor::unrestricted::UnrestrictedVmmExecutor;
use fctools::vmm::installation::VmmInstallation;
use fctools::vmm::ownership::VmmOwnershipModel;
use fctools::vmm::resource::system::ResourceSystem;
use fctools::vmm::resource::{MovedResourceType, Resource, ResourceType};
use futures_util::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tempfile::TempDir;

/// Far longer than anything here takes: a test that waits so long has failed.
const DEADLINE: Duration = Duration::from_secs(60);

type Machine = Vm<UnrestrictedVmmExecutor, DirectProcessSpawner, TokioRuntime>;
type Child = <TokioRuntime as Runtime>::Child;
type Resources = ResourceSystem<DirectProcessSpawner, TokioRuntime>;

fn installation() -> VmmInstallation {
    let monitor = runnel_tests::program("runnel-vmm");
    VmmInstallation::new(monitor.clone(), monitor.clone(), monitor)
}

fn file(resources: &mut Resources, path: &Path) -> Resource {
    resources
        .create_resource(path, ResourceType::Moved(MovedResourceType::Copied))
        .unwrap()
}

fn configuration(resources: &mut Resources, folder: &Path) -> VmConfigurationData {
    let disk = folder.join("disk");
    std::fs::write(&disk, vec![7; 1 << 20]).unwrap();
    VmConfigurationData {
        boot_source: BootSource {
            kernel_image: file(resources, runnel_tests::bare_guest()),
            boot_args: Some("console=ttyS0".to_owned()),
            initrd: None,
        },
        drives: vec![Drive {
            drive_id: "disk".to_owned(),
            is_root_device: false,
            cache_type: Some(DriveCacheType::Writeback),
            partuuid: None,
            is_read_only: Some(false),
            block: Some(file(resources, &disk)),
            rate_limiter: None,
            io_engine: None,
            socket: None,
        }],
        pmem_devices: Vec::new(),
        machine_configuration: MachineConfiguration {
            vcpu_count: 1,
            mem_size_mib: 64,
            smt: None,
            track_dirty_pages: Some(true),
            huge_pages: None,
        },
        cpu_template: None,
        network_interfaces: Vec::new(),
        balloon_device: None,
        vsock_device: None,
        logger_system: None,
        metrics_system: None,
        memory_hotplug_configuration: None,
        mmds_configuration: None,
        entropy_device: Some(EntropyDevice::default()),
    }
}

async fn machine(folder: &TempDir, init_method: InitMethod) -> Machine {
    let mut resources = ResourceSystem::new(DirectProcessSpawner, TokioRuntime, VmmOwnershipModel::Shared);
    let data = configuration(&mut resources, folder.path());
    let socket = VmmApiSocket::Enabled(folder.path().join("api.sock"));
    let executor = UnrestrictedVmmExecutor::new(VmmArguments::new(socket));
    let configuration = VmConfiguration::New { init_method, data };
    let mut machine = Vm::prepare(executor, resources, installation(), configuration)
        .await
        .unwrap();
    machine.start(DEADLINE).await.unwrap();
    machine
}

async fn end(mut machine: Machine) {
    kill(&mut machine).await;
    machine.cleanup().await.unwrap();
}

/// Ends the monitor, whose machine is paused or runs, and leaves the machine's files where they are.
async fn kill(machine: &mut Machine) {
    let method = if machine.get_state() == VmState::Paused {
        VmShutdownMethod::Kill
    } else {
        VmShutdownMethod::PauseThenKill
    };
    let kill = VmShutdownAction {
        method,
        timeout: Some(DEADLINE),
        graceful: false,
    };
    machine.shutdown([kill]).await.unwrap();
}

/// The guest's console. A guest whose console is let go of is heard no more.
struct Console {
    keyboard: <Child as RuntimeChild>::Stdin,
    lines: BufReader<<Child as RuntimeChild>::Stdout>,
}

impl Console {
    fn of(machine: &mut Machine) -> Self {
        let pipes = machine.take_pipes().unwrap();
        Self {
            keyboard: pipes.stdin,
            lines: BufReader::new(pipes.stdout),
        }
    }

    /// What the guest says next.
    async fn line(&mut self) -> String {
        let mut line = String::new();
        let read = tokio::time::timeout(DEADLINE, self.lines.read_line(&mut line)).await;
        let bytes = read.expect("the guest stays silent").unwrap();
        assert_ne!(bytes, 0, "the guest's console was closed");
        line.trim_end().to_owned()
    }

    /// Waits until the guest has said that it listens.
    async fn wait_for_guest(&mut self) {
        while self.line().await != "listening=1" {}
    }

    /// Tells the guest `words`, and holds what it says against `answer`.
    async fn tell(&mut self, words: &str, answer: &str) {
        let typed = format!("{words}\n");
        self.keyboard.write_all(typed.as_bytes()).await.unwrap();
        assert_eq!(self.line().await, answer);
    }
}

#[tokio::test]
async fn the_client_takes_runnel_for_the_firecracker_that_it_knows() {
    let folder = tempfile::tempdir().unwrap();
    let mut machine = machine(&folder, InitMethod::ViaApiCalls).await;
    assert_eq!(machine.get_firecracker_version().await.unwrap(), "1.17.0");
    let info = machine.get_info().await.unwrap();
    assert_eq!(info.app_name, "Firecracker");
    let configured = machine.get_machine_configuration().await.unwrap();
    assert_eq!((configured.vcpu_count, configured.mem_size_mib), (1, 64));
    end(machine).await;
}

#[tokio::test]
async fn the_client_boots_pauses_and_resumes_a_machine() {
    for by_file in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let init_method = if by_file {
            InitMethod::ViaJsonConfiguration(folder.path().join("config.json"))
        } else {
            InitMethod::ViaApiCalls
        };
        let mut machine = machine(&folder, init_method).await;
        Console::of(&mut machine).wait_for_guest().await;
        assert_eq!(machine.get_state(), VmState::Running);
        machine.pause().await.unwrap();
        assert!(machine.get_info().await.unwrap().is_paused);
        machine.resume().await.unwrap();
        assert!(!machine.get_info().await.unwrap().is_paused);
        end(machine).await;
    }
}

#[tokio::test]
async fn the_client_snapshots_a_machine_and_runs_it_in_another_monitor() {
    let folder = tempfile::tempdir().unwrap();
    let mut first = machine(&folder, InitMethod::ViaApiCalls).await;
    let mut console = Console::of(&mut first);
    console.wait_for_guest().await;
    console.tell("fill:8m:64k:7", "fill=done").await;
    console.tell("diskfill:0:16k:5", "diskfill=right").await;
    console.tell("count:1", "count=1").await;
    first.pause().await.unwrap();
    let mut produced = |name: &str| {
        let path = folder.path().join(name);
        let resources = first.get_resource_system_mut();
        resources.create_resource(path, ResourceType::Produced).unwrap()
    };
    let create = CreateSnapshot {
        snapshot_type: Some(SnapshotType::Full),
        snapshot: produced("state"),
        mem_file: produced("memory"),
    };
    let snapshot = first.create_snapshot(create).await.unwrap();
    // Its drive is writable, and one machine at a time has it.
    kill(&mut first).await;

    let socket = VmmApiSocket::Enabled(folder.path().join("second.sock"));
    let options = PrepareVmFromSnapshotOptions {
        executor: UnrestrictedVmmExecutor::new(VmmArguments::new(socket)),
        process_spawner: DirectProcessSpawner,
        runtime: TokioRuntime,
        moved_resource_type: MovedResourceType::Copied,
        ownership_model: VmmOwnershipModel::Shared,
        track_dirty_pages: Some(true),
        resume_vm: None,
        network_overrides: Vec::new(),
    };
    let mut second = snapshot.prepare_vm(&mut first, options).await.unwrap();
    second.start(DEADLINE).await.unwrap();
    assert!(second.get_info().await.unwrap().is_paused);
    // The client takes what it has loaded for running, and lets go on only what it has paused itself.
    second.pause().await.unwrap();
    second.resume().await.unwrap();
    assert!(!second.get_info().await.unwrap().is_paused);
    let configured = second.get_machine_configuration().await.unwrap();
    assert_eq!(configured.track_dirty_pages, Some(true));

    let mut console = Console::of(&mut second);
    console.tell("checkfill:8m:64k:7", "checkfill=right").await;
    console.tell("checkdisk:0:16k:5", "checkdisk=right").await;
    console.tell("count:1", "count=2").await;
    end(second).await;
    first.cleanup().await.unwrap();
}

#[tokio::test]
async fn the_client_hears_why_it_was_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut machine = machine(&folder, InitMethod::ViaApiCalls).await;
    let refusal = machine.get_balloon_device().await.unwrap_err();
    let VmApiError::ReceivedErrorResponse {
        status_code,
        fault_message,
    } = refusal
    else {
        panic!("{refusal}")
    };
    assert_eq!(status_code.as_u16(), 400);
    assert_eq!(
        fault_message,
        "GET balloon is not supported by this version of Runnel."
    );
    end(machine).await;
}
