//! KVM: whether it may be used, and can do what the monitor asks of it (Documentation/virt/kvm/api.rst).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use super::Finding;

const DEVICE: &str = "/dev/kvm";

const GET_API_VERSION: libc::c_ulong = 0xAE00;
const CHECK_EXTENSION: libc::c_ulong = 0xAE03;

/// The only version there has been since 2.6.22.
const API_VERSION: libc::c_int = 12;

/// Without these the monitor refuses to start a machine: the same as in `runnel_vmm::kvm`, which is not linked in here.
const NEEDED: [(&str, libc::c_ulong); 13] = [
    ("IRQCHIP", 0),
    ("USER_MEMORY", 3),
    ("EXT_CPUID", 7),
    ("MP_STATE", 14),
    ("IRQFD", 32),
    ("PIT2", 33),
    ("IOEVENTFD", 36),
    ("ADJUST_CLOCK", 39),
    ("VCPU_EVENTS", 41),
    ("DEBUGREGS", 50),
    ("XSAVE", 55),
    ("XCRS", 56),
    ("IMMEDIATE_EXIT", 136),
];

const MAX_VCPUS: libc::c_ulong = 66;
const TSC_CONTROL: libc::c_ulong = 60;

/// The most vCPUs of a machine.
const VCPUS_MAX: libc::c_int = 32;

pub(super) fn examine() -> Vec<Finding> {
    const CHECK: &str = "kvm";
    let kvm = match OpenOptions::new().read(true).write(true).open(DEVICE) {
        Ok(kvm) => kvm,
        Err(error) => return vec![unusable(CHECK, &error)],
    };
    let version = ask(&kvm, GET_API_VERSION, 0);
    if version != API_VERSION {
        let found = format!("{DEVICE} speaks version {version} of its interface, not {API_VERSION}");
        return vec![Finding::missing(
            CHECK,
            found,
            "use a kernel's own KVM, 6.1 or newer",
        )];
    }
    let lacking: Vec<&str> = NEEDED
        .iter()
        .filter(|(_, number)| ask(&kvm, CHECK_EXTENSION, *number) <= 0)
        .map(|(name, _)| *name)
        .collect();
    if !lacking.is_empty() {
        let found = format!("{DEVICE} lacks {}", lacking.join(", "));
        return vec![Finding::missing(CHECK, found, "use a newer kernel, 6.1 at least")];
    }
    let access = Finding::ok(
        CHECK,
        format!("{DEVICE} can be used and has all that the monitor needs"),
    );
    vec![access, hardware(Path::new("/sys/module")), vcpus(&kvm), tsc(&kvm)]
}

fn unusable(check: &'static str, error: &io::Error) -> Finding {
    let advice = match error.kind() {
        io::ErrorKind::NotFound => {
            "load the module (`modprobe kvm_intel` or `modprobe kvm_amd`), and switch virtualization on in the \
             firmware, or nested virtualization on if this is a virtual machine"
        }
        io::ErrorKind::PermissionDenied => {
            "join the group kvm (`usermod -aG kvm $USER`, then log in again), or run as root"
        }
        _ => "look at what the kernel says: `dmesg | grep -i kvm`",
    };
    Finding::missing(check, format!("{DEVICE} cannot be opened: {error}"), advice)
}

/// Whether guest code runs on the processor. A KVM without hardware virtualization interprets it, and lacks
/// instructions that every Linux kernel needs.
fn hardware(modules: &Path) -> Finding {
    const CHECK: &str = "guests";
    let vendors = ["kvm_intel", "kvm_amd"];
    match vendors.iter().find(|name| modules.join(name).exists()) {
        Some(name) => Finding::ok(CHECK, format!("run on the processor, by {name}")),
        None => Finding::warning(
            CHECK,
            "neither kvm_intel nor kvm_amd is loaded: this KVM may interpret guest code, and then Linux does not run on it",
            "use a host with VT-x or AMD-V, or nested virtualization switched on if this is a virtual machine",
        ),
    }
}

fn vcpus(kvm: &File) -> Finding {
    let most = ask(kvm, CHECK_EXTENSION, MAX_VCPUS);
    let found = format!("machines of up to {} vCPUs", most.clamp(0, VCPUS_MAX));
    if most >= VCPUS_MAX {
        return Finding::ok("vcpus", found);
    }
    Finding::warning("vcpus", found, "larger machines need another kernel's KVM")
}

/// Whether a machine that was saved on a host with another TSC frequency runs here.
fn tsc(kvm: &File) -> Finding {
    if ask(kvm, CHECK_EXTENSION, TSC_CONTROL) > 0 {
        return Finding::ok("tsc", "the TSC's frequency can be scaled");
    }
    Finding::warning(
        "tsc",
        "the TSC's frequency cannot be scaled",
        "machines that were saved on hosts of another frequency are refused here: move them between hosts of one kind",
    )
}

/// Asks the device for a number; negative if it does not know the question.
fn ask(kvm: &File, request: libc::c_ulong, argument: libc::c_ulong) -> libc::c_int {
    // SAFETY: both requests take a number, not a pointer, and change nothing.
    unsafe { libc::ioctl(kvm.as_raw_fd(), request, argument) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::doctor::Verdict;

    #[test]
    fn a_kvm_without_the_processors_help_is_warned_about() {
        let modules = tempfile::tempdir().unwrap();
        std::fs::create_dir(modules.path().join("kvm_pvm")).unwrap();
        assert_eq!(hardware(modules.path()).verdict, Verdict::Warning);
        std::fs::create_dir(modules.path().join("kvm_amd")).unwrap();
        assert_eq!(hardware(modules.path()).verdict, Verdict::Ok);
    }

    #[test]
    fn a_device_that_may_not_be_opened_says_how_to_get_access() {
        let advice = |kind: io::ErrorKind| unusable("kvm", &kind.into()).advice.unwrap();
        assert!(advice(io::ErrorKind::NotFound).contains("modprobe"));
        assert!(advice(io::ErrorKind::PermissionDenied).contains("usermod"));
    }
}
