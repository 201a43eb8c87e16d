//! Building a machine that boots.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use kvm_ioctls::VcpuFd;
use runnel_devices::virtio::block::FileStore;
use runnel_snapshot::block_store::{BlockStore, GuestRam};

use super::{BuildError, Microvm, Since, create_vm, dirty_log};
use crate::acpi;
use crate::board::{Builder, Parts, StoreError, Stores};
use crate::boot;
use crate::config::{self, BootSource, MicrovmConfig};
use crate::cpuid::{self, Topology};
use crate::exit::EndSignal;
use crate::kvm::{Kvm, Vm, failed};
use crate::layout::RamLayout;
use crate::memory;
use crate::msrs;
use crate::vcpu::{self, VcpuError, Vcpus};

impl Microvm {
    /// Builds a machine that boots, its drives over the files that `config` names. Its vCPUs stand.
    ///
    /// # Errors
    /// When something that it is to be made of cannot be had; nothing is left of it then.
    pub fn build(config: &MicrovmConfig, end: &EndSignal) -> Result<Self, BuildError> {
        Self::build_over(config, end, &mut open_file)
    }

    /// Builds a machine that boots, its drives over what `stores` opens. Its vCPUs stand.
    ///
    /// # Errors
    /// As for [`build`](Self::build).
    pub fn build_over(
        config: &MicrovmConfig,
        end: &EndSignal,
        stores: &mut Stores<'_>,
    ) -> Result<Self, BuildError> {
        let source = config.boot_source.as_ref().ok_or(BuildError::NoBootSource)?;
        let layout = RamLayout::new(config.machine.memory.bytes())?;
        let ram = Arc::new(memory::booted(layout)?);
        let entry = load_kernel(
            &ram,
            layout,
            source,
            config.command_line().as_deref().unwrap_or_default(),
        )?;

        let kvm = Kvm::open()?;
        let vm = create_vm(&kvm, &ram, dirty_log(config))?;
        let parts = Parts {
            config,
            vm: &vm,
            ram: Arc::clone(&ram),
            end,
            stores: &mut |drive| stores(drive),
        };
        let board = Builder::boot(parts)?;
        let topology = topology(config);
        let virtio = board.virtio_slots().collect();
        acpi::write(
            &ram,
            &acpi::Description {
                vcpus: topology.vcpus,
                virtio,
                guest_channel: config.guest_channel,
            },
        )?;
        board.vmgenid().write_new(&ram)?;

        let fds = create_vcpus(&kvm, &vm, topology)?;
        for (number, fd) in (0..).zip(&fds) {
            let refused = |source| VcpuError::Kvm { vcpu: number, source };
            msrs::set_for_boot(fd).map_err(refused)?;
            if number == 0 {
                vcpu::set_up_boot_vcpu(fd, entry.address).map_err(refused)?;
            }
        }
        let vcpus = Vcpus::start(fds, board.buses(), end)?;
        Ok(Self::standing(vcpus, board, vm, ram, layout, Since::Build)?)
    }
}

/// Opens the file that the drive's configuration names.
///
/// # Errors
/// When it cannot be a drive.
pub fn open_file(drive: &config::Drive) -> Result<Arc<dyn BlockStore>, StoreError> {
    Ok(Arc::new(FileStore::open(&drive.path, drive.is_read_only)?))
}

fn load_kernel(
    ram: &GuestRam,
    layout: RamLayout,
    source: &BootSource,
    command_line: &str,
) -> Result<boot::Entry, BuildError> {
    let open = |what, path: &PathBuf| {
        File::open(path).map_err(|source| BuildError::Open {
            what,
            path: path.clone(),
            source,
        })
    };
    let mut kernel = open("kernel", &source.kernel)?;
    let mut initrd = source
        .initrd
        .as_ref()
        .map(|path| open("initrd", path))
        .transpose()?;
    let source = boot::Source {
        kernel: &mut kernel,
        initrd: initrd.as_mut(),
        command_line,
    };
    Ok(boot::load(ram, layout, source)?)
}

fn topology(config: &MicrovmConfig) -> Topology {
    Topology {
        vcpus: config.machine.vcpus.get(),
        smt: config.machine.smt,
    }
}

/// vCPUs that know what they are, and nothing more: everything else depends on CPUID.
fn create_vcpus(kvm: &Kvm, vm: &Vm, topology: Topology) -> Result<Vec<VcpuFd>, BuildError> {
    let supported = kvm.supported_cpuid()?;
    let create = |number| {
        let fd = vm.create_vcpu(number)?;
        fd.set_cpuid2(&cpuid::of_vcpu(&supported, number, topology))
            .map_err(failed("take CPUID leaves"))?;
        Ok(fd)
    };
    (0..topology.vcpus)
        .map(|number| create(number).map_err(|source| VcpuError::Kvm { vcpu: number, source }.into()))
        .collect()
}
